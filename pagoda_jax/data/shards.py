"""Folders of ArrayRecord shards that survive a kill at any moment; the noise store and prepared pictures use them.

Each shard is a fixed range of keys, whoever writes it. It is written under another name, renamed when
whole, and followed by a JSON beside it (the sidecar: count, bytes, SHA-256); a shard without a sidecar
that fits it does not count. Sidecars and manifests are sealed: they hold a checksum of their own values.

In a bucket, which has no files to write on, a shard is uploaded when it is whole, and records are read by the places
that its sidecar tells.
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
import zlib

from array_record.python import array_record_module
from etils import epath

from pagoda_jax.data import record_places
from pagoda_jax.runtime import buckets
from pagoda_jax.runtime.files import file_digest, naming, read_sealed, write_sealed

SUFFIX = '.array_record'
PLACES = 'places'  # in a sidecar: where the records lie in the shard
OPEN_READERS = 512  # a file handle each; the usual limit is 1024 a process
VERIFY_HINT = '`pagoda prepare --verify --output={}` checks every shard'


class ShardError(ValueError):
  """A shard or a record is missing or damaged; the message names it."""


def encode_record(header: dict, content: bytes) -> bytes:
  """A record of a header and what it describes, such as an encoded picture."""
  text = json.dumps(header, ensure_ascii=False).encode(errors='surrogatepass')  # a file's name may be no Unicode
  return len(text).to_bytes(4, 'little') + text + content


def decode_record(record: bytes) -> tuple[dict, bytes]:
  """The header of a record, and what follows it.

  Raises:
    ValueError: it is no record.
  """
  start = 4 + int.from_bytes(record[:4], 'little')
  return json.loads(record[4:start].decode(errors='surrogatepass')), record[start:]


@dataclasses.dataclass(frozen=True)
class Layout:
  """How `count` keys are cut into shards, named PREFIX-00000-of-00007."""

  prefix: str
  count: int
  shard_size: int

  @property
  def num_shards(self) -> int:
    return -(-self.count // self.shard_size)

  @property
  def names(self) -> list[str]:
    return [self.name(shard) for shard in range(self.num_shards)]

  def keys(self, shard: int) -> range:
    """The keys of one shard."""
    return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

  def name(self, shard: int) -> str:
    return f'{self.prefix}-{shard:05d}-of-{self.num_shards:05d}'


class ShardWriter:
  """Writes one shard; only `close` makes it count.

  Args:
    folder: where; made if need be.
    name: the shard's.

  Raises:
    OSError: here and in every method: it cannot be written; names it. What there was of it is deleted.
  """

  def __init__(self, folder, name: str):
    self._folder, self._name, self._checksums = epath.Path(folder), name, []
    self._path = self._folder / (name + SUFFIX)
    local = self._folder
    if buckets.is_in_bucket(folder):
      self._room = tempfile.TemporaryDirectory(prefix='pagoda-')  # goes with this writer
      local = epath.Path(self._room.name)
    local.mkdir(parents=True, exist_ok=True)
    for left_over in local.glob(f'{name}.*.partial'):  # by a killed process
      left_over.unlink(missing_ok=True)
    # The process is part of the name: one that outlives a kill cannot write into its successor's file.
    self._partial = local / f'{name}.{os.getpid()}.partial'
    # group_size:1 lets a reader fetch single records; noise and encoded pictures do not compress.
    self._writer = array_record_module.ArrayRecordWriter(str(self._partial), 'group_size:1,uncompressed')

  def add(self, record: bytes) -> None:
    with self._whole_or_not():
      self._writer.write(record)
    self._checksums.append(zlib.crc32(record))

  def close(self, **details) -> None:
    """Puts the shard in place; `details` go into its sidecar."""
    with self._whole_or_not():
      self._writer.close()
      sidecar = {
        'count': len(self._checksums),
        'bytes': self._partial.stat().length,
        'sha256': file_digest(self._partial),
        PLACES: record_places.of_file(self._partial, self._checksums),
      }
      if buckets.is_in_bucket(self._path):
        buckets.upload(self._partial, self._path)
        self._partial.unlink()
      else:
        self._partial.replace(self._path)
      write_sealed(sidecar_path(self._folder, self._name), sidecar | details, indent=None)

  @contextlib.contextmanager
  def _whole_or_not(self):
    try:
      with naming(self._path):
        yield
    except BaseException:
      with contextlib.suppress(OSError):
        self._partial.unlink(missing_ok=True)
      raise


def sidecar_path(folder, name: str) -> epath.Path:
  """The JSON beside a shard."""
  return epath.Path(folder) / (name + '.json')


def shard_path(folder: str, name: str) -> str:
  """A shard's file. No epath.Path: making one takes a fifth of the time in which a record is read."""
  return f'{folder}/{name}{SUFFIX}'


def read_sidecar(folder, name: str) -> dict:
  """A shard's sidecar.

  Raises:
    ShardError: it is missing or damaged.
    OSError: the bucket that it lies in cannot be reached.
  """
  path = sidecar_path(folder, name)
  try:
    return read_sealed(path)
  except (OSError, ValueError) as error:
    if buckets.is_away(path, error):  # what is whole is not to be deleted and made anew for that
      raise
    raise ShardError(f'{path}: missing or damaged ({error})') from None


def is_finished(folder, name: str) -> bool:
  """Whether the shard is there, as long as its sidecar says."""
  path = epath.Path(folder) / (name + SUFFIX)
  try:
    return path.exists() and path.stat().length == read_sidecar(folder, name)['bytes']
  except (ShardError, KeyError, TypeError):
    return False


def finished_shards(folder, layout: Layout) -> list[int]:
  """Numbers of the shards that need not be written again."""
  finished = buckets.mapped(folder, functools.partial(is_finished, folder), layout.names)
  return [shard for shard, whole in enumerate(finished) if whole]


@functools.lru_cache(maxsize=OPEN_READERS)
def open_shard(folder: str, name: str, count: int):
  """The ArrayRecord reader of a shard; opened once in each process.

  Raises:
    ShardError: it is missing, damaged, or holds another number of records than `count`.
  """
  path = shard_path(folder, name)
  reader = _in_bucket(folder, name) if buckets.is_in_bucket(folder) else array_record_module.ArrayRecordReader(path)
  found = reader.num_records()
  if found != count:  # a file that is missing or cut short opens as one without records
    state = f'damaged: {found} records instead of {count}' if epath.Path(path).exists() else 'missing'
    raise ShardError(f'{path}: {state}')
  return reader


@functools.cache  # without a limit: it holds no file, and to read places again takes longer than any record
def _in_bucket(folder, name) -> record_places.Reader:
  sidecar = read_sidecar(folder, name)
  if PLACES not in sidecar:
    raise ShardError(f'{sidecar_path(folder, name)}: an earlier version wrote it, without the places of records: what '
                     'lies in a bucket cannot be read so. Copy the folder to a file system, or make it again')
  return record_places.Reader(shard_path(folder, name), sidecar[PLACES])


def read_record(folder: str, name: str, count: int, place: int) -> bytes:
  """Record number `place` of a shard of `count` records, none of them empty.

  Raises:
    ShardError: names the shard and the record that cannot be read; ArrayRecord checks a hash of each.
  """
  try:
    record = open_shard(folder, name, count).read([place])[0]
  except FileNotFoundError:
    raise ShardError(f'{shard_path(folder, name)}: missing') from None
  except (RuntimeError, IndexError) as error:
    raise ShardError(f'{shard_path(folder, name)}: record {place} is damaged ({_first_line(error)})') from None
  if not record:  # what ArrayRecord gives, without an error, of a file that was cut short after it was opened
    raise ShardError(f'{shard_path(folder, name)}: record {place} is damaged (the file ends before it)')
  return record


def _first_line(error):
  return str(error).split('\n')[0].split(';')[0]


def damaged_shards(folder, digests: dict[str, str]) -> list[str]:
  """Names of the shards that are missing or whose bytes differ from their SHA-256."""
  paths = {name: epath.Path(folder) / (name + SUFFIX) for name in digests}
  return [name for name, path in paths.items() if not path.exists() or file_digest(path) != digests[name]]
