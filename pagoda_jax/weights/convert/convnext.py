"""timm's ConvNeXt V2 <-> ConvNeXtV2."""

import re
from collections.abc import Iterator

from pagoda_jax.networks.frozen.convnext import EXPANSION, KERNEL, ConvNeXtV2
from pagoda_jax.weights.convert.layers import layer_leaves, norm_leaves
from pagoda_jax.weights.convert.mapping import CONV, LINEAR, ConversionError, Leaf, StateDict


def options(state_dict: StateDict) -> dict:
  """`network`'s arguments from names and shapes.

  Raises:
    ConversionError: no ConvNeXt, or the first version, which is another network.
  """
  if (first := 'stages.0.blocks.0.conv_dw.weight') not in state_dict:
    raise ConversionError(f'not a ConvNeXt of timm: no {first}')
  if (norm := 'stages.0.blocks.0.mlp.grn.weight') not in state_dict:
    raise ConversionError(f'a ConvNeXt of the first version: no {norm}; ConvNeXt V2 is converted, such as '
                          'convnextv2_base')
  depths, widths = [], []
  while (name := f'stages.{len(depths)}.blocks.0.conv_dw.weight') in state_dict:
    block = rf'stages\.{len(depths)}\.blocks\.\d+\.conv_dw\.weight'
    depths.append(len([name for name in state_dict if re.fullmatch(block, name)]))
    widths.append(state_dict[name].shape[0])
  return {'depths': tuple(depths), 'widths': tuple(widths)}


def network(options: dict) -> ConvNeXtV2:
  """The module of `options`."""
  return ConvNeXtV2(**options)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under timm's names."""
  return list(_leaves(network(options)))


def carried(name: str) -> bool:
  """Whether `name` is of the classifier, or of the norm that it begins with."""
  return name.startswith('head.')


def _leaves(net: ConvNeXtV2) -> Iterator[Leaf]:
  width_in = 3
  for stage, (depth, width) in enumerate(zip(net.depths, net.widths)):
    theirs, side = ('stem', 4) if stage == 0 else (f'stages.{stage}.downsample', 2)
    patches, norm = (0, 1) if stage == 0 else (1, 0)
    yield from layer_leaves(f'{theirs}.{patches}', f'stage{stage}_patches', (width, width_in, side, side), CONV)
    yield from norm_leaves(f'{theirs}.{norm}', f'stage{stage}_norm', width_in if stage else width)
    for index in range(depth):
      yield from _block_leaves(f'stages.{stage}.blocks.{index}', f'stage{stage}_block{index}', width)
    width_in = width


def _block_leaves(theirs: str, ours: str, width: int) -> Iterator[Leaf]:
  inner = EXPANSION * width
  yield from layer_leaves(f'{theirs}.conv_dw', f'{ours}/depthwise', (width, 1, KERNEL, KERNEL), CONV)
  yield from norm_leaves(f'{theirs}.norm', f'{ours}/norm', width)
  yield from layer_leaves(f'{theirs}.mlp.fc1', f'{ours}/mlp_in', (inner, width), LINEAR)
  yield from norm_leaves(f'{theirs}.mlp.grn', f'{ours}/response_norm', inner)
  yield from layer_leaves(f'{theirs}.mlp.fc2', f'{ours}/mlp_out', (width, inner), LINEAR)
