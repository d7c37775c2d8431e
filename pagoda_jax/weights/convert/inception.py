"""pytorch-fid's Inception-v3 (a translation of the 2015 TensorFlow graph) <-> InceptionV3."""

import jax
import jax.numpy as jnp
from flax import traverse_util

from pagoda_jax.networks.frozen.inception import InceptionV3
from pagoda_jax.weights.convert.mapping import CONV, LINEAR, SAME, ConversionError, Leaf, StateDict

_SUFFIXES = {
    'conv/kernel': ('conv.weight', CONV),
    'bn/scale': ('bn.weight', SAME),
    'bn/bias': ('bn.bias', SAME),
    'bn/mean': ('bn.running_mean', SAME),
    'bn/var': ('bn.running_var', SAME),
    'fc_kernel': ('fc.weight', LINEAR),
    'fc_bias': ('fc.bias', SAME),
}


def options(state_dict: StateDict) -> dict:
  """`network`'s arguments; ConversionError if there is no fc.weight."""
  if 'fc.weight' not in state_dict:
    raise ConversionError('not an Inception-v3: no fc.weight')
  return {'classes': state_dict['fc.weight'].shape[0]}


def network(options: dict, **fields) -> InceptionV3:
  """The module of `options`; `fields` are its others: graph, dtype."""
  return InceptionV3(**options, **fields)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under pytorch-fid's names, which our modules bear too."""
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(network(options).init, jax.random.key(0), images)
  found = []
  for path, value in traverse_util.flatten_dict(variables, sep='/').items():
    suffix = next(suffix for suffix in _SUFFIXES if path.endswith(suffix))
    theirs, layout = _SUFFIXES[suffix]
    module = path.split('/', 1)[1].removesuffix(suffix).replace('/', '.')
    found.append(Leaf(module + theirs, path, _their_shape(value.shape, layout), layout))
  return found


def carried(name: str) -> bool:
  """Whether `name` is a counter of batches."""
  return name.endswith('num_batches_tracked')


def _their_shape(shape, layout):
  if layout is CONV:
    return (*shape[:1:-1], *shape[:2])
  return shape[::-1]
