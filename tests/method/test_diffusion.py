"""The diffusion maths where data are Gaussian, so that every answer is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax.method import diffusion

DATA_STD = 0.5
SHAPE = (4, 2, 2, 3)


def optimal_denoise(x, sigma, cond):
  """E[image | x] for images of N(label, DATA_STD^2)."""
  sigma = diffusion.broadcast(sigma, x)
  mean = diffusion.broadcast(cond['label'], x)
  return mean + (x - mean) * DATA_STD**2 / (DATA_STD**2 + sigma**2)


def normal(seed, shape=SHAPE):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


COND = {'label': np.zeros(SHAPE[0])}


def test_sigmas():
  levels = diffusion.sigmas(40, 0.002, 80.0, 7.0)
  assert len(levels) == 40 and (np.diff(levels) < 0).all()
  np.testing.assert_allclose(levels[[0, -1]], [80.0, 0.002])
  np.testing.assert_allclose(levels[20], (80 ** (1 / 7) + 20 / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
  for wrong in ((1,), (4, 0.0), (4, 2.0, 1.0)):
    with pytest.raises(ValueError, match='sigma_min'):
      diffusion.sigmas(*wrong)


def test_preconditioned_inputs_and_targets_have_unit_variance():
  sigma = jnp.asarray([0.002, 0.5, 80.0])
  c_skip, c_out, c_in, c_noise = diffusion.coefficients(sigma, 0.5)
  np.testing.assert_allclose(c_in**2 * (sigma**2 + 0.25), 1, rtol=1e-6)
  # The target is (image - c_skip x) / c_out.
  variance = (1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2
  np.testing.assert_allclose(variance / c_out**2, 1, rtol=1e-5)
  np.testing.assert_allclose(c_noise, np.log(sigma) / 4, rtol=1e-6)


def test_preconditioning_is_float32_around_a_bfloat16_network():
  seen = {}

  def network(params, x, c_noise, cond):
    seen.update(x=x.dtype, c_noise=c_noise.dtype)
    return jnp.zeros_like(x, jnp.bfloat16)

  denoised = diffusion.precondition(network)(None, normal(0).astype(jnp.bfloat16), 0.1, COND)
  assert denoised.dtype == seen['x'] == seen['c_noise'] == jnp.float32


@pytest.mark.parametrize('steps, tolerance', [(40, 1e-2), (160, 1e-3)])  # second order
def test_inversion_and_sampling_follow_the_exact_flow(steps, tolerance):
  levels = diffusion.sigmas(steps)
  images = DATA_STD * normal(0)
  # The flow of Gaussian data scales x with the deviation of the marginal.
  growth = np.sqrt((80.0**2 + DATA_STD**2) / (0.002**2 + DATA_STD**2))
  noise = diffusion.invert(optimal_denoise, images, levels, COND, clip=False)
  np.testing.assert_allclose(noise, images * growth, rtol=tolerance)
  np.testing.assert_array_equal(diffusion.invert(optimal_denoise, images, levels[::-1], COND, clip=False), noise)
  sampled = diffusion.heun_sample(optimal_denoise, images * growth, levels, COND)
  np.testing.assert_allclose(sampled, images, rtol=tolerance, atol=1e-4)


def test_solvers_evaluate_the_network_as_often_as_promised():
  calls = []

  def counting(x, sigma, cond):
    jax.debug.callback(lambda level: calls.append(float(level)), sigma, ordered=True)
    return x / 2

  levels = diffusion.sigmas(4)
  diffusion.invert(counting, normal(0), levels, COND)
  jax.effects_barrier()
  np.testing.assert_allclose(calls, [x for pair in zip(levels[::-1], levels[-2::-1]) for x in pair], rtol=1e-6)
  calls.clear()
  diffusion.heun_sample(counting, normal(0), levels, COND)
  jax.effects_barrier()
  np.testing.assert_allclose(calls, [x for pair in zip(levels, levels[1:]) for x in pair] + [levels[-1]], rtol=1e-6)


def test_clipping_clamps_the_denoised_image():
  def far(x, sigma, cond):
    return jnp.full_like(x, 7.0)

  def edge(x, sigma, cond):
    return jnp.ones_like(x)

  levels = diffusion.sigmas(5)
  for solve in (diffusion.invert, diffusion.heun_sample):
    np.testing.assert_array_equal(
        solve(far, normal(0), levels, COND, clip=True), solve(edge, normal(0), levels, COND, clip=False))
  np.testing.assert_allclose(diffusion.heun_sample(far, 80 * normal(0), levels, COND), 7.0, rtol=1e-5)


def test_churn_keeps_the_distribution():
  noise = 80 * normal(0, (64, 8, 8, 3))
  cond = {'label': np.zeros(64)}
  levels = diffusion.sigmas(40)

  def sample(seed, **churn):
    return diffusion.heun_sample(optimal_denoise, noise, levels, cond, **churn, rng=jax.random.key(seed))

  first = sample(0, churn=40.0)
  np.testing.assert_allclose(first.std(), DATA_STD, rtol=0.05)
  np.testing.assert_array_equal(first, sample(0, churn=40.0))
  assert np.abs(first - sample(1, churn=40.0)).max() > 0.1
  # Outside [churn_min, churn_max] nothing is added.
  np.testing.assert_allclose(sample(0, churn=40.0, churn_min=100.0), sample(0), rtol=1e-6, atol=1e-6)
  with pytest.raises(ValueError, match='needs rng'):
    diffusion.heun_sample(optimal_denoise, noise, levels, cond, churn=40.0)


def test_what_a_solver_would_make_nonsense_of_is_refused():
  levels, noise, draws = diffusion.sigmas(4), 80 * normal(0), normal(1, (3, *SHAPE))
  sample = lambda levels, **churn: diffusion.heun_sample(optimal_denoise, noise, levels, COND, **churn)
  for wrong in (levels[::-1], np.append(levels, 0.0), levels * np.nan):  # the second is not a number throughout
    with pytest.raises(ValueError, match='must fall, and end above 0'):
      sample(wrong)
  with pytest.raises(ValueError, match='before the last must be above 0'):
    diffusion.invert(optimal_denoise, noise, np.append(levels, 0.0), COND)
  with pytest.raises(ValueError, match=r'churn_noise is \[3, 4, 2, 2, 3\]; must be \[4, 4, 2, 2, 3\]'):
    sample(levels, churn=1.0, churn_noise=draws)  # the last interval's was the one before it once more
  with pytest.raises(ValueError, match='jumps need jump_noise'):
    diffusion.heun(optimal_denoise, noise, levels, COND, jumps=1.1 * levels[:-1])


def test_one_step_is_the_raw_network():
  def network(params, x, c_noise, cond):
    return params * x + c_noise[:, None, None, None]

  z = 80 * normal(0)
  np.testing.assert_allclose(
      diffusion.one_step(network, 3.0, z, COND), 3.0 * z / np.sqrt(80**2 + 0.25) + np.log(80.0) / 4, rtol=1e-5)


def gaussian_loss(scale, rng, batch=20000):
  """EDM loss of D = scale * c_skip x on N(0, DATA_STD^2): smallest at scale 1, where D is optimal."""
  def denoise(params, x, sigma, cond):
    return params * optimal_denoise(x, sigma, {'label': 0.0})

  images = DATA_STD * normal(5, (batch, 1, 1, 1))
  sigma, noise = diffusion.training_draws(rng, images.shape)
  return jnp.mean(diffusion.edm_loss(denoise, scale, images, {}, sigma, noise, sigma_data=DATA_STD))


def test_edm_loss_and_its_gradient_on_gaussian_data():
  """With variances v = s^2 + sd^2, D - image has variance k^2 sd^4/v - 2k sd^4/v + sd^2 at scale k; the
  weight is v / (s sd)^2; so the loss is E[1 + (k - 1)^2 sd^2 / s^2], with E[1/s^2] of a log-normal s."""
  loss, gradient = jax.value_and_grad(gaussian_loss)(1.0, jax.random.key(0))
  np.testing.assert_allclose(loss, 1.0, rtol=0.03)
  inverse_square = np.exp(2 * 1.2 + 2 * 1.2**2)
  loss, gradient = jax.value_and_grad(gaussian_loss)(2.0, jax.random.key(0))
  np.testing.assert_allclose(loss, 1 + DATA_STD**2 * inverse_square, rtol=0.25)  # heavy-tailed weights
  numeric = (gaussian_loss(2.01, jax.random.key(0)) - gaussian_loss(1.99, jax.random.key(0))) / 0.02
  np.testing.assert_allclose(gradient, numeric, rtol=1e-3)


def test_edm_loss_sums_over_pixels():
  def denoise_to_zero(params, x, sigma, cond):
    return jnp.zeros_like(x)

  images = np.ones(SHAPE, np.float32)
  sigma = diffusion.training_sigma(jnp.asarray([0.0, 1.0, -1.0, 2.0]), p_mean=-1.2, p_std=1.2)
  np.testing.assert_allclose(sigma, np.exp([-1.2, 0.0, -2.4, 1.2]), rtol=1e-6)
  error = diffusion.weighted_error(denoise_to_zero, None, images, COND, sigma, np.zeros(SHAPE))
  np.testing.assert_allclose(error[:, 0, 0, 0], (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-5)
  sigma, noise = diffusion.training_draws(jax.random.key(0), SHAPE, p_mean=0.0, p_std=0.0)
  fixed = diffusion.edm_loss(denoise_to_zero, None, images, COND, sigma, noise)
  np.testing.assert_allclose(fixed, [12 * (1 + 0.25) / 0.25] * len(images), rtol=1e-5)
