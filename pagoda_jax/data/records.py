"""The data set that `pagoda prepare` writes: encoded pictures in ArrayRecord shards, of one resolution or several.

Several lie side by side: each resolution has shards of its own, of the same pictures in the same order, so that
what is read of one costs nothing of the others.

A record is the length of a JSON header (4 bytes, little-endian), the header {"shard", "record", "label",
"name", "caption" where there is one}, and the picture as PNG, JPEG or raw bytes (rows from the top, one
byte of grey or three of RGB a pixel). manifest.json, written last, holds classes, counts, settings, the
pictures' format among them, and the SHA-256 of every shard and of the sidecar beside it, which lists the
shard's labels.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from pagoda_jax.data import pictures, shards
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.runtime import processes
from pagoda_jax.runtime.files import file_digest, read_sealed

FORMAT_VERSION = 1
RAW_VERSION = 2  # of folders with raw pictures, which programs that know only FORMAT_VERSION would call damaged
SIDES_VERSION = 3  # of folders with several resolutions, raw or not
MANIFEST = 'manifest.json'
PREFIX = 'pictures'
VERIFY_HINT = '`pagoda prepare --verify --output={}` checks every shard'


def encode_record(header: dict, content: bytes) -> bytes:
  """A record of a header and an encoded picture."""
  text = json.dumps(header, ensure_ascii=False).encode(errors='surrogatepass')  # a file's name may be no Unicode
  return len(text).to_bytes(4, 'little') + text + content


def decode_record(record: bytes) -> tuple[dict, bytes]:
  """The header and the encoded picture of a record.

  Raises:
    ValueError: it is no record.
  """
  start = 4 + int.from_bytes(record[:4], 'little')
  return json.loads(record[4:start].decode(errors='surrogatepass')), record[start:]


def prefix(resolution: int, several: bool) -> str:
  """Of the names of the shards of a resolution."""
  return f'{PREFIX}_{resolution}px' if several else PREFIX


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRecordSource:
  """The pictures of a prepared folder at one resolution, in the order of its shards."""

  folder: str
  shard_names: tuple[str, ...]
  ends: np.ndarray  # [shards]: how many pictures there are up to and with a shard
  all_labels: np.ndarray
  class_names: tuple[str, ...]
  digest: str  # of these shards; with `sides`, of all
  resolution: int
  format: str = 'png'  # of the records, one of pictures.FORMATS
  sides: tuple['ArrayRecordSource', ...] = ()  # every resolution there is, smallest first, where there are several

  def __len__(self) -> int:
    return int(self.ends[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{'image', 'label', 'name', and 'caption' where the source had captions}.

    Raises:
      SourceError: names the shard and the record that are damaged.
    """
    shard = int(np.searchsorted(self.ends, index, side='right'))
    first = int(self.ends[shard - 1]) if shard else 0
    place, count = int(index) - first, int(self.ends[shard]) - first
    path = shards.shard_path(self.folder, self.shard_names[shard])
    try:
      record = shards.read_record(self.folder, self.shard_names[shard], count, place)
      header, content = decode_record(record)
      found = header.pop('shard'), header.pop('record')
      image = pictures.of_raw(content, self.resolution) if self.format == 'raw' else pictures.decode(content)
      if image.size != (self.resolution, self.resolution):
        raise SourceError(f'a picture of {image.size[0]} x {image.size[1]} px, not of {self.resolution}')
    except shards.ShardError as error:
      raise SourceError(f'{error}; {VERIFY_HINT.format(self.folder)}') from None
    except Exception as error:  # what damaged bytes lead Pillow's and JSON's readers to
      raise SourceError(f'{path}: record {place} is damaged ({error}); {VERIFY_HINT.format(self.folder)}') from None
    if found != (shard, place):  # a shard under another one's name
      raise SourceError(f'{path}: record {place} is record {found[1]} of shard {found[0]}; '
                        + VERIFY_HINT.format(self.folder))
    return {'image': image} | header

  @property
  def resolutions(self) -> tuple[int, ...]:
    """Sides in pixels that the pictures are stored at."""
    return tuple(side.resolution for side in self.sides) or (self.resolution,)

  def at(self, resolution: int) -> 'ArrayRecordSource':
    """The same pictures as they are stored at this resolution, or the nearest above; otherwise at the largest."""
    return next((side for side in self.sides if side.resolution >= resolution), self)


def read_manifest(folder) -> dict:
  """The manifest of a prepared folder.

  Raises:
    SourceError: there is none, it is damaged, or of another version.
  """
  path = epath.Path(folder) / MANIFEST
  try:
    manifest = read_sealed(path)
    version = manifest['format_version']
  except FileNotFoundError:
    raise SourceError(f'{path}: no finished data set there; `pagoda prepare --source=... --output={folder}` '
                      'makes one, or goes on where it stopped') from None
  except (ValueError, KeyError, TypeError) as error:
    raise SourceError(f'{path}: damaged ({error}); run the same `pagoda prepare` again') from None
  if version not in (FORMAT_VERSION, RAW_VERSION, SIDES_VERSION):
    raise SourceError(f'{path}: format version {version}, this program reads {FORMAT_VERSION} to {SIDES_VERSION}')
  return manifest


def open_records(folder: str, verify: bool = False) -> ArrayRecordSource:
  """The source of a prepared folder.

  Args:
    folder: what `pagoda prepare` wrote.
    verify: whether to compare every shard with its SHA-256; without it, that each is there with all its
      bytes and records, and whole sidecars.

  Raises:
    SourceError: names what is missing or damaged.
  """
  folder = str(epath.Path(folder))
  manifest = read_manifest(folder)
  names = tuple(manifest['shards'])
  refuse_damaged(folder, [part for name in names for part in damaged_parts(folder, manifest, name, verify)])
  for name, entry in manifest['shards'].items():
    try:
      shards.open_shard(folder, name, entry['count'])
    except shards.ShardError as error:
      raise SourceError(f'{error}; {VERIFY_HINT.format(folder)}') from None
  sides = manifest.get('resolutions')
  if sides is None:
    return _one_side(folder, manifest, manifest['resolution'], names)
  found = [_one_side(folder, manifest, side, [name for name in names if name.startswith(prefix(side, True) + '-')])
           for side in sides]
  # One array of labels, so that worker processes are sent one.
  found = tuple(dataclasses.replace(side, all_labels=found[0].all_labels) for side in found)
  return dataclasses.replace(found[-1], sides=found, digest=_digest(manifest, names))


def _one_side(folder, manifest, resolution, names):
  labels = [label for name in names for label in shards.read_sidecar(folder, name)['labels']]
  return ArrayRecordSource(
    folder=folder,
    shard_names=tuple(names),
    ends=np.cumsum([manifest['shards'][name]['count'] for name in names]),
    all_labels=np.array(labels, np.int32),
    class_names=tuple(manifest['classes']),
    digest=_digest(manifest, names),
    resolution=resolution,
    format=manifest['format'],
  )


def _digest(manifest, names):
  return hashlib.sha256(json.dumps([manifest['shards'][name]['sha256'] for name in names]).encode()).hexdigest()


def damaged_parts(folder, manifest: dict, name: str, verify: bool) -> list[str]:
  """Which of a shard's two files differ from the manifest: the shard by size, or `verify`, the sidecar by SHA-256."""
  path, sidecar = epath.Path(folder) / (name + shards.SUFFIX), shards.sidecar_path(folder, name)
  entry, found = manifest['shards'][name], []
  whole = path.exists() and path.stat().length == entry['bytes']
  if not whole or (verify and file_digest(path) != entry['sha256']):
    found.append(path.name)
  if not sidecar.exists() or file_digest(sidecar) != entry['sidecar_sha256']:
    found.append(sidecar.name)
  return found


def refuse_damaged(folder, parts: list[str]) -> None:
  """Raises SourceError, naming the files, if there are any."""
  if parts:
    raise SourceError(f'{folder}: damaged or missing: {", ".join(parts)}; delete what is left of them and run the '
                      'same `pagoda prepare` again, which makes only those anew')


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How pictures are stored: sides in pixels, smallest first; format of pictures.FORMATS; JPEG quality."""

  resolutions: tuple[int, ...]
  format: str
  quality: int

  def layouts(self, count: int, shard_size: int) -> dict[int, shards.Layout]:
    """The shards of each resolution."""
    several = len(self.resolutions) > 1
    return {side: shards.Layout(prefix(side, several), count, shard_size) for side in self.resolutions}


def write_shard(source, folder, layouts: dict[int, shards.Layout], shard: int, recipe: Recipe,
                tick: Callable[[], None]) -> None:
  """Writes the pictures of a source that belong to one shard, at each resolution that has not been finished.

  Unreadable ones are listed in the sidecars: those that cannot be had at the largest resolution are in none.

  Args:
    source: sources.Source.
    folder: where to.
    layouts: shards of the source's indices, for each of the recipe's resolutions.
    shard: number of the shard.
    recipe: how to store them.
    tick: called after each picture.
  """
  names = {side: layout.name(shard) for side, layout in layouts.items()}
  writers = {side: shards.ShardWriter(folder, name) for side, name in names.items()
             if not shards.is_finished(folder, name)}
  sources = {side: source.at(side) if isinstance(source, ArrayRecordSource) else source for side in recipe.resolutions}
  labels, unreadable, enlarged = [], [], dict.fromkeys(names, 0)
  for index in layouts[recipe.resolutions[-1]].keys(shard):
    try:
      stored = source[index]
      cut = pictures.cuts_of(stored, recipe.resolutions, pictures.color_channels(stored['image']))
      for side in writers:
        if sources[side] is not source and sources[side].resolution == side:  # stored so, and better than cut anew
          image = sources[side][index]['image']
          cut[side] = pictures.picture(image, side, pictures.color_channels(image))
    except SourceError as error:
      unreadable.append(str(error))
    else:
      image = stored.pop('image')
      header = {'shard': shard, 'record': len(labels)} | stored
      for side, writer in writers.items():
        writer.add(encode_record(header, pictures.encode(cut[side], recipe.format, recipe.quality)))
        enlarged[side] += min(image.size) < side
      labels.append(stored['label'])
    tick()
  for side, writer in writers.items():
    writer.close(labels=labels, unreadable=unreadable, enlarged=enlarged[side])


def work(source, folder, layouts: dict[int, shards.Layout], numbers: list[int], recipe: Recipe, done, failed) -> None:
  """A worker process of `pagoda prepare`: writes the shards `numbers`.

  `done` is a shared count of pictures, `failed` a queue: an OSError goes there, for the first process to raise.
  """
  processes.begin_worker()

  def tick():
    with done.get_lock():
      done.value += 1

  try:
    for number in numbers:
      write_shard(source, folder, layouts, number, recipe, tick)
  except OSError as error:
    failed.put(error)
    sys.exit(1)
