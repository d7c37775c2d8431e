"""The magnitude-preserving layers of EDM2's U-Net (Karras et al. 2024, arXiv 2312.02696, configuration G).

Every layer keeps the expected magnitude of its input: weights count by their direction alone (equation 66 and 67
normalise them wherever they are used), sums and concatenations are weighted so that magnitudes stay, activations are
scaled; there are no biases and no group norms. `networks/unet.py` makes the network of them: its blocks, their names
and sizes are those of EDM's ADM.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from pagoda_jax.networks import attention, layers

RESIDUAL_BALANCE = 0.3  # how much of a sum the residual branch is; of attention too
CLIP = 256.0  # of activations after a block
LOGVAR_CHANNELS = 128
CONSTANTS = ('freqs', 'phases')  # leaves that are drawn once and never trained


def unit(x: jax.Array, axes, eps: float = 1e-4) -> jax.Array:
  """x over its root mean square along `axes` (equation 53); statistics in float32."""
  whole = x.astype(jnp.float32)
  return (whole / (eps + jnp.sqrt(jnp.mean(jnp.square(whole), axes, keepdims=True)))).astype(x.dtype)


def mp_silu(x: jax.Array) -> jax.Array:
  """SiLU that keeps the magnitude of normal inputs (equation 81)."""
  return nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
  """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) (equation 88)."""
  return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
  """Channels of both, each part with its share of the magnitude, whatever its width (equation 103)."""
  whole = math.sqrt((a.shape[-1] + b.shape[-1]) / ((1 - t) ** 2 + t**2))
  return jnp.concatenate([whole * (1 - t) / math.sqrt(a.shape[-1]) * a, whole * t / math.sqrt(b.shape[-1]) * b], -1)


class Weighted(nn.Module):
  """A convolution, or with `size` 1 a product over channels, whose weights' magnitude does not count.

  Each output channel's weights are divided by their root mean square, and by sqrt(fan in), where they are used. With
  `parts` a product is made as so many, each of its share of the channels, and a list is returned.
  """

  features: int
  size: int = 1
  dtype: Any = jnp.float32
  precision: Any = None
  parts: int = 0

  @nn.compact
  def __call__(self, x: jax.Array, gain=1.0) -> jax.Array:
    shape = (x.shape[-1], self.features) if self.size == 1 else (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.normal(1.0), shape)
    kernel = unit(kernel, tuple(range(kernel.ndim - 1))) * (gain / math.sqrt(math.prod(shape[:-1])))
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.parts:
      return [jnp.matmul(x, part, precision=self.precision) for part in jnp.split(kernel, self.parts, axis=1)]
    if self.size == 1:
      return jnp.matmul(x, kernel, precision=self.precision)
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=self.precision)


def forced(params, before):
  """The parameters after an update of `before`, every kernel back at its magnitude of 1 (equation 66).

  Gradients are orthogonal to weights that only count by their direction, so that these grow with every step, and
  learning slows down; at a fixed magnitude it does not. Kernels with a bias beside them are of other layers, and stay
  as they are; constants are those of `before`, as some optimisers shrink what has no gradient too.
  """
  new, old = traverse_util.flatten_dict(params), traverse_util.flatten_dict(before)

  def kept(path, leaf):
    if path[-1] in CONSTANTS:
      return old[path]
    counts = path[-1] != 'kernel' or (*path[:-1], 'bias') in new
    return leaf if counts else unit(leaf, tuple(range(leaf.ndim - 1)))

  return traverse_util.unflatten_dict({path: kept(path, leaf) for path, leaf in new.items()})


class Fourier(nn.Module):
  """sqrt(2) cos(freqs x + phases) of a scalar [B]: [B, channels] (equation 75); drawn once, never trained."""

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scaled = lambda draw: lambda key, shape: 2 * np.pi * draw(key, shape)
    freqs = self.param('freqs', scaled(jax.random.normal), (self.channels,))
    phases = self.param('phases', scaled(jax.random.uniform), (self.channels,))
    freqs, phases = jax.lax.stop_gradient((freqs, phases))
    return math.sqrt(2) * jnp.cos(x.astype(jnp.float32)[:, None] * freqs + phases)


def embedding_dense(features: int, name: str) -> Weighted:
  """A layer of the embedding: float32 whatever the compute type."""
  return Weighted(features, precision=jax.lax.Precision.HIGHEST, name=name)


class Embedding(nn.Module):
  """[B, features]: noise level and label in one vector, before its activation; NaN for labels from num_classes on."""

  noise_channels: int
  features: int
  num_classes: int  # 0: no labels

  @nn.compact
  def __call__(self, c_noise: jax.Array, label: jax.Array | None) -> jax.Array:
    x = embedding_dense(self.features, 'noise')(Fourier(self.noise_channels, name='fourier')(c_noise))
    if self.num_classes:
      one_hot = jax.nn.one_hot(label, self.num_classes) * math.sqrt(self.num_classes)  # all zeros for -1
      one_hot = jnp.where(label[:, None] < self.num_classes, one_hot, jnp.nan)
      x = mp_sum(x, embedding_dense(self.features, 'label')(one_hot))
    return x


class LogVar(nn.Module):
  """u [B]: the logarithm of how large the loss is at a noise level, learned with it (equation 21)."""

  @nn.compact
  def __call__(self, c_noise: jax.Array) -> jax.Array:
    return embedding_dense(1, 'linear')(Fourier(LOGVAR_CHANNELS, name='fourier')(c_noise))[:, 0]


class Block(nn.Module):
  """A block of encoder or decoder (Karras et al. 2024, figure 21), with cosine attention after it if `heads` > 0."""

  channels: int
  decoder: bool
  resample: str = ''  # 'up' (nearest), 'down' (mean) or ''
  heads: int = 0
  skip_conv: bool = False  # a 1x1 convolution in the skip connection, where the width changes
  dropout: float = 0.0
  dtype: Any = jnp.float32
  attention_form: str = 'auto'

  @nn.compact
  def __call__(self, x: jax.Array, embedding: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
    """x [B, H, W, C], embedding [B, E], keys [B] (None: no dropout) -> [B, H', W', channels]."""
    x = {'': lambda y: y, 'up': layers.upsampled, 'down': layers.downsampled}[self.resample](x).astype(self.dtype)
    skip = lambda y: Weighted(self.channels, dtype=self.dtype, name='skip')(y) if self.skip_conv else y
    if not self.decoder:
      x = unit(skip(x), -1)
    y = Weighted(self.channels, 3, self.dtype, name='conv_0')(mp_silu(x))
    gain = self.param('embed_gain', nn.initializers.zeros_init(), ())
    condition = 1 + embedding_dense(self.channels, 'embed')(embedding, gain)[:, None, None, :]
    y = mp_silu(y * condition).astype(self.dtype)
    if self.dropout and dropout_keys is not None:
      y = layers.dropped(y, self.dropout, dropout_keys)
    y = Weighted(self.channels, 3, self.dtype, name='conv_1')(y)
    x = mp_sum(skip(x) if self.decoder else x, y, RESIDUAL_BALANCE)
    if self.heads:
      x = mp_sum(x, Attention(self.heads, self.dtype, self.attention_form, name='attention')(x), RESIDUAL_BALANCE)
    return jnp.clip(x, -CLIP, CLIP)


class Attention(nn.Module):
  """Cosine self-attention over all positions, without the sum (section 2.3). Channels of qkv: (qkv, head, channel)."""

  heads: int
  dtype: Any = jnp.float32
  form: str = 'auto'  # of attention.FORMS

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    if c % self.heads:
      raise ValueError(f'{self.name}: {c} channels do not split into {self.heads} attention heads')
    rows = Weighted(3 * c, parts=3, dtype=self.dtype, name='qkv')(x.reshape(b, h * w, c))
    q, k, v = (unit(row.reshape(b, h * w, self.heads, c // self.heads), -1) for row in rows)
    x = attention.attend(q, k, v, self.form).reshape(b, h, w, c)
    return Weighted(c, dtype=self.dtype, name='out')(x)
