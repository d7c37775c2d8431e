"""StyleGAN-T's discriminator heads (Sauer et al. 2023): one on each sequence of a frozen transformer's tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.networks import layers
from pagoda_jax.networks.discriminator import SpectralConv
from pagoda_jax.networks.text_condition import TextProjection

VIRTUAL_BATCH = 8  # images whose statistics a batch norm takes together


class TokenDiscriminator(nn.Module):
  """Logits of every token of every sequence, conditional by projection on class or text, and on omega, or not.

  Variables: 'params' and 'spectral' (as SpectralConv's).

  Attributes:
    num_classes: 0 for no conditioning.
    text: conditional on a text's vector.
    omega_embedding: conditional on the strength of guidance, as an input of each head's tokens and beside the text.
    projection_width: channels in which tokens and condition are compared.
    kernel: tokens that a residual block's convolution sees.
    dtype: of the convolutions; norms' statistics, spectral norm and logits are float32.
  """

  num_classes: int = 0
  text: bool = False
  omega_embedding: bool = False
  projection_width: int = 64
  kernel: int = 9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: Sequence[jax.Array], cond: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
    """Logits float32 [B, n]: the sequences' one after the other.

    Args:
      features: sequences [B, N, C], any number of them.
      cond: 'label' int32 [B], needed when num_classes is not 0, -1 for no class; text_condition's entries, needed if
        text; 'omega' [B], needed if omega_embedding; other entries are ignored.
      train: one power iteration, stored; else the stored singular vectors.

    Raises:
      ValueError: no label.
    """
    if self.num_classes and 'label' not in cond:
      raise ValueError(f"a discriminator of {self.num_classes} classes needs cond['label']; got {sorted(cond)}")
    logits, conditional = [], self.num_classes or self.text or self.omega_embedding
    for index, tokens in enumerate(features):
      name, width = f'head{index}', tokens.shape[-1]
      x = TokenBlock(width, 1, self.dtype, name=f'{name}_block0')(tokens, train)
      if self.omega_embedding:
        x = (x + layers.OmegaEmbedding(width, name=f'{name}_omega_mix')(cond['omega'])[:, None]).astype(self.dtype)
      x = (TokenBlock(width, self.kernel, self.dtype, name=f'{name}_block1')(x, train) + x) / math.sqrt(2)
      outputs = self.projection_width if conditional else 1
      x = SpectralConv(outputs, (1, 1), dtype=self.dtype, name=f'{name}_logits')(x[:, None], train)[:, 0]
      x = x.astype(jnp.float32)
      if conditional:
        x = x * self._embedded(cond, name)[:, None] / math.sqrt(self.projection_width)
      logits.append(jnp.sum(x, axis=-1))
    return jnp.concatenate(logits, axis=1)

  def _embedded(self, cond, name):
    """The condition's direction in the projected space, float32 [B, projection_width].

    StyleGAN-T maps a text's embedding, of unit variance in each channel; a class has one of its own.
    """
    width, embedded = self.projection_width, 0.0
    if self.num_classes:
      init = nn.initializers.normal(1.0)
      embed = layers.ClassEmbedding(self.num_classes, width, embedding_init=init, name=f'{name}_embedding')
      embedded = embed(cond['label'])
    if self.text:
      embedded += TextProjection(width, name=f'{name}_text')(cond)
    if self.omega_embedding:
      embedded += layers.OmegaEmbedding(width, name=f'{name}_omega')(cond['omega'])
    return embedded


class TokenBlock(nn.Module):
  """Spectral-norm convolution along the tokens, which are taken as a ring; local batch norm, leaky ReLU."""

  features: int
  kernel: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, N, C] -> [B, N, features]."""
    x = jnp.pad(x, ((0, 0), (self.kernel // 2, self.kernel // 2), (0, 0)), 'wrap')
    x = SpectralConv(self.features, (1, self.kernel), dtype=self.dtype, name='conv')(x[:, None], train)[:, 0]
    return nn.leaky_relu(LocalBatchNorm(self.dtype, name='norm')(x), 0.2)


class LocalBatchNorm(nn.Module):
  """Batch norm with the statistics of a few images at a time, in training and in evaluation; none are stored.

  The batch falls into groups of consecutive images: of VIRTUAL_BATCH, or of the next smaller number that divides it.
  """

  dtype: Any = jnp.float32
  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, N, C] -> [B, N, C]; statistics in float32, over a group's images and tokens."""
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    size = next(n for n in range(VIRTUAL_BATCH, 0, -1) if len(x) % n == 0)
    groups = x.astype(jnp.float32).reshape(-1, size, *x.shape[1:])
    mean = jnp.mean(groups, axis=(1, 2), keepdims=True)
    variance = jnp.mean((groups - mean) ** 2, axis=(1, 2), keepdims=True)
    groups = (groups - mean) * jax.lax.rsqrt(variance + self.eps)
    return (groups.reshape(x.shape) * scale + bias).astype(self.dtype)
