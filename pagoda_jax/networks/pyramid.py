"""Discriminator for runs with no downloaded weights: it sees the pixels themselves at several scales."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pagoda_jax.networks import layers
from pagoda_jax.networks.text_condition import TextProjection


def pixel_pyramid(images: jax.Array, scales: int) -> list[jax.Array]:
  """[B, H, W, C] -> `scales` maps, each the 2x2 average of the one before, finest first."""
  maps = [images]
  for _ in range(scales - 1):
    batch, height, width, channels = maps[-1].shape
    maps.append(maps[-1].reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4)))
  return maps


class ScaleDiscriminator(nn.Module):
  """Strided convolutions down to 4x4, one logit a place; with spectral norm (Miyato et al. 2018) or without."""

  channels: int
  num_classes: int = 0
  spectral_norm: bool = True
  omega_embedding: bool = False
  text: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, cond: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
    """[B, H, W, C] -> logits [B, 16]; `train` renews the spectral norm's vectors ('batch_stats')."""

    def convolve(x, channels, kernel, stride, name):
      conv = layers.Conv(channels, (kernel, kernel), (stride, stride), dtype=self.dtype, name=name)
      return nn.SpectralNorm(conv, name=f'{name}_norm')(x, update_stats=train) if self.spectral_norm else conv(x)

    channels, level = self.channels, 0
    while x.shape[1] > 4:
      x = nn.leaky_relu(convolve(x, channels, 4, 2, f'down_{level}'), 0.2)
      channels, level = 2 * channels, level + 1
    if self.omega_embedding:  # before the last features, so that they, and through them the class, depend on it
      x = (x + layers.OmegaEmbedding(x.shape[-1], name='omega_mix')(cond['omega'])[:, None, None]).astype(self.dtype)
    x = nn.leaky_relu(convolve(x, channels, 3, 1, 'mix'), 0.2)
    logits = convolve(x, 1, 1, 1, 'logit')[..., 0]
    embedded = 0.0
    if self.num_classes:  # projection of the features on the class (Miyato & Koyama 2018)
      embedded = layers.ClassEmbedding(self.num_classes, x.shape[-1], name='label_embed')(cond['label'])
    if self.omega_embedding:
      embedded += layers.OmegaEmbedding(x.shape[-1], name='omega_embed')(cond['omega'])
    if self.text:  # as large as a class's
      embedded += TextProjection(x.shape[-1], name='text_embed')(cond) / math.sqrt(x.shape[-1])
    if self.num_classes or self.omega_embedding or self.text:
      logits += jnp.einsum('bhwc,bc->bhw', x, embedded.astype(self.dtype))
    return logits.reshape(len(x), -1).astype(jnp.float32)


class PyramidDiscriminator(nn.Module):
  """One ScaleDiscriminator for each map of a pixel pyramid.

  Args:
    channels: of the finest map's first convolution.
    num_classes: 0 makes it unconditional.
    spectral_norm: bounds how fast the logits can change; short runs learn faster without.
    omega_embedding: conditioned on the strength of guidance, cond['omega'] [B].
    text: conditioned on a text's vector, as of text_condition.vector.
  """

  channels: int = 64
  num_classes: int = 0
  spectral_norm: bool = True
  omega_embedding: bool = False
  text: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: Sequence[jax.Array], cond: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
    """Maps [B, H_i, W_i, C] -> logits [B, n], all scales side by side.

    Raises:
      ValueError: a map smaller than 4x4.
    """
    if min(x.shape[1] for x in features) < 4:
      sides = [x.shape[1] for x in features]
      raise ValueError(f'maps of {sides} px: the discriminator needs at least 4; use fewer scales')
    logits = [
      ScaleDiscriminator(
        self.channels, self.num_classes, self.spectral_norm, self.omega_embedding, self.text, self.dtype,
        name=f'scale_{i}'
      )(x, cond, train=train)
      for i, x in enumerate(features)
    ]
    return jnp.concatenate(logits, axis=-1)
