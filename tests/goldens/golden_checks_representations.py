"""FDr's encoders but Inception against timm's, from 8-bit pictures to features: zeros behind to whole patches,
positions of another grid, the exact GELU in CLIP's tower, tanh's and the pool in SigLIP's, ConvNeXt's map before its
norm."""

import functools
import pathlib
import tempfile

import golden_tools
import jax
import numpy as np
from golden_tools import assert_close, in_float32

from pagoda_jax.evaluation import representations
from pagoda_jax.weights import locate
from pagoda_jax.weights.convert import torch_files

FILES = {'dinov2': 'dinov2_vitl14', 'mae': 'mae_vitl16', 'clip': 'clip_vit_l14', 'convnext': 'convnextv2_base',
         'siglip': 'siglip2_so400m16'}
SIZES = {'dinov2': 36, 'mae': 32, 'clip': 36, 'convnext': 64, 'siglip': 32}
TOLERANCE = {'convnext': 2e-5, 'siglip': 2e-5}  # the other GELU moves them by 4e-4 and more


def cases():
  """(name, check) of this file."""
  return [(f'representations {name}', in_float32(functools.partial(check, name))) for name in FILES
          ] if golden_tools.exists('representations') else []


def check(name):
  arrays, meta = golden_tools.load('representations')
  tensors = golden_tools.rule_state_dict(meta['params'][name], meta['prefix'])
  if name == 'clip':
    tensors = dict(row for key, value in tensors.items() for row in _as_transformers(key, value))
    tensors['visual_projection.weight'] = np.ones((8, 64), np.float32)
  elif name == 'dinov2':
    tensors['mask_token'] = np.zeros((1, 64), np.float32)
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / locate.entry(FILES[name]).file_name
    torch_files.write_safetensors(file, tensors, {'format': 'pt'})
    encoder = getattr(representations, f'of_{name}')(folder, SIZES[name])
  found = jax.jit(encoder.apply)(encoder.variables, arrays['img_uint8'])['features']
  assert_close(found, arrays[name], TOLERANCE.get(name, 1e-4), name)


def _as_transformers(name, value):
  """A tensor of timm's vision transformer under the names that transformers gives CLIP's."""
  first = {'cls_token': 'embeddings.class_embedding', 'pos_embed': 'embeddings.position_embedding.weight'}
  if name in first:
    yield f'vision_model.{first[name]}', value.reshape(value.shape[1:] if value.shape[1] > 1 else -1)
    return
  for theirs, ours in (('patch_embed.proj', 'embeddings.patch_embedding'), ('norm_pre', 'pre_layrnorm'),
                       ('blocks.', 'encoder.layers.'), ('.norm1', '.layer_norm1'), ('.norm2', '.layer_norm2'),
                       ('.attn.proj', '.self_attn.out_proj'), ('.attn.qkv', '.self_attn.qkv')):
    name = name.replace(theirs, ours)
  name = name.replace('norm.', 'post_layernorm.') if name.startswith('norm.') else name
  if '.qkv.' in name:
    for letter, part in zip('qkv', np.split(value, 3)):
      yield f'vision_model.{name.replace(".qkv.", f".{letter}_proj.")}', part
  else:
    yield f'vision_model.{name}', value
