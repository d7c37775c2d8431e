"""Files that are written whole or not at all, and whether they are as they were written."""

import hashlib
import json
import os
import stat
from typing import BinaryIO

from etils import epath

KINDS = {'p': 'FIFO', 's': 'socket', 'c': 'device', 'b': 'device', 'd': 'folder'}  # as stat.filemode begins


def open_regular(path) -> BinaryIO:
  """Opens a local file to read its bytes; links are followed.

  Raises:
    OSError: there is none, or it is no regular file: reading a FIFO would wait for a writer, perhaps for ever.
  """
  _refuse_other_kinds(os.stat(path))  # before it is opened: opening alone moves some devices
  file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 'rb')
  try:
    _refuse_other_kinds(os.fstat(file.fileno()))
  except OSError:
    file.close()
    raise
  return file


def _refuse_other_kinds(status):
  if not stat.S_ISREG(status.st_mode):
    raise OSError(f'a {KINDS.get(stat.filemode(status.st_mode)[0], "special file")}, no regular file')


def file_digest(path) -> str:
  """SHA-256 of a file, hexadecimal."""
  with epath.Path(path).open('rb') as file:
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
      digest.update(chunk)
  return digest.hexdigest()


def write_sealed(path, value: dict, indent: int | None = 2) -> None:
  """Writes a JSON object with a checksum of its own values, for `read_sealed`; whole or not at all."""
  write_json(path, value | {'seal': _seal(value)}, indent)


def read_sealed(path) -> dict:
  """The values of a JSON object that `write_sealed` wrote; one without a seal, of older versions, is taken as it is.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no JSON object, or its values are not those that were written.
  """
  value = json.loads(epath.Path(path).read_text())
  if not isinstance(value, dict):
    raise ValueError('no JSON object')
  seal = value.pop('seal', None)
  if seal not in (None, _seal(value)):
    raise ValueError('its values do not fit its checksum')
  return value


def _seal(value) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path, value, indent: int | None = 2) -> None:
  """Writes JSON whole or not at all."""
  path = epath.Path(path)
  partial = path.parent / (path.name + '.partial')
  partial.write_text(json.dumps(value, indent=indent) + '\n')
  partial.replace(path)
