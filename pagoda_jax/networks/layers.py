"""Layers that the U-Nets share: group normalisation, convolutions, embeddings, resampling."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.extend.random import threefry2x32_p

from pagoda_jax.networks import chips
from pagoda_jax.networks.group_norm import GroupNorm

# Uniform in +-1/sqrt(fan_in), as the published networks begin.
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
zeros_init = nn.initializers.zeros_init()


def _promoted_but_bias(inputs, kernel, bias, *, dtype):
  return *promote_dtype(inputs, kernel, dtype=dtype), bias


class Conv(nn.Conv):
  """`nn.Conv` of a given `dtype` that adds its bias in float32 and rounds the sum.

  The bias's gradient, a sum over all places, is float32 then: in bfloat16 a sum of ones ends at 256. The kernel's needs
  no such care, as products sum in float32 whatever their type.
  """

  promote_dtype: Any = _promoted_but_bias

  def __call__(self, x: jax.Array) -> jax.Array:
    return super().__call__(x).astype(self.dtype)


class BareConv(nn.Conv):
  """`Conv` that leaves its bias to the `GroupNorm` after it, whose sums give the bias's gradient without a pass."""

  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x -> (its products, of `dtype`; the bias [features], float32)."""
    return super().__call__(x), self.param('bias', self.bias_init, (self.features,), self.param_dtype)


SUMMED_BY_PRODUCT_FROM = 1024  # places of an image


@jax.custom_vjp
def with_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """x [..., C] and a float32 bias [C], added in float32 and rounded to x's type."""
  return (x + bias).astype(x.dtype)


def _bias_gradient(kept, dy):
  del kept
  rows, places = tuple(range(dy.ndim - 1)), math.prod(dy.shape[1:-1])
  if dy.dtype == jnp.bfloat16 and chips.chip() == 'tpu' and places >= SUMMED_BY_PRODUCT_FROM:
    # A product with ones, which the matrix units sum in float32: at 32 px sums of columns took 0.3 of a block's 2.7 M
    # cycles (README.md). At 16 px, with 2,048 rows on a chip, they took 0.05 M less than the product.
    ones = jnp.ones(dy.shape[:-1], dy.dtype)
    return dy, jax.lax.dot_general(ones, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
  return dy, dy.astype(jnp.float32).sum(rows)


with_bias.defvjp(lambda x, bias: (with_bias(x, bias), None), _bias_gradient)


class Dense(nn.Module):
  """`nn.Dense` of a given `dtype`, its bias as `Conv`'s.

  Of the last `axes` axes of x, as of one that holds them all: heads and their channels need not be brought side by side
  in memory, where the kernels of attention do not leave them.
  """

  features: int
  axes: int = 1
  kernel_init: Any = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = x.shape[-self.axes:]
    kernel = self.param('kernel', self.kernel_init, (math.prod(inputs), self.features)).astype(self.dtype)
    y = jnp.tensordot(x.astype(self.dtype), kernel.reshape(*inputs, self.features), self.axes)
    return with_bias(y, self.param('bias', zeros_init, (self.features,)))


class Patches(nn.Module):
  """A linear map of each square of `patch` pixels; parameters as of `nn.Conv` with a stride of its own size.

  As a product: cuDNN's gradient of such a convolution for its input takes 9.0 ms for 32 images of 224 px in bfloat16
  on an H200, twice in a step of distill of 221 ms.
  """

  features: int
  patch: int
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, H, W, C] -> [B, H / patch, W / patch, features]; what is over at the right and below is left out."""
    (batch, height, width, channels), side = x.shape, self.patch
    shape = (side, side, channels, self.features)
    kernel = self.param('kernel', nn.initializers.lecun_normal(), shape).reshape(-1, self.features).astype(self.dtype)
    rows, columns = height // side, width // side
    x = x[:, : rows * side, : columns * side].reshape(batch, rows, side, columns, side, channels)
    y = x.swapaxes(2, 3).reshape(batch, rows, columns, -1).astype(self.dtype) @ kernel
    return y + self.param('bias', zeros_init, (self.features,)).astype(self.dtype) if self.use_bias else y


def group_norm(channels: int, min_group_channels: int, eps: float, dtype, name: str) -> GroupNorm:
  """GroupNorm of min(32, channels // min_group_channels) groups; statistics are taken in float32.

  Where the published networks cannot exist, because the channels do not split into that many
  groups, the next smaller number that divides them is taken. In bfloat16 the variance is taken in one
  pass, E[x^2] - E[x]^2: where the mean is large, that loses less than bfloat16 has lost already.
  """
  most = max(1, min(32, channels // min_group_channels))
  groups = max(n for n in range(1, most + 1) if channels % n == 0)
  return GroupNorm(groups, epsilon=eps, use_fast_variance=dtype == jnp.bfloat16, dtype=dtype, name=name)


def sinusoid(x: jax.Array, channels: int, sine_first: bool = False, endpoint: bool = False) -> jax.Array:
  """Sinusoidal features of a scalar.

  Args:
    x: [B], any range.
    channels: number of features, even.
    sine_first: sines in the first half and cosines in the second, instead of the other way round.
    endpoint: the lowest frequency is exactly 1/10000 (DDPM++), not one step above it (ADM).

  Returns:
    [B, channels] float32.
  """
  half = channels // 2
  # float64 on the host: at arguments of about 1000, errors of float32 frequencies would be seen.
  steps = np.arange(half) / max(half - 1 if endpoint else half, 1)
  angles = x.astype(jnp.float32)[:, None] * np.exp(-math.log(10000) * steps).astype(np.float32)
  cosine, sine = jnp.cos(angles), jnp.sin(angles)
  return jnp.concatenate([sine, cosine] if sine_first else [cosine, sine], axis=-1)


def embedding_dense(features: int, name: str, use_bias: bool = True) -> nn.Dense:
  """A layer of the embedding networks: float32 whatever the compute type, as a one-step generator
  depends on it at its largest arguments."""
  return nn.Dense(features, use_bias, kernel_init=kernel_init, precision=jax.lax.Precision.HIGHEST, name=name)


PIECES = 4  # of 16 bits, in what Threefry makes at once


def dropped(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
  """x [B, H, ...], values zero with probability `rate` < 1, in steps of 2^-16, and the others scaled to keep the mean.

  One key an image, [B]: what happens to it does not depend on the batch that it is in. What Threefry makes at once
  decides about four values, a quarter of H apart: its operations are most of what dropout takes (README.md).
  """
  chances = max(1, round((1 - rate) * 2**16))
  quarter = -(-x.shape[1] // PIECES), *x.shape[2:]

  def kept(key):  # of each quarter
    places = jnp.arange(math.prod(quarter), dtype=jnp.uint32).reshape(quarter)
    halves = threefry2x32_p.bind(*jax.random.bits(key, 2, jnp.uint32), places, places + places.size)
    return [piece < chances for half in halves for piece in (half & 0xffff, half >> 16)]

  if chips.chip() == 'nvidia':  # a thread makes one value there: it would use a quarter of what Threefry made
    packed = jax.vmap(lambda key: sum(part.astype(jnp.uint8) << n for n, part in enumerate(kept(key))))(keys)
    return _masked(x, packed, 2**16 / chances)
  mask = jax.vmap(lambda key: jnp.concatenate(kept(key))[:x.shape[1]])(keys)
  return jnp.where(mask, x * (2**16 / chances), 0).astype(x.dtype)


# By hand: the packed bits are kept for the backward pass then, not the mask, which is four times as large.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _masked(x, packed, factor: float):
  """x [B, H, ...] times `factor` where packed [B, H / 4, ...] has a one, zero elsewhere; its bits are quarters of H."""
  quarters = jnp.arange(PIECES, dtype=packed.dtype).reshape(PIECES, *(1,) * (packed.ndim - 1))
  kept = ((packed[:, None] >> quarters) & 1).reshape(len(x), -1, *x.shape[2:])[:, :x.shape[1]]
  return jnp.where(kept > 0, x * factor, 0).astype(x.dtype)


_masked.defvjp(lambda x, packed, factor: (_masked(x, packed, factor), packed),
               lambda factor, packed, dy: (_masked(dy, packed, factor), None))


class OmegaEmbedding(nn.Module):
  """Features of the strength of guidance: 100 omega, embedded as a noise level is (PaGoDA).

  `zero`: begins as zeros, so that a network that it is added to begins as it was without.
  """

  features: int
  channels: int = 64  # sines and cosines
  zero: bool = False

  @nn.compact
  def __call__(self, omega: jax.Array) -> jax.Array:
    """omega [B] -> float32 [B, features]."""
    y = nn.silu(embedding_dense(self.features, 'hidden')(sinusoid(100.0 * omega, self.channels)))
    last = zeros_init if self.zero else kernel_init
    return nn.Dense(self.features, kernel_init=last, precision=jax.lax.Precision.HIGHEST, name='out')(y)


class LabelEmbedding(nn.Module):
  """A learned vector for each label in 0..num_classes-1; zeros for -1 (no label); NaN from num_classes on."""

  num_classes: int
  features: int

  @nn.compact
  def __call__(self, label: jax.Array) -> jax.Array:
    table = self.param('embedding', nn.initializers.normal(1.0), (self.num_classes, self.features))
    vectors = jnp.take(table, jnp.maximum(label, 0), axis=0, mode='fill')
    return jnp.where((label < 0)[:, None], 0.0, vectors)


class ClassEmbedding(nn.Embed):
  """`LabelEmbedding` with the parameters of `nn.Embed`, for discriminators: nn.Embed takes -1 for the last class."""

  def __call__(self, label: jax.Array) -> jax.Array:
    return jnp.where((label < 0)[:, None], 0.0, super().__call__(label))


def upsampled(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, 2H, 2W, C], nearest."""
  # Its gradient sums two by two in x's type: each sum is rounded once, as one of float32 would be.
  return x.repeat(2, axis=1).repeat(2, axis=2)


def downsampled(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, H/2, W/2, C], the mean of each 2x2 square."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class QKV(nn.Module):
  """Queries, keys and values of tokens [B, N, C]: [B, N, heads, C / heads] each, in one layer's parameters.

  Channels of the parameters: (qkv, head, channel). Three products of a third of the kernel each, as the parts of one
  product would be copied into the layout that attention takes them in. Biases as `Conv`'s.
  """

  heads: int
  kernel_init: Any = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    batch, tokens, width = x.shape
    kernel = self.param('kernel', self.kernel_init, (width, 3 * width)).astype(self.dtype)
    bias = self.param('bias', zeros_init, (3 * width,))
    parts = zip(jnp.split(kernel, 3, axis=1), jnp.split(bias, 3))
    rows = [with_bias(x @ kernel, bias) for kernel, bias in parts]
    return [row.reshape(batch, tokens, self.heads, width // self.heads) for row in rows]
