"""Text as a condition of the U-Net: its tokens in attention blocks, and what it adds to the embedding.

A caption comes as an encoder's embeddings: 'text' [B, L, W] of its tokens, 'text_mask' [B, L] (True: a token), and
'text_pooled' [B, P], a vector of the whole of it.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pagoda_jax.networks import attention, layers

# 'cross': attention to the tokens after the picture's own (Rombach et al. 2022); 'added_kv': keys and values of the
# tokens beside the picture's own (GLIDE, Nichol et al. 2021; Imagen; DeepFloyd IF).
ATTENTIONS = ('none', 'cross', 'added_kv')
KEYS = ('text', 'text_mask', 'text_pooled')


class Tokens(NamedTuple):
  """What attention blocks see of a text: values [B, L, C], and which are tokens, bool [B, L] (None: all)."""

  values: jax.Array
  mask: jax.Array | None


def missing(cond: Mapping[str, jax.Array], pooled_width: int) -> tuple[str, ...]:
  """The entries of a text that `cond` lacks."""
  return tuple(key for key in (KEYS if pooled_width else KEYS[:2]) if key not in cond)


def vector(cond: Mapping[str, jax.Array]) -> jax.Array:
  """One vector of each text, float32 [B, P or W]: the encoder's own, or else the mean of the tokens (0 of none)."""
  if 'text_pooled' in cond:
    return cond['text_pooled'].astype(jnp.float32)
  mask = cond['text_mask'].astype(jnp.float32)[..., None]
  return jnp.sum(cond['text'].astype(jnp.float32) * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)


class TextEmbedding(nn.Module):
  """What a text adds to the embedding of noise level and strength, float32 [B, features]: of its vector."""

  features: int

  @nn.compact
  def __call__(self, cond: Mapping[str, jax.Array]) -> jax.Array:
    x = nn.LayerNorm(name='norm')(vector(cond))
    return layers.embedding_dense(self.features, 'out')(x)


class TextProjection(nn.Module):
  """A text's vector for a discriminator: of unit variance in each channel (StyleGAN-T), projected, float32."""

  features: int

  @nn.compact
  def __call__(self, cond: Mapping[str, jax.Array]) -> jax.Array:
    """cond -> [B, features].

    Raises:
      ValueError: it has no text.
    """
    if 'text_pooled' not in cond and (lacking := missing(cond, 0)):
      raise ValueError(f'a discriminator of texts needs {", ".join(lacking)} in cond; got {sorted(cond)}')
    x = nn.LayerNorm(use_bias=False, use_scale=False, name='norm')(vector(cond))
    return nn.Dense(self.features, precision=jax.lax.Precision.HIGHEST, name='out')(x)


class PooledTokens(nn.Module):
  """DeepFloyd IF's form of `TextEmbedding`: one query, the tokens' mean, attends to itself and to all of them.

  Padding is attended to as tokens are.
  """

  features: int
  heads: int

  @nn.compact
  def __call__(self, cond: Mapping[str, jax.Array]) -> jax.Array:
    x = nn.LayerNorm(epsilon=1e-5, name='norm')(cond['text'].astype(jnp.float32))
    batch, _, width = x.shape
    if width % self.heads:
      raise ValueError(f'{self.name}: {width} channels do not split into {self.heads} attention heads')
    position = self.param('position', nn.initializers.normal(width**-0.5), (width,))
    x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True) + position, x], axis=1)
    in_heads = lambda y: y.reshape(batch, -1, self.heads, width // self.heads)
    q, k, v = (in_heads(layers.embedding_dense(width, name)(y))
               for name, y in (('query', x[:, :1]), ('key', x), ('value', x)))
    logits = jnp.einsum('bqhc,bkhc->bhqk', q, k, precision='highest') / math.sqrt(q.shape[-1])
    x = jnp.einsum('bhqk,bkhc->bqhc', jax.nn.softmax(logits), v, precision='highest').reshape(batch, width)
    return nn.LayerNorm(epsilon=1e-5, name='norm_out')(layers.embedding_dense(self.features, 'out')(x))


class TextTokens(nn.Module):
  """`Tokens` for attention blocks: normalised (but in IF's form) and projected to `features` channels."""

  features: int
  plain: bool  # IF's form: neither normalised here, nor masked
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, cond: Mapping[str, jax.Array]) -> Tokens:
    x = cond['text'].astype(jnp.float32)
    if not self.plain:
      x = nn.LayerNorm(name='norm')(x)
    x = layers.Dense(self.features, kernel_init=layers.kernel_init, dtype=self.dtype, name='out')(x)
    return Tokens(x, None if self.plain else cond['text_mask'])


class TextKeysValues(nn.Module):
  """Keys and values of tokens [B, L, C]: [B, L, heads, width / heads] each; channels of the parameters: (kv, head,
  channel). With `group_norm` (IF) after a norm over all tokens and the channels of each of 32 groups."""

  heads: int
  width: int
  group_norm: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> list[jax.Array]:
    if self.group_norm:
      tokens = layers.group_norm(tokens.shape[-1], 1, 1e-5, self.dtype, 'norm')(tokens)
    both = layers.Dense(2 * self.width, kernel_init=layers.kernel_init, dtype=self.dtype, name='out')(tokens)
    split = lambda x: x.reshape(*x.shape[:2], self.heads, self.width // self.heads)
    return [split(part) for part in jnp.split(both, 2, axis=-1)]


class CrossAttention(nn.Module):
  """Attention of a picture's positions to a text's tokens, without the residual sum; zeros at first, and of no text."""

  heads: int
  min_group_channels: int = 4
  norm_eps: float = 1e-5
  dtype: Any = jnp.float32
  form: str = 'auto'

  @nn.compact
  def __call__(self, x: jax.Array, text: Tokens) -> jax.Array:
    b, h, w, c = x.shape
    if c % self.heads:
      raise ValueError(f'{self.name}: {c} channels do not split into {self.heads} attention heads')
    y = layers.group_norm(c, self.min_group_channels, self.norm_eps, self.dtype, 'norm')(x).reshape(b, h * w, c)
    q = layers.Dense(c, kernel_init=layers.kernel_init, dtype=self.dtype, name='query')(y)
    k, v = TextKeysValues(self.heads, c, dtype=self.dtype, name='text_kv')(text.values)
    some = jnp.any(text.mask, axis=1)
    # A softmax over nothing is none: the first place stands in, and counts nothing.
    mask = text.mask | (~some[:, None] & (jnp.arange(text.mask.shape[1]) == 0))
    y = attention.attend(q.reshape(b, h * w, self.heads, c // self.heads), k, v, self.form, mask)
    y = layers.Dense(c, axes=2, kernel_init=layers.zeros_init, dtype=self.dtype, name='out')(y).reshape(b, h, w, c)
    return jnp.where(some[:, None, None, None], y, 0)
