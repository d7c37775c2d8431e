"""Arrays of the tensors and NumPy arrays that `unpickle` found in a pickle; views, without a copy."""

import math
import re

import numpy as np

from pagoda_jax.weights.convert.unpickle import NUMPY_ARRAYS, TENSORS, TYPES, Record, Storage, WeightsFileError

_ARRAYS = frozenset(TENSORS + NUMPY_ARRAYS)


def is_array(value) -> bool:
  """Whether `array` takes it."""
  return isinstance(value, np.ndarray) or (isinstance(value, Record) and value.name in _ARRAYS)


def array(value) -> np.ndarray:
  """The numbers, read-only.

  Raises:
    WeightsFileError, DAMAGE: they leave their storage, are more than it holds, or no numbers, as only a damaged or
      forged file's can.
  """
  if isinstance(value, np.ndarray):
    return value
  if value.name in TENSORS:
    return _tensor(*value.args)
  if value.name.endswith('_reconstruct'):
    _, shape, dtype, fortran, data = value.state
    return _numpy(data, dtype, shape, 'F' if fortran else 'C')
  if value.name.endswith('scalar'):
    dtype, data = value.args
    return _numpy(data, dtype)
  return _numpy(*value.args)


def shaped(flat: np.ndarray, shape, order: str = 'C') -> np.ndarray:
  """`flat` in a shape that a file tells; raises WeightsFileError or ValueError where they do not agree."""
  _check_counts(*shape)
  return flat.reshape(shape, order=order)


def _check_counts(*counts) -> None:
  # Far more than any array has, so that nothing computed from them overflows; also a type that is not a number's.
  if len(counts) > 200 or not all(type(count) is int and 0 <= count < 2**40 for count in counts):
    raise WeightsFileError('truncated or corrupted tensor: its shape, strides or offset are no counts')


def _tensor(storage, offset, shape, strides, _gradient=None, _hooks=None, dtype=None, *_) -> np.ndarray:
  """A strided view of a storage, in elements as torch counts them; `dtype` is the third version's."""
  if not isinstance(storage, Storage) or storage.data is None:
    raise WeightsFileError('a tensor without its storage')
  flat = np.frombuffer(storage.data, TYPES[dtype.name] if isinstance(dtype, Record) else storage.dtype)
  _check_counts(offset, *shape, *strides)
  size = math.prod(shape)
  if size > flat.size:
    raise WeightsFileError(f'a tensor of shape {shape} has more elements than its storage, {flat.size}')
  if size == 0:
    return np.zeros(shape, flat.dtype)
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if last >= flat.size:
    raise WeightsFileError(f'a tensor of shape {shape} reaches beyond its storage of {flat.size} elements')
  byte_strides = tuple(stride * flat.itemsize for stride in strides)
  return np.lib.stride_tricks.as_strided(flat[offset:], shape, byte_strides, writeable=False)


def _numpy(data, dtype, shape=(), order: str = 'C') -> np.ndarray:
  if isinstance(data, str):  # written by Python 2, or by the protocols of its time
    data = data.encode('latin1')
  code = dtype.args[0] if isinstance(dtype, Record) and dtype.name == 'numpy.dtype' else None
  if type(code) is not str or not isinstance(data, bytes | bytearray):
    raise WeightsFileError('a NumPy array of Python objects; only numbers are read')
  if not re.fullmatch(r'[<>|=]?[biufc]\d{1,2}', code):
    raise WeightsFileError(f'a NumPy array of type {code!r}; only numbers are read')
  swapped = dtype.state and dtype.state[1] in ('<', '>')
  flat = np.frombuffer(data, np.dtype(code).newbyteorder(dtype.state[1] if swapped else '='))
  return shaped(flat, shape, order)
