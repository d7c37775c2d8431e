"""The diffusion process of Karras et al. 2022 (EDM) as pure functions.

Images and states are [B, H, W, C]; the state at noise level sigma is x = image + sigma * normal, so
noise at sigma_max has a standard deviation near sigma_max. Three kinds of function are passed around:

  network_apply(params, x, c_noise, cond, **kwargs) -> F   the raw network (`UNet.apply` of variables)
  denoise(params, x, sigma, cond, **kwargs) -> D           preconditioned, float32 (from `precondition`)
  denoise(x, sigma, cond) -> D                             the same with its parameters bound: for solvers
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Cond = Mapping[str, jax.Array]


def sigmas(num_levels: int = 40, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
  """Noise levels from sigma_max down to sigma_min, float64 (Karras et al. 2022, equation 5 without the final 0).

  Raises:
    ValueError: fewer than two levels, or 0 < sigma_min < sigma_max does not hold.
  """
  if num_levels < 2 or not 0 < sigma_min < sigma_max:
    raise ValueError(f'need num_levels >= 2 and 0 < sigma_min < sigma_max: {num_levels}, {sigma_min}, {sigma_max}')
  ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_levels)
  return ramp**rho


def broadcast(sigma, x: jax.Array) -> jax.Array:
  """A scalar or [B] as float32 [B, 1, 1, 1] beside x [B, H, W, C]."""
  return jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), x.shape[:1]).reshape(-1, *(1,) * (x.ndim - 1))


def coefficients(sigma: jax.Array, sigma_data: float = 0.5) -> tuple[jax.Array, ...]:
  """(c_skip, c_out, c_in, c_noise) at noise levels of any shape (Karras et al. 2022, table 1, last column)."""
  variance = sigma**2 + sigma_data**2
  deviation = jnp.sqrt(variance)
  return sigma_data**2 / variance, sigma * sigma_data / deviation, 1 / deviation, jnp.log(sigma) / 4


def precondition(network_apply: Callable, sigma_data: float = 0.5, of_sigma: Callable | None = None) -> Callable:
  """Makes a denoiser of a raw network (Karras et al. 2022, equation 7).

  Args:
    network_apply: the raw network.
    sigma_data: standard deviation of the data.
    of_sigma: of_sigma(sigma) -> its coefficients, where they are not EDM's (ddpm.coefficients).

  Returns:
    denoise(params, x, sigma, cond, **kwargs) -> D: x [B, H, W, C] the noisy state, sigma a scalar or
    [B]; D the estimate of the clean image, float32 whatever the network's type. kwargs go to the network.
  """
  of_sigma = of_sigma or (lambda sigma: coefficients(sigma, sigma_data))

  def denoise(params, x, sigma, cond, **kwargs):
    x = x.astype(jnp.float32)
    c_skip, c_out, c_in, c_noise = of_sigma(broadcast(sigma, x))
    output = network_apply(params, c_in * x, c_noise.reshape(-1), cond, **kwargs)
    return c_skip * x + c_out * output.astype(jnp.float32)

  return denoise


def training_sigma(normal: jax.Array, p_mean: float = -1.2, p_std: float = 1.2) -> jax.Array:
  """Noise levels whose logarithm has the given mean and deviation, from normal draws."""
  return jnp.exp(p_std * normal + p_mean)


def weighted_error(denoise, params, images, cond, sigma, noise, sigma_data: float = 0.5, **kwargs) -> jax.Array:
  """EDM's weighted squared error of every value, unreduced (Karras et al. 2022, equation 8).

  Args:
    denoise: denoise(params, x, sigma, cond, **kwargs).
    images: [B, H, W, C] clean images.
    sigma: [B] noise levels.
    noise: [B, H, W, C] normal draws.

  Returns:
    [B, H, W, C] float32.
  """
  sigma = broadcast(sigma, images)
  weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
  denoised = denoise(params, images + sigma * noise, sigma.reshape(-1), cond, **kwargs)
  return weight * (denoised - images) ** 2


def training_draws(rng: jax.Array, shape: tuple[int, ...], p_mean: float = -1.2, p_std: float = 1.2):
  """(noise levels [B], normal draws [B, H, W, C]) for images of a shape [B, H, W, C]."""
  level_rng, noise_rng = jax.random.split(rng)
  return training_sigma(jax.random.normal(level_rng, shape[:1]), p_mean, p_std), jax.random.normal(noise_rng, shape)


def edm_loss(denoise, params, images, cond, sigma, noise, sigma_data: float = 0.5, **kwargs) -> jax.Array:
  """EDM's training loss of every image, [B]: the sum of its `weighted_error`, which explains the arguments."""
  error = weighted_error(denoise, params, images, cond, sigma, noise, sigma_data, **kwargs)
  return error.sum(axis=(1, 2, 3))


def one_step(
    network_apply, params, z, cond, sigma_max: float = 80.0, sigma_data: float = 0.5, of_sigma: Callable | None = None,
    **kwargs,
) -> jax.Array:
  """The one-step generator: the raw network output is the image (PaGoDA, stage 2).

  Args:
    z: [B, H, W, C] noise with a standard deviation near sigma_max.
    of_sigma: as of `precondition`.

  Returns:
    [B, S, S, C] images, about [-1, 1], not clipped.
  """
  scale, c_noise = math.hypot(sigma_max, sigma_data), np.float32(math.log(sigma_max) / 4)
  if of_sigma:
    *_, c_in, c_noise = of_sigma(sigma_max)
    scale = 1 / c_in
  # Broadcast: ONNX's converter knows no other way to fill a batch of symbolic size.
  return network_apply(params, z / scale, jnp.broadcast_to(c_noise, z.shape[:1]), cond, **kwargs)


def heun(denoise: Callable, x: jax.Array, levels: np.ndarray, cond: Cond, *, clip=False, jumps=0.0, jump_noise=None):
  """Solves the probability-flow ODE dx/dsigma = (x - D)/sigma through `levels`, up or down.

  Every interval takes two evaluations (Heun), but the one that ends at 0 takes one (Euler). The
  loop has one evaluation a turn, so the network is compiled once.

  Args:
    denoise: denoise(x, sigma, cond).
    x: [B, H, W, C] the state at levels[0].
    levels: [N] noise levels, NumPy; N - 1 intervals.
    clip: whether D is clamped to [-1, 1].
    jumps: noise levels [N - 1] >= levels[:-1] to which noise is added before each interval, or 0.0.
    jump_noise: jump_noise(i) -> normal draws [B, H, W, C] for interval i; needed with `jumps`.

  Returns:
    [B, H, W, C] float32, the state at levels[-1].

  Raises:
    ValueError: a level before the last is not above 0, or jumps without jump_noise.
  """
  levels = np.asarray(levels)
  if not (levels[:-1] > 0).all():  # the slope there is a division by it
    raise ValueError(f'noise levels before the last must be above 0: {levels}')
  starts, ends = np.maximum(levels[:-1], jumps), levels[1:]
  added = np.sqrt(np.maximum(starts**2 - levels[:-1] ** 2, 0))
  if added.any() and jump_noise is None:
    raise ValueError('jumps need jump_noise')
  table = []  # (noise level, step, second evaluation of its interval?, interval, noise to add) of each evaluation
  for i, (start, end) in enumerate(zip(starts, ends)):
    table.append((start, end - start, False, i, added[i]))
    if end > 0:
      table.append((end, end - start, True, i, 0.0))
  columns = [np.asarray(column) for column in zip(*table)]
  columns = [c.astype(np.float32) if c.dtype.kind == 'f' else c for c in columns]

  def evaluate(carry, turn):
    x, start, first_slope = carry
    sigma, step, second, interval, noise_level = turn
    if jump_noise is not None:
      x = x + noise_level * jump_noise(interval)
    denoised = denoise(x, sigma, cond)
    slope = (x - (jnp.clip(denoised, -1, 1) if clip else denoised)) / sigma
    corrected = start + step * (first_slope + slope) / 2
    return (jnp.where(second, corrected, x + step * slope), x, slope), None

  x = x.astype(jnp.float32)
  (x, _, _), _ = jax.lax.scan(evaluate, (x, x, jnp.zeros_like(x)), columns)
  return x


def invert(denoise: Callable, images: jax.Array, levels: np.ndarray, cond: Cond, clip: bool = True) -> jax.Array:
  """Data to noise: the clean image is taken as the state at the lowest level (PaGoDA).

  Args:
    denoise: denoise(x, sigma, cond), of the images' own labels.
    images: [B, H, W, C] in [-1, 1]; no noise is added.
    levels: noise levels of `sigmas`, either order; N levels are 2 (N - 1) evaluations.
    clip: whether the denoised image is clamped to [-1, 1], as in the release.

  Returns:
    [B, H, W, C] noise with a standard deviation near sigma_max; neither clamped nor normalised.
  """
  return heun(denoise, images, np.sort(levels), cond, clip=clip)


def heun_sample(
    denoise: Callable,
    noise: jax.Array,
    levels: np.ndarray,
    cond: Cond,
    *,
    clip: bool = False,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_scale: float = 1.0,
    rng: jax.Array | None = None,
    churn_noise: Any = None,
) -> jax.Array:
  """Noise to data: EDM's sampler (Karras et al. 2022, algorithms 1 and 2); with `clip`, PaGoDA's.

  Args:
    denoise: denoise(x, sigma, cond).
    noise: [B, H, W, C], standard deviation sigma_max (not 1).
    levels: [N] descending, of `sigmas`; a final 0 is appended. 2 N - 1 evaluations.
    clip: whether the denoised image is clamped to [-1, 1] at every evaluation.
    churn, churn_min, churn_max, churn_scale: S_churn, S_tmin, S_tmax, S_noise of algorithm 2.
    rng: key of the added noise; needed if churn > 0 and no churn_noise is given.
    churn_noise: [N, B, H, W, C] normal draws to use instead.

  Returns:
    [B, H, W, C] float32 images.

  Raises:
    ValueError: levels that do not fall, or end at 0; churn without a source of noise, or churn_noise of another shape.
  """
  levels = np.append(levels, 0.0)
  if not (np.diff(levels) < 0).all():
    raise ValueError(f'noise levels must fall, and end above 0, which is appended: {levels[:-1]}')
  if not churn:
    return heun(denoise, noise, levels, cond, clip=clip)
  if churn_noise is None and rng is None:
    raise ValueError('churn needs rng')
  starts = levels[:-1]
  wanted = (len(starts), *noise.shape)
  if churn_noise is not None and np.shape(churn_noise) != wanted:  # past its end JAX would take the last draw again
    raise ValueError(f'churn_noise is {list(np.shape(churn_noise))}; must be {list(wanted)}')
  gamma = min(churn / len(starts), math.sqrt(2) - 1)
  jumps = np.where((starts >= churn_min) & (starts <= churn_max), starts * (1 + gamma), starts)

  def jump_noise(i):
    if churn_noise is None:
      return churn_scale * jax.random.normal(jax.random.fold_in(rng, i), noise.shape)
    return churn_scale * jnp.asarray(churn_noise)[i]

  return heun(denoise, noise, levels, cond, clip=clip, jumps=jumps, jump_noise=jump_noise)
