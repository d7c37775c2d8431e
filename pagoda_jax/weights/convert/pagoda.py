"""Networks in the guided-diffusion form: PaGoDA's, and the EDM teacher of the Consistency Models release.

State dict of `cm.unet.UNetModel` (github sony/pagoda, openai/consistency_models) with
resblock_updown=True. Not everything is in the names and shapes; `options` asks for the rest.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from pagoda_jax.networks.unet import GUIDED_ADM, GrownLevel, UNet
from pagoda_jax.weights import published
from pagoda_jax.weights.convert import mapping, unets
from pagoda_jax.weights.convert.mapping import ConversionError, Leaf, StateDict

# attention_type of the published code -> its order of qkv channels.
QKV_AXES = {'flash': 'thc', 'legacy': 'htc', 'xformers': 'thc'}


def carried(name: str) -> bool:
  """Whether a tensor has no place in our network: none is."""
  del name
  return False


def options(
    state_dict: StateDict,
    *,
    resolution: int = 0,
    attention_order: str = 'flash',
    num_heads: int = 0,
    channels_per_head: int = 64,
    grown_num_blocks: int = 2,
) -> dict[str, Any]:
  """Fields of the `UNet` that a state dict is for.

  Args:
    state_dict: names and shapes determine the widths, levels, blocks, classes, where there is
      attention, and which levels scale and shift; the other arguments are not in it.
    resolution: of the input; 0: that of the published networks of these widths, 64 where there are none. Another
      one than theirs is warned of.
    attention_order: 'flash' (the released checkpoints), 'legacy' or 'xformers' (which has one head).
    num_heads: attention heads at every width; 0: by channels_per_head.
    channels_per_head: width of a head.
    grown_num_blocks: residual blocks after the up-sampling block of each added level.

  Raises:
    ConversionError: another architecture, or a decoder that does not consist of such levels.
  """
  _check_order(attention_order)
  for name in state_dict:
    if re.fullmatch(r'(input|output)_blocks\.\d+\.\d+\.(op|conv)\.weight', name):
      raise ConversionError(f'resampling without residual blocks is not supported (resblock_updown=False): {name}')

  def width(block):
    return unets.shape(state_dict, f'{block}.0.in_layers.2.weight')[0]

  def scale_shift(block):
    return unets.shape(state_dict, f'{block}.0.emb_layers.1.weight')[0] == 2 * width(block)

  num_blocks, levels, grown_blocks = _depth(state_dict)
  if grown_blocks % (1 + grown_num_blocks):
    raise ConversionError(f'{grown_blocks} decoder blocks above the input resolution are not levels of '
                          f'1 + {grown_num_blocks}; give grown_num_blocks')
  embed_channels, channels = unets.shape(state_dict, 'time_embed.0.weight')
  stem_channels, in_channels = unets.shape(state_dict, 'input_blocks.0.0.weight')[:2]
  first = [1 + level * (num_blocks + 1) for level in range(levels)]  # input block that begins each level
  base = levels * (num_blocks + 1)  # input blocks; as many output blocks take a skip connection
  encoder = [width(f'input_blocks.{i}') for i in first]
  decoder = [width(f'output_blocks.{base - i}') for i in first]
  attended = [level for level, i in enumerate(first) if f'input_blocks.{i}.1.qkv.weight' in state_dict]
  mult = tuple(unets.multiplier(c, channels) for c in encoder)
  resolution = _resolution(resolution, channels, mult, attended)
  added = [f'output_blocks.{base + i}' for i in range(0, grown_blocks, 1 + grown_num_blocks)]
  return {
      **GUIDED_ADM,
      'resolution': resolution,
      'image_channels': unets.shape(state_dict, 'out.2.weight')[0],
      'in_channels': in_channels,
      'channels': channels,
      'channel_mult': mult,
      'decoder_channel_mult': tuple(unets.multiplier(c, channels) for c in decoder) if decoder != encoder else (),
      'stem_channels': stem_channels,
      'embed_channels': embed_channels,
      'num_blocks': num_blocks,
      'attention_resolutions': tuple(resolution >> level for level in attended),
      'num_heads': 1 if attention_order == 'xformers' else num_heads,
      'channels_per_head': channels_per_head,
      'num_classes': unets.width_if_present(state_dict, 'label_emb.weight', axis=0),
      'scale_shift': scale_shift('input_blocks.1'),
      'grown': tuple(GrownLevel(width(block), grown_num_blocks, scale_shift(block)) for block in added),
  }


def _resolution(asked, channels, mult, attended):
  known = published.INPUT_OF_WIDTHS.get((channels, mult)) if attended == [*range(1, len(mult))] else None
  if asked and known and asked != known:
    logging.warning('resolution = %d: %d channels times %s with attention on all levels but the first are those of '
                    "PaGoDA's published networks of %d px", asked, channels, mult, known)
  return asked or known or 64


def leaves(options: Mapping[str, Any], *, attention_order: str = 'flash') -> list[Leaf]:
  """Every tensor of the network that has these options; `attention_order` as in `options`."""
  _check_order(attention_order)
  net = UNet(**options)
  return [*_outer_leaves(net), *_residual_leaves(net, QKV_AXES[attention_order])]


def block_names(net: UNet) -> dict[str, tuple[str, int]]:
  """Our block name -> (their sequence of layers, the block's index in it)."""
  encoder, middle, decoder = net.blocks()
  names = {block.name: (f'input_blocks.{i}', 0) for i, block in enumerate(encoder, 1)}
  # Residual block, attention, residual block; so the second one is at 2.
  names |= {block.name: ('middle_block', i * (1 + bool(middle[0].heads))) for i, block in enumerate(middle)}
  sequence, attended = -1, False
  for block in decoder:
    closes_level = block.resample and block.resolution <= net.resolution
    if not closes_level:
      sequence += 1
    names[block.name] = (f'output_blocks.{sequence}', 1 + attended if closes_level else 0)
    attended = bool(block.heads)
  return names


def _check_order(attention_order):
  if attention_order not in QKV_AXES:
    raise ConversionError(f'attention_order {attention_order!r} is none of {", ".join(QKV_AXES)}')


def _depth(state_dict):
  """(residual blocks per level, levels, decoder blocks above the input's resolution)."""
  def count(kind):
    return len({name.split('.')[1] for name in state_dict if name.startswith(kind)})

  inputs, outputs = count('input_blocks.'), count('output_blocks.')
  # A second residual block in a sequence up-samples, and ends a level.
  ends = sorted({int(found[1]) for name in state_dict
                 if (found := re.fullmatch(r'output_blocks\.(\d+)\.[12]\.in_layers\.2\.weight', name))})
  levels = len(ends) + 1
  num_blocks = inputs // levels - 1
  if num_blocks < 1 or inputs != levels * (num_blocks + 1) or outputs < inputs:
    raise ConversionError(f'not a U-Net of the guided-diffusion form: {inputs} input blocks, {outputs} output blocks, '
                          f'{len(ends)} of which up-sample')
  return num_blocks, levels, outputs - inputs


def _residual_leaves(net, axes):
  layers = {'norm_0': 'in_layers.0', 'conv_0': 'in_layers.2', 'embed': 'emb_layers.1', 'norm_1': 'out_layers.0',
            'conv_1': 'out_layers.3', 'skip': 'skip_connection'}
  attention = {'attention/norm': 'norm', 'attention/qkv': 'qkv', 'attention/out': 'proj_out'}
  names = block_names(net)
  found = []
  for block in itertools.chain(*net.blocks()):
    sequence, index = names[block.name]
    theirs = {ours: f'{sequence}.{index}.{layer}' for ours, layer in layers.items()}
    theirs |= {ours: f'{sequence}.{index + 1}.{layer}' for ours, layer in attention.items()}
    found += unets.block_leaves(net, block, theirs, axes)
  return found


def _outer_leaves(net):
  width, last = net.embed_width, net.blocks()[2][-1].channels
  found = [
      *unets.linear('time_embed.0', 'time_embed_0', net.channels, width),
      *unets.linear('time_embed.2', 'time_embed_1', width, width),
      *unets.conv('input_blocks.0.0', 'in_conv', net.in_channels or net.image_channels, net.stem_width, 3),
      *unets.norm('out.0', 'out_norm', last),
      *unets.conv('out.2', 'out_conv', last, net.image_channels, 3),
  ]
  if net.num_classes:
    found.append(Leaf('label_emb.weight', 'label_embed/embedding', (net.num_classes, width), mapping.SAME))
  return found
