"""Where each record lies in a shard's file, so that one can be read from a bucket by a range of bytes.

ArrayRecord reads files of a file system only. Its file is one of Riegeli (github.com/google/riegeli,
doc/riegeli_records_file_format.md): blocks of 64 KiB, a header of 24 bytes at the start of each and within whatever
lies there, and chunks one after the other. Ours hold one record each, not compressed, whose bytes end the chunk.
"""

import base64
import zlib
from collections.abc import Sequence

import numpy as np

from pagoda_jax.runtime import buckets

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 2**16, 24, 40
_RECORDS = ord('r')  # a chunk's kind; others hold the file's signature, padding and ArrayRecord's own index
_PLACE = np.dtype([('start', '<u8'), ('length', '<u4'), ('crc32', '<u4')])


def of_file(path, checksums: Sequence[int]) -> str:
  """The places of the records of a local file as text, for `Reader`; `checksums`: the CRC-32 of each, in order.

  Raises:
    RuntimeError: the file is not built as this module expects: of another version of array_record.
  """
  content, found, position = np.memmap(path, np.uint8, 'r'), np.zeros(len(checksums), _PLACE), 0
  for place in range(len(found)):
    kind = 0
    while kind != _RECORDS:
      if position >= len(content):
        raise RuntimeError(f'{path}: {place} records where {len(found)} were written')
      header = _without_headers(content[position : _end(position, _CHUNK_HEADER)], position)
      size, kind, length = int.from_bytes(header[8:16], 'little'), header[24], int.from_bytes(header[32:], 'little')
      start = _end(position, _CHUNK_HEADER + size - length)
      position = _end(position, _CHUNK_HEADER + size)
    checksum = zlib.crc32(_without_headers(content[start:position], start))
    if checksum != checksums[place]:
      raise RuntimeError(f'{path}: record {place} lies elsewhere than this version of pagoda_jax expects')
    found[place] = start, length, checksum
  return base64.b64encode(found.tobytes()).decode()


def _end(start: int, length: int) -> int:
  """Where `length` bytes end that begin at `start`, with the headers of blocks among them."""
  while length:
    start += _BLOCK_HEADER if start % _BLOCK == 0 else 0
    step = min(_BLOCK - start % _BLOCK, length)
    start, length = start + step, length - step
  return start


def _without_headers(raw, start: int) -> bytes:
  """What a file holds from `start` on, without the headers of blocks."""
  first = -start % _BLOCK
  parts = [raw[:first], *(raw[at + _BLOCK_HEADER : at + _BLOCK] for at in range(first, len(raw), _BLOCK))]
  return b''.join(bytes(part) for part in parts)


class Reader:
  """Reads records of a shard in a bucket, each by one request; like ArrayRecord's reader, from any thread.

  Args:
    path: of the shard.
    places: what `of_file` gave of it.
  """

  def __init__(self, path: str, places: str):
    self._path, self._places = path, np.frombuffer(base64.b64decode(places), _PLACE)

  def num_records(self) -> int:
    return len(self._places)

  def read(self, places: Sequence[int]) -> list[bytes]:
    """The records of these numbers.

    Raises:
      RuntimeError: the bytes there are not those that were written.
      OSError: they cannot be read.
    """
    return [self._read(*(int(value) for value in self._places[place])) for place in places]

  def _read(self, start, length, checksum):
    record = _without_headers(buckets.read_range(self._path, start, _end(start, length)), start)
    if zlib.crc32(record) != checksum:
      raise RuntimeError('its bytes have changed (CRC-32)')
    return record
