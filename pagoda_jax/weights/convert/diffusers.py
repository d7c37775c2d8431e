"""diffusers' AutoencoderKL <-> AutoencoderKL, with the attention names of all its versions."""

import itertools
import math
import re
from collections.abc import Iterator

from pagoda_jax.networks.autoencoder import AutoencoderKL
from pagoda_jax.weights.convert.layers import layer_leaves, norm_leaves
from pagoda_jax.weights.convert.mapping import CONV, LINEAR, POINTWISE_2D, ConversionError, Leaf, StateDict

# query, key, value, out: diffusers' present names, and those in the files published before 0.17.
ATTENTION_NAMES = {
    'to_q': ('to_q', 'to_k', 'to_v', 'to_out.0'),
    'query': ('query', 'key', 'value', 'proj_attn'),
}
# Options that are of the file, and no fields of the module.
NOT_FIELDS = ('attention_naming', 'attention_convolutions', 'scaling_factor', 'shift_factor')


def options(state_dict: StateDict, groups: int = 32, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> dict:
  """`network`'s arguments, and how attention is named and shaped, from names and shapes.

  Args:
    state_dict: diffusers' names.
    groups: of the group norms, which no shape tells; `norm_num_groups` of its config.json.
    scaling_factor, shift_factor: (latent - shift_factor) * scaling_factor has unit variance; of its config.json too.

  Raises:
    ConversionError: not an AutoencoderKL; its widths do not split into such groups; or no such factors.
  """
  if not 0 < scaling_factor < math.inf or not math.isfinite(shift_factor):
    raise ConversionError(f'scaling_factor = {scaling_factor:g}, shift_factor = {shift_factor:g}: must be finite, and '
                          'scaling_factor above 0')
  if 'encoder.conv_in.weight' not in state_dict or 'decoder.conv_out.weight' not in state_dict:
    raise ConversionError('not an AutoencoderKL: no encoder.conv_in.weight or decoder.conv_out.weight')
  block = 'encoder.down_blocks.{}.resnets.{}.conv1.weight'
  levels = next(n for n in itertools.count() if block.format(n, 0) not in state_dict)
  widths = tuple(state_dict[block.format(level, 0)].shape[0] for level in range(levels))
  if groups < 1 or any(width % groups for width in widths):
    raise ConversionError(f'groups = {groups}: must divide the widths {", ".join(map(str, widths))}')
  attention = 'encoder.mid_block.attentions.0.{}.weight'
  naming = next((name for name in ATTENTION_NAMES if attention.format(name) in state_dict), None)
  return {
      'channels': state_dict['encoder.conv_in.weight'].shape[1],
      'latent_channels': state_dict['decoder.conv_in.weight'].shape[1],
      'widths': widths,
      'blocks': len([name for name in state_dict if re.fullmatch(block.format(0, r'\d+'), name)]),
      'groups': groups,
      'quant_conv': 'quant_conv.weight' in state_dict,
      'post_quant_conv': 'post_quant_conv.weight' in state_dict,
      'mid_attention': naming is not None,
      'attention_naming': naming,
      # The oldest files hold them as 1x1 convolutions.
      'attention_convolutions': naming is not None and state_dict[attention.format(naming)].ndim == 4,
      'scaling_factor': float(scaling_factor),
      'shift_factor': float(shift_factor),
  }


def network(options: dict, **fields) -> AutoencoderKL:
  """The module of `options`; `fields` are its others, such as dtype."""
  return AutoencoderKL(**{name: v for name, v in options.items() if name not in NOT_FIELDS}, **fields)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under diffusers' names."""
  return list(_leaves(options))


def carried(name: str) -> bool:
  """Nothing is carried: every tensor has its place."""
  return False


def _leaves(options) -> Iterator[Leaf]:
  net = network(options)
  widths, moments = net.widths, 2 * net.latent_channels
  yield from _conv('encoder.conv_in', 'encoder/conv_in', (widths[0], net.channels))
  width = widths[0]
  for level, after in enumerate(widths):
    for index in range(net.blocks):
      theirs = f'encoder.down_blocks.{level}.resnets.{index}'
      yield from _residual_leaves(theirs, f'encoder/level{level}_block{index}', width, after)
      width = after
    if level + 1 < len(widths):
      name = f'encoder.down_blocks.{level}.downsamplers.0.conv'
      yield from _conv(name, f'encoder/level{level}_down', (width, width))
  yield from _ends(options, 'encoder', width, (moments, width))
  yield from _conv('decoder.conv_in', 'decoder/conv_in', (width, net.latent_channels))
  for block, after in enumerate(reversed(widths)):
    level = len(widths) - 1 - block
    for index in range(net.blocks + 1):
      theirs = f'decoder.up_blocks.{block}.resnets.{index}'
      yield from _residual_leaves(theirs, f'decoder/level{level}_block{index}', width, after)
      width = after
    if level:
      yield from _conv(f'decoder.up_blocks.{block}.upsamplers.0.conv', f'decoder/level{level}_up', (width, width))
  yield from _ends(options, 'decoder', widths[-1], (net.channels, width))
  if net.quant_conv:
    yield from _conv('quant_conv', 'quantize', (moments, moments), 1)
  if net.post_quant_conv:
    yield from _conv('post_quant_conv', 'unquantize', (net.latent_channels, net.latent_channels), 1)


def _ends(options, part, middle, output) -> Iterator[Leaf]:
  """Middle block of width `middle`, last norm and convolution of encoder or decoder."""
  for index in range(2):
    theirs = f'{part}.mid_block.resnets.{index}'
    yield from _residual_leaves(theirs, f'{part}/middle/block{index}', middle, middle)
  if options['mid_attention']:
    theirs, ours = f'{part}.mid_block.attentions.0', f'{part}/middle/attention'
    yield from norm_leaves(f'{theirs}.group_norm', f'{ours}/norm', middle)
    shape, layout = (middle, middle), LINEAR
    if options['attention_convolutions']:
      shape, layout = (middle, middle, 1, 1), POINTWISE_2D
    names = ATTENTION_NAMES[options['attention_naming']]
    for name, our_name in zip(names, ('query', 'key', 'value', 'out')):
      yield from layer_leaves(f'{theirs}.{name}', f'{ours}/{our_name}', shape, layout)
  yield from norm_leaves(f'{part}.conv_norm_out', f'{part}/norm_out', output[1])
  yield from _conv(f'{part}.conv_out', f'{part}/conv_out', output)


def _residual_leaves(theirs, ours, before, after) -> Iterator[Leaf]:
  for index, width in enumerate((before, after)):
    yield from norm_leaves(f'{theirs}.norm{index + 1}', f'{ours}/norm{index}', width)
    yield from _conv(f'{theirs}.conv{index + 1}', f'{ours}/conv{index}', (after, width))
  if before != after:
    yield from _conv(f'{theirs}.conv_shortcut', f'{ours}/skip', (after, before), 1)


def _conv(theirs, ours, channels, kernel=3):
  return layer_leaves(theirs, ours, (*channels, kernel, kernel), CONV)
