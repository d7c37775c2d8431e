"""Files that are written whole or not at all, and whether they are as they were written.

JSON that a program believes is sealed: it holds a checksum of its own values. Of other files, of which a flipped
byte can be read without an error, the checksums stand in a sealed JSON beside them.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import os
import stat
from typing import BinaryIO

from etils import epath

from pagoda_jax.runtime import buckets

SEAL = 'seal'
THREADS = 4  # of checksums; more would compete with the pictures' decoding while a checkpoint is saved
KINDS = {'p': 'FIFO', 's': 'socket', 'c': 'device', 'b': 'device', 'd': 'folder'}  # as stat.filemode begins
# What a disk answers that cannot be written: full, over a quota or a limit, read-only, forbidden, failing.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class NotSealedError(ValueError):
  """A JSON object without a seal: somebody took it away, or an earlier version wrote the file."""


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
def naming(path, instead_of=None):
  """What a disk answers within the block is raised as an OSError that names `path`.

  Python's own error of a write to an open file names none; ArrayRecord's and tensorstore's are RuntimeErrors and
  ValueErrors with the system's words somewhere in a long text.

  instead_of: where what is to be at `path` is made first: what lies there is not named, as nothing is left of it.
  """
  try:
    yield
  except OSError as error:
    _name(error, path, instead_of)
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
  if buckets.is_in_bucket(path):  # an object appears whole or not at all, and renaming one would copy it
    yield (content := io.BytesIO())
    path.write_bytes(content.getvalue())
    return
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
  within = instead_of is not None and os.path.join(str(error.filename), '').startswith(os.path.join(instead_of, ''))
  if error.errno is not None and (error.filename is None or within):
    error.filename, error.filename2 = str(path), None


def user_cache() -> str:
  """The user's cache folder; an empty variable counts as none, as its specification says."""
  return os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')


def file_digest(path) -> str:
  """SHA-256 of a file, hexadecimal."""
  with epath.Path(path).open('rb') as file:
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
      digest.update(chunk)
  return digest.hexdigest()


def checksums(folder, without: tuple[str, ...] = ()) -> dict[str, dict]:
  """Path within the folder -> {'bytes', 'sha256'} of every file there but those of `without`."""
  paths = {path: file for path, file in _files(epath.Path(folder)) if path not in without}
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    digests = pool.map(file_digest, paths.values())
    return {path: {'bytes': paths[path].stat().length, 'sha256': sha} for path, sha in zip(paths, digests)}


def _files(folder, prefix=''):
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path, f'{prefix}{path.name}/')
    else:
      yield prefix + path.name, path


def damaged_files(folder, expected: dict[str, dict]) -> list[str]:
  """What is wrong with the files that `checksums` gave `expected` of, a text for each; [] where all are as then.

  Raises:
    OSError: a file is there but cannot be read; this says nothing about what it holds.
  """
  folder = epath.Path(folder)
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    texts = pool.map(lambda path: _damage(folder / path, path, expected[path]), expected)
    return [text for text in texts if text]


def _damage(file, path, expected) -> str:
  try:
    size = file.stat().length
    if size != expected['bytes']:
      return f'{path}: {size} bytes instead of {expected["bytes"]}'
    return '' if file_digest(file) == expected['sha256'] else f'{path}: its bytes have changed (SHA-256)'
  except (FileNotFoundError, NotADirectoryError):
    return f'{path}: missing'


def first_lines(error: Exception, count: int = 12) -> str:
  """The beginning of an error's text: some libraries print whole trees."""
  lines = str(error).splitlines()
  return '\n'.join(lines[:count] + (['...'] if len(lines) > count else []))


def first_rows(rows: list[str], count: int = 3) -> str:
  """The first of many texts in one line."""
  return '; '.join(rows[:count] + ([f'and {len(rows) - count} more'] if len(rows) > count else []))


def write_sealed(path, value: dict, indent: int | None = 2) -> None:
  """Writes a JSON object with a checksum of its own values, for `read_sealed`; whole or not at all."""
  write_json(path, value | {SEAL: seal(value)}, indent)


def read_sealed(path) -> dict:
  """The values of a JSON object that `write_sealed` wrote.

  Raises:
    NotSealedError: it has no seal.
    ValueError: it is no JSON object, or its values are not those that were written.
    OSError: it cannot be read; FileNotFoundError: there is no such file.
  """
  value = read_json(path)
  if SEAL not in value:
    raise NotSealedError('no seal: changed, or written by an earlier version')
  found = value.pop(SEAL)
  if found != seal(value):
    raise ValueError('its values do not fit its checksum')
  return value


def read_to_compare(path) -> tuple[dict, bool]:
  """(values, whether they are sealed): for values that are compared and never believed; errors as `read_sealed`'s.

  Earlier versions sealed less. What the caller finds to be equal to what it knows itself may then be sealed anew.
  """
  try:
    return read_sealed(path), True
  except NotSealedError:
    return read_json(path), False


def seal(value) -> str:
  """Checksum of JSON values: SHA-256, hexadecimal."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_whole(path, most: int = -1) -> bytes:
  """The content of a file, local or gs://; of a longer one its first `most` bytes.

  Raises:
    OSError: it cannot be read, or is a pipe or device, for which a reader would wait.
  """
  if buckets.is_in_bucket(path):
    return epath.Path(path).read_bytes()[: most if most >= 0 else None]
  with open_regular(path) as file:
    return file.read(most)


def read_json(path) -> dict:
  """The JSON object in a file.

  Raises:
    ValueError: there is none in it.
    OSError: it cannot be read.
  """
  try:
    value = json.loads(read_whole(path))
  except RecursionError:
    raise ValueError('no JSON object: nested too deeply') from None
  if not isinstance(value, dict):
    raise ValueError('no JSON object')
  return value


def write_json(path, value, indent: int | None = 2) -> None:
  """Writes JSON whole or not at all."""
  with replacing(path) as file:
    file.write((json.dumps(value, indent=indent) + '\n').encode())
