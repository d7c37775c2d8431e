"""Reading and writing files of PyTorch weights without torch and without running code in them.

`read` takes .pt / .pth (the zip format and the older one), .safetensors, .npz and NVIDIA's .pkl; the
content decides, not the suffix. Weights in several files are read by their index
(model.safetensors.index.json). Numbers stay in the file until they are used: what comes back are
memory-mapped views wherever the format stores them plainly. What a file makes us read is bounded by its size
(`_max_bytes`), whatever it declares.
"""

import dataclasses
import hashlib
import io
import json
import mmap
import os
import pathlib
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from absl import logging
from etils import epath

from pagoda_jax.runtime import buckets
from pagoda_jax.runtime.files import file_digest, replacing
from pagoda_jax.weights.convert import state_dicts, unpickle
from pagoda_jax.weights.convert.arrays import shaped
from pagoda_jax.weights.convert.unpickle import DAMAGE, DTYPES, Storage, UnsafeFileError, WeightsFileError

SUFFIXES = ('.pt', '.pth', '.bin', '.ckpt', '.safetensors', '.npz', '.pkl')
_SAFETENSORS_NAMES = {
  'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'F8_E4M3': 'float8_e4m3fn',
  'F8_E5M2': 'float8_e5m2', 'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8', 'U64': 'uint64',
  'U32': 'uint32', 'U16': 'uint16', 'U8': 'uint8', 'BOOL': 'bool', 'C64': 'complex64',
}  # fmt: skip
# How many times a file's size its tensors may take. Float32 weights compress by a tenth, halves of them stored as
# float32 by half; a tensor under several names counts for each.
MAX_EXPANSION = 20
# Which any file may take: the weights of a fresh network are mostly the same number.
ALWAYS_ALLOWED = 2**26
# Bytes of a .safetensors file's table of tensors; 100 a tensor.
MAX_TABLE = 2**24


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """The tensors of a weights file.

  Attributes:
    tensors: name -> array, in the file's own types (bfloat16 as ml_dtypes'); read-only views.
    format: 'torch', 'torch (before 1.6)', 'safetensors', 'npz' or 'pickle'.
    taken: what was taken, in words: the whole file, or which key and what was left aside.
    key: that key; '' for the whole file.
  """

  tensors: dict[str, np.ndarray]
  format: str
  taken: str
  key: str = ''


def read(path, key: str = '', strip: tuple[str, ...] = ('module.',)) -> TensorFile:
  """Reads a weights file, local or gs://.

  Args:
    path: the file.
    key: which entry of a checkpoint to take, '/'-joined when nested; '' prefers an average (EMA) to raw
      weights, see `state_dicts.choose`, and logs what it took.
    strip: prefixes to take off where every name carries them; '_orig_mod.' always goes.

  Raises:
    FileNotFoundError: no such file.
    UnsafeFileError: it holds a pickle that could run code; nothing of it was run.
    WeightsFileError: a directory, an unknown, truncated or corrupted file, or no tensors under `key`.
  """
  path = epath.Path(path)
  _check_is_file(path)
  if is_index(path):
    tensors = state_dicts.without_wrappers(_indexed(path), strip)
    return TensorFile(tensors, 'index', f'the {len(set(_weight_map(path).values()))} files of {path.name}')
  data = _mapped(path)
  try:
    name, content = _content(data, path.suffix.lower())
    choice = state_dicts.choose(content, key, _max_bytes(data))
    tensors = state_dicts.without_wrappers(choice.tensors, strip)
  except WeightsFileError as error:
    raise type(error)(f'{path}: {_line(error)}') from error
  except _DAMAGE as error:
    raise WeightsFileError(f'{path}: truncated or corrupted ({type(error).__name__}: {_line(error)})') from error
  logging.info('%s: %d tensors taken from %s', path, len(tensors), choice.taken)
  return TensorFile(tensors, name, choice.taken, choice.key)


def is_index(path) -> bool:
  """Whether a file is by its name the index of weights in several files."""
  name = epath.Path(path).name
  return '.index.' in name and name.endswith('.json')


def digest(path, digest_of_file=file_digest) -> str:
  """SHA-256 of a weights file; of an index, of it and all files that it names."""
  if not is_index(path):
    return digest_of_file(path)
  files = [epath.Path(path).parent / name for name in sorted(set(_weight_map(path).values()))]
  for file in files:
    _check_is_file(file)
  return hashlib.sha256(''.join(map(digest_of_file, [path, *files])).encode()).hexdigest()


def _indexed(path: epath.Path) -> dict[str, np.ndarray]:
  weight_map = _weight_map(path)
  tensors = {}
  for file in sorted(set(weight_map.values())):
    found, named = read(path.parent / file, strip=()).tensors, {n for n, other in weight_map.items() if other == file}
    if misfits := sorted(found.keys() ^ named):
      where = 'in the index alone' if misfits[0] in named else 'not in the index'
      raise WeightsFileError(f'{path.parent / file}: another file than {path.name} is of: {misfits[0]} is {where}')
    tensors |= found
  return tensors


def _weight_map(path: epath.Path) -> dict[str, str]:
  """Name of a tensor -> name of its file, beside the index."""
  path = epath.Path(path)
  try:
    if path.stat().length > MAX_TABLE:
      raise WeightsFileError(f'it has more than {MAX_TABLE:,} bytes')
    weight_map = json.loads(path.read_bytes())['weight_map']
    files = set(weight_map.values())
    if odd := [file for file in files if pathlib.PurePosixPath(file).name != file or file in ('', '..')]:
      raise WeightsFileError(f'{odd[0]!r} is no name of a file beside it')
    if not files or any(is_index(file) for file in files):
      raise WeightsFileError('it names no files of weights')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise WeightsFileError(f'{path}: no index of weights, or a damaged one ({_line(error)})') from None
  return weight_map


# RuntimeError: what looks encrypted. OSError: places before a zip file's beginning.
_DAMAGE = (*DAMAGE, zipfile.BadZipFile, zlib.error, RuntimeError, OSError)


def _line(error: Exception) -> str:
  """One line of a length to be read, though names in a forged file can be long."""
  line = ' '.join(str(error).split())
  return line if len(line) <= 800 else f'{line[:800]}...'


def _max_bytes(data: memoryview) -> int:
  return max(ALWAYS_ALLOWED, MAX_EXPANSION * len(data))


def _check_is_file(path: epath.Path) -> None:
  if path.is_dir():
    inside = sorted(child.name for child in path.iterdir() if child.suffix.lower() in SUFFIXES or is_index(child))
    hint = f'one of those in it? {", ".join(inside[:8])}' if inside else f'a file ending in {", ".join(SUFFIXES)}'
    raise WeightsFileError(f'{path} is a directory, and a weights file is needed: {hint}')
  if not path.exists():
    raise FileNotFoundError(f'{path}: no such file; `pagoda weights list` names the published ones')
  if not buckets.is_in_bucket(path) and not os.path.isfile(path):
    raise WeightsFileError(f'{path} is a pipe, device or socket, and a regular file is needed')


def _mapped(path: epath.Path) -> memoryview:
  """The file's bytes, mapped into memory; a remote file is copied to a temporary one first."""
  if buckets.is_in_bucket(path):
    # Unlinked on return; the mapping keeps the data alive.
    with tempfile.TemporaryDirectory() as folder:
      local = epath.Path(folder) / path.name
      path.copy(local)
      return _mapped(local)
  with open(path, 'rb') as file:
    if os.fstat(file.fileno()).st_size == 0:
      raise WeightsFileError(f'{path}: the file is empty')
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _content(data: memoryview, suffix: str) -> tuple[str, object]:
  """(format, content) by the first bytes."""
  head = bytes(data[:64])
  if head[:2] == b'PK':
    return _zip_content(data)
  if unpickle.is_legacy(head):
    file = _Reader(data)
    return 'torch (before 1.6)', unpickle.load_legacy(file, lambda start, end: data[start:end], len(data))
  if head[8:9] == b'{' and (suffix == '.safetensors' or int.from_bytes(head[:8], 'little') < 2**32):
    return 'safetensors', _safetensors(data)
  _refuse_stand_ins(head)
  if head[:1] == b'\x80' or suffix in SUFFIXES:
    return 'pickle', unpickle.load(_Reader(data), records=True)
  raise WeightsFileError(
    f'unknown content (first bytes {head[:8]!r}); one of {", ".join(SUFFIXES)} is read, whatever its name'
  )


def _refuse_stand_ins(head: bytes) -> None:
  """What a failed download leaves instead of weights."""
  text = head.lstrip().lower()
  if text.startswith(b'version https://git-lfs'):
    raise WeightsFileError('this is a Git LFS pointer, not the weights: fetch them with `git lfs pull`')
  if text.startswith((b'<!doctype', b'<html', b'<?xml')):
    raise WeightsFileError('this is a web page or an error message, not weights: download the file again')


class _Reader(io.RawIOBase):
  """A buffer as a binary file; unlike BytesIO it makes no copy."""

  def __init__(self, data: memoryview):
    self._data, self._position = data, 0

  def readable(self):
    return True

  def seekable(self):
    return True

  def tell(self):
    return self._position

  def seek(self, offset, whence=os.SEEK_SET):
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}[whence]
    if base + offset < 0:
      raise OSError(f'no byte {base + offset}')
    self._position = base + offset
    return self._position

  def readinto(self, buffer):
    count = min(len(buffer), max(len(self._data) - self._position, 0))
    buffer[:count] = self._data[self._position : self._position + count]
    self._position += count
    return count

  def read(self, size=-1):
    end = len(self._data) if size is None or size < 0 else min(self._position + size, len(self._data))
    chunk = bytes(self._data[self._position : end])
    self._position = max(end, self._position)
    return chunk

  def readline(self, size=-1):
    # Only text opcodes ask for lines, and those are short.
    limit = self._position + (size if size is not None and size >= 0 else 1 << 16)
    chunk = bytes(self._data[self._position : limit])
    line = chunk[: chunk.find(b'\n') + 1] or chunk
    self._position += len(line)
    return line


def _zip_content(data: memoryview) -> tuple[str, object]:
  archive = zipfile.ZipFile(_Reader(data)).infolist()
  _check_sizes(archive, data)
  entries = {entry.filename: entry for entry in archive}
  pickles = [name for name in entries if name.endswith('/data.pkl') or name == 'data.pkl']
  if pickles:
    return 'torch', _torch_zip(data, entries, pickles[0].removesuffix('data.pkl'))
  arrays = [name for name in entries if name.endswith('.npy')]
  if arrays:
    return 'npz', {name.removesuffix('.npy'): _npy(_entry(data, entries[name])) for name in arrays}
  raise WeightsFileError(f'a zip file without weights; it holds {", ".join(list(entries)[:5]) or "nothing"}')


def _check_sizes(archive: list[zipfile.ZipInfo], data: memoryview) -> None:
  """Before anything is unpacked or its checksum computed."""
  end = 0
  for entry in sorted(archive, key=lambda entry: entry.header_offset):
    if entry.header_offset < end:
      raise WeightsFileError(f'corrupted: its member {entry.filename} overlaps another')
    end = entry.header_offset + entry.compress_size
  size, most = sum(entry.file_size for entry in archive), _max_bytes(data)
  if size > most:
    raise WeightsFileError(f'it unpacks to {size:,} bytes, and at most {most:,} are read from a file of its size')


def _entry(data: memoryview, entry: zipfile.ZipInfo) -> memoryview:
  """The bytes of a member, checked against its CRC: a view where it is stored plainly."""
  damaged = f'truncated or corrupted: its member {entry.filename}'
  header = bytes(data[entry.header_offset : entry.header_offset + 30])
  if header[:4] != b'PK\x03\x04':
    raise WeightsFileError(f'{damaged} has no header')
  start = entry.header_offset + 30 + sum(struct.unpack('<HH', header[26:30]))
  view = data[start : start + entry.compress_size]
  if entry.compress_type == zipfile.ZIP_DEFLATED:
    # Not by zipfile, which unpacks up to 2 GiB more than the member declares before it looks.
    view = memoryview(zlib.decompressobj(-zlib.MAX_WBITS).decompress(view, entry.file_size + 1))
  elif entry.compress_type != zipfile.ZIP_STORED:
    raise WeightsFileError(f'its member {entry.filename} is neither stored nor deflated')
  # torch can be told to leave the checksums out; it then writes zeros.
  if len(view) != entry.file_size or (entry.CRC and zlib.crc32(view) != entry.CRC):
    raise WeightsFileError(f'{damaged} does not match its size and checksum')
  return view


def _torch_zip(data: memoryview, entries: Mapping, root: str):
  """The object that torch.save put into a zip file, with its storages as views of it."""
  if f'{root}constants.pkl' in entries:
    raise WeightsFileError('a TorchScript program, not a state dict; save module.state_dict() instead')
  if f'{root}byteorder' in entries and bytes(_entry(data, entries[f'{root}byteorder'])) != b'little':
    raise WeightsFileError('written on a big-endian machine; only little-endian files are read')
  storages = {}

  def storage(key, dtype):
    if key not in storages:
      member = f'{root}data/{key}'
      if member not in entries:
        raise WeightsFileError(f'truncated or corrupted: its member {member} is missing')
      storages[key] = Storage(dtype, _entry(data, entries[member]))
    return storages[key]

  return unpickle.load(_Reader(_entry(data, entries[f'{root}data.pkl'])), storage)


def _npy(view: memoryview) -> np.ndarray:
  """A .npy member as a view; raises UnsafeFileError for Python objects."""
  head = io.BytesIO(view[: 1 << 16])
  version = np.lib.format.read_magic(head)
  readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  shape, fortran, dtype = readers[version](head)
  if dtype.hasobject:
    raise UnsafeFileError('an array of Python objects, which NumPy stores as a pickle: refused')
  return shaped(np.frombuffer(view[head.tell() :], dtype), shape, 'F' if fortran else 'C')


def _safetensors(data: memoryview) -> dict[str, np.ndarray]:
  """The tensors of a .safetensors file: a JSON table of (type, shape, byte range), then the bytes without gaps."""
  size = int.from_bytes(data[:8], 'little')
  if size > MAX_TABLE:
    raise WeightsFileError(f'its table of tensors has {size:,} bytes; at most {MAX_TABLE:,} are read')
  if 8 + size > len(data):
    raise WeightsFileError('truncated: its table of tensors is cut off')
  table, numbers = json.loads(bytes(data[8 : 8 + size])), data[8 + size :]
  table.pop('__metadata__', None)
  end = 0
  for begin, next_end in sorted(row['data_offsets'] for row in table.values()):
    if begin != end or next_end < begin:
      raise WeightsFileError(f'corrupted: its tensors overlap or leave a gap at byte {end} of their numbers')
    end = next_end
  if end != len(numbers):
    raise WeightsFileError(f'truncated or corrupted: its tensors end at byte {end} of {len(numbers)}')
  return {name: _safetensor(numbers, **row) for name, row in table.items()}


def _safetensor(numbers: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
  begin, end = data_offsets
  return shaped(np.frombuffer(numbers[begin:end], DTYPES[_SAFETENSORS_NAMES[dtype]]), shape)


def write_safetensors(path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
  """Writes a .safetensors file at once: a reader sees the old file or the whole new one.

  Args:
    path: local or gs://; its folder is made.
    tensors: name -> array.
    metadata: text entries for the file's header.

  Raises:
    ValueError: an array of a type that the format has no name for.
  """
  names = {DTYPES[ours]: theirs for theirs, ours in _SAFETENSORS_NAMES.items()}
  table, offset = ({'__metadata__': dict(metadata)} if metadata else {}), 0
  for name, value in tensors.items():
    if np.asarray(value).dtype not in names:
      raise ValueError(f'{name}: .safetensors has no type for {np.asarray(value).dtype}')
    end = offset + np.asarray(value).nbytes
    table[name] = {'dtype': names[np.asarray(value).dtype], 'shape': np.shape(value), 'data_offsets': [offset, end]}
    offset = end
  header = json.dumps(table).encode()
  header += b' ' * (-len(header) % 8)  # so that the numbers are aligned
  with replacing(path) as file:
    file.write(struct.pack('<Q', len(header)) + header)
    for value in tensors.values():
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
