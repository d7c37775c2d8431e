"""timm's picture towers of SigLIP and SigLIP 2 <-> SigLIP."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax

from pagoda_jax.networks.frozen.siglip import SigLIP
from pagoda_jax.weights.convert import timm
from pagoda_jax.weights.convert.layers import layer_leaves, norm_leaves
from pagoda_jax.weights.convert.mapping import LINEAR, ConversionError, Leaf, StateDict

QUERY = 'attn_pool.latent'
# Width -> channels of a head, of the published towers whose heads are not of 64: So400m and giant.
HEAD_CHANNELS = {1152: 72, 1536: 96}


def options(state_dict: StateDict, head_channels: int = 0) -> dict:
  """`network`'s arguments from names and shapes.

  Args:
    state_dict: timm's names.
    head_channels: channels of one attention head, which no shape tells; 0: those of the published tower of this width.

  Raises:
    ConversionError: no tower of SigLIP, or its channels do not split into such heads.
  """
  if lacking := [name for name in (QUERY, 'patch_embed.proj.weight', 'pos_embed') if name not in state_dict]:
    raise ConversionError(f'not a picture tower of SigLIP: no {lacking[0]}')
  width = state_dict['patch_embed.proj.weight'].shape[0]
  head_channels = head_channels or HEAD_CHANNELS.get(width, 64)
  if width % head_channels:
    raise ConversionError(f'{width} channels do not split into heads of {head_channels}')
  return timm.options(state_dict, head_channels) | {
    'distilled': False, 'class_token': False, 'approximate_gelu': True,
    'grid': math.isqrt(state_dict['pos_embed'].shape[1]),
  }


def network(options: dict, resized_positions: Callable[[jax.Array, int, int], jax.Array]) -> SigLIP:
  """The module of `options`; `resized_positions` as in DeiT."""
  return SigLIP(options, resized_positions)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under timm's names."""
  return list(_leaves(options))


def carried(name: str) -> bool:
  """Whether `name` is of a classifier, which published towers do not have."""
  return name.startswith('head.')


def _leaves(options: dict) -> Iterator[Leaf]:
  width, inner = options['width'], options['mlp_width']
  for leaf in timm.leaves(options):
    yield dataclasses.replace(leaf, ours=leaf.ours.replace('params/', 'params/backbone/', 1))
  yield from norm_leaves('norm', 'norm', width)
  yield Leaf(QUERY, 'params/pool/query', (1, 1, width), timm.TOKEN)
  for theirs, ours, shape in (('q', 'q', (width, width)), ('kv', 'kv', (2 * width, width)),
                              ('proj', 'out', (width, width)), ('mlp.fc1', 'mlp_in', (inner, width)),
                              ('mlp.fc2', 'mlp_out', (width, inner))):
    yield from layer_leaves(f'attn_pool.{theirs}', f'pool/{ours}', shape, LINEAR)
  yield from norm_leaves('attn_pool.norm', 'pool/mlp_norm', width)
