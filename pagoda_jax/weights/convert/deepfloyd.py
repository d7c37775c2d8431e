"""DeepFloyd IF's first stage as diffusers' UNet2DConditionModel has it <-> UNet: added keys and values, pooled text.

Not everything is in the names and shapes: the diffusers form has a config.json beside the weights, which `described`
reads and checks.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pagoda_jax.networks.unet import DEEPFLOYD, Block, UNet
from pagoda_jax.weights.convert import config_json, mapping, unets
from pagoda_jax.weights.convert.mapping import ConversionError, Layout, Leaf, StateDict

CLASS_NAME = 'UNet2DConditionModel'
# What its config.json says of the arithmetic, which is ours.
_FIXED = {
  'act_fn': 'gelu', 'addition_embed_type': 'text', 'center_input_sample': False,
  'class_embed_type': None, 'class_embeddings_concat': False, 'cross_attention_norm': 'group_norm',
  'encoder_hid_dim_type': 'text_proj', 'flip_sin_to_cos': True, 'freq_shift': 0, 'mid_block_scale_factor': 1,
  'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn', 'norm_eps': 1e-5, 'norm_num_groups': 32,
  'only_cross_attention': False, 'resnet_out_scale_factor': 1, 'resnet_skip_time_act': False,
  'resnet_time_scale_shift': 'scale_shift', 'time_embedding_type': 'positional',
}
# What neither names nor shapes tell -> our argument.
_TOLD = {'sample_size': 'resolution', 'attention_head_dim': 'channels_per_head',
         'addition_embed_type_num_heads': 'text_pool_heads'}
_POSITION = Layout(lambda x: x[0], lambda x: x[None])


def described(path) -> dict[str, Any]:
  """The arguments of `options` that the config.json beside a file of weights says; {} without one.

  Raises:
    ConversionError: it is damaged, or of another architecture.
  """
  if not (said := config_json.beside(path, (CLASS_NAME,))):
    return {}
  path = said['']
  # Keys that came later are absent from older files, and None is their default here and there.
  wrong = [f'{key} = {said[key]!r}, not {value!r}' for key, value in _FIXED.items()
           if said.get(key) is not None and said[key] != value]
  if wrong:
    raise ConversionError(f'{path}: not the first stage of DeepFloyd IF: {"; ".join(wrong)}')
  odd = [f'{key} = {said[key]!r}' for key in _TOLD if said.get(key) is not None
         and (type(said[key]) is not int or not 0 < said[key] < 2**16)]
  if odd:
    raise ConversionError(f'{path}: must be a whole number in [1, 65535]: {", ".join(odd)}')
  return {ours: said[theirs] for theirs, ours in _TOLD.items() if said.get(theirs) is not None}


def carried(name: str) -> bool:
  """Nothing is carried: every tensor has its place."""
  del name
  return False


def options(
    state_dict: StateDict, *, resolution: int = 64, channels_per_head: int = 64, text_pool_heads: int = 64
) -> dict[str, Any]:
  """Fields of the `UNet` that a state dict is for.

  Args:
    state_dict: diffusers' names.
    resolution: of the input.
    channels_per_head: width of a head of the picture's attention.
    text_pool_heads: heads of the attention that pools the text.

  Raises:
    ConversionError: another architecture.
  """
  block = 'down_blocks.{}.resnets.{}.conv1.weight'
  levels = next(n for n in itertools.count() if block.format(n, 0) not in state_dict)
  if not levels:
    raise ConversionError(f'not a UNet2DConditionModel: no {block.format(0, 0)}')
  embed_channels, channels = unets.shape(state_dict, 'time_embedding.linear_1.weight')
  text_channels, text_width = unets.shape(state_dict, 'encoder_hid_proj.weight')
  head, image_channels = unets.shape(state_dict, 'conv_out.weight')[0], unets.shape(state_dict, 'conv_in.weight')[1]
  if head != 2 * image_channels:
    raise ConversionError(f'conv_out.weight gives {head} channels for pictures of {image_channels}: not noise and its '
                          "variance, which IF's first stage gives")
  attended = [level for level in range(levels) if f'down_blocks.{level}.attentions.0.to_q.weight' in state_dict]
  return {
      **DEEPFLOYD,
      'resolution': resolution,
      'image_channels': image_channels,
      'channels': channels,
      'channel_mult': tuple(
        unets.multiplier(unets.shape(state_dict, block.format(level, 0))[0], channels) for level in range(levels)),
      'stem_channels': unets.shape(state_dict, 'conv_in.weight')[0],
      'embed_channels': embed_channels,
      'num_blocks': len([name for name in state_dict if re.fullmatch(block.format(0, r'\d+'), name)]),
      'attention_resolutions': tuple(resolution >> level for level in attended),
      'channels_per_head': channels_per_head,
      'text_width': text_width,
      'text_attention': 'added_kv',
      'text_channels': text_channels,
      'text_pool_heads': text_pool_heads,
  }


def leaves(options: Mapping[str, Any]) -> list[Leaf]:
  """Every tensor of the network that has these options.

  Raises:
    ConversionError: diffusers has no such network: one that has grown.
  """
  net = UNet(**options)
  if net.grown:
    raise ConversionError("diffusers' form of DeepFloyd IF has no levels above the input's resolution")
  return [*_outer(net), *itertools.chain(*(_residual(net, block, *names) for block, names in block_names(net)))]


def block_names(net: UNet) -> list[tuple[Block, tuple[str, str]]]:
  """(our block, their names of its residual block and of its attention)."""
  encoder, middle, decoder = net.blocks()
  level = lambda block: (net.resolution // block.resolution).bit_length() - 1
  number = lambda block: int(block.name.rpartition('block')[2])
  found = []
  for block in encoder:
    of = f'down_blocks.{level(block) - bool(block.resample)}'
    found.append((block, (f'{of}.downsamplers.0', '') if block.resample else
                  (f'{of}.resnets.{number(block)}', f'{of}.attentions.{number(block)}')))
  found += [(block, (f'mid_block.resnets.{number(block)}', 'mid_block.attentions.0')) for block in middle]
  for block in decoder:
    of = f'up_blocks.{len(net.channel_mult) - 1 - level(block) - bool(block.resample)}'
    found.append((block, (f'{of}.upsamplers.0', '') if block.resample else
                  (f'{of}.resnets.{number(block)}', f'{of}.attentions.{number(block)}')))
  return found


def _residual(net: UNet, block: Block, theirs: str, attention: str) -> Iterator[Leaf]:
  ours, width = block.name, block.channels
  yield from unets.norm(f'{theirs}.norm1', f'{ours}/norm_0', block.in_channels)
  yield from unets.conv(f'{theirs}.conv1', f'{ours}/conv_0', block.in_channels, width, 3)
  yield from unets.linear(f'{theirs}.time_emb_proj', f'{ours}/embed', net.embed_width, 2 * width)
  yield from unets.norm(f'{theirs}.norm2', f'{ours}/norm_1', width)
  yield from unets.conv(f'{theirs}.conv2', f'{ours}/conv_1', width, width, 3)
  if block.skip_conv:
    yield from unets.conv(f'{theirs}.conv_shortcut', f'{ours}/skip', block.in_channels, width, 1)
  if block.heads:
    ours = f'{ours}/attention'
    yield from unets.norm(f'{attention}.group_norm', f'{ours}/norm', width)
    yield from unets.norm(f'{attention}.norm_cross', f'{ours}/text_kv/norm', net.text_channels)
    yield from _joined([f'{attention}.{name}' for name in ('to_q', 'to_k', 'to_v')], f'{ours}/qkv', width, width)
    yield from _joined([f'{attention}.{name}' for name in ('add_k_proj', 'add_v_proj')], f'{ours}/text_kv/out',
                       net.text_channels, width)
    yield from unets.linear(f'{attention}.to_out.0', f'{ours}/out', width, width)


def _joined(theirs, ours, inputs, outputs) -> Iterator[Leaf]:
  """Linear layers of theirs side by side in one of ours."""
  for name, layer, shape, layout in (('weight', 'kernel', (outputs, inputs), mapping.LINEAR),
                                     ('bias', 'bias', (outputs,), mapping.SAME)):
    first, *more = (f'{layer_name}.{name}' for layer_name in theirs)
    yield Leaf(first, f'{ours}/{layer}', shape, layout, tuple(more))


def _outer(net: UNet) -> Iterator[Leaf]:
  width, last = net.embed_width, net.blocks()[2][-1].channels
  yield from unets.linear('time_embedding.linear_1', 'time_embed_0', net.channels, width)
  yield from unets.linear('time_embedding.linear_2', 'time_embed_1', width, width)
  yield from unets.conv('conv_in', 'in_conv', net.image_channels, net.stem_width, 3)
  yield from unets.norm('conv_norm_out', 'out_norm', last)
  yield from unets.conv('conv_out', 'out_conv', last, net.head_width, 3)
  yield from unets.linear('encoder_hid_proj', 'text_tokens/out', net.text_width, net.text_channels)
  pool, ours = 'add_embedding', 'text_pool'
  yield from unets.norm(f'{pool}.norm1', f'{ours}/norm', net.text_width)
  yield Leaf(f'{pool}.pool.positional_embedding', f'{ours}/position', (1, net.text_width), _POSITION)
  for name, layer in (('q_proj', 'query'), ('k_proj', 'key'), ('v_proj', 'value')):
    yield from unets.linear(f'{pool}.pool.{name}', f'{ours}/{layer}', net.text_width, net.text_width)
  yield from unets.linear(f'{pool}.proj', f'{ours}/out', net.text_width, width)
  yield from unets.norm(f'{pool}.norm2', f'{ours}/norm_out', width)
