"""Reading pickles without running anything in them.

A pickle is a program: whatever it names, Python's own reader imports and calls. Here a name is an inert
`Record`, and so is what calling it gives; out come plain containers, text, numbers and Records of what
they were made from. `arrays.py` then makes arrays of those that are wanted. Nothing is imported and no
torch is needed; asking for a part of the standard library that is not plain data (os, subprocess,
builtins.eval, ...) is an error.

Nor does a pickle take more time or memory than its size warrants: while it is read no value is copied, compared,
printed, computed or, but for text, hashed, so that naming a large one again and again stays cheap. MAX_STEPS
bounds the program itself.
"""

import dataclasses
import io
import pickle
import struct
import sys
import tokenize
from collections.abc import Callable
from typing import ClassVar

import ml_dtypes
import numpy as np

# Some 30 a tensor, some 100 where its numbers are in the pickle. They take two seconds, and 160 MB at worst.
MAX_STEPS = 2_000_000
# Characters of a name: of a tensor with its modules, of a class with its package.
MAX_NAME = 500


class WeightsFileError(ValueError):
  """A weights file is damaged, or is not what was asked for; the message says which file and why."""


class UnsafeFileError(WeightsFileError):
  """A pickle asks for something that could run code; nothing of it was run."""


# What damaged bytes make Python's readers of pickles, zip files, JSON and NumPy's headers raise.
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
  SyntaxError,
  struct.error,
  tokenize.TokenError,
)


class Allowance:
  """So much of something for one file, and no more."""

  def __init__(self, amount: int, refusal: str):
    self._left, self._refusal = amount, refusal

  def take(self, amount: int = 1) -> None:
    """Raises WeightsFileError with the `refusal` once more than all of it is taken."""
    self._left -= amount
    if self._left < 0:
      raise WeightsFileError(self._refusal)


_NUMPY_TYPES = ('float64', 'float32', 'float16', 'bool', 'complex64', 'complex128')
_NUMPY_TYPES += tuple(f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64))
_OTHER_TYPES = ('bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz')
DTYPES = {name: np.dtype(name) for name in _NUMPY_TYPES}
DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _OTHER_TYPES}

_STORAGES = {
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
# torch's name of a type of numbers, or of a storage of them -> ours
TYPES = {f'torch.{name}': dtype for name, dtype in DTYPES.items()} | {
  f'{module}.{name}': DTYPES[dtype]
  for module in ('torch', 'torch.cuda', 'torch.storage')
  for name, dtype in _STORAGES.items()
}


@dataclasses.dataclass(eq=False, slots=True)
class Storage:
  """A run of numbers in a file; `data` is a buffer of its bytes, possibly filled in later."""

  dtype: np.dtype
  data: object = None


@dataclasses.dataclass(eq=False, slots=True)
class Record:
  """A name in a pickle, or an object made by calling it: its arguments and the state it was given; nothing is run.

  The items of lists and dictionaries of unknown classes are dropped.
  """

  name: str
  args: tuple = ()
  state: object = None

  def append(self, value):
    pass

  def extend(self, values):
    pass


TENSORS = tuple(f'torch._utils._rebuild_tensor{version}' for version in ('', '_v2', '_v3'))
NUMPY_ARRAYS = ('multiarray._reconstruct', 'multiarray.scalar', 'numeric._frombuffer')
NUMPY_ARRAYS = tuple(f'numpy.{core}.{name}' for core in ('core', '_core') for name in NUMPY_ARRAYS)
_INLINE_STORAGE = 'torch.storage._load_from_bytes'
_SUBCLASS = 'torch._tensor._rebuild_from_type_v2'
_DICTIONARIES = ('collections.OrderedDict', 'collections.defaultdict', 'collections.Counter', 'dnnlib.util.EasyDict')
# Stand for their first argument: sets for a list, and text for its bytes, in latin1, until they are needed.
_SAME = ('builtins.set', 'builtins.frozenset', 'torch.Size', '_codecs.encode', 'torch.nn.parameter.Parameter')
_SAME += ('torch._utils._rebuild_parameter', 'torch._utils._rebuild_parameter_with_state')
# Classes that are only named, and settings of a training run that often lie beside the weights.
_INERT = ('argparse.Namespace', 'pathlib.PosixPath', 'pathlib.Path', 'torch.Tensor', 'torch.device', 'numpy.ndarray')
_INERT += tuple(f'builtins.{name}' for name in 'object list dict tuple bytes complex slice int float bool str'.split())
_KNOWN = {*TYPES, *TENSORS, *NUMPY_ARRAYS, *_DICTIONARIES, *_SAME, *_INERT, _SUBCLASS}
_KNOWN |= {'copyreg._reconstructor', 'numpy.dtype'}
_PYTHON_2 = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}


class _Counted(dict):
  """The reader's table of instructions: looking one up is a step."""

  def __init__(self, table: dict, steps: Allowance):
    super().__init__(table)
    self._steps = steps

  def __getitem__(self, code):
    self._steps.take()
    return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):
  """Python's reader, restricted; arguments as `load`.

  The one written in Python and not the one in C, which a few forged bytes make allocate gigabytes.
  """

  def __init__(self, file, storage: Callable | None, records: bool, steps: Allowance):
    super().__init__(file, encoding='latin1')
    self._storage, self._records, self._steps = storage, records, steps
    self._inline = {}  # id of a storage's bytes -> (those bytes, storage): however often they are named, read once
    self.dispatch = _Counted(self.dispatch, steps)

  def find_class(self, module, name):
    if len(module) + len(name) > MAX_NAME:
      raise pickle.UnpicklingError(f'a name of more than {MAX_NAME} characters')
    full = f'{_PYTHON_2.get(module, module)}.{name}'
    if full in _KNOWN or (full == _INLINE_STORAGE and self._storage is None):
      return Record(full)
    package = full.split('.')[0]
    if package in sys.stdlib_module_names or not package:
      raise UnsafeFileError(
        f'the pickle asks for {full}, which could run code: refused, nothing was run. '
        'Get the file from its publisher, or as .safetensors.'
      )
    if self._records:
      return Record(full)
    raise WeightsFileError(
      f'the pickle holds an object of {full}; only tensors and plain containers are read from a .pt file. '
      'Save the state_dict() alone, or as .safetensors.'
    )

  def _made(self, function, args):
    """What stands for `function(*args)`."""
    if not isinstance(function, Record) or not isinstance(args, tuple):
      raise pickle.UnpicklingError(f'a call of a {type(function).__name__}')
    if function.name in _DICTIONARIES:
      return self._dictionary(args[0] if args else None)
    if function.name in _SAME:
      return args[0] if args else []
    if function.name == 'copyreg._reconstructor':
      return self._made(args[0], ())
    if function.name == _SUBCLASS:
      return self._made(args[0], args[2])
    if function.name == _INLINE_STORAGE:
      return self._inline_storage(args[0])
    return Record(function.name, args)

  def _dictionary(self, given):
    if isinstance(given, dict):
      return given
    if not isinstance(given, list):  # a defaultdict's factory
      return {}
    self._steps.take(len(given))
    return _named([part for key, value in given for part in (key, value)])  # pairs, as Python 2 wrote it

  def _inline_storage(self, data):
    if id(data) not in self._inline:
      self._inline[id(data)] = data, _load_storage(data, self._steps)
    return self._inline[id(data)][1]

  def persistent_load(self, pid):
    if self._storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
      raise pickle.UnpicklingError('a persistent id that torch does not write')
    _, cls, key, _, _, *window = pid
    if not isinstance(cls, Record) or cls.name not in TYPES or type(key) is not str or len(key) > MAX_NAME:
      raise pickle.UnpicklingError('a storage of unknown type or key')
    if window and window[0] is not None:
      raise WeightsFileError('windows into shared storages (PyTorch before 0.4) are not read')
    return self._storage(key, TYPES[cls.name])

  def get_extension(self, code):
    raise pickle.UnpicklingError('extension codes are not read')

  def _instantiate(self, cls, args):
    self.append(self._made(cls, tuple(args)))

  def load_reduce(self):
    args = self.stack.pop()
    self.stack[-1] = self._made(self.stack[-1], args)

  def load_newobj_ex(self):
    del self.stack[-1]  # arguments by keyword
    self.load_reduce()

  def load_build(self):
    state, made = self.stack.pop(), self.stack[-1]
    if isinstance(made, Record):
      made.state = state
    elif not isinstance(made, dict):  # attributes of a dictionary are dropped
      raise pickle.UnpicklingError(f'state given to a {type(made).__name__}')

  def _set(self, items: list):
    if isinstance(self.stack[-1], dict):
      self.stack[-1].update(_named(items))
    elif not isinstance(self.stack[-1], Record):
      raise pickle.UnpicklingError(f'items given to a {type(self.stack[-1]).__name__}')

  def load_setitem(self):
    value, key = self.stack.pop(), self.stack.pop()
    self._set([key, value])

  def load_put(self):
    index = int(self.readline())
    if not 0 <= index < 2**32:  # larger ones can be chosen with equal hashes
      raise pickle.UnpicklingError('a place in the memo that no pickle needs')
    self.memo[index] = self.stack[-1]

  def load_bytearray8(self):
    (size,) = struct.unpack('<Q', self.read(8))
    self.append(bytearray(self.read(size)))

  dispatch: ClassVar = pickle._Unpickler.dispatch | {
    pickle.REDUCE[0]: load_reduce,
    pickle.NEWOBJ[0]: load_reduce,
    pickle.NEWOBJ_EX[0]: load_newobj_ex,
    pickle.BUILD[0]: load_build,
    pickle.SETITEM[0]: load_setitem,
    pickle.SETITEMS[0]: lambda self: self._set(self.pop_mark()),
    pickle.DICT[0]: lambda self: self.append(_named(self.pop_mark())),
    pickle.EMPTY_SET[0]: pickle._Unpickler.load_empty_list,
    pickle.FROZENSET[0]: pickle._Unpickler.load_list,
    pickle.ADDITEMS[0]: pickle._Unpickler.load_appends,
    pickle.PUT[0]: load_put,
    pickle.BYTEARRAY8[0]: load_bytearray8,
  }


def _named(items: list) -> dict:
  """[key, value, key, value, ...] as a dictionary of what stands under text: nothing else is ever looked up.

  Hashes of text are remembered and cannot be chosen; those of nested tuples take time that doubles with every
  level.
  """
  return {key: value for key, value in zip(items[::2], items[1::2]) if type(key) is str}


def _all_steps() -> Allowance:
  return Allowance(
    MAX_STEPS,
    f'its pickle has more than {MAX_STEPS:,} instructions: not weights alone. Save the state_dict() alone, or as '
    '.safetensors.',
  )


def load(file, storage: Callable | None = None, records: bool = False, steps: Allowance | None = None):
  """The object of one pickle, from an open binary file.

  Args:
    file: where to read; left behind the pickle's end.
    storage: gives the `Storage` of a (key, type of numbers); None where storages are bytes in the pickle.
    records: whether unknown names are Records like the known (NVIDIA's files) or an error.
    steps: how many instructions it may have.

  Raises:
    UnsafeFileError: the pickle asks for something that could run code.
    WeightsFileError: a name that is not known, or too many instructions.
    DAMAGE: a damaged pickle.
  """
  return _Unpickler(file, storage, records, steps or _all_steps()).load()


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def is_legacy(head: bytes) -> bool:
  """Whether the first bytes are those of torch.save's format before zip files."""
  return head[:2] in (b'\x80\x02', b'\x80\x03', b'\x80\x04') and pickle.encode_long(LEGACY_MAGIC) in head[:32]


def load_legacy(file, view: Callable[[int, int], object], size: int, steps: Allowance | None = None):
  """The object of a file in torch.save's old format: five pickles, then each storage's count and bytes.

  Args:
    file: open binary file at its start.
    view: (start, end) -> a buffer of those bytes of the file.
    size: the file's size in bytes.
    steps: how many instructions the pickles may have together.

  Raises:
    UnsafeFileError, WeightsFileError, DAMAGE: as `load`.
  """
  steps, storages = steps or _all_steps(), {}

  def part():
    return load(file, lambda key, dtype: storages.setdefault(key, Storage(dtype)), steps=steps)

  magic, _, system = part(), part(), part()
  if magic != LEGACY_MAGIC:
    raise WeightsFileError('truncated or corrupted: no magic number')
  if isinstance(system, dict) and not system.get('little_endian', True):
    raise WeightsFileError('written on a big-endian machine; only little-endian files are read')
  result, keys = part(), part()
  for key in keys:
    if type(key) is not str or key not in storages:
      raise WeightsFileError('truncated or corrupted: a storage that belongs to no tensor')
    count = int.from_bytes(file.read(8), 'little', signed=True)
    start = file.tell()
    end = start + count * storages[key].dtype.itemsize
    if not start <= end <= size:
      raise WeightsFileError(f'truncated: storage {key!r} ends at byte {end} of {size}')
    storages[key].data = view(start, end)
    file.seek(end)
  return result


def _load_storage(data: bytes | str, steps: Allowance) -> Storage:
  """A storage inside a plain pickle: a whole file of torch.save's old format as bytes, or as text in latin1."""
  data = data.encode('latin1') if isinstance(data, str) else data
  if not isinstance(data, bytes) or not is_legacy(data[:32]):
    raise WeightsFileError('a storage inside the pickle is not in the format of torch.save')
  whole = memoryview(data)
  return load_legacy(io.BytesIO(data), lambda start, end: whole[start:end], len(data), steps)
