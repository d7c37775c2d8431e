"""Which pictures a folder holds, by class sub-folders or by its captions.jsonl; none of them is opened here."""

import heapq
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pagoda_jax.data import captions
from pagoda_jax.data.captions import KINDS, shortened
from pagoda_jax.data.pictures import SourceError, reason
from pagoda_jax.runtime.files import open_regular

CAPTIONS = 'captions.jsonl'
MAX_CLASSES = 2**20  # that class numbers may name: the names of all up to the largest are listed
SHOWN = 50  # rows that a message lists


class Entry(NamedTuple):
  """A picture of a folder; `label` is a class's name or number."""

  file: str
  label: str | int | None = None
  captions: tuple[tuple[str, str], ...] = ()  # (kind, text) of each; captions.py

  def identity(self) -> list:
    """What a digest of it is of: as it was when there was one caption, where there is one."""
    alone = len(self.captions) == 1 and self.captions[0][0] == KINDS[0]
    return [self.file, self.label, self.captions[0][1] if alone else self.captions or None]


def listed(rows: Sequence[str]) -> str:
  """The first rows of a list, each in a line of its own, and how many more there are."""
  more = [f'... and {len(rows) - SHOWN} more'] if len(rows) > SHOWN else []
  return ''.join(f'\n  {row}' for row in [*rows[:SHOWN], *more])


def entries_of(folder: pathlib.Path) -> list[Entry]:
  """The pictures of a folder: in the order of its captions.jsonl if there is one, otherwise sorted by path.

  Raises:
    SourceError: a folder cannot be read, captions.jsonl cannot be understood, or pictures lie beside class folders.
  """
  path = folder / CAPTIONS
  return _captioned(path) if os.path.lexists(path) else _by_sub_folder(folder)


def numbered(labels_of: Sequence[str | int | None], where) -> tuple[np.ndarray, tuple[str, ...]]:
  """(labels [N] int32, -1 for none; class names): names are numbered in their order, numbers stay.

  Raises:
    SourceError: names and numbers are mixed; begins with `where` they are.
  """
  labels = {*labels_of} - {None}
  kinds = {type(label) for label in labels}
  if len(kinds) > 1:
    raise SourceError(f'{where}: some labels are names and some are numbers; use one of them throughout')
  names = sorted(labels) if kinds == {str} else list(range(max(labels, default=-1) + 1))
  number = {name: place for place, name in enumerate(names)} | {None: -1}
  return np.array([number[label] for label in labels_of], np.int32), tuple(map(str, names))


def _by_sub_folder(folder: pathlib.Path) -> list[Entry]:
  files = _picture_files(folder)
  lone = [file for file in files if '/' not in file]
  if lone and len(lone) < len(files):
    classes = sorted({file.split('/')[0] for file in files if '/' in file})
    raise SourceError(f'{folder / lone[0]}: lies beside the class folders {", ".join(classes[:5])}'
                      f'{", ..." if len(classes) > 5 else ""}; move it into one, or all pictures out of them')
  return [Entry(file, None if lone else file.split('/')[0]) for file in files]


def _picture_files(folder: pathlib.Path) -> list[str]:
  """Sorted paths relative to the folder, with forward slashes.

  Links are followed, also out of the folder. Every folder is entered once, under its own name rather than a
  link's; links to folders entered already, or that the folder lies in, are listed on stderr.
  """
  endings = {end for end, name in Image.registered_extensions().items() if name in Image.OPEN} | {''}
  entered = {_identity(parent) for parent in folder.resolve().parents}
  files, left_out, own, links = [], [], [''], []
  while own or links:
    place = own.pop() if own else heapq.heappop(links)
    try:
      if (identity := _identity(folder / place)) in entered:
        left_out.append(f'{folder / place}')
        continue
      entered.add(identity)
      with os.scandir(folder / place) as found:
        for item in found:
          path = os.path.join(place, item.name)
          if item.name.startswith('.'):
            continue
          if item.is_symlink() and os.path.isdir(item.path):
            heapq.heappush(links, path)
          elif item.is_dir(follow_symlinks=False):
            own.append(path)
          elif os.path.splitext(item.name)[1].lower() in endings:
            files.append(path)
    except OSError as error:
      raise SourceError(f'{folder / place}: cannot be read ({reason(error)})') from None
  if left_out:
    print(f'{folder}: {len(left_out)} links to folders that it holds or lies in are not entered again:'
          f'{listed(left_out)}', file=sys.stderr, flush=True)
  return sorted(files)


def is_hidden(path: str) -> bool:
  """Whether a path within a folder is passed over there, with all that lies in it."""
  return any(part.startswith('.') and part != '.' for part in path.split(os.sep))


def _identity(path) -> tuple[int, int]:
  status = os.stat(path)
  return status.st_dev, status.st_ino


def _captioned(path: pathlib.Path) -> list[Entry]:
  try:
    with open_regular(path) as file:  # its lines end at newlines only: U+2028 and the like may stand in a caption
      return [_entry(line, f'{path}, line {number}') for number, line in enumerate(file, 1) if line.strip()]
  except OSError as error:
    raise SourceError(f'{path}: cannot be read ({reason(error)})') from None


def _entry(line: bytes, where: str) -> Entry:
  """One line of captions.jsonl; `where` it is begins the message of what is wrong with it."""
  must = 'must be an object with "file", "caption" and, if need be, "recaption" and "label"'
  row = captions.json_object(captions.decoded(line, where), where, must)
  for key in ('file', 'caption'):
    if key not in row:
      raise SourceError(f'{where}: {must} (KeyError: {key!r})')
  if not isinstance(row['file'], str):
    raise SourceError(f'{where}: "file" = {shortened(row["file"])}: must be a string')
  _check_file(row['file'], where)
  found = captions.of_row(row, where)
  if not found:
    raise SourceError(f'{where}: "caption" = []: must be a string, or a list of at least one')
  return Entry(row['file'], label_of(row, where), tuple(found))


def label_of(row: dict, where: str) -> str | int | None:
  """"label" of a JSON object: a class's number or name; None where there is none.

  Raises:
    SourceError: it is something else.
  """
  label = row.get('label')
  if not (label is None or isinstance(label, str) or (type(label) is int and 0 <= label < MAX_CLASSES)):
    raise SourceError(f'{where}: "label" = {shortened(label)}: must be a class number from 0 to {MAX_CLASSES - 1}, '
                      'or a name')
  return label


def _check_file(file, where):
  path = pathlib.PurePosixPath(file)
  try:
    possible = b'\0' not in os.fsencode(file)
  except UnicodeEncodeError:
    possible = False
  if not possible or path.is_absolute() or '..' in path.parts or not path.parts:
    raise SourceError(f'{where}: "file" = {shortened(file)}: must be the path of a picture in the folder, relative to '
                      'it and without ".."')
