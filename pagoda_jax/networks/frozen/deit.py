"""DeiT (Touvron et al. 2021): the vision transformer, as four maps of image tokens.

The defaults are DeiT-base-distilled, patch 16, 224 px. The final norm and the classifiers are not part
of it: the maps are taken before them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.networks import attention, layers


class DeiT(nn.Module):
  """The token grid after each quarter of the blocks (after blocks 3, 6, 9 and 12 of 12)."""

  width: int = 768
  depth: int = 12
  head_channels: int = 64
  mlp_width: int = 3072
  patch: int = 16
  grid: int = 14  # side of the position grid, in patches
  distilled: bool = True  # a second extra token
  dtype: Any = jnp.float32
  attention_form: str = 'auto'  # one of attention.FORMS: speed and memory

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """x [B, H, W, 3], ImageNet-normalised -> four maps [B, H/patch, W/patch, width].

    The position grid is resized bilinearly when H or W is not patch * grid.
    """
    patch = (self.patch, self.patch)
    x = nn.Conv(self.width, patch, patch, 'VALID', dtype=self.dtype, name='patches')(x)
    batch, height, width, _ = x.shape
    extra = self._extra_tokens()
    positions = self.param('positions', nn.initializers.normal(0.02), (extra.shape[1] + self.grid**2, self.width))
    # Sums of embeddings in float32: what is lost here is lost in every block.
    tokens = x.astype(jnp.float32) + self._position_grid(positions[extra.shape[1] :], height, width)
    extra = jnp.broadcast_to(extra + positions[: extra.shape[1]], (batch, *extra.shape[1:]))
    tokens = jnp.concatenate([extra, tokens.reshape(batch, height * width, self.width)], axis=1).astype(self.dtype)
    maps = []
    for index in range(self.depth):
      block = TransformerBlock(
        self.head_channels, self.mlp_width, self.dtype, self.attention_form, name=f'block{index}'
      )
      tokens = block(tokens)
      if 4 * (index + 1) % self.depth == 0:
        maps.append(tokens[:, extra.shape[1] :].reshape(batch, height, width, self.width))
    return maps

  def _extra_tokens(self):
    names = ('class_token', 'distillation_token') if self.distilled else ('class_token',)
    initializer = nn.initializers.normal(0.02)
    return jnp.stack([self.param(name, initializer, (self.width,)) for name in names])[None]

  def _position_grid(self, positions, height, width):
    positions = positions.reshape(self.grid, self.grid, self.width)
    return resize.resize(positions, (height, width), 'bilinear')


class TransformerBlock(nn.Module):
  """Pre-norm self-attention and MLP with exact GELU; x [B, tokens, channels]."""

  head_channels: int
  mlp_width: int
  dtype: Any = jnp.float32
  attention_form: str = 'auto'

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    h = self._norm('attention_norm')(x)
    q, k, v = layers.QKV(width // self.head_channels, dtype=self.dtype, name='qkv')(h)
    h = attention.attend(q, k, v, self.attention_form)
    x = x + nn.Dense(width, dtype=self.dtype, name='attention_out')(h.reshape(x.shape))
    h = self._norm('mlp_norm')(x)
    h = nn.gelu(nn.Dense(self.mlp_width, dtype=self.dtype, name='mlp_in')(h), approximate=False)
    return x + nn.Dense(width, dtype=self.dtype, name='mlp_out')(h)

  def _norm(self, name):
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=self.dtype, name=name)
