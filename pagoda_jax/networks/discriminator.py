"""The projected discriminator of StyleGAN-XL (Sauer et al. 2022): one head on each projected feature map."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.networks import layers
from pagoda_jax.networks.text_condition import TextProjection

# Channels by resolution, as in the published heads (from MiDaS).
WIDTHS = {4: 512, 8: 512, 16: 256, 32: 128, 64: 64, 128: 64, 256: 32, 512: 16, 1024: 8}


def published_widths(resolutions: Sequence[int] = (128, 64, 32, 16)) -> tuple[tuple[int, ...], ...]:
  """`Discriminator.widths` of the published network: halvings from each resolution down to 8.

  The resolutions are the feature maps' at 256 px input, whatever the input's size is.
  """
  widths = []
  for resolution in resolutions:
    start = min(WIDTHS, key=lambda size: abs(size - resolution))
    widths.append(tuple(WIDTHS[start >> n] for n in range(1, int(math.log2(start / 8)) + 1)))
  return tuple(widths)


class Discriminator(nn.Module):
  """Logits from feature maps of any number and sizes, class-conditional by projection or not.

  Variables: 'params'; 'batch_stats' (means and variances of the batch norms) and 'spectral' (left and
  right singular vectors), both updated when `train` is true: then apply with
  mutable=('batch_stats', 'spectral'), and with both collections as inputs.

  Attributes:
    widths: for each map, the channels after each of its stride-2 blocks.
    num_classes: 0 for no conditioning.
    embedding_width: channels of the class embedding (320: EfficientNet-lite0's ImageNet embedding).
    projection_width: channels in which features and class embedding are compared.
    logits_kernel: side of the last convolution.
    omega_embedding: conditioned on the strength of guidance, which joins the class before the projection.
    text: conditioned on a text's vector, which does so too.
    dtype: of the convolutions; norms' statistics, spectral norm and logits are float32.
  """

  widths: tuple[tuple[int, ...], ...] = published_widths()
  num_classes: int = 0
  embedding_width: int = 320
  projection_width: int = 64
  logits_kernel: int = 4
  omega_embedding: bool = False
  text: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: Sequence[jax.Array], cond: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
    """Logits of every place of every map.

    Args:
      features: maps [B, H, W, C], as many as `widths`.
      cond: 'label' int32 [B], needed when num_classes is not 0, -1 for no class; 'omega' [B], needed if
        omega_embedding; other entries are ignored.
      train: batch statistics and one power iteration, both stored; else the stored values.

    Returns:
      float32 [B, n]: the maps' logits one after the other, each row by row.

    Raises:
      ValueError: another number of maps, or no label.
    """
    if len(features) != len(self.widths):
      raise ValueError(f'{len(features)} feature maps for {len(self.widths)} discriminator heads')
    if self.num_classes and 'label' not in cond:
      raise ValueError(f"a discriminator of {self.num_classes} classes needs cond['label']; got {sorted(cond)}")
    logits, conditional = [], self.num_classes or self.omega_embedding or self.text
    for index, (x, widths) in enumerate(zip(features, self.widths)):
      for level, width in enumerate(widths):
        x = DownBlock(width, self.dtype, name=f'head{index}_block{level}')(x, train)
      features_out = self.projection_width if conditional else 1
      kernel = (self.logits_kernel, self.logits_kernel)
      x = SpectralConv(features_out, kernel, use_bias=False, dtype=self.dtype, name=f'head{index}_logits')(x, train)
      x = x.astype(jnp.float32)
      if conditional:
        embedded = self._embedded(cond, f'head{index}')[:, None, None]
        x = jnp.sum(x * embedded, axis=-1) / math.sqrt(self.projection_width)
      logits.append(x.reshape(len(x), -1))
    return jnp.concatenate(logits, axis=1)

  def _embedded(self, cond, name):
    """The direction of class, text and guidance in the projected space, float32 [B, projection_width]."""
    init, embedding = nn.initializers.normal(1.0), 0.0
    if self.num_classes:
      embed = layers.ClassEmbedding(
          self.num_classes, self.embedding_width, embedding_init=init, name=f'{name}_embedding')
      embedding = embed(cond['label'])
    if self.omega_embedding:
      embedding += layers.OmegaEmbedding(self.embedding_width, name=f'{name}_omega')(cond['omega'])
    if self.text:
      embedding += TextProjection(self.embedding_width, name=f'{name}_text')(cond)
    # StyleGAN2's equalised learning rate: unit weights, scaled at run time; activation gain sqrt 2.
    shape = (self.embedding_width, self.projection_width)
    kernel = self.param(f'{name}_projection_kernel', init, shape)
    bias = self.param(f'{name}_projection_bias', nn.initializers.zeros, (self.projection_width,))
    projected = _product(embedding, kernel / math.sqrt(self.embedding_width)) + bias
    return nn.leaky_relu(projected, 0.2) * math.sqrt(2)


class DiscriminatorEnsemble(nn.Module):
  """One `Discriminator` of the published sizes for each feature network, under its name."""

  num_classes: int = 0
  omega_embedding: bool = False
  text: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, features: Mapping[str, Sequence[jax.Array]], cond: Mapping[str, jax.Array], *, train: bool
  ) -> jax.Array:
    """{feature network: its maps} -> float32 [B, n], the logits of all, side by side."""
    logits = [
        Discriminator(
            num_classes=self.num_classes, omega_embedding=self.omega_embedding, text=self.text, dtype=self.dtype,
            name=name,
        )(maps, cond, train=train)
        for name, maps in features.items()
    ]
    return jnp.concatenate(logits, axis=1)


class DownBlock(nn.Module):
  """Spectral-norm convolution 4x4 of stride 2, batch norm, leaky ReLU."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, features]."""
    x = SpectralConv(self.features, (4, 4), 2, ((1, 1), (1, 1)), dtype=self.dtype, name='conv')(x, train)
    x = BatchNorm(self.dtype, name='norm')(x, train)
    return nn.leaky_relu(x, 0.2)


class SpectralConv(nn.Module):
  """Convolution with the kernel divided by its largest singular value (Miyato et al. 2018).

  As torch's `spectral_norm`: in training one power iteration before each use, stored, and no gradient
  through the singular vectors; in evaluation the stored ones. 'spectral': u [out], v [h * w * in].
  """

  features: int
  kernel_size: tuple[int, int]
  stride: int = 1
  padding: Any = 'VALID'
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    shape = (*self.kernel_size, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'), shape)
    sigma = self._largest_singular_value(kernel.reshape(-1, self.features), train)
    y = jax.lax.conv_general_dilated(
        x.astype(self.dtype),
        (kernel / sigma).astype(self.dtype),
        (self.stride, self.stride),
        self.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y = (y + bias).astype(self.dtype)  # float32, as the bias's gradient is a sum over all places
    return y

  def _largest_singular_value(self, matrix, train):
    fixed = jax.lax.stop_gradient(matrix)
    u = self.variable('spectral', 'u', lambda: _unit(jax.random.normal(self.make_rng('params'), (self.features,))))
    v = self.variable('spectral', 'v', lambda: _unit(_product(fixed, u.value)))
    left, right = u.value, v.value
    if train:
      right = _unit(_product(fixed, left))
      left = _unit(_product(right, fixed))
      if not self.is_initializing():
        u.value, v.value = left, right
    return _product(_product(right, matrix), left)


class BatchNorm(nn.Module):
  """Batch norm as torch's: the stored variance is the unbiased one, which Linen's is not.

  Statistics are over the whole (global) batch, in float32.
  """

  dtype: Any = jnp.float32
  eps: float = 1e-5
  momentum: float = 0.1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    width = x.shape[-1]
    mean = self.variable('batch_stats', 'mean', jnp.zeros, (width,))
    variance = self.variable('batch_stats', 'var', jnp.ones, (width,))
    scale = self.param('scale', nn.initializers.ones, (width,))
    bias = self.param('bias', nn.initializers.zeros, (width,))
    x = x.astype(jnp.float32)
    used_mean, used_variance = mean.value, variance.value
    if train:
      used_mean = jnp.mean(x, axis=(0, 1, 2))
      used_variance = jnp.mean((x - used_mean) ** 2, axis=(0, 1, 2))
      if not self.is_initializing():
        count = x.size // width
        unbiased = used_variance * (count / max(count - 1, 1))
        mean.value = _moved(mean.value, used_mean, self.momentum)
        variance.value = _moved(variance.value, unbiased, self.momentum)
    inverse = jax.lax.rsqrt(used_variance + self.eps) * scale
    return ((x - used_mean) * inverse + bias).astype(self.dtype)


def _product(a, b):
  """Matrix product in float32 on accelerators too."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _moved(old, new, momentum):
  return (1 - momentum) * old + momentum * jax.lax.stop_gradient(new)


def _unit(vector):
  return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)
