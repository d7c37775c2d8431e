"""Random weights as the publishers' files, for tests: through our conversions' way back."""

import dataclasses

import numpy as np
import torch_writers

from pagoda_jax.method import perception
from pagoda_jax.weights import published
from pagoda_jax.weights.convert import formats, torch_files

VGG = {'widths': (64, 128, 256, 512, 512), 'depths': (2, 2, 3, 3, 3)}


def random_tensors(leaves, seed: int = 0) -> dict[str, np.ndarray]:
  """Random tensors under the published names: unit-gain kernels, norms near the identity."""
  rng = np.random.default_rng(seed)
  return {leaf.theirs: _random(rng, leaf.theirs, leaf.shape) for leaf in leaves}


def _random(rng, name, shape):
  if name.startswith('lin'):  # LPIPS's channel weights are not negative
    return rng.random(shape, np.float32) / 64
  z = rng.standard_normal(shape, np.float32)
  if len(shape) > 1:
    return z * np.float32(1 / np.sqrt(np.prod(shape[1:])))
  near_one = name.endswith(('weight', 'running_var'))
  return 1 + np.abs(z) / 10 if near_one else z / 10


def unlocked(monkeypatch) -> None:
  """The registry without sizes and digests, so that random files pass for the published ones."""
  entries = tuple(dataclasses.replace(entry, sha256='', size=0) for entry in published.REGISTRY)
  monkeypatch.setattr(published, 'REGISTRY', entries)


def write_representations(folder) -> dict:
  """FDr's encoders but Inception, tiny but for the size of their pictures; returns {registry's name: path}."""
  tower = {'architecture': 'deit', 'width': 64, 'depth': 1, 'head_channels': 64, 'mlp_width': 8, 'patch': 16,
           'grid': 14, 'distilled': False}
  norm = {'norm.weight': np.ones(64, np.float32), 'norm.bias': np.zeros(64, np.float32)}
  clip = {'patch': 14, 'grid': 16, 'width': 64, 'layers': 1, 'heads': 1, 'mlp_width': 8, 'projection': 4}
  wanted = {
    'convnextv2_base': ('convnext', {'depths': (1, 1), 'widths': (4, 6)},
                        {'head.fc.weight': np.zeros((2, 6), np.float32)}),
    'dinov2_vitl14': ('dinov2', tower | {'patch': 14, 'grid': 16, 'layer_scale': True}, {}),
    'mae_vitl16': ('timm', tower, norm),
    'siglip2_so400m16': ('siglip', tower | {'grid': 16, 'class_token': False, 'approximate_gelu': True}, {}),
    'clip_vit_l14': ('clip_image', clip, {}),
  }
  paths = {name: folder / entry.file_name for entry in published.REGISTRY if (name := entry.name) in wanted}
  folder.mkdir(parents=True, exist_ok=True)
  for seed, (name, (format, options, more)) in enumerate(wanted.items()):
    content = random_tensors(formats.FORMATS[format].leaves(options), seed) | more
    if paths[name].suffix == '.safetensors':
      torch_files.write_safetensors(paths[name], content, {'format': 'pt'})
    else:
      torch_writers.save_zip(paths[name], content)
  return paths


def write(folder, *names: str) -> None:
  """Writes random files of these registry names into a folder, feature networks by perception.BACKBONES."""
  folder.mkdir(parents=True, exist_ok=True)
  files = {entry.name: folder / entry.file_name for entry in published.REGISTRY}
  for name in names:
    if name in perception.BACKBONES:
      content = random_tensors(formats.FORMATS['timm'].leaves(perception.BACKBONES[name]))
    elif name == perception.CLIP_NAME:
      leaves = formats.FORMATS['clip_image'].leaves(perception.CLIP_OPTIONS)
      torch_files.write_safetensors(files[name], random_tensors(leaves), {'format': 'pt'})
      continue
    elif name == 'in_embeddings_tf_efficientnet_lite0':
      # As StyleGAN-XL's file: a plain pickle of a torch.nn.Embedding.
      weight = np.random.default_rng(1).standard_normal((1000, 320), np.float32)
      torch_writers.save_pickle(files[name], {'embed': torch_writers.module({'weight': weight}, cls='Embedding')})
      continue
    else:
      package = random_tensors(formats.FORMATS['lpips'].leaves(VGG))
      linear = {key: value for key, value in package.items() if key.startswith('lin')}
      vgg = {f'features.{key.split(".", 2)[2]}': value for key, value in package.items() if key not in linear}
      content = {'vgg16': vgg, 'lpips_vgg': linear}[name]
    torch_writers.save_zip(files[name], content)
