"""transformers' T5 encoders of version 1.1 (T5EncoderModel, or the whole T5) <-> T5Encoder."""

import re
from collections.abc import Iterator

from pagoda_jax.networks.text import t5
from pagoda_jax.weights.convert import config_json
from pagoda_jax.weights.convert.layers import layer_leaves
from pagoda_jax.weights.convert.mapping import LINEAR, ConversionError, Leaf, StateDict

POSITIONS = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'


def options(state_dict: StateDict, max_distance: int = 128, activation: str = 'gated-gelu',
            epsilon: float = 1e-6) -> dict:
  """`network`'s arguments from names and shapes; see T5Encoder for those that they do not tell.

  Args:
    state_dict: transformers' names, the decoder's too if need be.
    max_distance, epsilon: as in T5Encoder.
    activation: transformers' feed_forward_proj.

  Raises:
    ConversionError: not a T5, or not of version 1.1.
  """
  if 'shared.weight' not in state_dict or POSITIONS not in state_dict:
    raise ConversionError(f'not a T5 encoder: no shared.weight or no {POSITIONS}')
  if activation != 'gated-gelu' or 'encoder.block.0.layer.1.DenseReluDense.wi_0.weight' not in state_dict:
    raise ConversionError(f'a T5 with feed_forward_proj = {activation!r} and '
                          f'{"gates" if activation != "gated-gelu" else "without gates (wi_0)"}: those of version 1.1 '
                          "are converted, with 'gated-gelu'")
  vocabulary, width = state_dict['shared.weight'].shape
  buckets, heads = state_dict[POSITIONS].shape
  layer = r'encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo\.weight'
  return {
    'vocabulary': vocabulary,
    'width': width,
    'layers': len([name for name in state_dict if re.fullmatch(layer, name)]),
    'heads': heads,
    'head_channels': state_dict['encoder.block.0.layer.0.SelfAttention.q.weight'].shape[0] // heads,
    'mlp_width': state_dict['encoder.block.0.layer.1.DenseReluDense.wi_0.weight'].shape[0],
    'buckets': buckets,
    'max_distance': max_distance,
    'epsilon': epsilon,
  }


def described(path) -> dict:
  """What config.json beside the weights says of `options`' arguments; {} without one."""
  said = config_json.beside(path, ('t5', 'mt5'))
  return {
    'max_distance': config_json.value(said, 'relative_attention_max_distance', int, 128),
    'activation': config_json.value(said, 'feed_forward_proj', str, 'relu'),
    'epsilon': config_json.value(said, 'layer_norm_epsilon', float, 1e-6),
  } if said else {}


def network(options: dict) -> t5.T5Encoder:
  """The module of `options`."""
  return t5.T5Encoder(**options)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under transformers' names."""
  return list(_leaves(network(options)))


def carried(name: str) -> bool:
  """Whether `name` is of the decoder, or the embedding once more."""
  return name.startswith(('decoder.', 'lm_head.')) or name == 'encoder.embed_tokens.weight'


def _leaves(net) -> Iterator[Leaf]:
  width, inner = net.width, net.heads * net.head_channels
  dense = lambda theirs, ours, shape: layer_leaves(theirs, ours, shape, LINEAR, bias=False)
  norm = lambda theirs, ours: Leaf(f'{theirs}.weight', f'params/{ours}/scale', (width,))
  yield Leaf('shared.weight', 'params/tokens/embedding', (net.vocabulary, width))
  yield Leaf(POSITIONS, 'params/positions/embedding', (net.buckets, net.heads))
  for layer in range(net.layers):
    theirs, ours = f'encoder.block.{layer}.layer', f'layer{layer}'
    for name, part in (('q', 'query'), ('k', 'key'), ('v', 'value')):
      yield from dense(f'{theirs}.0.SelfAttention.{name}', f'{ours}/attention/{part}', (inner, width))
    yield from dense(f'{theirs}.0.SelfAttention.o', f'{ours}/attention/out', (width, inner))
    yield norm(f'{theirs}.0.layer_norm', f'{ours}/attention_norm')
    for name, part in (('wi_0', 'mlp_gate'), ('wi_1', 'mlp_in')):
      yield from dense(f'{theirs}.1.DenseReluDense.{name}', f'{ours}/{part}', (net.mlp_width, width))
    yield from dense(f'{theirs}.1.DenseReluDense.wo', f'{ours}/mlp_out', (width, net.mlp_width))
    yield norm(f'{theirs}.1.layer_norm', f'{ours}/mlp_norm')
  yield norm('encoder.final_layer_norm', 'norm')
