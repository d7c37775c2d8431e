"""What the text encoders' transformers share."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
  """softmax(q k^T + bias) v of each head; the softmax in float32.

  Args:
    q, k, v: [B, N, heads, C]; q is scaled already.
    bias: of the logits, as [B, heads, N, N] or what broadcasts to it; -inf where a query must not see a key.
  """
  logits = jnp.einsum('bqhc,bkhc->bhqk', q, k, preferred_element_type=jnp.float32) + bias
  return jnp.einsum('bhqk,bkhc->bqhc', jax.nn.softmax(logits).astype(v.dtype), v)


class Attention(nn.Module):
  """Self-attention of `heads`, of `head_channels` each."""

  heads: int
  head_channels: int
  scale: float  # of the queries
  use_bias: bool

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    """[B, N, width] -> the same; `bias` as in `attend`."""
    width, inner = x.shape[-1], self.heads * self.head_channels
    split = lambda name: nn.Dense(inner, use_bias=self.use_bias, name=name)(x).reshape(
      *x.shape[:2], self.heads, self.head_channels)
    mixed = attend(split('query') * self.scale, split('key'), split('value'), bias)
    return nn.Dense(width, use_bias=self.use_bias, name='out')(mixed.reshape(*x.shape[:2], inner))
