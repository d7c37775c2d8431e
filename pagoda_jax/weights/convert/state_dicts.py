"""Which state dict of a checkpoint is meant: EMA before raw weights, network objects taken apart.

Works on what `unpickle.load` returns; also the prefixes that wrappers put before names, the change
to float32 and the search for NaN.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from pagoda_jax.weights.convert.arrays import array, is_array
from pagoda_jax.weights.convert.unpickle import MAX_NAME, Allowance, Record, WeightsFileError

# Entries of dictionaries and modules to look at, each wherever it stands. MAX_STEPS make fewer, so what has more
# contains itself, or one thing again and again.
MAX_ENTRIES = 1_000_000
# Of a tensor without elements, whose shape no number of bytes bounds.
MAX_EMPTY_SIDE = 2**16

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


def choose(content, key: str, max_bytes: int) -> Choice:
  """The state dict of a checkpoint.

  Args:
    content: what the file holds: a state dict, a network object, or a dictionary with some of them.
    key: which entry to take, '/'-joined when nested; '' decides by itself: an average before raw
      weights, by the order of EMA_KEYS and RAW_KEYS.
    max_bytes: what all tensors of the state dict may take together.

  Raises:
    WeightsFileError: no tensors there, no such key, several that nothing tells apart, or more than is allowed.
    DAMAGE: a damaged tensor.
  """
  entries = Allowance(MAX_ENTRIES, f'more than {MAX_ENTRIES:,} entries: dictionaries or modules within one another')
  found = dict(_candidates(content, entries))
  if key:
    if key not in found:
      raise WeightsFileError(f'no tensors under key {key!r}; there are: {_listed(found)}')
    best = key
  elif not found:
    raise WeightsFileError(f'no named tensors in it: {_kind(content)}')
  else:
    best = _preferred(tuple(found))
  others = tuple(name for name in found if name != best)
  return Choice(_arrays(found[best], max_bytes), best, others)


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


def _candidates(content, entries: Allowance, path: str = '', depth: int = 3):
  """Yields (key, {name: tensor as it stands in the pickle}) of everything that holds named tensors."""
  if isinstance(content, Record):
    named = dict(_module_tensors(content, entries))
  elif isinstance(content, dict) and depth:
    entries.take(1 + len(content))
    named = {name: value for name, value in content.items() if is_array(value)}
  else:
    return
  if named:
    yield path, named
  if isinstance(content, dict):
    for name, value in content.items():
      if isinstance(value, dict | Record) and len(name) <= MAX_NAME:
        yield from _candidates(value, entries, f'{path}/{name}' if path else name, depth - 1)


def _arrays(named: dict, max_bytes: int) -> dict[str, np.ndarray]:
  size = Allowance(max_bytes, f'its tensors take more than {max_bytes:,} bytes, the most for a file of its size')
  arrays = {}
  for name, value in named.items():
    value = arrays[_joined('', name)] = array(value)
    size.take(value.nbytes)
    if not value.size and max(value.shape) > MAX_EMPTY_SIDE:
      raise WeightsFileError(f'{name} has no elements, but the shape {value.shape}; at most {MAX_EMPTY_SIDE} is a side')
  return arrays


def _joined(prefix: str, name: str) -> str:
  if len(prefix) + len(name) > MAX_NAME:
    raise WeightsFileError(f'the name of a tensor has more than {MAX_NAME} characters: {prefix[:40]}{name[:40]}...')
  return prefix + name


def _module_state(record: Record) -> dict | None:
  """The attributes of a pickled torch.nn.Module, NVIDIA's persistent ones included; None for others."""
  state = record.state
  if state is None and len(record.args) == 1 and isinstance(record.args[0], dict):
    state = record.args[0].get('state')  # persistence's reconstruction from (type, source, class, state)
  if isinstance(state, tuple) and state:
    state = state[0]
  return state if isinstance(state, dict) and '_modules' in state and '_parameters' in state else None


def _module_tensors(record: Record, entries: Allowance, prefix: str = ''):
  """Yields (name, tensor as it stands in the pickle) in the order of torch's state_dict()."""
  state = _module_state(record)
  if state is None:
    return
  left_out = state.get('_non_persistent_buffers_set') or ()
  parameters, buffers, modules = (state.get(group) or {} for group in ('_parameters', '_buffers', '_modules'))
  entries.take(1 + len(left_out) + len(parameters) + len(buffers) + len(modules))
  left_out = {name for name in left_out if isinstance(name, str)}
  kept = {name: value for name, value in buffers.items() if name not in left_out}
  for name, value in (*parameters.items(), *kept.items()):
    if is_array(value):
      yield _joined(prefix, name), value
  for name, child in modules.items():
    if isinstance(child, Record):
      yield from _module_tensors(child, entries, _joined(prefix, name) + '.')


def _listed(keys) -> str:
  return ', '.join(repr(key) if key else "'' (the whole file)" for key in keys) or 'none'


def _kind(content) -> str:
  if isinstance(content, dict):
    return f'a dictionary with the keys {", ".join(map(repr, list(content)[:12])) or "(none of them text)"}'
  return f'an object of {content.name}' if isinstance(content, Record) else f'a {type(content).__name__}'


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
