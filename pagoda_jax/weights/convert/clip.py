"""transformers' CLIP text towers (CLIPTextModel, CLIPTextModelWithProjection, CLIPModel) <-> CLIPText."""

import re
from collections.abc import Iterator

from pagoda_jax.networks.text import clip
from pagoda_jax.weights.convert import config_json
from pagoda_jax.weights.convert.layers import layer_leaves, norm_leaves
from pagoda_jax.weights.convert.mapping import LINEAR, ConversionError, Leaf, StateDict

OPEN_CLIP = 'transformer.resblocks.0.attn.in_proj_weight'  # alone, or within 'text.': of OpenCLIP and OpenAI's own code
OLD_EOS = 2  # that configs written before the end token was known say: the place of the largest id is meant


def options(state_dict: StateDict, heads: int = 0, activation: str = 'quick_gelu', eos: int | None = None,
            epsilon: float = 1e-5) -> dict:
  """`network`'s arguments from names and shapes; see CLIPText for those that they do not tell.

  Args:
    state_dict: transformers' names, the picture tower's too if need be.
    heads: of attention; 0: of 64 channels each, as all published ones have.
    activation, eos, epsilon: as in CLIPText.

  Raises:
    ConversionError: not a CLIP text tower, or an unknown activation.
  """
  if any(name.endswith(OPEN_CLIP) for name in state_dict):
    raise ConversionError(
      "OpenCLIP's or OpenAI's own form of the towers (open_clip_pytorch_model.bin, say): take transformers' form, "
      'model.safetensors or pytorch_model.bin beside a config.json with "num_attention_heads", as the same repository '
      'mostly has it too')
  if 'text_model.embeddings.token_embedding.weight' not in state_dict:
    raise ConversionError('not a CLIP text tower: no text_model.embeddings.token_embedding.weight')
  if activation not in clip.ACTIVATIONS:
    raise ConversionError(f'hidden_act = {activation!r}: CLIP towers have {" or ".join(clip.ACTIVATIONS)}')
  vocabulary, width = state_dict['text_model.embeddings.token_embedding.weight'].shape
  layer = r'text_model\.encoder\.layers\.\d+\.mlp\.fc1\.weight'
  if width % (heads or 64):
    raise ConversionError(f'{width} channels do not split into {heads or "heads of 64"}')
  return {
    'vocabulary': vocabulary,
    'positions': state_dict['text_model.embeddings.position_embedding.weight'].shape[0],
    'width': width,
    'layers': len([name for name in state_dict if re.fullmatch(layer, name)]),
    'heads': heads or width // 64,
    'mlp_width': state_dict['text_model.encoder.layers.0.mlp.fc1.weight'].shape[0],
    'projection': state_dict['text_projection.weight'].shape[0] if 'text_projection.weight' in state_dict else 0,
    'activation': activation,
    'eos': eos,
    'epsilon': epsilon,
  }


def described(path) -> dict:
  """What config.json beside the weights says of `options`' arguments; {} without one."""
  said = config_json.beside(path, ('clip', 'clip_text_model'), 'text_config')
  eos = config_json.value(said, 'eos_token_id', int, OLD_EOS)
  return {
    'heads': config_json.value(said, 'num_attention_heads', int, 8),
    'activation': config_json.value(said, 'hidden_act', str, 'quick_gelu'),
    'eos': None if eos == OLD_EOS else eos,
    'epsilon': config_json.value(said, 'layer_norm_eps', float, 1e-5),
  } if said else {}


def network(options: dict) -> clip.CLIPText:
  """The module of `options`."""
  return clip.CLIPText(**options)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under transformers' names."""
  return list(_leaves(network(options)))


def carried(name: str) -> bool:
  """Whether `name` is of the other tower, or a list of positions."""
  return name.startswith(('vision_model.', 'visual_projection.')) or name in (
    'logit_scale', 'text_model.embeddings.position_ids')


def _leaves(net) -> Iterator[Leaf]:
  width = net.width
  theirs = 'text_model.embeddings'
  yield Leaf(f'{theirs}.token_embedding.weight', 'params/tokens/embedding', (net.vocabulary, width))
  yield Leaf(f'{theirs}.position_embedding.weight', 'params/positions', (net.positions, width))
  yield from layers_leaves('text_model', net)
  yield from norm_leaves('text_model.final_layer_norm', 'norm', width)
  if net.projection:
    yield from layer_leaves('text_projection', 'projection', (net.projection, width), LINEAR, bias=False)


def layers_leaves(tower: str, net) -> Iterator[Leaf]:
  """The transformer layers of either tower, 'text_model' or 'vision_model'."""
  width = net.width
  for layer in range(net.layers):
    theirs, ours = f'{tower}.encoder.layers.{layer}', f'layer{layer}'
    yield from norm_leaves(f'{theirs}.layer_norm1', f'{ours}/attention_norm', width)
    yield from norm_leaves(f'{theirs}.layer_norm2', f'{ours}/mlp_norm', width)
    for name, part in (('q', 'query'), ('k', 'key'), ('v', 'value'), ('out', 'out')):
      yield from layer_leaves(f'{theirs}.self_attn.{name}_proj', f'{ours}/attention/{part}', (width, width), LINEAR)
    yield from layer_leaves(f'{theirs}.mlp.fc1', f'{ours}/mlp_in', (net.mlp_width, width), LINEAR)
    yield from layer_leaves(f'{theirs}.mlp.fc2', f'{ours}/mlp_out', (width, net.mlp_width), LINEAR)
