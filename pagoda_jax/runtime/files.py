"""Files that are written whole or not at all, and whether they are as they were written."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from typing import BinaryIO

from etils import epath

KINDS = {'p': 'FIFO', 's': 'socket', 'c': 'device', 'b': 'device', 'd': 'folder'}  # as stat.filemode begins
# What a disk answers that cannot be written: full, over a quota or a limit, read-only, forbidden, failing.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


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


@contextlib.contextmanager
def naming(path):
  """What a disk answers within the block is raised as an OSError that names `path`.

  Python's own error of a write to an open file names none; ArrayRecord's and tensorstore's are RuntimeErrors and
  ValueErrors with the system's words somewhere in a long text.
  """
  try:
    yield
  except OSError as error:
    _name(error, path)
    raise
  except (RuntimeError, ValueError) as error:
    for number in _REFUSALS:
      if os.strerror(number) in str(error):
        raise OSError(number, os.strerror(number), str(path)) from error
    raise


@contextlib.contextmanager
def replacing(path):
  """A binary file to write to, put in the place of `path` when the block ends; nothing is left of a failure.

  Its folder is made if need be.

  Raises:
    OSError: it cannot be written; names it.
  """
  path = epath.Path(path)
  # The process is part of the name: two that write one file do not write into each other's.
  partial = path.parent / f'{path.name}.{os.getpid()}.partial'
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    with partial.open('wb') as file:
      yield file
    partial.replace(path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    if isinstance(error, OSError):
      _name(error, path, partial)
    raise


def _name(error: OSError, path, instead_of=None) -> None:
  """Has an error of the system name `path`; one that says all in words of its own stays as it is."""
  if error.errno is not None and error.filename in (None, str(instead_of)):
    error.filename = str(path)


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
  with replacing(path) as file:
    file.write((json.dumps(value, indent=indent) + '\n').encode())
