"""DeiT (Touvron et al. 2021): the vision transformer, as four maps of image tokens.

The defaults are DeiT-base-distilled, patch 16, 224 px. The final norm and the classifiers are not part
of it: the maps are taken before them.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.networks import attention, layers


def bilinear_positions(grid: jax.Array, height: int, width: int) -> jax.Array:
  """The position grid [h, w, C] of images of another size, as StyleGAN-XL makes it."""
  return resize.resize(grid, (height, width), 'bilinear')


class DeiT(nn.Module):
  """The token grid after each quarter of the blocks (after blocks 3, 6, 9 and 12 of 12).

  Attributes:
    resized_positions: resized_positions(grid [grid, grid, width], height, width) -> [height, width, width]: the
      position grid for images of another size.
  """

  width: int = 768
  depth: int = 12
  head_channels: int = 64
  mlp_width: int = 3072
  patch: int = 16
  grid: int = 14  # side of the position grid, in patches
  distilled: bool = True  # a second extra token
  layer_scale: bool = False  # DINOv2's: what a block adds is scaled by a factor a channel
  class_token: bool = True  # without it there is no extra token at all: SigLIP's
  approximate_gelu: bool = False  # by tanh: SigLIP's
  resized_positions: Callable[[jax.Array, int, int], jax.Array] = bilinear_positions
  dtype: Any = jnp.float32
  attention_form: str = 'auto'  # one of attention.FORMS: speed and memory

  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """x [B, H, W, 3], ImageNet-normalised -> four maps [B, H/patch, W/patch, width]."""
    extra, (height, width) = len(self._extra_names()), (side // self.patch for side in x.shape[1:3])
    quarters = [tokens for index, tokens in enumerate(self.tokens(x)) if index and 4 * index % self.depth == 0]
    return [tokens[:, extra:].reshape(len(x), height, width, self.width) for tokens in quarters]

  @nn.compact
  def tokens(self, x: jax.Array) -> list[jax.Array]:
    """x as above -> `depth` + 1 sequences [B, tokens, width], extra tokens first: embedded, and after each block."""
    x = layers.Patches(self.width, self.patch, dtype=self.dtype, name='patches')(x)
    batch, height, width, _ = x.shape
    extra = self._extra_tokens()
    positions = self.param('positions', nn.initializers.normal(0.02), (extra.shape[1] + self.grid**2, self.width))
    # Sums of embeddings in float32: what is lost here is lost in every block.
    grid = positions[extra.shape[1] :].reshape(self.grid, self.grid, self.width)
    tokens = x.astype(jnp.float32) + self.resized_positions(grid, height, width)
    extra = jnp.broadcast_to(extra + positions[: extra.shape[1]], (batch, *extra.shape[1:]))
    tokens = jnp.concatenate([extra, tokens.reshape(batch, height * width, self.width)], axis=1).astype(self.dtype)
    sequences = [tokens]
    for index in range(self.depth):
      block = TransformerBlock(
        self.head_channels, self.mlp_width, self.dtype, self.attention_form, self.layer_scale, self.approximate_gelu,
        name=f'block{index}',
      )
      sequences.append(block(sequences[-1]))
    return sequences

  def _extra_names(self):
    return ('class_token',) * self.class_token + ('distillation_token',) * self.distilled

  def _extra_tokens(self):
    initializer = nn.initializers.normal(0.02)
    tokens = [self.param(name, initializer, (self.width,)) for name in self._extra_names()]
    return jnp.stack(tokens)[None] if tokens else jnp.zeros((1, 0, self.width))


class TransformerBlock(nn.Module):
  """Pre-norm self-attention and MLP; x [B, tokens, channels]."""

  head_channels: int
  mlp_width: int
  dtype: Any = jnp.float32
  attention_form: str = 'auto'
  layer_scale: bool = False
  approximate_gelu: bool = False

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    h = self._norm('attention_norm')(x)
    q, k, v = layers.QKV(width // self.head_channels, dtype=self.dtype, name='qkv')(h)
    h = attention.attend(q, k, v, self.attention_form)
    x = x + self._scaled(nn.Dense(width, dtype=self.dtype, name='attention_out')(h.reshape(x.shape)), 'attention_scale')
    h = mlp(self._norm('mlp_norm')(x), self.mlp_width, self.approximate_gelu, self.dtype)
    return x + self._scaled(h, 'mlp_scale')

  def _scaled(self, x, name):
    if not self.layer_scale:
      return x
    return x * self.param(name, nn.initializers.constant(1e-5), (x.shape[-1],)).astype(self.dtype)

  def _norm(self, name):
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=self.dtype, name=name)


def mlp(x: jax.Array, inner: int, approximate: bool, dtype: Any = jnp.float32) -> jax.Array:
  """Two layers with GELU between, `inner` wide, of the module that calls it: `mlp_in` and `mlp_out`."""
  h = nn.gelu(nn.Dense(inner, dtype=dtype, name='mlp_in')(x), approximate=approximate)
  return nn.Dense(x.shape[-1], dtype=dtype, name='mlp_out')(h)
