"""StyleGAN-XL's F_RandomProj (a timm backbone and its random projections) <-> ProjectedFeatures.

The backbone sits under other names there; `backbone_name` says which, so that a published backbone can
be loaded under the projections of a checkpoint.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from pagoda_jax.weights.convert import timm
from pagoda_jax.weights.convert.layers import layer_leaves
from pagoda_jax.weights.convert.mapping import CONV, ConversionError, Layout, Leaf, StateDict, misfit_table

# torch ConvTranspose2d [in, out, h, w] <-> Linen ConvTranspose [h, w, in, out], which does not flip.
CONV_TRANSPOSE = Layout(
    lambda x: x[:, :, ::-1, ::-1].transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1)[:, :, ::-1, ::-1]
)
# (layer, place in it) of each EfficientNet stage; the stem is at the start of layer 0.
_PLACES = ((0, 3), (0, 4), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1))
_STEM = {'conv_stem.': 'pretrained.layer0.0.', 'bn1.': 'pretrained.layer0.1.'}


def options(state_dict: StateDict, head_channels: int = 64) -> dict:
  """`projections.projected`'s arguments from names and shapes; `head_channels` as for timm.options.

  Raises:
    ConversionError: not an F_RandomProj of one of the two backbones.
  """
  if 'scratch.layer0_ccm.weight' not in state_dict:
    raise ConversionError('not an F_RandomProj: no scratch.layer0_ccm.weight')
  backbone = timm.options(backbone_state_dict(state_dict), head_channels)
  transformer = backbone['architecture'] == 'deit'
  width = lambda name: state_dict[f'{name}.weight'].shape[0]
  return {
      'backbone': backbone,
      'reassembly_widths': tuple(width(f'pretrained.layer{i}.3') for i in range(1, 5)) if transformer else None,
      'widths': tuple(width(f'scratch.layer{i}_ccm') for i in range(4)),
      'mixed_widths': tuple(width(f'scratch.layer{i}_csm.out_conv') for i in range(4)),
  }


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `projections.projected(options)`, under F_RandomProj's names."""
  return [*_backbone_leaves(options['backbone']), *projection_leaves(options)]


def carried(name: str) -> bool:
  """Whether `name` is a counter of batches, or a weight after the last feature map."""
  backbone = backbone_name(name)
  return name.endswith('num_batches_tracked') or (backbone is not None and timm.carried(backbone))


def with_backbone(variables: Mapping, backbone: Mapping) -> dict:
  """The variables of ProjectedFeatures with those of a backbone, as timm's leaves make them, put in.

  Raises:
    ConversionError: the backbone is of another architecture; every difference is listed.
  """
  ours = {collection: tree.get('backbone', {}) for collection, tree in variables.items()}
  flat, given = (traverse_util.flatten_dict(tree, sep='/') for tree in (ours, backbone))
  rows = [('missing', path, '-', str(np.shape(flat[path]))) for path in flat if path not in given]
  rows += [('unexpected', path, str(np.shape(given[path])), '-') for path in given if path not in flat]
  for path in flat.keys() & given.keys():
    if np.shape(flat[path]) != np.shape(given[path]):
      rows.append(('other shape', path, str(np.shape(given[path])), str(np.shape(flat[path]))))
  if rows:
    raise ConversionError(misfit_table(rows))
  return {name: {**tree, 'backbone': backbone[name]} if name in backbone else tree for name, tree in variables.items()}


def projection_leaves(options: dict) -> list[Leaf]:
  """The random part of `leaves`: reassembly and mixing."""
  rows = []
  widths, reassembled = options['widths'], options['reassembly_widths']
  if reassembled:
    inputs, backbone_width = reassembled, options['backbone']['width']
    for index, width in enumerate(reassembled):
      rows.append((f'pretrained.layer{index + 1}.3', f'reassembly/project{index}', (width, backbone_width, 1, 1), CONV))
      kernel, layout = {0: (4, CONV_TRANSPOSE), 1: (2, CONV_TRANSPOSE), 3: (3, CONV)}.get(index, (0, None))
      if kernel:
        shape = (width, width, kernel, kernel)
        rows.append((f'pretrained.layer{index + 1}.4', f'reassembly/resample{index}', shape, layout))
  else:
    inputs = [options['backbone']['widths'][stage] for stage in (1, 2, 4, 6)]
  for index, (mixed, width) in enumerate(zip(options['mixed_widths'], widths)):
    shapes = (width, inputs[index], 1, 1), (mixed, width, 1, 1)
    rows.append((f'scratch.layer{index}_ccm', f'projection/channels{index}', shapes[0], CONV))
    rows.append((f'scratch.layer{index}_csm.out_conv', f'projection/scales{index}', shapes[1], CONV))
  return [leaf for row in rows for leaf in layer_leaves(*row)]


def backbone_name(name: str) -> str | None:
  """timm's name of one of F_RandomProj's, None for the random part."""
  if name.startswith('pretrained.model.'):
    return name.removeprefix('pretrained.model.')
  for theirs, prefix in _STEM.items():
    if name.startswith(prefix):
      return theirs + name.removeprefix(prefix)
  match = re.fullmatch(r'pretrained\.layer(\d)\.(\d)\.(\d+\..*)', name)
  if match and (int(match[1]), int(match[2])) in _PLACES:
    return f'blocks.{_PLACES.index((int(match[1]), int(match[2])))}.{match[3]}'
  return None


def backbone_state_dict(state_dict: StateDict) -> dict:
  """The backbone alone, under timm's names."""
  names = {name: backbone_name(name) for name in state_dict}
  return {names[name]: value for name, value in state_dict.items() if names[name] is not None}


def _backbone_leaves(options):
  """timm's leaves, renamed and moved to where ProjectedFeatures has its backbone."""
  for leaf in timm.leaves(options):
    collection, path = leaf.ours.split('/', 1)
    name = _random_projection_name(leaf.theirs, options['architecture'])
    yield dataclasses.replace(leaf, theirs=name, ours=f'{collection}/backbone/{path}')


def _random_projection_name(name, architecture):
  """The inverse of `backbone_name`."""
  if architecture == 'deit':
    return f'pretrained.model.{name}'
  for theirs, prefix in _STEM.items():
    if name.startswith(theirs):
      return prefix + name.removeprefix(theirs)
  _, stage, rest = name.split('.', 2)
  layer, place = _PLACES[int(stage)]
  return f'pretrained.layer{layer}.{place}.{rest}'
