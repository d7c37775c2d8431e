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
from PIL import Image

from pagoda_jax.data import pictures
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.runtime.progress import Progress

CAPTIONS = 'captions.jsonl'
SHOWN_FAULTS = 50  # unreadable files that a message lists
CHUNK = 512  # files that are tried between two lines of progress


class Entry(NamedTuple):
  """A picture of a folder; `label` is a class's name or number."""

  file: str
  label: str | int | None = None
  caption: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
  """The pictures of a folder; carries its list, so that worker processes see the one that the run began with."""

  folder: str
  entries: tuple[Entry, ...]
  all_labels: np.ndarray
  class_names: tuple[str, ...]
  digest: str
  resolution: int | None = None

  def __len__(self) -> int:
    return len(self.entries)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{'image', 'label', 'name', and 'caption' where there is a captions.jsonl}.

    Raises:
      SourceError: the file cannot be read.
    """
    entry = self.entries[index]
    path = pathlib.Path(self.folder) / entry.file
    try:
      with Image.open(path) as image:
        image = pictures.shown(image)
    except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
      raise SourceError(f'{path}: {type(error).__name__}: {error}') from None
    record = {'image': image, 'label': int(self.all_labels[index]), 'name': entry.file}
    return record if entry.caption is None else record | {'caption': entry.caption}


def open_folder(path: str, max_unreadable: float = 0.01, check: bool = True) -> FolderSource:
  """The pictures of a folder.

  With a captions.jsonl, its lines {"file": ..., "caption": ..., "label": ...} in their order; a label is
  optional, a number or a name. Otherwise files sorted by path: each sub-folder that holds pictures,
  at any depth, is a class, numbered in the order of their names; without sub-folders there are no classes.

  Args:
    path: the folder.
    max_unreadable: share of files that may be unreadable; they are listed and left out.
    check: whether every file is tried now (once: the answer is kept in the user's cache); without it,
      reading an unreadable one raises.

  Raises:
    SourceError: there is no such folder or no picture in it, captions.jsonl cannot be understood, or too many
      files cannot be read, which are listed.
  """
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise SourceError(f'{path}: no such folder')
  captions = folder / CAPTIONS
  entries = _captioned(captions) if captions.exists() else _by_sub_folder(folder)
  if not entries:
    raise SourceError(f'{path}: no pictures in it')
  labels, class_names = _numbered(entries, captions)
  if check:
    faults = _faults(folder, sorted({entry.file for entry in entries}))
    rows = [f'{folder / file}: {reason}' for file, reason in sorted(faults.items())]
    report_unreadable(path, rows, len(entries), max_unreadable)
    kept = np.array([entry.file not in faults for entry in entries])
    entries, labels = [entry for entry, keep in zip(entries, kept) if keep], labels[kept]
  return FolderSource(str(folder), tuple(entries), labels, class_names, _digest(folder, entries))


def report_unreadable(what, faults: Sequence[str], total: int, max_unreadable: float) -> None:
  """Lists unreadable pictures, each with its reason, on stderr.

  Raises:
    SourceError: they are more than the share `max_unreadable` of `total`, or all; the message lists them.
  """
  if not faults:
    return
  more = [f'... and {len(faults) - SHOWN_FAULTS} more'] if len(faults) > SHOWN_FAULTS else []
  listed = ''.join(f'\n  {row}' for row in [*faults[:SHOWN_FAULTS], *more])
  count = f'{what}: {len(faults)} of {total} pictures cannot be read'
  if len(faults) > max_unreadable * total or len(faults) == total:
    raise SourceError(f'{count}, more than max_unreadable = {max_unreadable:g} allows:{listed}')
  print(f'{count} and are left out:{listed}', file=sys.stderr, flush=True)


def _by_sub_folder(folder: pathlib.Path) -> list[Entry]:
  files = sorted(_picture_files(folder))
  lone = [file for file in files if '/' not in file]
  if lone and len(lone) < len(files):
    classes = sorted({file.split('/')[0] for file in files if '/' in file})
    raise SourceError(f'{folder / lone[0]}: lies beside the class folders {", ".join(classes[:5])}'
                      f'{", ..." if len(classes) > 5 else ""}; move it into one, or all pictures out of them')
  return [Entry(file, None if lone else file.split('/')[0]) for file in files]


def _picture_files(folder: pathlib.Path):
  """Paths relative to the folder, with forward slashes."""
  endings = {end for end, name in Image.registered_extensions().items() if name in Image.OPEN} | {''}
  for parent, folders, files in os.walk(folder, followlinks=True):
    folders[:] = [name for name in folders if not name.startswith('.')]
    for name in files:
      if not name.startswith('.') and os.path.splitext(name)[1].lower() in endings:
        yield pathlib.Path(parent, name).relative_to(folder).as_posix()


def _captioned(path: pathlib.Path) -> list[Entry]:
  entries = []
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      entry = Entry(row['file'], row.get('label'), row['caption'])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise SourceError(f'{path}, line {number}: must be an object with "file", "caption" and, if need be, "label" '
                        f'({type(error).__name__}: {error})') from None
    _check_entry(entry, f'{path}, line {number}')
    entries.append(entry)
  return entries


def _check_entry(entry, where):
  for key in ('file', 'caption'):
    if not isinstance(getattr(entry, key), str):
      raise SourceError(f'{where}: "{key}" = {getattr(entry, key)!r}: must be a string')
  label = entry.label
  if not (label is None or isinstance(label, str) or (type(label) is int and label >= 0)):
    raise SourceError(f'{where}: "label" = {label!r}: must be a class number from 0 on, or a name')


def _numbered(entries: Sequence[Entry], path) -> tuple[np.ndarray, tuple[str, ...]]:
  """(labels [N] int32, -1 for none; class names): names are numbered in their order, numbers stay."""
  labels = {entry.label for entry in entries} - {None}
  kinds = {type(label) for label in labels}
  if len(kinds) > 1:
    raise SourceError(f'{path}: some labels are names and some are numbers; use one of them throughout')
  names = sorted(labels) if kinds == {str} else list(range(max(labels, default=-1) + 1))
  number = {name: place for place, name in enumerate(names)} | {None: -1}
  return np.array([number[entry.label] for entry in entries], np.int32), tuple(map(str, names))


def _digest(folder, entries) -> str:
  """SHA-256 of names, sizes, labels and captions: not of where the folder is, nor when it was copied there."""
  digest = hashlib.sha256()
  for entry in entries:
    digest.update(json.dumps([*entry, *_stamp(folder / entry.file)[:1]]).encode())
  return digest.hexdigest()


def _faults(folder: pathlib.Path, files: list[str]) -> dict[str, str]:
  """File -> why it cannot be read; each is decoded once, and again only after something in the folder has changed."""
  state = hashlib.sha256()
  for file in files:
    state.update(json.dumps([file, *_stamp(folder / file)]).encode())
  cache = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
  name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
  path = pathlib.Path(cache, 'pagoda_jax', 'folders', name + '.json')
  try:
    known = json.loads(path.read_text())
    if known['state'] == state.hexdigest():
      return known['faults']
  except (OSError, ValueError, KeyError, TypeError):
    pass  # not checked before
  faults = _try_all(folder, files)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f'.{os.getpid()}')
    partial.write_text(json.dumps({'folder': str(folder), 'state': state.hexdigest(), 'faults': faults}))
    partial.replace(path)
  except OSError:
    pass  # a read-only home: checked again next time
  return faults


def _try_all(folder, files) -> dict[str, str]:

  progress, faults = Progress(f'checking {folder}', len(files), unit='file'), {}
  with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter's lock
    for start in range(0, len(files), CHUNK):
      chunk = files[start : start + CHUNK]
      faults |= dict(zip(chunk, pool.map(pictures.fault, [folder / file for file in chunk])))
      progress.update(start + len(chunk), len(chunk))
  return {file: fault for file, fault in faults.items() if fault}


def _stamp(path: pathlib.Path) -> tuple[int, ...]:
  """What changes when a file does; () where there is none."""
  try:
    status = path.stat()
  except OSError:
    return ()
  return status.st_size, status.st_mtime_ns
