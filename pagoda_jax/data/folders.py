"""Anyone's own folder of images: class sub-folders, a captions.jsonl, or just pictures.

Local paths (mounted ones too). What is a picture: every file whose name ends as one of Pillow's readable
formats, or has no ending; hidden files are not.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import PIL

from pagoda_jax.data import captions, listing, pictures
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.runtime.files import open_regular, read_sealed, user_cache, write_sealed
from pagoda_jax.runtime.progress import Progress

MAX_BYTES = 2**30  # of a file: as many as Pillow's largest picture has with 16 bits, uncompressed
CHUNK = 512  # files that are read between two lines of progress


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
  """The pictures of a folder; carries its list, so that worker processes see the one that the run began with."""

  folder: str
  entries: tuple[listing.Entry, ...]
  stamps: np.ndarray  # [N, 2] int64: size and time of each file; one that changes is not read on
  all_labels: np.ndarray
  class_names: tuple[str, ...]
  digest: str
  resolution: int | None = None

  def __len__(self) -> int:
    return len(self.entries)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{'image', 'label', 'name', and captions (captions.py) where there is a captions.jsonl}.

    Raises:
      SourceError: the file cannot be read.
      OSError: it has changed.
    """
    entry = self.entries[index]
    path = os.path.join(self.folder, entry.file)
    try:
      content, stamp = _read(path)
      image = pictures.shown(content)
    except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
      raise SourceError(f'{path}: {pictures.reason(error)}') from None
    if stamp[:2] != self.stamps[index].tolist():  # its noise may be made already; and it is not to be left out silently
      raise OSError(f'{path}: changed since it was looked at; start again, and do not write to it meanwhile')
    record = {'image': image, 'label': int(self.all_labels[index]), 'name': entry.file}
    return record | captions.as_record(list(entry.captions))


def open_folder(path: str, max_unreadable: float = 0.01, check: bool = True, resolution: int = 0) -> FolderSource:
  """The pictures of a folder.

  With a captions.jsonl, its lines {"file": ..., "caption": ..., "recaption": ..., "label": ...} in their order; the
  last two are optional, a label is a number or a name. Otherwise files sorted by path: each sub-folder is a class, with
  the pictures at any depth in it, numbered in the order of their names; without sub-folders there are no classes.

  Every file is read once for the digest; the answer is kept in the user's cache until the file changes.

  Args:
    path: the folder.
    max_unreadable: share of files that may be unreadable; they are listed and left out.
    check: whether every file is decoded now as well, and unreadable ones are left out; without it, reading an
      unreadable one raises.
    resolution: short side that the pictures will be scaled to; with `check`, those that are so long and thin that
      this would take more than pictures.MAX_PIXELS are unreadable too. 0: not known.

  Raises:
    SourceError: there is no such folder or no picture in it, captions.jsonl cannot be understood, or too many
      files cannot be read, which are listed.
  """
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise SourceError(f'{path}: no such folder')
  entries = listing.entries_of(folder)
  if not entries:
    raise SourceError(f'{path}: no pictures in it')
  labels, class_names = listing.numbered([entry.label for entry in entries], folder / listing.CAPTIONS)
  contents = _contents(folder, sorted({entry.file for entry in entries}), check)
  if check:
    faults = {file: _fault(content, resolution) for file, content in contents.items()}
    rows = [f'{folder / file}: {fault}' for file, fault in faults.items() if fault]
    report_unreadable(path, rows, len(entries), max_unreadable)
    kept = np.array([not faults[entry.file] for entry in entries])
    entries, labels = [entry for entry, keep in zip(entries, kept) if keep], labels[kept]
  digest = hashlib.sha256()  # of names, labels, captions and contents: not of where the folder is, nor when it was made
  for entry in entries:
    digest.update(json.dumps([*entry.identity(), contents[entry.file].sha256]).encode())
  stamps = np.array([contents[entry.file].stamp[:2] or [-1, -1] for entry in entries], np.int64)
  return FolderSource(str(folder), tuple(entries), stamps, labels, class_names, digest.hexdigest())


def report_unreadable(what, faults: Sequence[str], total: int, max_unreadable: float) -> None:
  """Lists unreadable pictures, each with its reason, on stderr.

  Raises:
    SourceError: they are more than the share `max_unreadable` of `total`, or all; the message lists them.
  """
  if not faults:
    return
  count = f'{what}: {len(faults)} of {total} pictures cannot be read'
  if len(faults) > max_unreadable * total or len(faults) == total:
    raise SourceError(f'{count}, more than max_unreadable = {max_unreadable:g} allows:{listing.listed(faults)}')
  print(f'{count} and are left out:{listing.listed(faults)}', file=sys.stderr, flush=True)


class Content(NamedTuple):
  """What reading a file has told; neither size nor fault: it was not decoded. The cache has rows of these."""

  stamp: list[int]  # when it was read; [] where there is no file
  sha256: str = ''  # of its bytes; '' where there are none to read
  size: tuple[int, int] | None = None  # width, height
  fault: str | None = None


def _fault(content: Content, resolution: int) -> str | None:
  return content.fault or (pictures.excess(content.size, resolution) if resolution else None)


def _contents(folder: pathlib.Path, files: list[str], decode: bool) -> dict[str, Content]:
  """What is in each file: of the user's cache where it is as it was then, otherwise read, and decoded if asked for."""
  stamps = {file: _stamp(folder / file) for file in files}
  name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
  path = pathlib.Path(user_cache(), 'pagoda_jax', 'folders', name + '.json')
  known = {file: content for file, content in _known(path, stamps).items()
           if not decode or content.size or content.fault}
  fresh = _examined(folder, {file: stamp for file, stamp in stamps.items() if file not in known}, decode)
  contents = {file: known.get(file) or fresh[file] for file in files}
  if fresh:
    rows = {file: content for file, content in contents.items() if content.sha256}
    keep(path, {'folder': str(folder), 'pillow': PIL.__version__, 'files': rows})
  return contents


def _known(path, stamps) -> dict[str, Content]:
  """What the cache tells of the files that have not changed since."""
  try:
    kept = read_sealed(path)
    rows = kept['files'] if kept['pillow'] == PIL.__version__ else {}  # another one may read what this one does not
    return {file: Content(*row) for file, row in rows.items() if row[0] == stamps.get(file)}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {}  # not read before


def keep(path: pathlib.Path, values: dict) -> None:
  """Writes a file of the user's cache, if that can be written to."""
  partial = path.with_suffix(f'.{os.getpid()}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(partial, values, indent=None)
    partial.replace(path)
  except OSError:
    pass  # a read-only home: read again next time


def _examined(folder, stamps, decode) -> dict[str, Content]:
  files, contents = list(stamps), {}
  progress = Progress(f'checking {folder}', len(files), unit='file')
  with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing and decoding work without the interpreter's lock
    for start in range(0, len(files), CHUNK):
      chunk = files[start : start + CHUNK]
      contents |= zip(chunk, pool.map(lambda file: _examine(folder / file, stamps[file], decode), chunk))
      progress.update(start + len(chunk), len(chunk))
  return contents


def _examine(path: pathlib.Path, stamp: list[int], decode: bool) -> Content:
  try:
    content, _ = _read(path)
  except (OSError, SourceError) as error:
    return Content(stamp, fault=pictures.reason(error))
  sha256 = hashlib.sha256(content).hexdigest()
  try:
    return Content(stamp, sha256, pictures.examine(content) if decode else None)
  except MemoryError as error:  # this machine's fault, now: not to be kept
    return Content(stamp, fault=pictures.reason(error))
  except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
    return Content(stamp, sha256, fault=pictures.reason(error))


def _read(path) -> tuple[bytes, list[int]]:
  """(what is in a file, its stamp as it was opened)."""
  with open_regular(path) as file:
    status = os.fstat(file.fileno())
    if status.st_size > MAX_BYTES:
      raise SourceError(f'{status.st_size} bytes, more than {MAX_BYTES}')
    return file.read(), _stamp_of(status)


def _stamp(path: pathlib.Path) -> list[int]:
  """`_stamp_of` a file; [] where there is none."""
  try:
    return _stamp_of(path.stat())
  except OSError:
    return []


def _stamp_of(status: os.stat_result) -> list[int]:
  """What changes when a file does, or when another one takes its name."""
  return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
