"""The lpips package's LPIPS(net='vgg') <-> LPIPS; torchvision's VGG16 and the package's linear weights."""

import re

from pagoda_jax.networks.frozen.vgg_lpips import LPIPS
from pagoda_jax.weights.convert.layers import layer_leaves
from pagoda_jax.weights.convert.mapping import CONV, ConversionError, Layout, Leaf, StateDict

CHANNEL_WEIGHTS = Layout(lambda x: x[0, :, 0, 0], lambda x: x[None, :, None, None])


def options(state_dict: StateDict) -> dict:
  """`network`'s arguments from names and shapes; torchvision names must go through `from_torchvision`.

  Raises:
    ConversionError: no VGG of the lpips package.
  """
  widths, depths = [], []
  while names := [n for n in state_dict if re.fullmatch(rf'net\.slice{len(widths) + 1}\.\d+\.weight', n)]:
    widths.append(state_dict[names[0]].shape[0])
    depths.append(len(names))
  if not widths:
    raise ConversionError("not the lpips package's VGG: no net.slice1.0.weight")
  return {'widths': tuple(widths), 'depths': tuple(depths)}


def network(options: dict, **fields) -> LPIPS:
  """The module of `options`; `fields` are its others, such as dtype."""
  return LPIPS(**options, **fields)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under the package's names."""
  found, width_in = [], 3
  for (level, index), place in _places(options['depths']).items():
    width = options['widths'][level]
    found += layer_leaves(
        f'net.slice{level + 1}.{place}', f'vgg/level{level}_conv{index}', (width, width_in, 3, 3), CONV
    )
    width_in = width
  for level, width in enumerate(options['widths']):
    found.append(Leaf(f'lin{level}.model.1.weight', f'params/weight{level}', (1, width, 1, 1), CHANNEL_WEIGHTS))
  return found


def carried(name: str) -> bool:
  """Whether `name` is the fixed scaling, a second name of the linear weights, or VGG's classifier."""
  return name.startswith(('scaling_layer.', 'lins.', 'classifier.'))


def from_torchvision(vgg16: StateDict, linear: StateDict) -> dict:
  """The package's state dict from its two published files: torchvision's VGG16 and the linear weights.

  Raises:
    ConversionError: `vgg16` has no features.0.weight.
  """
  if 'features.0.weight' not in vgg16:
    raise ConversionError("not torchvision's VGG16: no features.0.weight")
  depths = LPIPS().depths
  slices = {f'features.{place}.': f'net.slice{level + 1}.{place}.' for (level, _), place in _places(depths).items()}
  renamed = {name: re.sub(r'features\.\d+\.', lambda m: slices.get(m[0], m[0]), name) for name in vgg16}
  return {renamed[name]: value for name, value in vgg16.items()} | dict(linear)


def _places(depths):
  """(level, index) -> number of the convolution in torchvision's list, which counts ReLUs and pools."""
  places, place = {}, 0
  for level, depth in enumerate(depths):
    for index in range(depth):
      places[level, index] = place
      place += 2
    place += 1
  return places
