"""transformers' CLIP picture towers (CLIPVisionModelWithProjection, CLIPModel) <-> CLIPImage."""

import math
import re
from collections.abc import Iterator

from pagoda_jax.networks.frozen.clip_image import CLIPImage
from pagoda_jax.networks.text import clip
from pagoda_jax.weights.convert import config_json
from pagoda_jax.weights.convert.clip import layers_leaves
from pagoda_jax.weights.convert.layers import layer_leaves, norm_leaves
from pagoda_jax.weights.convert.mapping import CONV, LINEAR, ConversionError, Leaf, StateDict

PATCHES = 'vision_model.embeddings.patch_embedding.weight'


def options(state_dict: StateDict, heads: int = 0, activation: str = 'quick_gelu', epsilon: float = 1e-5) -> dict:
  """`network`'s arguments from names and shapes; see CLIPImage for those that they do not tell.

  Args:
    state_dict: transformers' names, the text tower's too if need be.
    heads: of attention; 0: of 64 channels each, as most published ones have.
    activation, epsilon: as in CLIPImage.

  Raises:
    ConversionError: not a CLIP picture tower with its projection, or an unknown activation.
  """
  if lacking := [name for name in (PATCHES, 'visual_projection.weight') if name not in state_dict]:
    raise ConversionError(f'not a CLIP picture tower with its projection: no {lacking[0]}')
  if activation not in clip.ACTIVATIONS:
    raise ConversionError(f'hidden_act = {activation!r}: CLIP towers have {" or ".join(clip.ACTIVATIONS)}')
  width, _, patch, _ = state_dict[PATCHES].shape
  if width % (heads or 64):
    raise ConversionError(f'{width} channels do not split into {heads or "heads of 64"}')
  places = state_dict['vision_model.embeddings.position_embedding.weight'].shape[0] - 1
  layer = r'vision_model\.encoder\.layers\.\d+\.mlp\.fc1\.weight'
  return {
    'patch': patch,
    'grid': math.isqrt(max(places, 0)),
    'width': width,
    'layers': len([name for name in state_dict if re.fullmatch(layer, name)]),
    'heads': heads or width // 64,
    'mlp_width': state_dict['vision_model.encoder.layers.0.mlp.fc1.weight'].shape[0],
    'projection': state_dict['visual_projection.weight'].shape[0],
    'activation': activation,
    'epsilon': epsilon,
  }


def described(path) -> dict:
  """What config.json beside the weights says of `options`' arguments; {} without one."""
  said = config_json.beside(path, ('clip', 'clip_vision_model'), 'vision_config')
  return {
    'heads': config_json.value(said, 'num_attention_heads', int, 12),
    'activation': config_json.value(said, 'hidden_act', str, 'quick_gelu'),
    'epsilon': config_json.value(said, 'layer_norm_eps', float, 1e-5),
  } if said else {}


def network(options: dict) -> CLIPImage:
  """The module of `options`."""
  return CLIPImage(**options)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under transformers' names."""
  return list(_leaves(network(options)))


def carried(name: str) -> bool:
  """Whether `name` is of the other tower, or a list of positions."""
  return name.startswith(('text_model.', 'text_projection.')) or name in (
    'logit_scale', 'vision_model.embeddings.position_ids')


def _leaves(net: CLIPImage) -> Iterator[Leaf]:
  width, embeddings = net.width, 'vision_model.embeddings'
  yield Leaf(f'{embeddings}.class_embedding', 'params/class_token', (width,))
  yield Leaf(f'{embeddings}.position_embedding.weight', 'params/positions', (1 + net.grid**2, width))
  kernel = (width, 3, net.patch, net.patch)
  yield from layer_leaves(f'{embeddings}.patch_embedding', 'patches', kernel, CONV, bias=False)
  yield from norm_leaves('vision_model.pre_layrnorm', 'norm_in', width)  # spelt so
  yield from layers_leaves('vision_model', net)
  yield from norm_leaves('vision_model.post_layernorm', 'norm', width)
  yield from layer_leaves('visual_projection', 'projection', (net.projection, width), LINEAR, bias=False)
