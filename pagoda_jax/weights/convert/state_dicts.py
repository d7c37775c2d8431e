"""Which state dict of a checkpoint is meant: EMA before raw weights, network objects taken apart.

Works on what `unpickle.load` returns; also the prefixes that wrappers put before names, the change
to float32 and the search for NaN.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from pagoda_jax.weights.convert.unpickle import DAMAGE, NumpyArray, Record, Tensor, WeightsFileError

# Best first. Averages come before raw weights: the published figures are the averages'.
EMA_KEYS = ('ema', 'ema_params', 'state_dict_ema', 'model_ema', 'ema_model', 'ema_state_dict', 'params_ema', 'G_ema')
EMA_KEYS += ('net_ema', 'generator_ema', 'g_ema', 'ema_generator')
RAW_KEYS = ('state_dict', 'model_state_dict', 'model', 'params', 'net', 'network', 'generator', 'G', 'module')


@dataclasses.dataclass(frozen=True)
class Choice:
  """A state dict found in a checkpoint.

  Attributes:
    tensors: name -> array.
    key: where it was, '/'-joined; '' for the whole file.
    others: the other places with tensors.
  """

  tensors: dict[str, np.ndarray]
  key: str = ''
  others: tuple[str, ...] = ()

  @property
  def taken(self) -> str:
    """What was taken, in words for the log."""
    said = f'key {self.key!r}' if self.key else 'the whole file'
    return f'{said} (left aside: {", ".join(map(repr, self.others))})' if self.others else said


def choose(content, key: str = '') -> Choice:
  """The state dict of a checkpoint.

  Args:
    content: what the file holds: a state dict, a network object, or a dictionary with some of them.
    key: which entry to take, '/'-joined when nested; '' decides by itself: an average before raw
      weights, by the order of EMA_KEYS and RAW_KEYS.

  Raises:
    WeightsFileError: no tensors there, no such key, or several that nothing tells apart.
  """
  found = dict(_candidates(content))
  if key:
    if key not in found:
      raise WeightsFileError(f'no tensors under key {key!r}; there are: {_listed(found)}')
    best = key
  elif not found:
    raise WeightsFileError(f'no named tensors in it: {_kind(content)}')
  else:
    best = _preferred(tuple(found))
  others = tuple(name for name in found if name != best)
  return Choice(_arrays(found[best]), best, others)


def _preferred(keys: tuple[str, ...]) -> str:
  if len(keys) == 1:
    return keys[0]
  for wanted in EMA_KEYS:
    for key in keys:
      if wanted in key.split('/'):
        return key
  for key in keys:  # ema_0.9999 and the like: the first of the file
    if re.search(r'(^|[^a-z])ema([^a-z]|$)', key.lower()):
      return key
  for wanted in RAW_KEYS:
    for key in keys:
      if wanted in key.split('/'):
        return key
  raise WeightsFileError(f'several sets of tensors; choose one with key=: {_listed(keys)}')


def _candidates(content, path: str = '', depth: int = 3):
  """Yields (key, state dict or network object) of everything that holds named tensors."""
  if isinstance(content, Record):
    if _module_state(content) is not None and _arrays(content):
      yield path, content
    return
  if not isinstance(content, dict) or depth == 0:
    return
  if any(_is_tensor(value) for value in content.values()):
    yield path, content
  for name, value in content.items():
    if isinstance(name, str) and isinstance(value, (dict, Record)):
      yield from _candidates(value, f'{path}/{name}' if path else name, depth - 1)


def _is_tensor(value) -> bool:
  return isinstance(value, (Tensor, NumpyArray, np.ndarray))


def _array(value) -> np.ndarray:
  try:
    return value if isinstance(value, np.ndarray) else value.array()
  except WeightsFileError:
    raise
  except DAMAGE as error:
    raise WeightsFileError(f'truncated or corrupted tensor: {error}') from error


def _arrays(content) -> dict[str, np.ndarray]:
  if isinstance(content, Record):
    return dict(_module_tensors(content))
  return {str(name): _array(value) for name, value in content.items() if _is_tensor(value)}


def _module_state(record: Record) -> dict | None:
  """The attributes of a pickled torch.nn.Module, NVIDIA's persistent ones included; None for others."""
  state = record.state
  if state is None and len(record.args) == 1 and isinstance(record.args[0], dict):
    state = record.args[0].get('state')  # persistence's reconstruction from (type, source, class, state)
  if isinstance(state, tuple) and state:
    state = state[0]
  return state if isinstance(state, dict) and '_modules' in state and '_parameters' in state else None


def _module_tensors(record: Record, prefix: str = '', depth: int = 100):
  """Yields (name, array) in the order of torch's state_dict()."""
  state = _module_state(record)
  if state is None or depth == 0:
    return
  left_out = state.get('_non_persistent_buffers_set') or ()
  for group in ('_parameters', '_buffers'):
    for name, value in (state.get(group) or {}).items():
      if _is_tensor(value) and not (group == '_buffers' and name in left_out):
        yield f'{prefix}{name}', _array(value)
  for name, child in state['_modules'].items():
    if isinstance(child, Record):
      yield from _module_tensors(child, f'{prefix}{name}.', depth - 1)


def _listed(keys) -> str:
  return ', '.join(repr(key) if key else "'' (the whole file)" for key in keys) or 'none'


def _kind(content) -> str:
  if isinstance(content, dict):
    names = [repr(key) for key in content if isinstance(key, str)]
    return f'a dictionary with the keys {", ".join(names[:12]) or "none of which is text"}'
  return f'an object of {content.global_name}' if isinstance(content, Record) else f'a {type(content).__name__}'


def without_wrappers(tensors: Mapping[str, np.ndarray], strip: tuple[str, ...] = ('module.',)) -> dict[str, np.ndarray]:
  """Names without what wrappers put before them.

  `_orig_mod.` (torch.compile) goes wherever it stands, as no module is named so by hand; the prefixes
  of `strip` go, repeatedly, where every name carries them. `model.` is not among them by default: EDM's
  own names begin with it.

  Raises:
    WeightsFileError: two names would become one.
  """
  names = {name: name.replace('_orig_mod.', '') for name in tensors}
  shrinking = bool(names)
  while shrinking:
    shrinking = False
    for prefix in strip:
      if all(name.startswith(prefix) and len(name) > len(prefix) for name in names.values()):
        names = {theirs: name.removeprefix(prefix) for theirs, name in names.items()}
        shrinking = True
  if len(set(names.values())) < len(names):
    raise WeightsFileError("two tensors have the same name once wrappers' prefixes are taken off")
  return {names[theirs]: value for theirs, value in tensors.items()}


def as_float32(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
  """(tensors with every real floating-point one in float32, type -> names of those that were another).

  float16, bfloat16 and float8 lose nothing; float64 is rounded. Integers stay as they are.
  """
  out, changed = {}, {}
  for name, value in tensors.items():
    if _is_real_float(value.dtype) and value.dtype != np.float32:
      changed.setdefault(str(value.dtype), []).append(name)
      value = value.astype(np.float32)
    out[name] = value
  return out, changed


def _is_real_float(dtype: np.dtype) -> bool:
  return np.issubdtype(dtype, np.floating) or dtype.name.startswith(('bfloat', 'float'))


def non_finite_names(tensors: Mapping[str, np.ndarray]) -> list[str]:
  """Names of the tensors that hold a NaN or an infinity."""
  return [name for name, value in tensors.items() if _is_real_float(value.dtype) and not np.isfinite(value).all()]
