"""Exponential moving averages of weights: by a half-life with ramp-up, by power functions, and post hoc.

The half-life is EDM's (Karras et al. 2022, appendix F): what has a weight of one half was seen `halflife` images
ago, or a share of all images so far where that is less, so that the average forgets where training began.

The power functions are EDM2's (Karras et al. 2024, section 3 and appendix C): at time t the weights of time tau count
in proportion to tau^gamma, whatever t is. Such an average is told by its relative standard deviation `std`, that of
tau / t under this profile: 0.05 is an average of about the last 10 % of training, 0.28 the plainest (gamma near 0).
Averages stored now and then during training span a space in which any other profile is found afterwards.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# The uniform average of all weights: gamma = 0.
LARGEST_STD = 1 / math.sqrt(12)


def halflife_rate(images_seen: jax.Array, batch_size: int, halflife: float, rampup: float) -> jax.Array:
  """1 - decay of one step: decay = 0.5^(batch_size / min(halflife, rampup * images_seen)).

  Args:
    images_seen: before this step; float32 is exact enough.
    batch_size: images of this step.
    halflife: in images.
    rampup: largest half-life as a share of the images seen; 0: no ramp-up.

  Returns:
    A float32 scalar, precise where decay would round to 1: what the average moves by is
    rate * (params - average). At images_seen = 0 it is 1.
  """
  if rampup:
    halflife = jnp.minimum(jnp.float32(halflife), rampup * images_seen.astype(jnp.float32))
  return -jnp.expm1(-math.log(2) * batch_size / jnp.maximum(halflife, 1e-8))


def power_rate(step: jax.Array, std: float) -> jax.Array:
  """1 - decay of step number `step` (1, 2, ...) for a power-function average: decay = (1 - 1/step)^(gamma + 1)."""
  step = step.astype(jnp.float32)
  return -jnp.expm1((exponent_of(std) + 1) * jnp.log1p(-1 / step))


def moved(average, params, rate: jax.Array):
  """The average after a step: average + rate * (params - average)."""
  return jax.tree.map(lambda a, p: a + rate * (p.astype(a.dtype) - a), average, params)


def exponent_of(std: float) -> float:
  """gamma of the power function with this relative standard deviation; falls as `std` rises, and is 0 at 1/sqrt(12).

  Raises:
    ValueError: no power function with gamma >= 0 has it.
  """
  if not 0 < std <= LARGEST_STD:
    raise ValueError(f'std = {std}: must be in (0, {LARGEST_STD:.4f}], the standard deviations of power functions')
  # std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), as a polynomial in gamma with one root that is not negative.
  roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
  return max(0.0, float(roots.real[np.abs(roots.imag) < 1e-9].max()))


def std_of(exponent: float) -> float:
  """The relative standard deviation of the power function of this exponent."""
  return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def profile_product(time: float, exponent: float, other_time: float, other_exponent: float) -> float:
  """The integral of the product of two profiles, (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]."""
  (early, low), (late, high) = sorted([(time, exponent), (other_time, other_exponent)])
  return (low + 1) * (high + 1) / (low + high + 1) * (early / late) ** high / late


def post_hoc_weights(
  times: Sequence[float], stds: Sequence[float], time: float, std: float
) -> tuple[np.ndarray, float]:
  """The factors of stored averages in the sum that is nearest to another average, by least squares.

  Args:
    times: when each was stored, in steps or images.
    stds: of each, its relative standard deviation.
    time, std: of the average wanted.

  Returns:
    (factors [len(times)] float64, which sum to about 1; the relative error of the profile: 0 where it is met).

  Raises:
    ValueError: no averages, or one from time 0 or before.
  """
  if not len(times) or min(times) <= 0 or time <= 0:
    raise ValueError(f'needs averages of times after 0, not of {tuple(times)}')
  # In units of `time`: the products' size does not depend on how long training was.
  basis = [(t / time, exponent_of(s)) for t, s in zip(times, stds, strict=True)]
  wanted = (1.0, exponent_of(std))
  gram = np.array([[profile_product(*a, *b) for b in basis] for a in basis])
  right = np.array([profile_product(*a, *wanted) for a in basis])
  # Snapshots close together are nearly alike: directions that rounding alone tells apart are left out.
  scale = 1 / np.sqrt(np.diag(gram))
  factors = scale * np.linalg.lstsq(gram * np.outer(scale, scale), right * scale, rcond=1e-13)[0]
  whole = profile_product(*wanted, *wanted)
  missed = whole - 2 * factors @ right + factors @ gram @ factors
  return factors, math.sqrt(max(missed, 0.0) / whole)
