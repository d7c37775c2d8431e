"""A DDPM's network as a denoiser D(x; sigma): its discrete levels of the cosine schedule, and sigma.

Level t of T of Nichol & Dhariwal 2021 (IF's): beta_t = min(1 - f((t + 1) / T) / f(t / T), 0.999) with
f(u) = cos((u + s) / (1 + s) pi / 2)^2 and s = 0.008; alphabar_t is the product of 1 - beta up to t. The network is
trained on sqrt(alphabar) x_0 + sqrt(1 - alphabar) n, and answers with n. Ours is the variance-exploding state
x = x_0 + sigma n, of sigma_t = sqrt((1 - alphabar_t) / alphabar_t), which is the other one times sqrt(1 + sigma^2).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_BETA = 0.999
OFFSET = 0.008


@functools.cache
def sigmas(levels: int) -> np.ndarray:
  """sigma of each level, float64 [levels], rising: the first is that of t = 0."""
  f = np.cos((np.arange(levels + 1) / levels + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2
  betas = np.minimum(1 - f[1:] / f[:-1], LARGEST_BETA)
  alphas = np.cumprod(1 - betas)
  # 1 - alphabar of the first levels would be lost in rounding, as a difference: it is a sum of what each level adds.
  added = np.cumsum(betas * np.concatenate([[1.0], alphas[:-1]]))
  found = np.sqrt(added / alphas)
  found.flags.writeable = False
  return found


def level_of(sigma, levels: int) -> jax.Array:
  """The level, a float32 between 0 and levels - 1, of a sigma of any shape.

  Between two levels ln(sigma), half the logarithm of the signal-to-noise ratio, is a straight line. Below the first
  level's sigma and above the last one's it is that level.
  """
  return jnp.interp(jnp.log(jnp.asarray(sigma, jnp.float32)), np.log(sigmas(levels)).astype(np.float32),
                    np.arange(levels, dtype=np.float32))


def sigma_of(level, levels: int) -> jax.Array:
  """The inverse of `level_of`, float32; of levels outside 0 to levels - 1, of the nearest."""
  return jnp.exp(jnp.interp(jnp.asarray(level, jnp.float32), np.arange(levels, dtype=np.float32),
                            np.log(sigmas(levels)).astype(np.float32)))


def coefficients(sigma: jax.Array, levels: int) -> tuple[jax.Array, ...]:
  """(c_skip, c_out, c_in, c_noise) of D = c_skip x + c_out F(c_in x, c_noise), as of diffusion.coefficients.

  D = x - sigma F, F the noise; outside the levels' range c_in and c_out are sigma's own, and c_noise the end's.
  """
  sigma = jnp.asarray(sigma, jnp.float32)
  return jnp.ones_like(sigma), -sigma, jax.lax.rsqrt(1 + sigma**2), level_of(sigma, levels)
