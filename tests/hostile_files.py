"""Files that ask for far more time or memory than their size warrants; `FILES` says what becomes of each.

Run as a script on a folder of them: reads each with half a gigabyte of memory and prints what became of it.
"""

import itertools
import json
import os
import pathlib
import pickle
import resource
import struct
import sys
import zipfile
import zlib

import numpy as np
import torch_writers as writers

from pagoda_jax.weights.convert import state_dicts, torch_files, unpickle

# Pickles, instruction by instruction


def text(value: str) -> bytes:
  return pickle.BINUNICODE + struct.pack('<I', len(value.encode())) + value.encode()


def name(module: str, of: str) -> bytes:
  return f'c{module}\n{of}\n'.encode()


def call(function: bytes, *args: bytes) -> bytes:
  return function + b'(' + b''.join(args) + b'tR'


def entry(key: bytes, value: bytes = b'N') -> bytes:
  return key + value + pickle.SETITEM


def keep(place: int) -> bytes:
  return pickle.BINPUT + bytes([place])


def kept(place: int) -> bytes:
  return pickle.BINGET + bytes([place])


ONES = pickle.dumps(np.ones(2, np.float32), 2)[2:-1]
DOUBLED = b')' + 60 * (pickle.DUP + pickle.TUPLE2)  # 2 ** 60 empty tuples, one within the other
DEEP = b')' + 150_000 * pickle.TUPLE1
FLOATS = call(name('numpy', 'dtype'), text('f4'))
FROMBUFFER = name('numpy._core.numeric', '_frombuffer')


def dictionary(*entries: bytes) -> bytes:
  """A pickle of a dictionary with one array, w, and more."""
  return b'\x80\x04}' + entry(text('w'), ONES) + b''.join(entries) + b'.'


def tensor(storage: bytes, offset=b'K\x00', shape=b'(K\x01t', strides=b'(K\x01t') -> bytes:
  return call(name('torch._utils', '_rebuild_tensor_v2'), storage, offset, shape, strides)


def deep_records(count: int) -> bytes:
  """Objects that were each made from the one before."""
  made = b'0' + kept(1) + kept(2) + b'\x85R' + keep(2)
  return name('argparse', 'Namespace') + keep(1) + b'0N' + keep(2) + count * made


def modules(depth: int) -> bytes:
  """A network whose every module has the next one twice, and none a parameter."""
  groups = entry(text('_parameters'), b'}') + entry(text('_buffers'), b'}')
  made = b'}'
  for _ in range(depth):
    children = b'}' + entry(text('a'), kept(1)) + entry(text('b'), kept(1))
    state = b'}' + groups + entry(text('_modules'), children)
    made += keep(1) + b'0' + name('somewhere', 'Net') + b')\x81' + state + b'b'
  return made


def dictionaries(count: int) -> bytes:
  """Three levels of dictionaries, the entries of each one the same."""
  names = [text(str(i)) for i in range(count)]
  made = b'}'
  for _ in range(3):
    made += keep(1) + b'0}' + b''.join(entry(one, kept(1)) for one in names)
  return made


def own_module() -> bytes:
  """A network that is its own child."""
  groups = entry(text('_parameters'), b'}') + entry(text('_buffers'), b'}')
  state = b'}' + groups + entry(text('_modules'), b'}' + entry(text('a'), kept(1)))
  return name('somewhere', 'Net') + b')\x81' + keep(1) + state + b'b'


def storages_within(levels: int) -> bytes:
  """A storage whose pickle loads the one below eight times."""
  load = name('torch.storage', '_load_from_bytes')
  system = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.'
  data = system + b'N.].'
  for _ in range(levels):
    inner = pickle.BINBYTES + struct.pack('<I', len(data)) + data + keep(1)
    data = system + b'\x80\x02' + inner + 8 * call(load, kept(1)) + b'.].'
  return call(load, pickle.BINBYTES + struct.pack('<I', len(data)) + data)


LONG_TEXT = text('x' * 2**20) + keep(1) + b'0'
PAIRS = b'(' + b''.join(b'(' + text(str(i)) + b'Nt' for i in range(20_000)) + b'l' + keep(1) + b'0'
COLLIDING = b''.join(f'p{place * (2**61 - 1)}\n'.encode() for place in range(1, 100_000))

# name -> (pickle, what the refusal says; None where w is read and the rest does no harm)
PICKLES = {
  'key-of-doubled-tuples': (dictionary(entry(DOUBLED)), None),
  'key-of-deep-tuples': (dictionary(entry(DEEP)), None),
  'deep-records': (dictionary(entry(text('deep'), deep_records(50_000))), None),
  'set-of-doubled-tuples': (dictionary(entry(text('set'), b'\x8f(' + DOUBLED + b'\x90')), None),
  'frozenset-of-doubled-tuples': (dictionary(entry(text('set'), b'(' + DOUBLED + b'\x91')), None),
  'called-set': (dictionary(entry(text('set'), call(name('builtins', 'set'), b'](' + DOUBLED + b'e'))), None),
  'str': (dictionary(entry(text('str'), call(name('builtins', 'str'), DOUBLED))), None),
  'device': (dictionary(entry(text('device'), call(name('torch', 'device'), DOUBLED))), None),
  'int-of-bytes': (dictionary(entry(text('int'), call(name('builtins', 'bytes'), b'\x8a\x05\0\0\0\0\2'))), None),
  'type-of-doubled-tuples': (
    dictionary(entry(text('v'), call(FROMBUFFER, b'C\0', call(name('numpy', 'dtype'), DOUBLED), b')', text('C')))),
    'only numbers are read',
  ),
  'bytes-of-a-number': (
    dictionary(entry(text('v'), call(FROMBUFFER, b'\x8a\x05\0\0\0\0\2', FLOATS, b'(K\x01t', text('C')))),
    'only numbers are read',
  ),
  'shape-of-minus-one': (
    dictionary(entry(text('v'), call(FROMBUFFER, b'C\x04abcd', FLOATS, b'(J\xff\xff\xff\xfft', text('C')))),
    'are no counts',
  ),
  'same-text-in-many-arrays': (
    dictionary(
      LONG_TEXT + FLOATS + keep(2) + b'0',
      *(entry(text(f'v{i}'), call(FROMBUFFER, kept(1), kept(2), b'J\0\0\4\0\x85', text('C'))) for i in range(3000)),
    ),
    'more than 67,108,864 bytes, the most for a file of its size',
  ),
  'same-text-encoded-again': (
    dictionary(
      LONG_TEXT + name('_codecs', 'encode') + keep(2) + b'0',
      *(entry(text(f'v{i}'), call(kept(2), kept(1), text('latin1'))) for i in range(3000)),
    ),
    None,
  ),
  'same-list-in-many-dictionaries': (
    dictionary(
      PAIRS + name('collections', 'OrderedDict') + keep(2) + b'0',
      *(entry(text(f'v{i}'), call(kept(2), kept(1))) for i in range(3000)),
    ),
    'more than 400,000 instructions',
  ),
  'modules-twice': (b'\x80\x04' + modules(60) + b'.', 'more than 100,000 entries: dictionaries or modules within'),
  'module-of-itself': (b'\x80\x04' + own_module() + b'.', 'more than 500 characters: a.a.a.'),
  'dictionaries-many-times': (b'\x80\x04' + dictionaries(2000) + b'.', 'more than 100,000 entries'),
  'storages-in-storages': (
    dictionary(entry(text('v'), tensor(storages_within(12)))),
    'holds an object of torch.storage._load_from_bytes',
  ),
  'memo-of-equal-hashes': (dictionary(b'}' + COLLIDING + b'0'), 'a place in the memo'),
  'long-name': (dictionary(entry(text('module.' * 100_000), ONES)), 'more than 500 characters: module.module'),
  'long-class': (b'\x80\x04' + text('x' * 10**6) + b'\x8c\x01y\x93.', 'more than 500 characters'),
  'bytes-of-2**60': (dictionary(entry(text('v'), b'\x8e' + struct.pack('<Q', 2**60))), 'truncated or corrupted'),
  'bytearray-of-2**60': (dictionary(entry(text('v'), b'\x96' + struct.pack('<Q', 2**60))), 'truncated or corrupted'),
  'text-of-2**60': (dictionary(entry(text('v'), b'\x8d' + struct.pack('<Q', 2**60))), 'truncated or corrupted'),
  'long-of-2**31': (dictionary(entry(text('v'), b'\x8b' + struct.pack('<i', 2**31 - 1))), 'truncated or corrupted'),
  'frame-of-2**60': (b'\x80\x04\x95' + struct.pack('<Q', 2**60) + b'}.', 'no named tensors'),
  'memo-of-2**32': (dictionary(b'r\xff\xff\xff\xff'), None),
}  # fmt: skip


def zip_of(path, changes: dict, members: dict = {}, **more: bytes) -> None:  # noqa: B006
  """A zip file of stored members whose directory tells something else: {member: {field: value}}."""
  with zipfile.ZipFile(path, 'w') as archive:
    for member, data in (members | more).items():
      archive.writestr(member, data)
    for member, fields in changes.items():
      for field, value in fields.items():
        setattr(archive.getinfo(member), field, value)


def zeros(mebibytes: int, told: int, method: int = zipfile.ZIP_DEFLATED):
  """Writes a member of so many zeros, said to be `told` bytes."""
  squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
  once = squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
  packed = mebibytes * once + squeeze.flush()
  fields = {'compress_type': method, 'file_size': told, 'CRC': 1}
  return lambda path: zip_of(path, {'w.npy': fields}, {'w.npy': packed})


def npy(header: str) -> bytes:
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header.encode()


def safetensors(table, numbers: bytes = bytes(8), size: int | None = None):
  """Writes a table, as text or as rows, and numbers."""
  text = table if isinstance(table, str) else json.dumps(table)
  start = struct.pack('<Q', len(text) if size is None else size)
  return lambda path: path.write_bytes(start + text.encode() + numbers)


def row(begin, end, shape=None):
  return {'dtype': 'F32', 'shape': [(end - begin) // 4] if shape is None else shape, 'data_offsets': [begin, end]}


def views(*views):
  return lambda path: writers.save_zip(path, {f'v{i}': view for i, view in enumerate(views)})


def overlapping(path):
  members = {f'{i}.npy': npy(' ' * 118) for i in range(2)}
  zip_of(path, {'1.npy': {'header_offset': 0}}, members)


def legacy(storages: bytes):
  """Writes a file of torch.save's old format that ends in these keys, counts and numbers."""
  system = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.'
  storage = b'(' + text('storage') + name('torch', 'FloatStorage') + text('0') + text('cpu') + b'K\x01NtQ'
  content = b'\x80\x02}' + entry(text('w'), tensor(storage)) + b'.'
  return lambda path: path.write_bytes(system + content + b'\x80\x02' + storages)


BASE = np.ones(2**18, np.float32)
COUNT = b'](' + text('0') + b'e.'
# name -> (what writes it, what the refusal says)
OTHERS = {
  'zero-strides.pt': (views(writers.View(BASE, 0, (2**16, 2**16), (0, 0))), 'more elements than its storage, 262144'),
  'one-storage-many-times.pt': (views(*itertools.repeat(BASE, 80)), 'more than 67,108,864 bytes, the most'),
  'side-of-an-empty-tensor.pt': (views(writers.View(BASE, 0, (0, 2**39), (1, 1))), 'no elements, but the shape'),
  'shape-of-2**60.pt': (views(writers.View(BASE, 0, (2**60,), (0,))), 'are no counts'),
  '8-gib.npz': (zeros(8192, 2**33), 'it unpacks to 8,589,934,592 bytes, and at most'),
  '8-gib-said-to-be-100.npz': (zeros(8192, 100), 'does not match its size'),
  'another-method.npz': (zeros(1, 100, zipfile.ZIP_LZMA), 'neither stored nor deflated'),
  'overlapping.npz': (overlapping, '1.npy overlaps another'),
  'minus-one.npz': (lambda path: zip_of(path, {}, {'w.npy': npy(
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }") + bytes(8)}), 'are no counts'),
  'deep-header.npz': (lambda path: zip_of(path, {}, {'w.npy': npy('-' * 9000 + '1')}), 'truncated or corrupted'),
  'broken-header.npz': (lambda path: zip_of(path, {}, {'w.npy': npy("{'''")}), 'truncated or corrupted'),
  'table-of-2**60.safetensors': (safetensors({}, size=2**60), 'of tensors has 1,152,921,504,606,846,976 bytes; at'),
  'table-cut-off.safetensors': (safetensors({}, size=2**20), 'table of tensors is cut off'),
  'deep-table.safetensors': (safetensors('{"a":' + '[' * 10**6), 'truncated or corrupted'),
  'overlap.safetensors': (safetensors({'a': row(0, 8), 'b': row(4, 8)}), 'overlap or leave a gap'),
  'gap.safetensors': (safetensors({'a': row(4, 8)}), 'overlap or leave a gap'),
  'backwards.safetensors': (safetensors({'a': row(0, 8), 'b': row(8, 4, [1])}), 'overlap or leave a gap'),
  'lost-end.safetensors': (safetensors({'a': row(0, 4)}), 'end at byte 4 of 8'),
  'minus-one.safetensors': (safetensors({'a': row(0, 8, [-1])}), 'are no counts'),
  'shape-of-2**70.safetensors': (safetensors({'a': row(0, 0, [0, 2**70])}, b''), 'are no counts'),
  'storage-of-2**60.pth': (legacy(COUNT + struct.pack('<q', 2**60)), 'truncated: storage'),
  'storage-of-minus-one.pth': (legacy(COUNT + struct.pack('<q', -1)), 'truncated: storage'),
  'key-of-doubled-tuples.pth': (legacy(b'](' + DOUBLED + b'e.'), 'belongs to no tensor'),
  'number-of-storages.pth': (legacy(b'K\x05.'), 'truncated or corrupted'),
  'fifo.pt': (os.mkfifo, 'is a pipe, device or socket, and a regular file is needed'),
  'device.pt': (lambda path: path.symlink_to('/dev/zero'), 'is a pipe, device or socket'),
}  # fmt: skip


def written(data: bytes):
  return lambda path: path.write_bytes(data)


FILES = OTHERS | {f'{name}.pkl': (written(data), said) for name, (data, said) in PICKLES.items()}


def outcome(path: pathlib.Path) -> str:
  """The names of the tensors, or the error."""
  try:
    return ' '.join(torch_files.read(path).tensors)
  except Exception as error:
    return f'{type(error).__name__}: {error}'


if __name__ == '__main__':
  # Fewer than in earnest, so that reaching them takes no time.
  unpickle.MAX_STEPS, state_dicts.MAX_ENTRIES = 400_000, 100_000
  used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
  for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    print(json.dumps([path.name, outcome(path)]), flush=True)
