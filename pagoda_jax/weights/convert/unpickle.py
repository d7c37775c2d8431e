"""Reading pickles without running anything in them.

A pickle is a program: whatever it names, Python's own reader imports and calls. Here every name goes
through `_Unpickler.find_class`, which hands out nothing but plain containers, descriptions of tensors
and, for NVIDIA's network files, inert `Record`s that only remember what they were given. Nothing is
imported and no torch is needed; asking for a part of the standard library that is not plain data (os,
subprocess, builtins.eval, ...) is an error.

Only records, mappings and NumPy arrays take a state (the BUILD instruction sets attributes otherwise),
so a hostile pickle cannot change our own functions and classes either.
"""

import dataclasses
import io
import math
import pickle
import struct
import sys
from collections.abc import Callable
from typing import ClassVar

import ml_dtypes
import numpy as np


class WeightsFileError(ValueError):
  """A weights file is damaged, or is not what was asked for; the message says which file and why."""


class UnsafeFileError(WeightsFileError):
  """A pickle asks for something that could run code; nothing of it was run."""


_NUMPY_TYPES = ('float64', 'float32', 'float16', 'bool', 'complex64', 'complex128')
_NUMPY_TYPES += tuple(f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64))
_OTHER_TYPES = ('bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz')
DTYPES = {name: np.dtype(name) for name in _NUMPY_TYPES}
DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _OTHER_TYPES}

STORAGES = {
  'DoubleStorage': 'float64',
  'FloatStorage': 'float32',
  'HalfStorage': 'float16',
  'BFloat16Storage': 'bfloat16',
  'LongStorage': 'int64',
  'IntStorage': 'int32',
  'ShortStorage': 'int16',
  'CharStorage': 'int8',
  'ByteStorage': 'uint8',
  'BoolStorage': 'bool',
  'ComplexFloatStorage': 'complex64',
  'ComplexDoubleStorage': 'complex128',
  'UntypedStorage': 'uint8',
}


@dataclasses.dataclass(eq=False)
class Storage:
  """A run of numbers in a file; `data` is a buffer of its bytes, possibly filled in later."""

  dtype: np.dtype
  data: object = None


@dataclasses.dataclass(eq=False)
class Tensor:
  """A strided view of a storage, in elements as torch counts them."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: np.dtype

  def array(self) -> np.ndarray:
    """The numbers as a read-only view of the storage, without a copy.

    Raises:
      WeightsFileError: the view leaves its storage, as only a damaged or forged file's can.
    """
    if not isinstance(self.storage, Storage) or self.storage.data is None:
      raise WeightsFileError('a tensor without its storage')
    flat = np.frombuffer(self.storage.data, self.dtype)
    shape, strides = tuple(int(n) for n in self.shape), tuple(int(n) for n in self.strides)
    if math.prod(shape) == 0 and min(shape, default=0) == 0:
      return np.zeros(shape, self.dtype)
    last = self.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if self.offset < 0 or min((*shape, 0)) < 0 or min((*strides, 0)) < 0 or last >= flat.size:
      raise WeightsFileError(f'a tensor of shape {shape} reaches beyond its storage of {flat.size} elements')
    byte_strides = tuple(stride * flat.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(flat[self.offset :], shape, byte_strides, writeable=False)


class _Parameter:
  """torch.nn.Parameter, as PyTorch before 0.4 pickled it: made from its tensor, then given a state."""

  def __new__(cls, tensor, *_):
    return tensor


class Record:
  """An object of an unknown class: the arguments, state and items it was given; nothing is run."""

  global_name = ''

  def __new__(cls, *args, **kwargs):
    record = super().__new__(cls)
    record.args, record.kwargs, record.state, record.items, record.elements = args, kwargs, None, {}, []
    return record

  def __init__(self, *args, **kwargs):
    pass

  def __call__(self, *args, **kwargs):
    return type(self)(self, *args, **kwargs)  # what a function gave, called: one more record

  def __setstate__(self, state):
    self.state = state

  def __setitem__(self, key, value):
    self.items[key] = value

  def append(self, value):
    self.elements.append(value)

  def extend(self, values):
    self.elements.extend(values)


class Mapping(dict):
  """Any dictionary class (OrderedDict, EasyDict, ...) as a plain one; attributes set on it are dropped."""

  def __setstate__(self, state):
    pass


class NumpyArray:
  """A pickled NumPy array; its state arrives by BUILD after its creation."""

  def __init__(self, dtype=None, shape=(), data=b'', fortran=False):
    self._state = (dtype, shape, data, fortran)

  def __setstate__(self, state):
    _, shape, dtype, fortran, data = state
    self._state = (dtype, shape, data, fortran)

  def array(self) -> np.ndarray:
    """The numbers, read-only; raises WeightsFileError where they are objects or too few."""
    dtype, shape, data, fortran = self._state
    if isinstance(data, str):  # written by Python 2
      data = data.encode('latin1')
    if not isinstance(dtype, NumpyDtype) or not isinstance(data, (bytes, bytearray)):
      raise WeightsFileError('a NumPy array of Python objects; only numbers are read')
    return np.frombuffer(data, dtype.dtype()).reshape(shape, order='F' if fortran else 'C')


class NumpyDtype:
  """A pickled NumPy type of plain numbers."""

  def __init__(self, code, *_):
    self._code, self._order = code, '='

  def __setstate__(self, state):
    self._order = state[1] if state[1] in ('<', '>') else '='

  def dtype(self) -> np.dtype:
    code = str(self._code)
    if code.lstrip('<>|=')[:1] not in tuple('biufc'):
      raise WeightsFileError(f'a NumPy array of type {code!r}; only numbers are read')
    return np.dtype(code).newbyteorder(self._order)


class _Call:
  """One of our functions under the name of one of theirs."""

  def __init__(self, function: Callable):
    self._function = function

  def __call__(self, *args):
    return self._function(*args)


@dataclasses.dataclass(frozen=True)
class _StorageType:
  dtype: np.dtype


def _tensor(storage, offset, shape, strides, *_):
  return Tensor(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _typed_tensor(storage, offset, shape, strides, requires_grad, hooks, dtype, *_):
  return Tensor(storage, offset, tuple(shape), tuple(strides), dtype.dtype)


def _encoded(text, encoding='latin1'):
  return text.encode('latin1')


def _reconstructed(cls, *_):
  """copyreg._reconstructor: an empty object of a class that we handed out."""
  return cls() if isinstance(cls, type) and issubclass(cls, (Record, Mapping)) else Mapping()


_NUMPY_FUNCTIONS = {
  'multiarray._reconstruct': lambda *_: NumpyArray(),
  'multiarray.scalar': lambda dtype, data=b'': NumpyArray(dtype, (), data),
  'numeric._frombuffer': lambda data, dtype, shape, order: NumpyArray(dtype, shape, bytes(data), order == 'F'),
}

_FUNCTIONS = {
  'torch._utils._rebuild_tensor': _tensor,
  'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_tensor_v3': _typed_tensor,
  'torch._utils._rebuild_parameter': lambda tensor, *_: tensor,
  'torch._utils._rebuild_parameter_with_state': lambda tensor, *_: tensor,
  'torch._tensor._rebuild_from_type_v2': lambda function, cls, args, state: function(*args),
  'torch.Size': lambda size=(): tuple(size),
  'torch.device': lambda *args: ':'.join(map(str, args)),
  'torch.storage._load_from_bytes': lambda data: load_storage_bytes(data),
  'numpy.dtype': lambda *args: NumpyDtype(*args),
  'collections.defaultdict': lambda *_: Mapping(),
  'collections.Counter': Mapping,
  '_codecs.encode': _encoded,
  'copyreg._reconstructor': _reconstructed,
} | {f'numpy.{core}.{name}': function for core in ('core', '_core') for name, function in _NUMPY_FUNCTIONS.items()}

_TYPES = {f'builtins.{cls.__name__}': cls for cls in (set, frozenset, complex, slice, int, float, bool, str)} | {
  'collections.OrderedDict': Mapping,
  'dnnlib.util.EasyDict': Mapping,
  'torch.nn.parameter.Parameter': _Parameter,
}

# Classes that are only named, and settings of a training run that often lie beside the weights.
_INERT = ('argparse.Namespace', 'pathlib.PosixPath', 'pathlib.Path', 'torch.Tensor', 'numpy.ndarray')
_INERT += ('builtins.object', 'builtins.list', 'builtins.dict', 'builtins.tuple', 'builtins.bytes')
_PYTHON_2 = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}


class _Unpickler(pickle._Unpickler):
  """Python's reader, restricted; `records`: unknown classes become inert records instead of an error.

  The one written in Python and not the one in C, which a few forged bytes make allocate gigabytes.
  """

  def __init__(self, file, storage: Callable | None, records: bool):
    super().__init__(file, encoding='latin1')
    self._storage, self._records = storage, records

  def load_build(self):
    state = self.stack.pop()
    if isinstance(self.stack[-1], Tensor):
      return  # of a `_Parameter`: whether it wants a gradient
    if not isinstance(self.stack[-1], (Record, Mapping, NumpyArray, NumpyDtype)):
      raise pickle.UnpicklingError(f'state given to a {type(self.stack[-1]).__name__}')
    self.stack[-1].__setstate__(state)

  def load_bytearray8(self):
    (size,) = struct.unpack('<Q', self.read(8))
    self.append(bytearray(self.read(size)))

  dispatch: ClassVar = pickle._Unpickler.dispatch | {
    pickle.BUILD[0]: load_build,
    pickle.BYTEARRAY8[0]: load_bytearray8,
  }

  def get_extension(self, code):
    raise pickle.UnpicklingError('extension codes are not read')

  def find_class(self, module, name):
    module = _PYTHON_2.get(module, module)
    full = f'{module}.{name}'
    if full in _FUNCTIONS:
      return _Call(_FUNCTIONS[full])
    if full in _TYPES:
      return _TYPES[full]
    if module in ('torch', 'torch.cuda', 'torch.storage') and name in STORAGES:
      return _StorageType(DTYPES[STORAGES[name]])
    if module == 'torch' and name in DTYPES:
      return _StorageType(DTYPES[name])
    if full in _INERT:
      return type(name, (Record,), {'global_name': full})
    package = module.split('.')[0]
    if package in sys.stdlib_module_names or not package:
      raise UnsafeFileError(
        f'the pickle asks for {full}, which could run code: refused, nothing was run. '
        'Get the file from its publisher, or as .safetensors.'
      )
    if self._records:
      return type(name, (Record,), {'global_name': full})
    raise WeightsFileError(
      f'the pickle holds an object of {full}; only tensors and plain containers are read from a .pt file. '
      'Save the state_dict() alone, or as .safetensors.'
    )

  def persistent_load(self, pid):
    if self._storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
      raise pickle.UnpicklingError('a persistent id that torch does not write')
    if not isinstance(pid[1], _StorageType):
      raise pickle.UnpicklingError('a storage of unknown type')
    return self._storage(pid)


# What damaged bytes make Python's reader raise, besides its own error.
DAMAGE = (
  pickle.UnpicklingError,
  EOFError,
  ValueError,
  TypeError,
  AttributeError,
  LookupError,
  ArithmeticError,
  MemoryError,
  RecursionError,
  struct.error,
)


def load(file, storage: Callable | None = None, records: bool = False):
  """The object of one pickle, from an open binary file.

  Args:
    file: where to read; left behind the pickle's end.
    storage: gives the `Storage` of a persistent id ('storage', type, key, location, count, ...).
    records: whether objects of unknown classes become `Record`s (NVIDIA's files) or an error.

  Raises:
    UnsafeFileError: the pickle asks for something that could run code.
    WeightsFileError: an object of an unknown class, or a damaged pickle.
  """
  try:
    return _Unpickler(file, storage, records).load()
  except WeightsFileError:
    raise
  except DAMAGE as error:
    raise WeightsFileError(f'truncated or corrupted pickle ({type(error).__name__}: {str(error)[:200]})') from error


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def is_legacy(head: bytes) -> bool:
  """Whether the first bytes are those of torch.save's format before zip files."""
  return head[:2] in (b'\x80\x02', b'\x80\x03', b'\x80\x04') and pickle.encode_long(LEGACY_MAGIC) in head[:32]


def load_legacy(file, view: Callable[[int, int], object], size: int):
  """The object of a file in torch.save's old format: five pickles, then each storage's count and bytes.

  Args:
    file: open binary file at its start.
    view: (start, end) -> a buffer of those bytes of the file.
    size: the file's size in bytes.

  Raises:
    UnsafeFileError, WeightsFileError: as `load`.
  """
  storages = {}

  def storage(pid):
    _, cls, key, _, _, *window = pid
    base = storages.setdefault(key, Storage(cls.dtype))
    if not window or window[0] is None:
      return base
    raise WeightsFileError('windows into shared storages (PyTorch before 0.4) are not read')

  magic, _, system = load(file), load(file), load(file)
  if magic != LEGACY_MAGIC:
    raise WeightsFileError('truncated or corrupted: no magic number')
  if isinstance(system, dict) and not system.get('little_endian', True):
    raise WeightsFileError('written on a big-endian machine; only little-endian files are read')
  result = load(file, storage)
  for key in load(file):
    if key not in storages:
      raise WeightsFileError(f'truncated or corrupted: storage {key!r} belongs to no tensor')
    count = int.from_bytes(file.read(8), 'little', signed=True)
    start = file.tell()
    end = start + count * storages[key].dtype.itemsize
    if not start <= end <= size:
      raise WeightsFileError(f'truncated: storage {key!r} ends at byte {end} of {size}')
    storages[key].data = view(start, end)
    file.seek(end)
  return result


def load_storage_bytes(data: bytes) -> Storage:
  """A storage inside a plain pickle: a whole file of torch.save's old format as bytes."""
  if not isinstance(data, bytes) or not is_legacy(data[:32]):
    raise WeightsFileError('a storage inside the pickle is not in the format of torch.save')
  whole = memoryview(data)
  return load_legacy(io.BytesIO(data), lambda start, end: whole[start:end], len(data))
