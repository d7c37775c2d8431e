"""Residual and attention blocks of the U-Nets."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pagoda_jax.networks import attention
from pagoda_jax.networks.layers import (
  QKV,
  BareConv,
  Conv,
  Dense,
  downsampled,
  dropped,
  group_norm,
  kernel_init,
  upsampled,
  zeros_init,
)
from pagoda_jax.networks.text_condition import CrossAttention, TextKeysValues, Tokens


class Attention(nn.Module):
  """Self-attention over all positions, without the residual sum, in a form of `attention.FORMS`.

  Keys and values of a text's tokens, if there are any, stand before the picture's own.
  """

  heads: int
  min_group_channels: int = 4
  norm_eps: float = 1e-5
  text_group_norm: bool = False
  dtype: Any = jnp.float32
  form: str = 'auto'

  @nn.compact
  def __call__(self, x: jax.Array, text: Tokens | None = None) -> jax.Array:
    b, h, w, c = x.shape
    if c % self.heads:
      raise ValueError(f'{self.name}: {c} channels do not split into {self.heads} attention heads')
    x = group_norm(c, self.min_group_channels, self.norm_eps, self.dtype, 'norm')(x).reshape(b, h * w, c)
    q, k, v = QKV(self.heads, kernel_init=kernel_init, dtype=self.dtype, name='qkv')(x)
    mask = None
    if text is not None:
      added = TextKeysValues(self.heads, c, self.text_group_norm, self.dtype, name='text_kv')(text.values)
      k, v = (jnp.concatenate([of_text, own], axis=1) for of_text, own in zip(added, (k, v)))
      if text.mask is not None:
        mask = jnp.concatenate([text.mask, jnp.ones((b, h * w), bool)], axis=1)
    x = attention.attend(q, k, v, self.form, mask)
    return Dense(c, axes=2, kernel_init=zeros_init, dtype=self.dtype, name='out')(x).reshape(b, h, w, c)


class ResBlock(nn.Module):
  """Residual block of the ADM and DDPM++ networks, with attention after it if `heads` > 0.

  The embedding acts at the second normalisation: as scale and shift after it, or as a sum before
  it. Resampling comes before the convolutions of both branches. The residual branch ends in a
  zero-initialised convolution, so a new block begins as its (resampled) skip connection.
  """

  channels: int
  resample: str = ''  # 'up' (nearest), 'down' (mean) or ''
  heads: int = 0
  scale_shift: bool = True
  skip_conv: bool = False  # a 1x1 convolution in the skip connection; needed where the width changes
  skip_scale: float = 1.0  # factor after each residual sum
  dropout: float = 0.0
  min_group_channels: int = 4
  norm_eps: float = 1e-5
  activation: str = 'silu'  # of group_norm.ACTIVATIONS
  text_attention: str = 'none'  # of text_condition.ATTENTIONS: where there is attention, of text too
  text_group_norm: bool = False
  dtype: Any = jnp.float32
  attention_form: str = 'auto'

  @nn.compact
  def __call__(
      self, x: jax.Array, embedding: jax.Array, dropout_keys: jax.Array | None = None, text: Tokens | None = None
  ) -> jax.Array:
    """x [B, H, W, C], embedding [B, E] (after its last nonlinearity), keys [B] (None: no dropout), the text's tokens
    (needed if text_attention) -> [B, H', W', channels]."""
    def activated(y, name, scale=None, shift=None, bias=None):
      norm = group_norm(y.shape[-1], self.min_group_channels, self.norm_eps, self.dtype, name)
      return norm(y, scale, shift, self.activation, bias)

    def conv(y, name, size=3, init=kernel_init, kind=Conv):
      return kind(self.channels, (size, size), kernel_init=init, dtype=self.dtype, name=name)(y)

    resampled = {'': lambda y: y, 'up': upsampled, 'down': downsampled}[self.resample]
    skip = resampled(x)
    if self.skip_conv:
      skip = conv(skip, 'skip', size=1)

    y = resampled(activated(x, 'norm_0'))
    width = self.channels * (2 if self.scale_shift else 1)
    # Float32, whatever it meets: its gradient is a sum over all places.
    condition = nn.Dense(width, kernel_init=kernel_init, name='embed')(embedding)[:, None, None, :]
    if self.scale_shift:
      scale, shift = jnp.split(condition, 2, axis=-1)
      y, bias = conv(y, 'conv_0', kind=BareConv)
      y = activated(y, 'norm_1', scale, shift, bias)
    else:
      y = activated((conv(y, 'conv_0') + condition).astype(self.dtype), 'norm_1')
    if self.dropout and dropout_keys is not None:
      y = dropped(y, self.dropout, dropout_keys)
    x = (skip + conv(y, 'conv_1', init=zeros_init)) * self.skip_scale
    if self.heads:
      attend = Attention(self.heads, self.min_group_channels, self.norm_eps, self.text_group_norm, self.dtype,
                         self.attention_form, name='attention')
      x = (x + attend(x, text if self.text_attention == 'added_kv' else None)) * self.skip_scale
      if self.text_attention == 'cross':
        cross = CrossAttention(self.heads, self.min_group_channels, self.norm_eps, self.dtype, self.attention_form,
                               name='text_attention')
        x = (x + cross(x, text)) * self.skip_scale
    return x
