"""Frozen backbones: timm's tf_efficientnet_lite* and (distilled) DeiT <-> EfficientNetLite and DeiT.

What the feature maps do not need (heads, classifiers, the final norm) is carried along untouched.
"""

import re

from pagoda_jax.networks.frozen import projections
from pagoda_jax.weights.convert.layers import batch_norm_leaves, layer_leaves, norm_leaves
from pagoda_jax.weights.convert.mapping import CONV, LINEAR, ConversionError, Layout, Leaf, StateDict

TOKEN = Layout(lambda x: x[0, 0], lambda x: x[None, None])
POSITIONS = Layout(lambda x: x[0], lambda x: x[None])
_UNUSED = ('conv_head.', 'bn2.', 'classifier.', 'norm.', 'head.', 'head_dist.')


def options(state_dict: StateDict, head_channels: int = 64) -> dict:
  """`projections.backbone`'s arguments from names and shapes.

  Args:
    state_dict: timm's names.
    head_channels: channels of one attention head, which the shapes of a DeiT do not tell; 64 in all
      published ones.

  Raises:
    ConversionError: neither of the two architectures.
  """
  if 'patch_embed.proj.weight' in state_dict and 'pos_embed' in state_dict:
    return _deit_options(state_dict, head_channels)
  if 'conv_stem.weight' in state_dict and 'blocks.0.0.conv_dw.weight' in state_dict:
    return _efficientnet_options(state_dict)
  raise ConversionError('neither an EfficientNet-lite nor a DeiT: no conv_stem.weight, no patch_embed.proj.weight')


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `projections.backbone(options)`, under timm's names."""
  if options['architecture'] == 'deit':
    return list(_deit_leaves(projections.backbone(options)))
  return list(_efficientnet_leaves(projections.backbone(options)))


def carried(name: str) -> bool:
  """Whether `name` is a counter of batches, or a weight after the last feature map."""
  return name.endswith('num_batches_tracked') or name.startswith(_UNUSED)


def _efficientnet_options(state_dict):
  repeats, widths, expansions, kernels = [], [], [], []
  while (stage := f'blocks.{len(repeats)}.') + '0.conv_dw.weight' in state_dict:
    blocks = {re.match(r'blocks\.\d+\.(\d+)', name)[1] for name in state_dict if name.startswith(stage)}
    repeats.append(len(blocks))
    expanded = f'{stage}0.conv_pwl.weight' in state_dict
    widths.append(state_dict[f'{stage}0.conv_{"pwl" if expanded else "pw"}.weight'].shape[0])
    expansion = state_dict[f'{stage}0.conv_pw.weight'].shape
    expansions.append(expansion[0] // expansion[1] if expanded else 1)
    kernels.append(state_dict[f'{stage}0.conv_dw.weight'].shape[-1])
  return {
      'architecture': 'efficientnet_lite',
      'stem': state_dict['conv_stem.weight'].shape[0],
      'repeats': tuple(repeats),
      'widths': tuple(widths),
      'expansions': tuple(expansions),
      'kernels': tuple(kernels),
  }


def _efficientnet_leaves(net):
  yield Leaf('conv_stem.weight', 'params/stem/kernel', (net.stem, 3, 3, 3), CONV)
  yield from batch_norm_leaves('bn1', 'stem_norm', net.stem)
  width_in = net.stem
  stages = zip(net.repeats, net.widths, net.expansions, net.kernels)
  for stage, (repeats, width, expansion, kernel) in enumerate(stages):
    for index in range(repeats):
      theirs, ours = f'blocks.{stage}.{index}', f'stage{stage}_block{index}'
      inner = width_in * expansion
      expand = ('conv_pw', 'expand', (inner, width_in, 1, 1))
      depthwise = ('conv_dw', 'depthwise', (inner, 1, kernel, kernel))
      project = ('conv_pwl' if expansion != 1 else 'conv_pw', 'project', (width, inner, 1, 1))
      parts = (expand, depthwise, project) if expansion != 1 else (depthwise, project)
      for number, (name, part, shape) in enumerate(parts, start=1):
        yield from layer_leaves(f'{theirs}.{name}', f'{ours}/{part}', shape, CONV, bias=False)
        yield from batch_norm_leaves(f'{theirs}.bn{number}', f'{ours}/{part}_norm', shape[0])
      width_in = width


def _deit_options(state_dict, head_channels):
  width, _, patch, _ = state_dict['patch_embed.proj.weight'].shape
  distilled = 'dist_token' in state_dict
  scaled = {'layer_scale': True} if 'blocks.0.ls1.gamma' in state_dict else {}
  return {
      'architecture': 'deit',
      'width': width,
      'depth': len([name for name in state_dict if re.fullmatch(r'blocks\.\d+\.attn\.qkv\.weight', name)]),
      'head_channels': head_channels,
      'mlp_width': state_dict['blocks.0.mlp.fc1.weight'].shape[0],
      'patch': patch,
      'grid': int((state_dict['pos_embed'].shape[1] - 1 - distilled) ** 0.5),
      'distilled': distilled,
      **scaled,
  }


def _deit_leaves(net):
  width = net.width
  if net.class_token:
    yield Leaf('cls_token', 'params/class_token', (1, 1, width), TOKEN)
  if net.distilled:
    yield Leaf('dist_token', 'params/distillation_token', (1, 1, width), TOKEN)
  yield Leaf('pos_embed', 'params/positions', (1, net.grid**2 + net.class_token + net.distilled, width), POSITIONS)
  yield from layer_leaves('patch_embed.proj', 'patches', (width, 3, net.patch, net.patch), CONV)
  for index in range(net.depth):
    theirs, ours = f'blocks.{index}', f'block{index}'
    for norm, name in (('norm1', 'attention_norm'), ('norm2', 'mlp_norm')):
      yield from norm_leaves(f'{theirs}.{norm}', f'{ours}/{name}', width)
    if net.layer_scale:
      yield Leaf(f'{theirs}.ls1.gamma', f'params/{ours}/attention_scale', (width,))
      yield Leaf(f'{theirs}.ls2.gamma', f'params/{ours}/mlp_scale', (width,))
    yield from layer_leaves(f'{theirs}.attn.qkv', f'{ours}/qkv', (3 * width, width), LINEAR)
    yield from layer_leaves(f'{theirs}.attn.proj', f'{ours}/attention_out', (width, width), LINEAR)
    yield from layer_leaves(f'{theirs}.mlp.fc1', f'{ours}/mlp_in', (net.mlp_width, width), LINEAR)
    yield from layer_leaves(f'{theirs}.mlp.fc2', f'{ours}/mlp_out', (width, net.mlp_width), LINEAR)
