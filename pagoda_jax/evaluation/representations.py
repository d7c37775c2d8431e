"""The six encoders of FDr6 (Yang et al. 2026, "Representation Frechet Loss"), distances as shares of real pictures'.

FDr of an encoder is the Frechet distance of samples to the reference over that of held-out pictures to it; FDr6 is the
mean over six encoders. As the authors' code has them: Inception-v3 as ADM's evaluator, ConvNeXt V2-B fine-tuned on
ImageNet-22k and -1k (mean over places of the last map, before the classifier's norm, 224 px), DINOv2 ViT-L/14 (class
token, 256 px), MAE ViT-L/16 (class token, 224 px), SigLIP 2 So400m/16 of 256 px (what its attention pools, taken at 224
px) and CLIP ViT-L/14 (class token before the projection, 256 px, and with the exact GELU that timm gives this tower,
which was trained with another). Pictures are resized by torch's bicubic filter with antialias, and not rounded; sides
that hold no whole number of patches get zeros. That code computes all but Inception in bfloat16, this one in float32.
"""

import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.evaluation.encoders import DINOV2_FILE, INCEPTION_FILE, Encoder, read
from pagoda_jax.networks.frozen import clip_image as clip_tower
from pagoda_jax.networks.frozen import dinov2, projections
from pagoda_jax.networks.frozen import siglip as siglip_tower
from pagoda_jax.weights import locate
from pagoda_jax.weights.convert import convnext, siglip
from pagoda_jax.weights.convert.mapping import ConversionError

# Figure -> the encoder that it is of.
SIX = {'fid': 'inception', 'fd_convnext': 'convnext', 'fd_dinov2_256': 'dinov2_256', 'fd_mae': 'mae',
       'fd_siglip': 'siglip', 'fd_clip': 'clip_256'}
# Encoder -> its published file.
FILES = {'inception': INCEPTION_FILE, 'convnext': 'convnextv2_base', 'dinov2_256': DINOV2_FILE, 'mae': 'mae_vitl16',
         'siglip': 'siglip2_so400m16', 'clip_256': 'clip_vit_l14'}
RESIZED = 'bicubic with antialias to {} px'


def here(weights_dir) -> tuple[str, ...]:
  """The figures of SIX whose encoders can be had."""
  return tuple(figure for figure, name in SIX.items() if locate.located(
    locate.entry(FILES[name]), weights_dir) is not None)


def lacking(figures) -> str:
  """In words, why the figures of SIX that are not among `figures` are not."""
  return ', '.join(f'{name} (weights {FILES[name]} are not here)' for figure, name in SIX.items()
                   if figure not in figures)


def prepared(images: jax.Array, size: int, mean, deviation, patch: int) -> jax.Array:
  """uint8 [B, H, W, 3 or 1] -> what enters a network, float32 [B, S, S, 3], S >= size a multiple of `patch`."""
  x = resize.resize(images.astype(jnp.float32) / 255, size, 'bicubic', antialias=True)
  x = (x - jnp.array(mean)) / jnp.array(deviation)
  missing = -size % patch
  return jnp.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0)))


def timm_positions(grid: jax.Array, height: int, width: int) -> jax.Array:
  """The position grid [h, w, C] of pictures of another size, as timm makes it."""
  return resize.resize(grid, (height, width), 'bicubic', antialias=True)


def of_convnext(weights_dir, size: int = 224) -> Encoder:
  """ConvNeXt V2-B: 'features'. This and the others raise as encoders.of_inception does; `size`: pictures' side."""
  converted, described = read(FILES['convnext'], 'convnext', weights_dir)
  if 'head.fc.weight' not in converted.carried:
    raise ConversionError(f'{described["network"]}: no ConvNeXt V2 fine-tuned on ImageNet, which ends in a classifier')
  module = convnext.network(converted.options)
  embed = lambda variables, x: jnp.mean(module.apply(variables, x), axis=(1, 2))
  return _encoder(embed, converted.variables, described, size, *projections.NORMALIZATION['deit'])


def of_siglip(weights_dir, size: int = 224) -> Encoder:
  """SigLIP 2 So400m/16's tower of pictures: 'features'."""
  converted, described = read(FILES['siglip'], 'siglip', weights_dir)
  module = siglip.network(converted.options, timm_positions)
  return _encoder(module.apply, converted.variables, described, size, siglip_tower.MEAN, siglip_tower.DEVIATION,
                  converted.options['patch'])


def of_dinov2(weights_dir, size: int = 256) -> Encoder:
  """DINOv2 ViT-L/14: 'features'."""
  converted, described = read(DINOV2_FILE, 'dinov2', weights_dir)
  return _transformer(converted.variables, converted.options, described, size)


def of_mae(weights_dir, size: int = 224) -> Encoder:
  """MAE ViT-L/16's encoder: 'features'."""
  converted, described = read(FILES['mae'], 'timm', weights_dir)
  if not {'norm.weight', 'norm.bias'} <= set(converted.carried) or converted.options['architecture'] != 'deit':
    raise ConversionError(f'{described["network"]}: no encoder of MAE, which ends in a norm')
  norm = {'scale': converted.carried['norm.weight'], 'bias': converted.carried['norm.bias']}
  variables = {'params': {'backbone': converted.variables['params'], 'norm': norm}}
  return _transformer(variables, converted.options, described, size)


def _transformer(variables, options, described, size) -> Encoder:
  """'features': a vision transformer's class token after its last norm."""
  module = dinov2.DINOv2(options, resized_positions=timm_positions)
  embed = lambda variables, x: module.apply(variables, x, method='features')
  return _encoder(embed, variables, described, size, *projections.NORMALIZATION['deit'], options['patch'])


def of_clip(weights_dir, size: int = 256) -> Encoder:
  """CLIP ViT-L/14's tower of pictures before its projection: 'features'."""
  converted, described = read(FILES['clip_256'], 'clip_image', weights_dir)
  module = clip_tower.CLIPImage(**converted.options | {'activation': 'gelu'})
  embed = lambda variables, x: module.apply(variables, x, False, method='embed')
  return _encoder(embed, converted.variables, described, size, clip_tower.MEAN, clip_tower.DEVIATION, module.patch)


def _encoder(embed, variables, described, size, mean, deviation, patch=1) -> Encoder:
  """'features': embed(variables, x) of what `prepared` makes of pictures."""
  apply = lambda variables, images: {'features': embed(variables, prepared(images, size, mean, deviation, patch))}
  return Encoder(apply, variables, described | {'resize': RESIZED.format(size)})


MAKERS = {'convnext': of_convnext, 'dinov2_256': of_dinov2, 'mae': of_mae, 'siglip': of_siglip, 'clip_256': of_clip}
