"""Comparing lists of feature maps, in float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Features = Sequence[jax.Array]


def unit_normalize(features: jax.Array, eps: float = 1e-10) -> jax.Array:
  """features / (norm over the last axis + eps), float32.

  A zero vector (dead ReLUs) stays zero and gets a zero gradient, where the formula's would be 1 / eps.
  """
  features = jnp.asarray(features, jnp.float32)
  squared = jnp.sum(features**2, axis=-1, keepdims=True)
  alive = squared > 0
  norm = jnp.sqrt(jnp.where(alive, squared, 1))
  return jnp.where(alive, features / (norm + eps), 0)


def lpips_distance(features_a: Features, features_b: Features, weights: Features) -> jax.Array:
  """LPIPS (Zhang et al. 2018, eq. 1) from the five VGG maps [B, H, W, C] and channel weights [C], [B]."""
  return jnp.sum(lpips_per_layer(features_a, features_b, weights), axis=0)


def lpips_per_layer(features_a: Features, features_b: Features, weights: Features) -> jax.Array:
  """The terms of `lpips_distance`, [layers, B]; ValueError where lists or shapes do not match."""
  check_pairs(features_a, features_b)
  if len(weights) != len(features_a):
    raise ValueError(f'{len(features_a)} maps but weights for {len(weights)}')
  layers = []
  for a, b, weight in zip(features_a, features_b, weights):
    squared = (unit_normalize(a) - unit_normalize(b)) ** 2
    layers.append(jnp.mean(jnp.sum(squared * jnp.asarray(weight, jnp.float32), axis=-1), axis=(1, 2)))
  return jnp.stack(layers)


def check_pairs(features_a: Features, features_b: Features) -> None:
  """Raises ValueError where two lists of maps differ in length or in a shape."""
  shapes = [[jnp.shape(x) for x in features] for features in (features_a, features_b)]
  if shapes[0] != shapes[1]:
    raise ValueError(f'shapes differ: {shapes[0]} and {shapes[1]}')
