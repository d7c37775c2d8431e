"""Classifier-free guidance (Ho & Salimans 2022), and the laws that its strength omega is drawn from.

omega = 1 is no guidance; larger ones give samples of p(x|c, omega) ~ p(x|c)^omega p(x)^(1 - omega), or near it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pagoda_jax.method.diffusion import broadcast


def guided(denoise: Callable, omega) -> Callable:
  """D_uncond + omega * (D_cond - D_uncond), of a denoiser with its parameters bound.

  A picture's two states lie side by side in one batch: the network stands once in the program, and a batch that is
  split over devices stays where it is.

  Args:
    denoise: denoise(x, sigma, cond) of a teacher trained with label dropout; sigma a scalar or [B].
    omega: a scalar or [B].
  """

  def denoise_guided(x, sigma, cond):
    label = cond['label']
    labels = jnp.stack([label, jnp.full_like(label, -1)], axis=1).reshape(-1)
    sigmas = jnp.repeat(broadcast(sigma, x).reshape(-1), 2)
    denoised = denoise(jnp.repeat(x, 2, axis=0), sigmas, {'label': labels})
    conditional, unconditional = jnp.moveaxis(denoised.reshape(-1, 2, *denoised.shape[1:]), 1, 0)
    return unconditional + broadcast(omega, x) * (conditional - unconditional)

  return denoise_guided


class Law(NamedTuple):
  """How omega is distributed: 'constant' (`mean`), 'uniform' in [low, high], or 'truncated_normal' (of `mean` and
  `std` before it is cut to [low, high])."""

  kind: str
  mean: float = 1.0
  std: float = 1.0
  low: float = 1.0
  high: float = 1.0

  @property
  def ends(self) -> tuple[float, float]:
    """The smallest and the largest omega."""
    return (self.mean, self.mean) if self.kind == 'constant' else (self.low, self.high)

  def draw(self, rng: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """float32 of a shape."""
    if self.kind == 'constant':
      return jnp.full(shape, self.mean, jnp.float32)
    if self.kind == 'uniform':
      return jax.random.uniform(rng, shape, jnp.float32, self.low, self.high)
    low, high = ((end - self.mean) / self.std for end in self.ends)
    # Rounding must not lead out of the range.
    return jnp.clip(self.mean + self.std * jax.random.truncated_normal(rng, low, high, shape), self.low, self.high)

  def of_pictures(self, rng: jax.Array, keys: jax.Array) -> jax.Array:
    """float32 [B] of pictures' keys int32 [B]: each depends on rng and its own key alone."""
    return jax.vmap(lambda key: self.draw(jax.random.fold_in(rng, key)))(keys)

  def nearest(self, omega: float) -> float:
    """The strength in the law's range that is nearest to omega."""
    low, high = self.ends
    return min(max(omega, low), high)
