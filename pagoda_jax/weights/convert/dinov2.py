"""facebookresearch/dinov2's vision transformers, without registers <-> DINOv2."""

import dataclasses

from pagoda_jax.networks.frozen.dinov2 import DINOv2
from pagoda_jax.weights.convert import timm
from pagoda_jax.weights.convert.layers import norm_leaves
from pagoda_jax.weights.convert.mapping import ConversionError, Leaf, StateDict


def options(state_dict: StateDict, head_channels: int = 64) -> dict:
  """`network`'s arguments from names and shapes; `head_channels` as in timm.options.

  Raises:
    ConversionError: no DINOv2, or one with registers or a gated MLP (ViT-g/14), which are other networks.
  """
  if 'blocks.0.ls1.gamma' not in state_dict or 'norm.weight' not in state_dict:
    raise ConversionError('not a DINOv2: no blocks.0.ls1.gamma or no norm.weight')
  if 'register_tokens' in state_dict or 'blocks.0.mlp.w12.weight' in state_dict:
    raise ConversionError('a DINOv2 with registers or a gated MLP (ViT-g/14); those without are converted, such as '
                          'dinov2_vitl14')
  return timm.options(state_dict, head_channels)


def network(options: dict, **fields) -> DINOv2:
  """The module of `options`; `fields` are its others: input_size, dtype, attention_form."""
  return DINOv2(options, **fields)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under the published names."""
  inner = [dataclasses.replace(leaf, ours=leaf.ours.replace('params/', 'params/backbone/', 1))
           for leaf in timm.leaves(options)]
  return inner + list(norm_leaves('norm', 'norm', options['width']))


def carried(name: str) -> bool:
  """Whether `name` is the token of masked patches, which only training has."""
  return name == 'mask_token'
