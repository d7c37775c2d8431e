"""The data set that `pagoda prepare` writes: encoded pictures in ArrayRecord shards, of one resolution or several.

Several lie side by side: each resolution has shards of its own, of the same pictures in the same order, so that
what is read of one costs nothing of the others.

A record is the length of a JSON header (4 bytes, little-endian), the header {"shard", "record", "label",
"name", "caption" where there is one}, and the picture as PNG, JPEG or raw bytes (rows from the top, one
byte of grey or three of RGB a pixel), or latents of it (latents.py). manifest.json, written last, holds
classes, counts, settings, the pictures' format among them, and the SHA-256 of every shard and of the
sidecar beside it, which lists the shard's labels.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from pagoda_jax.data import latents, pictures, shards, texts
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.runtime import buckets, processes
from pagoda_jax.runtime.files import file_digest, read_sealed

FORMAT_VERSION = 1
RAW_VERSION = 2  # of folders with raw pictures, which programs that know only FORMAT_VERSION would call damaged
SIDES_VERSION = 3  # of folders with several resolutions, raw or not
LATENT_VERSION = 4  # of folders with latents
MANIFEST = 'manifest.json'
PREFIX, LATENT_PREFIX = 'pictures', 'latents'


def prefix(resolution: int, several: bool, latent: bool = False) -> str:
  """Of the names of the shards of a resolution."""
  if latent:
    return f'{LATENT_PREFIX}_{resolution}'
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
  format: str = 'png'  # of the records, one of pictures.FORMATS, or latents.FORMAT
  embedded: texts.TextStore | None = None  # of the captions
  sides: tuple['ArrayRecordSource', ...] = ()  # every resolution there is, smallest first, where there are several
  autoencoder: dict[str, Any] | None = None  # of latents: sha256, factor, channels, mirror

  def __len__(self) -> int:
    return int(self.ends[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{'image', 'label', 'name', and 'caption' where the source had captions}; 'image' may be latents.Moments.

    Raises:
      IndexError: there is no such picture.
      SourceError: names the shard and the record that are damaged.
    """
    return self.oriented(index, flip=False)

  def oriented(self, index: int, flip: bool) -> dict[str, Any]:
    """As `[]`; of latents, those of the mirror image where `flip` says so."""
    if not 0 <= index < len(self):  # record -1 would seem to be damaged
      raise IndexError(f'picture {index}: {self.folder} holds 0 to {len(self) - 1}')
    shard = int(np.searchsorted(self.ends, index, side='right'))
    first = int(self.ends[shard - 1]) if shard else 0
    place, count = int(index) - first, int(self.ends[shard]) - first
    if self.autoencoder and self.autoencoder['mirror']:
      place, count = 2 * place + flip, 2 * count
    path = shards.shard_path(self.folder, self.shard_names[shard])
    try:
      record = shards.read_record(self.folder, self.shard_names[shard], count, place)
      header, content = shards.decode_record(record)
      found = header.pop('shard'), header.pop('record')
      image = self._decoded(content)
    except shards.ShardError as error:
      raise SourceError(f'{error}; {shards.VERIFY_HINT.format(self.folder)}') from None
    except Exception as error:  # what damaged bytes lead Pillow's and JSON's readers to
      raise SourceError(f'{path}: record {place} is damaged ({error}); '
                        + shards.VERIFY_HINT.format(self.folder)) from None
    if found != (shard, place):  # a shard under another one's name
      raise SourceError(f'{path}: record {place} is record {found[1]} of shard {found[0]}; '
                        + shards.VERIFY_HINT.format(self.folder))
    return {'image': image} | header

  def _decoded(self, content):
    if self.autoencoder:
      return latents.of_bytes(content, self.resolution, self.autoencoder['channels'])
    image = pictures.of_raw(content, self.resolution) if self.format == 'raw' else pictures.decode(content)
    if image.size != (self.resolution, self.resolution):
      raise SourceError(f'a picture of {image.size[0]} x {image.size[1]} px, not of {self.resolution}')
    return image

  @property
  def texts(self) -> texts.TextStore:
    """The embeddings of the captions.

    Raises:
      SourceError: there are none beside the pictures.
    """
    if self.embedded is None:
      raise SourceError(f'{self.folder}: no embeddings of captions beside the pictures; {texts.PREPARE_HINT}')
    return self.embedded

  def text(self, index: int, key: int) -> dict[str, np.ndarray]:
    """One caption of a picture, drawn by the key: TextStore.text."""
    return self.texts.text(index, key)

  def texts_of(self, index: int) -> list[dict[str, np.ndarray]]:
    """All captions of a picture, in the order of its record: TextStore.captions."""
    return self.texts.captions(index)

  def null_text(self) -> dict[str, np.ndarray]:
    """The empty caption: {'text': [L, W] float16, 'text_mask': [L] bool, 'text_pooled': [P] float16}."""
    return self.texts.null()

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
  if version not in (FORMAT_VERSION, RAW_VERSION, SIDES_VERSION, LATENT_VERSION):
    raise SourceError(f'{path}: format version {version}, this program reads {FORMAT_VERSION} to {LATENT_VERSION}')
  return manifest


def check_texts(folder: str) -> None:
  """Refuses a prepared folder whose shards of embeddings are not there with all their bytes.

  Raises:
    SourceError: names what is missing or damaged.
  """
  _refuse_damaged_of(folder, read_manifest(folder)['text']['shards'], verify=False)


def _refuse_damaged_of(folder, entries, verify):
  parts = buckets.mapped(folder, lambda name: damaged_parts(folder, entries[name], name, verify), entries)
  refuse_damaged(folder, [part for some in parts for part in some])


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
  entries = manifest['shards'] | (manifest.get('text', {'shards': {}})['shards'] if verify else {})
  _refuse_damaged_of(folder, entries, verify)
  try:
    buckets.mapped(folder, lambda name: shards.open_shard(folder, name, manifest['shards'][name]['count']), names)
  except shards.ShardError as error:
    raise SourceError(f'{error}; {shards.VERIFY_HINT.format(folder)}') from None
  sides = manifest.get('resolutions')
  if sides is None:
    return _one_side(folder, manifest, manifest['resolution'], names)
  begins = {side: prefix(side, True, 'autoencoder' in manifest) + '-' for side in sides}
  found = [_one_side(folder, manifest, side, [name for name in names if name.startswith(begins[side])])
           for side in sides]
  # One array of labels, so that worker processes are sent one.
  found = tuple(dataclasses.replace(side, all_labels=found[0].all_labels) for side in found)
  return dataclasses.replace(found[-1], sides=found, digest=_digest(manifest, names))


def _one_side(folder, manifest, resolution, names):
  # Of each sidecar its labels alone, as numbers: those of a hundred million pictures are gigabytes of JSON.
  labels = buckets.mapped(folder, lambda name: np.array(shards.read_sidecar(folder, name)['labels'], np.int32), names)
  return ArrayRecordSource(
    folder=folder,
    shard_names=tuple(names),
    ends=np.cumsum([manifest['shards'][name]['count'] for name in names]) // orientations(manifest),
    all_labels=np.concatenate([np.zeros(0, np.int32), *labels]),
    class_names=tuple(manifest['classes']),
    digest=_digest(manifest, names),
    resolution=resolution,
    format=manifest['format'],
    embedded=texts.store_of(folder, manifest['text']) if 'text' in manifest else None,
    autoencoder=manifest.get('autoencoder'),
  )


def orientations(manifest) -> int:
  """Records that a picture has in a shard: of latents, its mirror image may have one of its own."""
  return 2 if manifest.get('autoencoder', {}).get('mirror') else 1


def _digest(manifest, names):
  return hashlib.sha256(json.dumps([manifest['shards'][name]['sha256'] for name in names]).encode()).hexdigest()


def damaged_parts(folder, entry: dict, name: str, verify: bool) -> list[str]:
  """Which of a shard's files differ from its manifest's entry: itself by size, or `verify`, the sidecar by SHA-256."""
  path, sidecar = epath.Path(folder) / (name + shards.SUFFIX), shards.sidecar_path(folder, name)
  found = []
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
  """How pictures are stored: sides in pixels, smallest first; format of pictures.FORMATS; JPEG quality.

  Of latents: their sides, latents.FORMAT, 0, and what latents.Encoder.described gives.
  """

  resolutions: tuple[int, ...]
  format: str
  quality: int
  autoencoder: dict[str, Any] | None = None

  def layouts(self, count: int, shard_size: int) -> dict[int, shards.Layout]:
    """The shards of each resolution."""
    several, latent = len(self.resolutions) > 1, self.autoencoder is not None
    return {side: shards.Layout(prefix(side, several, latent), count, shard_size) for side in self.resolutions}


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
        writer.add(shards.encode_record(header, pictures.encode(cut[side], recipe.format, recipe.quality)))
        enlarged[side] += min(image.size) < side
      labels.append(stored['label'])
    tick()
  for side, writer in writers.items():
    writer.close(labels=labels, unreadable=unreadable, enlarged=enlarged[side])


def work(source, folder, layouts: dict[int, shards.Layout], numbers: list[int], recipe: Recipe, room: str, done,
         failed) -> None:
  """A worker process of `pagoda prepare`: writes the shards `numbers`, with temporary files in the folder `room`.

  `done` is a shared count of pictures, `failed` a queue: an OSError goes there, for the first process to raise.
  """
  processes.begin_worker()
  tempfile.tempdir = room

  def tick():
    with done.get_lock():
      done.value += 1

  try:
    for number in numbers:
      write_shard(source, folder, layouts, number, recipe, tick)
  except OSError as error:
    failed.put(error)
    sys.exit(1)
