"""T5's encoder (Raffel et al. 2020) in its version 1.1, with gated GELUs."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.networks.text.transformer import Attention

# Of the published encoders of version 1.1.
SMALL = {'vocabulary': 32128, 'width': 512, 'layers': 8, 'heads': 6, 'head_channels': 64, 'mlp_width': 1024,
         'buckets': 32, 'max_distance': 128, 'epsilon': 1e-6}
BASE = SMALL | {'width': 768, 'layers': 12, 'heads': 12, 'mlp_width': 2048}
LARGE = SMALL | {'width': 1024, 'layers': 24, 'heads': 16, 'mlp_width': 2816}
XL = SMALL | {'width': 2048, 'layers': 24, 'heads': 32, 'mlp_width': 5120}
XXL = SMALL | {'width': 4096, 'layers': 24, 'heads': 64, 'mlp_width': 10240}


class T5Encoder(nn.Module):
  """Token ids -> the tokens' embeddings.

  Attributes:
    vocabulary: how many tokens there are.
    width, layers, heads, head_channels, mlp_width: of the transformer.
    buckets: of relative positions, half of them for keys behind the query.
    max_distance: from which on all positions share a bucket.
    epsilon: of the RMS norms.
  """

  vocabulary: int
  width: int
  layers: int
  heads: int
  head_channels: int
  mlp_width: int
  buckets: int
  max_distance: int
  epsilon: float

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 ids [B, N] and bool mask [B, N] (True = token) -> (tokens [B, N, width]; their mean [B, width])."""
    x = nn.Embed(self.vocabulary, self.width, name='tokens')(ids)
    table = nn.Embed(self.buckets, self.heads, name='positions')
    places = np.arange(ids.shape[1])
    buckets = position_buckets(places[None, :] - places[:, None], self.buckets, self.max_distance)
    bias = table(buckets).transpose(2, 0, 1) + jnp.where(mask[:, None, None], 0, -jnp.inf)
    for layer in range(self.layers):
      x = Layer(self.heads, self.head_channels, self.mlp_width, self.epsilon, name=f'layer{layer}')(x, bias)
    x = nn.RMSNorm(self.epsilon, name='norm')(x)
    weights = mask[..., None] / mask.sum(1)[:, None, None]
    return x, (x * weights).sum(1)


class Layer(nn.Module):
  """A pre-norm transformer layer, without biases, the logits not scaled; attributes as in T5Encoder."""

  heads: int
  head_channels: int
  mlp_width: int
  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    norm = lambda name: nn.RMSNorm(self.epsilon, name=name)
    dense = lambda width, name: nn.Dense(width, use_bias=False, name=name)
    attention = Attention(self.heads, self.head_channels, 1.0, False, name='attention')
    x = x + attention(norm('attention_norm')(x), bias)
    inner = norm('mlp_norm')(x)
    gate = jax.nn.gelu(dense(self.mlp_width, 'mlp_gate')(inner), approximate=True)
    return x + dense(x.shape[-1], 'mlp_out')(gate * dense(self.mlp_width, 'mlp_in')(inner))


def position_buckets(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
  """The bucket of each distance from a query to a key, in tokens (section 2.1 of the paper).

  Keys behind the query have the upper half of the buckets. Of each half, the first half is of one distance each, the
  others of ranges that grow by one ratio up to max_distance; the last one holds all beyond.
  """
  half, exact = buckets // 2, buckets // 4
  size = np.abs(distance)
  # In float32, as the published code rounds: where a distance is just the end of a range.
  ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
  ratio /= np.float32(math.log(max_distance / exact))
  far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
  return np.where(distance > 0, half, 0) + np.where(size < exact, size, far)
