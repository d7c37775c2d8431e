"""WebDataset tars of pictures with captions: samples NAME.jpg (.jpeg, .png, .webp) beside NAME.txt, .json, .cls.

Random access through an index of each tar, which is made once and kept in the user's cache until the tar changes (its
size, times or inode): where each member lies, whether each picture can be decoded, and the SHA-256 of the tar. Local
paths (mounted ones too).
"""

import dataclasses
import functools
import glob
import hashlib
import os
import pathlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL

from pagoda_jax.data import captions, folders, listing, pictures, tar_members
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.runtime.files import file_digest, open_regular, read_sealed, user_cache
from pagoda_jax.runtime.progress import Progress

VERSION = 1  # of the index
PICTURES = ('jpg', 'jpeg', 'png', 'webp')
TEXTS = ('txt', 'json', 'cls')
MAX_TEXT = 2**24  # bytes of a txt, json or cls
OPEN_TARS = 256
COLUMNS = 6  # of a sample's places: offset and size of picture, txt, json


@dataclasses.dataclass(frozen=True, eq=False)
class TarSource:
  """The pictures of some tars; carries their index, so that worker processes see the one that the run began with."""

  paths: tuple[str, ...]
  stamps: tuple[tuple[int, ...], ...]  # of each tar: one that changes is not read on
  ends: np.ndarray  # [tars]: how many pictures there are up to and with a tar
  names: tuple[str, ...]  # of the samples, within their tars
  places: np.ndarray  # [N, COLUMNS] int64; a size of -1: there is no such member
  all_labels: np.ndarray
  class_names: tuple[str, ...]
  digest: str
  resolution: int | None = None

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{'image', 'label', 'name', and captions (captions.py) where there are some}.

    Raises:
      IndexError: there is no such picture; -1 would be a place of the last tar, looked up in the first.
      SourceError: the picture cannot be read.
      OSError: the tar has changed, or is gone.
    """
    if not 0 <= index < len(self):
      raise IndexError(f'picture {index}: there are 0 to {len(self) - 1}')
    tar = int(np.searchsorted(self.ends, index, side='right'))
    path, where = self.paths[tar], f'{self.paths[tar]}: {self.names[index]}'
    picture, text, row = (_read(path, self.stamps[tar], *map(int, self.places[index, i : i + 2])) for i in (0, 2, 4))
    try:
      image = pictures.shown(picture)
    except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
      raise SourceError(f'{where}: {pictures.reason(error)}') from None
    name = f'{os.path.basename(path)}/{self.names[index]}'
    record = {'image': image, 'label': int(self.all_labels[index]), 'name': name}
    return record | captions.as_record(_captions(text, row, where)[0])


def open_tars(path: str, max_unreadable: float = 0.01, check: bool = True, resolution: int = 0) -> TarSource:
  """The pictures of tars, in the order of the tars' names, and within a tar in the order of their first members.

  A sample is what has one path up to the first dot after the last slash. Its captions are the txt, as one original,
  and "caption" and "recaption" of the json, as in captions.jsonl; what both say counts once. Its label is "label" of
  the json, or the number in the cls. Members with other endings are passed over.

  Args:
    path: a folder of .tar files, one such file, or a pattern such as data/part-*.tar.
    max_unreadable, check, resolution: as in folders.open_folder.

  Raises:
    SourceError: names the tar, the member and what is wrong: see tar_members.members; a member twice, a sample without
      a picture or with two, or without captions where others have some; texts that are not UTF-8, json that is no
      object; no pictures at all, or too many that cannot be read, which are listed.
  """
  paths, indices = _tars(path), []
  progress = Progress(f'indexing {path}', len(paths), unit='tar')
  for place, tar in enumerate(paths, 1):
    indices.append(_columns(_index(tar, check)))
    progress.update(place, 1)
  counts = [len(index['names']) for index in indices]
  if not sum(counts):
    raise SourceError(f'{path}: no pictures in {len(paths)} tars (.{", .".join(PICTURES)})')
  joined = {column: [value for index in indices for value in index[column]]
            for column in ('names', 'labels', 'sizes', 'faults')}
  tar_of = np.repeat(np.arange(len(paths)), counts)
  where = lambda i: f'{paths[tar_of[i]]}: {joined["names"][i]}'
  _check_captioned(np.concatenate([index['captions'] for index in indices]), where)
  faults = [fault or (pictures.excess(size, resolution) if resolution else None)
            for size, fault in zip(joined['sizes'], joined['faults'])] if check else [None] * sum(counts)
  rows = [f'{where(i)}: {fault}' for i, fault in enumerate(faults) if fault]
  folders.report_unreadable(path, rows, sum(counts), max_unreadable)
  kept = np.flatnonzero([not fault for fault in faults])
  labels, class_names = listing.numbered([joined['labels'][i] for i in kept], path)
  told = [*(index['sha256'] for index in indices), *(str(i) for i, fault in enumerate(faults) if fault)]
  return TarSource(
    paths=tuple(map(str, paths)),
    stamps=tuple(index['stamp'] for index in indices),
    ends=np.searchsorted(tar_of[kept], np.arange(len(paths)), side='right'),
    names=tuple(joined['names'][i] for i in kept),
    places=np.concatenate([index['places'] for index in indices])[kept],
    all_labels=labels,
    class_names=class_names,
    digest=hashlib.sha256('\n'.join(told).encode()).hexdigest(),
  )


def _columns(index: dict) -> dict:
  """An index's samples in columns: those of millions of them take little memory."""
  names, places, labels, counts, sizes, faults = zip(*index['samples']) if index['samples'] else ((),) * 6
  return {'stamp': tuple(index['stamp']), 'sha256': index['sha256'], 'names': names, 'labels': labels, 'sizes': sizes,
          'places': np.array(places, np.int64).reshape(-1, COLUMNS), 'captions': np.array(counts, np.int64),
          'faults': faults}


def _tars(path) -> list[pathlib.Path]:
  expanded = os.path.expanduser(path)
  if os.path.isdir(expanded):
    found = sorted(pathlib.Path(expanded).glob('*.tar'))
    others = sorted(file.name for file in pathlib.Path(expanded).iterdir()
                    if file.name.endswith(('.tgz', '.tar.gz', '.tar.bz2', '.tar.xz', '.tar.zst')))
    if others:
      raise SourceError(f'{path}: {others[0]}: compressed, and no member of it can be read by itself: decompress it, '
                        'or give a pattern that leaves it out')
  else:  # a tar that is there is no pattern, though its name may look like one
    found = [pathlib.Path(file) for file in ([expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded)))]
  if not found:
    raise SourceError(f'{path}: no .tar there; must be a folder of them, one, or a pattern such as data/part-*.tar')
  if twice := [name for name, count in Counter(file.name for file in found).items() if count > 1]:
    raise SourceError(f'{path}: two tars are called {twice[0]}; pictures are named by their tar')
  return found


def _check_captioned(counts, where):
  """That all samples have captions, or none has."""
  lacking = np.flatnonzero(counts == 0)
  if 0 < len(lacking) < len(counts):
    raise SourceError(f'{where(lacking[0])}: no caption, and others have one ({len(lacking)} of {len(counts)} have '
                      'none); it needs a .txt, which may be empty, or "caption" in its .json')


def _index(path: pathlib.Path, decode: bool) -> dict:
  """The index of a tar: of the user's cache where the tar is as it was then, otherwise made."""
  try:
    stamp = _stamp(path)
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    file = pathlib.Path(user_cache(), 'pagoda_jax', 'tars', name + '.json')
    known = _known(file, stamp, decode)
    if known:
      return known
    with open_regular(path) as tar:
      samples = _samples(tar, path)
      if decode:
        _decode(tar, samples)
    index = {'version': VERSION, 'tar': str(path), 'stamp': stamp, 'pillow': PIL.__version__, 'decoded': decode,
             'sha256': file_digest(path), 'samples': samples}
    if _stamp(path) != stamp:
      raise SourceError(f'{path}: changed while it was indexed; start again when it is written')
  except OSError as error:
    raise SourceError(f'{path}: cannot be read ({pictures.reason(error)})') from None
  folders.keep(file, index)
  return index


def _known(file, stamp, decode):
  try:
    index = read_sealed(file)
    fits = (index['version'], index['stamp']) == (VERSION, stamp)
    decoded = index['decoded'] and index['pillow'] == PIL.__version__  # another one may read what this one does not
    return index if fits and (decoded or not decode) else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _stamp(path) -> list[int]:
  """What changes when a tar does, or when another one takes its name."""
  status = os.stat(path)
  return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _samples(tar, path) -> list[list]:
  """[name, places, label, how many captions, size, fault] of each; the last two are still unknown."""
  found, others, seen = {}, Counter(), {}
  for member in tar_members.members(tar, path):
    folder, _, base = member.name.rpartition('/')
    stem, _, ending = base.partition('.')
    if not stem or ending.lower() not in PICTURES + TEXTS:
      others[ending] += 1
      continue
    where = f'{path}: member {captions.shortened(member.name)} at byte {member.offset - tar_members.BLOCK}'
    if member.name in seen:
      raise SourceError(f'{where}: twice in it, also at byte {seen[member.name]}; write each sample once')
    seen[member.name] = member.offset - tar_members.BLOCK
    parts = found.setdefault(f'{folder}/{stem}' if folder else stem, {})
    part = 'picture' if ending.lower() in PICTURES else ending.lower()
    if part in parts:
      raise SourceError(f'{where}: a second {part} of one sample, beside {captions.shortened(parts[part].name)}')
    if member.size > (MAX_TEXT if part in TEXTS else folders.MAX_BYTES):
      raise SourceError(f'{where}: {member.size} bytes; at most {MAX_TEXT if part in TEXTS else folders.MAX_BYTES}')
    parts[part] = member
  if others:
    listed = ', '.join(f'.{ending} ({count})' for ending, count in others.most_common(8))
    print(f'{path}: members with other endings are passed over: {listed}', file=sys.stderr, flush=True)
  return [_sample(tar, f'{path}: {name}', name, parts) for name, parts in found.items()]


def _sample(tar, where, name, parts) -> list:
  if 'picture' not in parts:
    raise SourceError(f'{where}: no picture beside {", ".join(sorted(f".{part}" for part in parts))}; it needs one '
                      f'of .{", .".join(PICTURES)}')
  members = [parts.get(part) for part in ('picture', 'txt', 'json')]
  text, row, number = (_content(tar, parts.get(part)) for part in TEXTS)
  found, label = _captions(text, row, where)
  if number is not None:
    said = captions.decoded(number, f'{where}.cls').strip()
    if not said.isascii() or not said.isdecimal() or len(said) > 7:
      raise SourceError(f'{where}.cls: {captions.shortened(said)}: must be a class number from 0 to '
                        f'{listing.MAX_CLASSES - 1}')
    if label not in (None, int(said)):
      raise SourceError(f'{where}: the label {label!r} in its .json, and {said} in its .cls')
    label = listing.label_of({'label': int(said)}, f'{where}.cls')
  places = [value for member in members for value in ((member.offset, member.size) if member else (0, -1))]
  return [name, places, label, len(found), None, None]


def _content(tar, member) -> bytes | None:
  if member is None:
    return None
  tar.seek(member.offset)
  return tar.read(member.size)


def _captions(text: bytes | None, row: bytes | None, where: str) -> tuple[captions.Captions, str | int | None]:
  """(captions, label) of a sample's txt and json."""
  found, label = [], None
  if text is not None:
    found.append((captions.KINDS[0], captions.checked(captions.decoded(text, f'{where}.txt').strip(), f'{where}.txt')))
  if row is not None:
    said = captions.json_object(captions.decoded(row, f'{where}.json'), f'{where}.json', 'must be a JSON object')
    label = listing.label_of(said, f'{where}.json')
    more = [(kind, caption.strip()) for kind, caption in captions.of_row(said, f'{where}.json')]
    found += [caption for caption in more if caption not in found]
  return found, label


def _decode(tar, samples):
  """Fills in each picture's size, or what is wrong with it."""

  def examined(sample):
    offset, size = sample[1][:2]
    try:
      return pictures.examine(os.pread(tar.fileno(), size, offset)), None
    except MemoryError:  # this machine's fault, now: not to be kept
      raise
    except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
      return None, pictures.reason(error)

  with ThreadPoolExecutor(os.cpu_count()) as pool:
    for sample, told in zip(samples, pool.map(examined, samples)):
      sample[4:] = told


@functools.lru_cache(maxsize=OPEN_TARS)
def _opened(path: str, stamp: tuple[int, ...]):
  del stamp  # a changed tar is another one
  return open_regular(path)


def _read(path: str, stamp: tuple[int, ...], offset: int, size: int) -> bytes | None:
  """Bytes of a tar that is as it was when it was indexed; None of a size of -1."""
  if size < 0:
    return None
  # What has become of the whole tar is no fault of one picture, which would be listed and left out.
  try:
    file, now = _opened(path, stamp), tuple(_stamp(path))
  except OSError as error:
    raise OSError(f'{path}: cannot be read any more ({pictures.reason(error)}); start again when it is back') from None
  try:
    content = os.pread(file.fileno(), size, offset)
  except OSError as error:
    raise SourceError(f'{path}: cannot be read ({pictures.reason(error)})') from None
  if now != stamp or len(content) != size:
    raise OSError(f'{path}: changed since it was indexed; start again, and do not write to it meanwhile')
  return content
