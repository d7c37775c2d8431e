"""LPIPS (Zhang et al. 2018) on VGG16: a perceptual distance between images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.networks.frozen.maps import lpips_per_layer

# The published scaling: ImageNet's mean and deviation, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class VGGFeatures(nn.Module):
  """The last ReLU before each max pool of VGG16, and the last of all."""

  widths: tuple[int, ...] = (64, 128, 256, 512, 512)
  depths: tuple[int, ...] = (2, 2, 3, 3, 3)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """x [B, H, W, 3], scaled -> maps [B, H, W, widths[0]], [B, H/2, W/2, widths[1]], ..."""
    maps = []
    for level, (width, depth) in enumerate(zip(self.widths, self.depths)):
      if level:
        x = nn.max_pool(x, (2, 2), (2, 2))
      for index in range(depth):
        x = nn.relu(nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f'level{level}_conv{index}')(x))
      maps.append(x)
    return maps


class LPIPS(nn.Module):
  """The learned perceptual distance; all its weights are published and stay frozen."""

  widths: tuple[int, ...] = (64, 128, 256, 512, 512)
  depths: tuple[int, ...] = (2, 2, 3, 3, 3)
  dtype: Any = jnp.float32

  def setup(self):
    self.vgg = VGGFeatures(self.widths, self.depths, self.dtype)
    # The published weights are not negative; uniform ones make a distance of an untrained network.
    init = nn.initializers.constant(1 / 64)
    self.weights = [self.param(f'weight{level}', init, (width,)) for level, width in enumerate(self.widths)]

  def __call__(self, images_a: jax.Array, images_b: jax.Array) -> jax.Array:
    """Distance of images [B, H, W, 3 or 1 (gray)] in [-1, 1], [B] float32. H and W at least 16."""
    return jnp.sum(self.per_layer(images_a, images_b), axis=0)

  def per_layer(self, images_a: jax.Array, images_b: jax.Array) -> jax.Array:
    """The five terms of the distance, [5, B]."""
    return lpips_per_layer(self.features(images_a), self.features(images_b), self.weights)

  def features(self, images: jax.Array) -> list[jax.Array]:
    """The five maps of images in [-1, 1]."""
    return self.vgg((images - jnp.array(SHIFT)) / jnp.array(SCALE))
