"""Pickles that try to run code, in every place where a weights file can hold one: refused, nothing run."""

import pathlib
import struct
import zipfile

import numpy as np
import pytest
import torch_writers as writers

from pagoda_jax.weights.convert import torch_files
from pagoda_jax.weights.convert.unpickle import UnsafeFileError, WeightsFileError


def hostile_pickles(canary: pathlib.Path) -> dict[str, bytes]:
  """name -> a pickle that makes the file `canary`, each by another way in."""
  touch = f'touch {canary}'.encode()
  python = f'open({str(canary)!r}, "w")'.encode()
  long = struct.pack('<I', len(touch)) + touch
  return {
    'os.system': b'cos\nsystem\n(S' + repr(touch.decode()).encode() + b'\ntR.',
    'posix.system': b'\x80\x02cposix\nsystem\n(X' + long + b'tR.',
    'subprocess.Popen': b'\x80\x02csubprocess\nPopen\n(](X\x05\x00\x00\x00touchX'
    + struct.pack('<I', len(str(canary))) + str(canary).encode() + b'etR.',
    'builtins.eval': b'\x80\x04\x8c\x08builtins\x8c\x04eval\x93X' + struct.pack('<I', len(python)) + python + b'\x85R.',
    'builtins.exec': b'(ibuiltins\nexec\nS' + repr(python.decode()).encode() + b'\n.',
    'builtins.getattr': b'\x80\x02cbuiltins\ngetattr\n.',
    'builtins.__import__': b'\x80\x02c__builtin__\n__import__\n(X\x02\x00\x00\x00ostR.',
    'operator.attrgetter': b'\x80\x02coperator\nattrgetter\n(X\x06\x00\x00\x00systemtR.',
    'collections.OrderedDict.fromkeys': b'\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.',
    'pickle.loads': b'\x80\x02cpickle\nloads\n.',
    'runpy._run_code': b'\x80\x02crunpy\n_run_code\n.',
  }  # fmt: skip


HOSTILE = tuple(hostile_pickles(pathlib.Path('x')))


@pytest.mark.parametrize('name', HOSTILE)
@pytest.mark.parametrize('suffix', ('pt', 'pkl', 'zip.pt', 'inside.pkl'))
def test_pickle_that_runs_code_is_refused_and_nothing_is_run(name, suffix, tmp_path):
  canary = tmp_path / 'canary'
  data = hostile_pickles(canary)[name]
  path = tmp_path / f'f.{suffix}'
  if suffix == 'zip.pt':
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('archive/data.pkl', data)
  elif suffix == 'inside.pkl':  # in the bytes of a storage
    system = b'\x80\x02}.'
    legacy = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.' + b'\x80\x02M\xe9\x03.' + system + data
    writers.save_pickle(path, writers.Reduced(writers.Global('torch.storage', '_load_from_bytes'), (legacy,)))
  else:
    path.write_bytes(data)
  with pytest.raises(UnsafeFileError, match=f'{name}, which could run code: refused, nothing was run'):
    torch_files.read(path)
  assert not canary.exists()


def test_unknown_functions_of_a_pkl_are_not_called(tmp_path):
  """Outside the standard library nothing is imported: the name becomes an inert record."""
  canary = tmp_path / 'canary'
  runs = writers.Global('numpy.testing._private.utils', 'runstring')
  call = writers.Reduced(runs, (f'open({str(canary)!r}, "w")', {}))
  writers.save_pickle(tmp_path / 'n.pkl', {'ema': {'w': np.ones(1, np.float32)}, 'extra': call})
  assert torch_files.read(tmp_path / 'n.pkl').key == 'ema'
  assert not canary.exists()


def test_arrays_of_objects_are_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', w=np.array([{'a': 1}], dtype=object))
  with pytest.raises(UnsafeFileError, match='Python objects'):
    torch_files.read(tmp_path / 'a.npz')


def test_pickle_cannot_change_our_functions(tmp_path):
  """The BUILD instruction sets attributes; it must not reach what the next file is read with."""
  names = (('torch._utils', '_rebuild_tensor_v2'), ('collections', 'OrderedDict'), ('torch', 'FloatStorage'))
  for module, name in names:
    state = b'N}(X\x08\x00\x00\x00__call__NX\x05\x00\x00\x00dtypeNu\x86b.'
    state = b'\x80\x02c' + f'{module}\n{name}\n'.encode() + state
    (tmp_path / 'a.pkl').write_bytes(state)
    with pytest.raises(WeightsFileError):
      torch_files.read(tmp_path / 'a.pkl')
  expected = {'w': np.arange(6, dtype=np.float32).reshape(2, 3), 'half': np.ones(2, np.float16)}
  writers.save_zip(tmp_path / 'b.pt', expected)
  tensors = torch_files.read(tmp_path / 'b.pt').tensors
  assert list(tensors) == list(expected)
  for name, value in expected.items():
    assert tensors[name].dtype == value.dtype and np.array_equal(tensors[name], value)
