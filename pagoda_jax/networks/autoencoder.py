"""AutoencoderKL, the image autoencoder of latent diffusion (Rombach et al. 2022), as in diffusers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.networks import layers


class AutoencoderKL(nn.Module):
  """Images <-> latents at 1 / 2^(levels - 1) of the size; `encode` and `decode` are the methods to apply.

  Latents are as the network makes them: multiplying by a scaling factor is the caller's.

  Attributes:
    channels: of the images.
    latent_channels: of the latents.
    widths: channels of each level, finest first.
    blocks: residual blocks per level of the encoder; the decoder has one more.
    groups: of every group norm.
    quant_conv: a 1x1 convolution after the encoder.
    post_quant_conv: a 1x1 convolution before the decoder.
    mid_attention: attention at the coarsest level.
    remat: resolutions of the blocks whose activations are computed again in the backward pass.
    dtype: of the computation; norms' statistics and attention weights are float32.
  """

  channels: int = 3
  latent_channels: int = 4
  widths: tuple[int, ...] = (128, 256, 512, 512)
  blocks: int = 2
  groups: int = 32
  quant_conv: bool = True
  post_quant_conv: bool = True
  mid_attention: bool = True
  remat: tuple[int, ...] = ()
  dtype: Any = jnp.float32

  def setup(self):
    options = {
        'widths': self.widths,
        'blocks': self.blocks,
        'groups': self.groups,
        'mid_attention': self.mid_attention,
        'remat': self.remat,
        'dtype': self.dtype,
    }
    self.encoder = Encoder(2 * self.latent_channels, **options)
    self.decoder = Decoder(self.channels, **options)
    if self.quant_conv:
      self.quantize = layers.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
    if self.post_quant_conv:
      self.unquantize = layers.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

  def __call__(self, images: jax.Array) -> jax.Array:
    """The reconstruction from the mean latents; initialises every variable."""
    return self.decode(self.encode(images)[0])

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """images [B, H, W, channels] in [-1, 1] -> mean and log variance (in [-30, 20]) of the latents, float32."""
    moments = self.encoder(images)
    if self.quant_conv:
      moments = self.quantize(moments)
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30, 20)

  def decode(self, latents: jax.Array) -> jax.Array:
    """latents [B, h, w, latent_channels] -> images [B, H, W, channels], float32, not clipped."""
    if self.post_quant_conv:
      latents = self.unquantize(latents)
    return self.decoder(latents).astype(jnp.float32)


class Encoder(nn.Module):
  """[B, H, W, C] -> [B, H / 2^(levels - 1), ..., features]."""

  features: int
  widths: tuple[int, ...]
  blocks: int
  groups: int
  mid_attention: bool
  remat: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = layers.Conv(self.widths[0], (3, 3), dtype=self.dtype, name='conv_in')(x)
    for level, width in enumerate(self.widths):
      for index in range(self.blocks):
        x = residual_block(x, width, self.groups, self.remat, self.dtype, f'level{level}_block{index}')
      if level + 1 < len(self.widths):
        # Padded below and on the right only.
        conv = layers.Conv(width, (3, 3), 2, ((0, 1), (0, 1)), dtype=self.dtype, name=f'level{level}_down')
        x = conv(x)
    x = MiddleBlock(self.groups, self.mid_attention, self.remat, self.dtype, name='middle')(x)
    return _output(x, self.features, self.groups, self.dtype)


class Decoder(nn.Module):
  """[B, h, w, latent channels] -> [B, h * 2^(levels - 1), ..., features]; level 0 is the finest here too."""

  features: int
  widths: tuple[int, ...]
  blocks: int
  groups: int
  mid_attention: bool
  remat: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = layers.Conv(self.widths[-1], (3, 3), dtype=self.dtype, name='conv_in')(x)
    x = MiddleBlock(self.groups, self.mid_attention, self.remat, self.dtype, name='middle')(x)
    for level in reversed(range(len(self.widths))):
      width = self.widths[level]
      for index in range(self.blocks + 1):
        x = residual_block(x, width, self.groups, self.remat, self.dtype, f'level{level}_block{index}')
      if level:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = layers.Conv(width, (3, 3), dtype=self.dtype, name=f'level{level}_up')(x)
    return _output(x, self.features, self.groups, self.dtype)


class MiddleBlock(nn.Module):
  """Residual block, attention, residual block; all as wide as the input."""

  groups: int
  attention: bool
  remat: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = residual_block(x, x.shape[-1], self.groups, self.remat, self.dtype, 'block0')
    if self.attention:
      x = SpatialAttention(self.groups, self.dtype, name='attention')(x)
    return residual_block(x, x.shape[-1], self.groups, self.remat, self.dtype, 'block1')


def residual_block(x, features: int, groups: int, remat, dtype, name: str):
  """A ResidualBlock applied, its activations kept or not by the side of x; called inside a compact method."""
  block = nn.remat(ResidualBlock) if x.shape[1] in remat else ResidualBlock
  return block(features, groups, dtype, name=name)(x)


class ResidualBlock(nn.Module):
  """Twice group norm, SiLU, convolution 3x3; 1x1 convolution of the skip where the width changes."""

  features: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    skip = x
    for index in range(2):
      x = nn.silu(group_norm(self.groups, self.dtype, f'norm{index}')(x))
      x = layers.Conv(self.features, (3, 3), dtype=self.dtype, name=f'conv{index}')(x)
    if skip.shape[-1] != self.features:
      skip = layers.Conv(self.features, (1, 1), dtype=self.dtype, name='skip')(skip)
    return x + skip


class SpatialAttention(nn.Module):
  """Single-head attention between all places, with a residual; softmax in float32."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    batch, height, width, channels = x.shape
    h = group_norm(self.groups, self.dtype, 'norm')(x).reshape(batch, height * width, channels)
    q, k, v = (layers.Dense(channels, dtype=self.dtype, name=name)(h) for name in ('query', 'key', 'value'))
    scores = jnp.einsum('bqc,bkc->bqk', q, k).astype(jnp.float32) * channels**-0.5
    h = jnp.einsum('bqk,bkc->bqc', jax.nn.softmax(scores, axis=-1).astype(self.dtype), v)
    return x + layers.Dense(channels, dtype=self.dtype, name='out')(h).reshape(x.shape)


def group_norm(groups: int, dtype, name: str) -> nn.GroupNorm:
  """The autoencoder's group norm: eps 1e-6, two-pass variance."""
  return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def _output(x, features, groups, dtype):
  """Group norm, SiLU, convolution to the output channels; called inside a compact method."""
  x = nn.silu(group_norm(groups, dtype, 'norm_out')(x))
  return layers.Conv(features, (3, 3), dtype=dtype, name='conv_out')(x)
