"""Growing a generator: copying parameters by name, and what is trained afterwards."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

HEAD = ('out_norm', 'out_conv', 'out_gain')


class GrowthReport(NamedTuple):
  """What became of each leaf, as '/'-joined paths."""

  copied: tuple[str, ...]
  new: tuple[str, ...]  # only in the grown network
  other_shape: tuple[str, ...]  # in both, but of another shape: freshly initialised
  left_out: tuple[str, ...]  # only in the old network

  def __str__(self) -> str:
    odd = [f'{what.replace("_", " ")}: {path}' for what in ('other_shape', 'left_out') for path in getattr(self, what)]
    return '\n'.join([self.counts, *odd])

  @property
  def counts(self) -> str:
    """How many leaves each fate had."""
    return ', '.join(f'{len(paths)} {what.replace("_", " ")}' for what, paths in self._asdict().items())


def grow_params(new_params: Mapping, old_params: Mapping) -> tuple[dict, GrowthReport]:
  """Copies the old network into a freshly initialised larger one (PaGoDA, stage 3).

  Args:
    new_params: parameters of the grown network, freshly initialised.
    old_params: parameters of the network it grows from.

  Returns:
    (params, report): `new_params` with every leaf of equal path and shape replaced by the old
    leaf itself, bit for bit.

  Raises:
    ValueError: the networks have no leaf in common.
  """
  new, old = traverse_util.flatten_dict(new_params, sep='/'), traverse_util.flatten_dict(old_params, sep='/')
  shared = [path for path in new if path in old]
  copied = tuple(path for path in shared if np.shape(new[path]) == np.shape(old[path]))
  if not copied:
    raise ValueError('the grown network has no parameter in common with the one it grows from')
  report = GrowthReport(
      copied=copied,
      new=tuple(path for path in new if path not in old),
      other_shape=tuple(path for path in shared if np.shape(new[path]) != np.shape(old[path])),
      left_out=tuple(path for path in old if path not in new),
  )
  return traverse_util.unflatten_dict(new | {path: old[path] for path in copied}, sep='/'), report


def split_trainable(params: Mapping, thaw: Iterable[int | str]) -> tuple[dict, dict]:
  """Splits parameters into those that growth trains and those that it keeps fixed.

  Args:
    params: a U-Net's parameters.
    thaw: what is trained besides the output head: resolutions of decoder levels (the new ones and
      the formerly highest), or names of single blocks such as 'dec_32_block1'.

  Returns:
    (trainable, fixed): two trees without a leaf in common; `merge` undoes the split.

  Raises:
    ValueError: an entry of `thaw` names nothing in the network.
  """
  prefixes = {entry: f'dec_{entry}_' if isinstance(entry, int) else entry for entry in thaw}
  thawed = set(HEAD)
  for entry, prefix in prefixes.items():
    found = {name for name in params if name.startswith(prefix) if isinstance(entry, int) or name == prefix}
    if not found:
      raise ValueError(f'nothing to thaw at {entry!r}; the decoder has {", ".join(decoder_blocks(params))}')
    thawed |= found
  trainable = {name: leaves for name, leaves in params.items() if name in thawed}
  return trainable, {name: leaves for name, leaves in params.items() if name not in thawed}


def merge(trainable: Mapping, fixed: Mapping) -> dict:
  """The parameters that `split_trainable` split."""
  return {**fixed, **trainable}


def decoder_blocks(params: Mapping) -> list[str]:
  """Names of the decoder's blocks in the order of their calls."""
  def place(name):
    resolution, index = re.fullmatch(r'dec_(\d+)_(?:up|block(\d+))', name).groups(default='-1')
    return int(resolution), int(index)
  return sorted((name for name in params if name.startswith('dec_')), key=place)


def last_layer(params: Mapping) -> tuple[str, str, str]:
  """Path of the weight at which the adaptive weight's gradients are taken: the last convolution of
  the last decoder block (PaGoDA's release; not the output convolution)."""
  return decoder_blocks(params)[-1], 'conv_1', 'kernel'
