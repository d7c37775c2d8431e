"""CLIP's text tower (Radford et al. 2021, section 2.4), as OpenAI and OpenCLIP publish it in transformers' form."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.networks.text.transformer import Attention

# OpenAI's; OpenCLIP's, the exact one.
ACTIVATIONS = {'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
               'gelu': lambda x: jax.nn.gelu(x, approximate=False)}

# Of the published towers.
VIT_B_32 = {'vocabulary': 49408, 'positions': 77, 'width': 512, 'layers': 12, 'heads': 8, 'mlp_width': 2048,
            'projection': 512, 'activation': 'quick_gelu', 'eos': None, 'epsilon': 1e-5}
VIT_L_14 = VIT_B_32 | {'width': 768, 'heads': 12, 'mlp_width': 3072, 'projection': 768}
VIT_G_14 = VIT_B_32 | {'width': 1024, 'layers': 24, 'heads': 16, 'mlp_width': 4096, 'projection': 1024,
                       'activation': 'gelu'}  # OpenCLIP's ViT-g/14; no capital G


class CLIPText(nn.Module):
  """Token ids -> the tokens' embeddings and one of the whole text.

  Attributes:
    vocabulary: how many tokens there are.
    positions: the longest text, in tokens.
    width, layers, heads, mlp_width: of the transformer.
    projection: width of the whole text's embedding; 0: there is no projection, and it is the end token's.
    activation: of ACTIVATIONS.
    eos: the end token, whose first place the whole text is read at; None: the place of the largest id, which is the
      same in CLIP's own vocabulary.
    epsilon: of the layer norms.
  """

  vocabulary: int
  positions: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  projection: int
  activation: str
  eos: int | None
  epsilon: float

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 ids [B, N] and bool mask [B, N] (True = token) -> (the last layer's tokens, normed, [B, N, width]; [B, P]).

    Tokens see those before them, so that padding behind the end token changes none of them.
    """
    tokens = ids.shape[1]
    embedding = nn.Embed(self.vocabulary, self.width, name='tokens')
    positions = self.param('positions', nn.initializers.normal(0.02), (self.positions, self.width))
    x = embedding(ids) + positions[:tokens]
    bias = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)) & mask[:, None, None], 0, -jnp.inf)
    # A token that sees none, as padding before the text would, sees itself: a softmax of nothing is no number.
    bias = jnp.where(jnp.eye(tokens, dtype=bool), 0, bias)
    for layer in range(self.layers):
      x = Layer(self.heads, self.mlp_width, self.activation, self.epsilon, name=f'layer{layer}')(x, bias)
    x = nn.LayerNorm(self.epsilon, name='norm')(x)
    last = jnp.argmax(ids if self.eos is None else ids == self.eos, axis=1)
    whole = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    if self.projection:
      whole = nn.Dense(self.projection, use_bias=False, name='projection')(whole)
    return x, whole


class Layer(nn.Module):
  """A pre-norm transformer layer; attributes as in CLIPText."""

  heads: int
  mlp_width: int
  activation: str
  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    width = x.shape[-1]
    head = width // self.heads
    norm = lambda name: nn.LayerNorm(self.epsilon, name=name)
    x = x + Attention(self.heads, head, head**-0.5, True, name='attention')(norm('attention_norm')(x), bias)
    inner = nn.Dense(self.mlp_width, name='mlp_in')(norm('mlp_norm')(x))
    return x + nn.Dense(width, name='mlp_out')(ACTIVATIONS[self.activation](inner))
