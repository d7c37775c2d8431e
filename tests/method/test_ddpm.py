"""A DDPM's discrete levels as noise levels, and its network as a denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax.method import ddpm, diffusion

LEVELS = 1000


def test_levels_are_of_the_cosine_schedule():
  """alphabar_t = f((t + 1) / T) / f(0), but for the last, whose beta would be 1 and is 0.999."""
  f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
  sigmas, t = ddpm.sigmas(LEVELS), np.arange(LEVELS)
  alphabar = f((t + 1) / LEVELS) / f(0)
  np.testing.assert_allclose(1 / (1 + sigmas[:-1] ** 2), alphabar[:-1], rtol=1e-10)
  np.testing.assert_allclose(1 / (1 + sigmas[-1] ** 2), 1e-3 * alphabar[-2], rtol=1e-10)
  assert 0.006 < sigmas[0] < 0.007 and 20_000 < sigmas[-1] < 21_000


def test_the_map_is_exact_on_the_levels_rises_between_them_and_ends_with_them():
  sigmas = ddpm.sigmas(LEVELS)
  np.testing.assert_allclose(ddpm.level_of(sigmas, LEVELS), np.arange(LEVELS), atol=1e-3)
  np.testing.assert_allclose(ddpm.sigma_of(np.arange(LEVELS), LEVELS), sigmas, rtol=2e-6)
  between = np.exp(np.linspace(np.log(sigmas[0]), np.log(sigmas[-1]), 20_001))
  found = np.asarray(ddpm.level_of(between, LEVELS))
  assert np.all(np.diff(found) >= 0) and np.all(found[1000::1000] > found[:-1000:1000])
  np.testing.assert_allclose(ddpm.sigma_of(found, LEVELS), between, rtol=3e-4)  # levels are float32
  # Half way between two levels: where ln(sigma) is, half the logarithm of the signal-to-noise ratio.
  middle = np.sqrt(sigmas[:-1] * sigmas[1:])
  np.testing.assert_allclose(ddpm.level_of(middle, LEVELS), np.arange(LEVELS - 1) + 0.5, atol=1e-3)
  assert ddpm.level_of(0.002, LEVELS) == 0 and ddpm.level_of(1e6, LEVELS) == LEVELS - 1
  assert ddpm.sigma_of(-3.0, LEVELS) == ddpm.sigma_of(0.0, LEVELS)


@pytest.mark.parametrize('mean, deviation', [(0.0, 0.5), (0.3, 0.2)])
def test_the_exact_noise_of_a_gaussian_gives_its_posterior_mean(mean, deviation):
  """For x_0 ~ N(m, s^2) E[n | x_t] = b (x_t - a m) / (a^2 s^2 + b^2), a^2 = alphabar, b^2 = 1 - alphabar."""

  def network(params, x, level, cond):
    sigma = ddpm.sigma_of(level, LEVELS)[:, None, None, None]
    a, b = 1 / jnp.sqrt(1 + sigma**2), sigma / jnp.sqrt(1 + sigma**2)
    return b * (x - a * mean) / (a**2 * deviation**2 + b**2)

  denoise = diffusion.precondition(network, of_sigma=lambda sigma: ddpm.coefficients(sigma, LEVELS))
  sigma = np.geomspace(0.01, 80, 16).astype(np.float32)
  normal = jax.random.normal(jax.random.key(0), (2, 16, 4, 4, 1))
  images = mean + deviation * normal[0]
  x = images + sigma[:, None, None, None] * normal[1]
  wide = sigma[:, None, None, None] ** 2
  expected = (deviation**2 * x + wide * mean) / (deviation**2 + wide)
  # D = x - sigma n is the difference of two numbers of size sigma.
  difference = np.abs(np.asarray(denoise(None, x, sigma, {}) - expected)).max(axis=(1, 2, 3))
  assert np.all(difference <= 2e-5 * np.maximum(sigma, 1))


def test_the_one_step_generator_is_told_the_level_of_the_largest_sigma():
  told = {}

  def network(params, x, level, cond):
    told['level'] = level
    return x

  z = 80 * jnp.ones((2, 4, 4, 1))
  made = diffusion.one_step(network, None, z, {}, 80.0, of_sigma=lambda sigma: ddpm.coefficients(sigma, LEVELS))
  np.testing.assert_allclose(made, 80 / np.sqrt(1 + 80**2), rtol=1e-6)
  np.testing.assert_allclose(told['level'], ddpm.level_of(80.0, LEVELS), rtol=1e-6)
