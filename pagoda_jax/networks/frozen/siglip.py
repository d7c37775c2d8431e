"""The picture tower of SigLIP and SigLIP 2 (Zhai et al. 2023, Tschannen et al. 2025)."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.networks import attention
from pagoda_jax.networks.frozen import deit, projections

MEAN = DEVIATION = (0.5, 0.5, 0.5)


class SigLIP(nn.Module):
  """Pictures -> what attention pools of a vision transformer's tokens, of which none stands for the whole picture.

  Attributes:
    options: of the transformer, as convert.siglip.options finds them in its file.
    resized_positions: as in DeiT.
  """

  options: Mapping[str, Any]
  resized_positions: Callable[[jax.Array, int, int], jax.Array]

  def setup(self):
    self.backbone = projections.backbone(self.options, resized_positions=self.resized_positions)
    self.norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
    self.pool = AttentionPool(self.backbone.head_channels, self.backbone.mlp_width)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, H, W, 3], normalised, sides a multiple of the patch's -> [B, width]."""
    return self.pool(self.norm(self.backbone.tokens(x)[-1]))


class AttentionPool(nn.Module):
  """Attention of one query, the same for every picture, and an MLP with tanh's GELU; x [B, tokens, C] -> [B, C]."""

  head_channels: int
  mlp_width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, _, width = x.shape
    in_heads = lambda x: x.reshape(*x.shape[:2], -1, self.head_channels)
    query = self.param('query', nn.initializers.normal(0.02), (width,))
    q = in_heads(nn.Dense(width, name='q')(jnp.broadcast_to(query, (batch, 1, width))))
    k, v = (in_heads(part) for part in jnp.split(nn.Dense(2 * width, name='kv')(x), 2, axis=-1))
    x = nn.Dense(width, name='out')(attention.attend(q, k, v).reshape(batch, width))
    norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name='mlp_norm')
    return x + deit.mlp(norm(x), self.mlp_width, approximate=True)
