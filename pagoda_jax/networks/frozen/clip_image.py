"""CLIP's picture tower, a vision transformer (Radford et al. 2021), as OpenAI publishes it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.networks.layers import Patches
from pagoda_jax.networks.text.clip import Layer

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class CLIPImage(nn.Module):
  """Pictures of any size -> their embeddings, in the space of the text tower's.

  Attributes:
    patch, grid: side of a patch in pixels, and of the picture in patches.
    width, layers, heads, mlp_width: of the transformer.
    projection: width of the embedding.
    activation: of networks.text.clip.ACTIVATIONS.
    epsilon: of the layer norms.
  """

  patch: int = 14
  grid: int = 16
  width: int = 1024
  layers: int = 24
  heads: int = 16
  mlp_width: int = 4096
  projection: int = 768
  activation: str = 'quick_gelu'
  epsilon: float = 1e-5

  def __call__(self, images: jax.Array) -> jax.Array:
    """images [B, H, W, 3 or 1 (grey)] in [-1, 1] -> float32 [B, projection]."""
    images = resize.resize(jnp.asarray(images, jnp.float32), self.size, 'bicubic')
    return self.embed(((images + 1) / 2 - jnp.array(MEAN)) / jnp.array(DEVIATION))

  @property
  def size(self) -> int:
    """Side in pixels of the pictures that it takes."""
    return self.patch * self.grid

  def of_pixels(self, images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3 or 1] -> [B, projection], of length 1; of other than squares the middle, as CLIP's own code
    crops. Resized by Pillow's bicubic filter in 8 bits, as that code and CMMD's do."""
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = resize.resize_as_pillow(images[:, top : top + side, left : left + side], self.size)
    x = self.embed((pixels / 255 - jnp.array(MEAN)) / jnp.array(DEVIATION))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  @nn.compact
  def embed(self, x: jax.Array, project: bool = True) -> jax.Array:
    """x [B, S, S, 3], normalised and of the tower's size -> [B, projection], or [B, width] before the projection.

    Of another size, whole patches: the positions are resized as timm does it.
    """
    x = Patches(self.width, self.patch, use_bias=False, name='patches')(x)
    whole = self.param('class_token', nn.initializers.normal(0.02), (self.width,))
    positions = self.param('positions', nn.initializers.normal(0.02), (1 + self.grid**2, self.width))
    whole = jnp.broadcast_to(whole, (len(x), 1, self.width))
    if x.shape[1:3] != (self.grid, self.grid):
      grid = positions[1:].reshape(self.grid, self.grid, self.width)
      grid = resize.resize(grid, x.shape[1:3], 'bicubic', antialias=True).reshape(-1, self.width)
      positions = jnp.concatenate([positions[:1], grid])
    x = jnp.concatenate([whole, x.reshape(len(x), -1, self.width)], axis=1) + positions
    x = nn.LayerNorm(self.epsilon, name='norm_in')(x)
    for layer in range(self.layers):
      x = Layer(self.heads, self.mlp_width, self.activation, self.epsilon, name=f'layer{layer}')(x, jnp.zeros(()))
    x = nn.LayerNorm(self.epsilon, name='norm')(x[:, 0])
    return nn.Dense(self.projection, use_bias=False, name='projection')(x) if project else x
