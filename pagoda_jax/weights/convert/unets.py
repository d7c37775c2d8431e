"""What the conversions of the published U-Nets have in common: leaves of a residual block."""

import numpy as np

from pagoda_jax.networks.unet import Block, UNet
from pagoda_jax.weights.convert import mapping
from pagoda_jax.weights.convert.mapping import Leaf


def shape(state_dict: mapping.StateDict, name: str) -> tuple[int, ...]:
  """The shape of a tensor that the architecture is read off.

  Raises:
    ConversionError: there is no such tensor: another architecture.
  """
  if name not in state_dict:
    raise mapping.ConversionError(mapping.misfit_table([('missing', name, '-', 'needed to read off the sizes')]))
  return tuple(np.shape(state_dict[name]))


def width_if_present(state_dict: mapping.StateDict, name: str, axis: int) -> int:
  """The size of an optional tensor along `axis`; 0 if there is none."""
  return shape(state_dict, name)[axis] if name in state_dict else 0


def multiplier(width: int, channels: int) -> float:
  """width / channels, an int where it is one."""
  return width // channels if width % channels == 0 else width / channels


def norm(theirs: str, ours: str, channels: int) -> list[Leaf]:
  return [Leaf(f'{theirs}.weight', f'{ours}/scale', (channels,)), Leaf(f'{theirs}.bias', f'{ours}/bias', (channels,))]


def linear(theirs: str, ours: str, inputs: int, outputs: int) -> list[Leaf]:
  return [
      Leaf(f'{theirs}.weight', f'{ours}/kernel', (outputs, inputs), mapping.LINEAR),
      Leaf(f'{theirs}.bias', f'{ours}/bias', (outputs,)),
  ]


def conv(theirs: str, ours: str, inputs: int, outputs: int, size: int) -> list[Leaf]:
  return [
      Leaf(f'{theirs}.weight', f'{ours}/kernel', (outputs, inputs, size, size), mapping.CONV),
      Leaf(f'{theirs}.bias', f'{ours}/bias', (outputs,)),
  ]


def pointwise(theirs: str, ours: str, inputs: int, outputs: int, order: np.ndarray | None = None) -> list[Leaf]:
  """A 1x1 convolution that is a Dense layer here; with `order`, ours[i] is their output channel order[i]."""
  kernel, bias = mapping.POINTWISE_2D, mapping.SAME
  if order is not None:
    kernel, bias = mapping.permuted(kernel, order), mapping.permuted(bias, order)
  return [
      Leaf(f'{theirs}.weight', f'{ours}/kernel', (outputs, inputs, 1, 1), kernel),
      Leaf(f'{theirs}.bias', f'{ours}/bias', (outputs,), bias),
  ]


def qkv_order(axes: str, channels: int, heads: int) -> np.ndarray:
  """Where our qkv channels, in the order (qkv, head, channel), are among theirs.

  Args:
    axes: their order, slowest first: a permutation of 't' (three: q, k, v), 'h' (head), 'c' (channel).

  Returns:
    [3 * channels] indices into their channels.
  """
  sizes = {'t': 3, 'h': heads, 'c': channels // heads}
  theirs = np.arange(3 * channels).reshape([sizes[axis] for axis in axes])
  return theirs.transpose([axes.index(axis) for axis in 'thc']).ravel()


def block_leaves(net: UNet, block: Block, names: dict[str, str], axes: str) -> list[Leaf]:
  """Leaves of one residual block.

  Args:
    names: their name of each of our layers ('norm_0', ..., 'attention/qkv').
    axes: their order of qkv channels, see `qkv_order`.
  """
  ours, width = block.name, block.channels
  leaves = [
      *norm(names['norm_0'], f'{ours}/norm_0', block.in_channels),
      *conv(names['conv_0'], f'{ours}/conv_0', block.in_channels, width, 3),
      *linear(names['embed'], f'{ours}/embed', net.embed_width, width * (2 if block.scale_shift else 1)),
      *norm(names['norm_1'], f'{ours}/norm_1', width),
      *conv(names['conv_1'], f'{ours}/conv_1', width, width, 3),
  ]
  if block.skip_conv:
    leaves += conv(names['skip'], f'{ours}/skip', block.in_channels, width, 1)
  if block.heads:
    attention = f'{ours}/attention'
    leaves += [
        *norm(names['attention/norm'], f'{attention}/norm', width),
        *pointwise(names['attention/qkv'], f'{attention}/qkv', width, 3 * width, qkv_order(axes, width, block.heads)),
        *pointwise(names['attention/out'], f'{attention}/out', width, width),
    ]
  return leaves
