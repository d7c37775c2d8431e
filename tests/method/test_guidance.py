"""Guidance where the score is known in closed form: mixtures of Gaussians, one for each class."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from pagoda_jax import config as c
from pagoda_jax.method import diffusion, guidance
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import guide, state

MEANS, STD, SHARES = np.array([-0.6, 0.1, 0.7]), 0.2, np.array([0.2, 0.5, 0.3])
LABELS = np.array([0, 1, 2, 2])
OMEGAS = np.array([0.0, 1.0, 2.5, 4.0])


def log_density(x, sigma, label):
  """ln p(x | label) of one number at a noise level; of the whole mixture where label is -1."""
  parts = stats_norm(x, MEANS, jnp.sqrt(STD**2 + sigma**2))
  return jnp.where(label < 0, jax.nn.logsumexp(parts + np.log(SHARES)), parts[label])


def stats_norm(x, mean, std):
  return -0.5 * ((x - mean) / std) ** 2 - jnp.log(std)


def optimal_denoise(x, sigma, cond):
  """E[image | x, label] = x + sigma^2 grad ln p (Tweedie); every value of an image is drawn by itself."""
  sigma = jnp.broadcast_to(jnp.asarray(sigma), x.shape[:1])
  of_value = jax.grad(log_density)
  of_image = jax.vmap(lambda x, s, y: x + s**2 * jax.vmap(of_value, (0, None, None))(x.ravel(), s, y).reshape(x.shape))
  return of_image(x, sigma, cond['label'])


def normal(shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('sigma', [0.05, 1.0, np.array([0.02, 0.3, 2.0, 40.0], np.float32)])
def test_the_guided_denoiser_is_that_of_the_sharpened_density(sigma):
  """Of p(x|c)^omega p(x)^(1 - omega) at each noise level, by its logarithm's gradient."""
  x = np.float32(0.5) * normal((4, 2, 2, 3))
  found = guidance.guided(optimal_denoise, OMEGAS)(x, sigma, {'label': LABELS})

  def sharpened(value, sigma, label, omega):
    return omega * log_density(value, sigma, label) + (1 - omega) * log_density(value, sigma, -1)

  for i, (label, omega, s) in enumerate(zip(LABELS, OMEGAS, np.broadcast_to(sigma, 4))):
    score = jax.vmap(jax.grad(sharpened), (0, None, None, None))(jnp.asarray(x[i].ravel()), s, label, omega)
    np.testing.assert_allclose(found[i].ravel(), x[i].ravel() + s**2 * score, rtol=1e-4, atol=2e-5)
  # One strength for all; 1 is none, 0 is no class.
  for omega, labels in ((1.0, LABELS), (0.0, np.full(4, -1))):
    whole = guidance.guided(optimal_denoise, omega)(x, sigma, {'label': LABELS})
    np.testing.assert_allclose(whole, optimal_denoise(x, sigma, {'label': labels}), rtol=1e-5, atol=1e-5)


def test_guided_inversion_is_scipys_solution_on_a_fine_grid():
  """Of second order: four times the levels, a sixteenth of the error."""
  x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3, 1, 1)
  labels, omegas = LABELS.repeat(3), OMEGAS.repeat(3)

  def flow(sigma, v):
    """dx/dsigma = -sigma grad ln p, in float64."""
    scores = (MEANS - v[:, None]) / (STD**2 + sigma**2)  # of every class
    shares = SHARES * np.exp(-0.5 * scores**2 * (STD**2 + sigma**2))
    mixture = np.sum(shares * scores, axis=1) / shares.sum(axis=1)
    return -sigma * (mixture + omegas * (scores[np.arange(12), labels] - mixture))

  exact = integrate.solve_ivp(flow, (0.002, 80.0), x.ravel(), rtol=1e-9, atol=1e-9).y[:, -1].reshape(x.shape)
  errors = []
  for count in (80, 320):
    found = diffusion.invert(guidance.guided(optimal_denoise, OMEGAS), x, diffusion.sigmas(count), {'label': LABELS},
                             clip=False)
    errors.append(np.abs(found - exact).max() / np.sqrt(np.mean(exact**2)))
  assert errors[1] < 3e-3 and errors[0] / errors[1] > 12, errors
  assert np.abs(exact[3] - exact[2]).max() > 1  # another strength, another noise


@pytest.mark.parametrize('mean, std, low, high', [(3.0, 2.0, 1.0, 10.0), (1.0, 0.1, 1.0, 100.0)])
def test_strengths_are_drawn_by_their_law(mean, std, low, high):
  cut = guidance.Law('truncated_normal', mean, std, low, high)
  draws = np.asarray(cut.draw(jax.random.key(0), (20_000,)))
  expected = stats.truncnorm((low - mean) / std, (high - mean) / std, mean, std)
  assert draws.min() >= low and draws.max() <= high and draws.dtype == np.float32
  assert stats.kstest(draws, expected.cdf).pvalue > 1e-3
  with jax.enable_x64(True):
    np.testing.assert_allclose(cut.draw(jax.random.key(0), (20_000,)), draws, rtol=1e-5)
  uniform = np.asarray(guidance.Law('uniform', low=low, high=high).draw(jax.random.key(0), (20_000,)))
  assert stats.kstest(uniform, stats.uniform(low, high - low).cdf).pvalue > 1e-3
  constant = guidance.Law('constant', mean)
  assert set(np.asarray(constant.draw(jax.random.key(0), (5,)))) == {np.float32(mean)} and constant.ends == (mean, mean)
  assert cut.nearest(0.5) == low and cut.nearest(1e3) == high and cut.nearest(low + 0.25) == low + 0.25


def test_a_pictures_strength_depends_on_its_key_alone():
  law, rng = guidance.Law('uniform', low=1.0, high=4.0), jax.random.key(3)
  keys = np.arange(64, dtype=np.int32)
  whole = np.asarray(jax.jit(law.of_pictures)(rng, keys))
  assert len(set(whole)) == 64
  some = keys[::-3]
  np.testing.assert_array_equal(law.of_pictures(rng, some), whole[some])
  mesh = sharding.make_mesh(devices=jax.devices()[:8])
  with jax.set_mesh(mesh):
    placed = sharding.place_batch(keys, mesh)
    np.testing.assert_array_equal(jax.jit(law.of_pictures)(rng, placed), whole)


@pytest.mark.parametrize('parts', [1, 4])
def test_the_estimators_optimum_is_the_posteriors_mean(parts):
  """A teacher whose samples are omega with noise of deviation TAU, in every pixel the same, and omega ~ N(MEAN, S^2):
  E[omega | x] = MEAN + S^2 / (S^2 + TAU^2) (x - MEAN), which an estimator that is linear in x reaches."""
  mean, s, tau, scale = 5.0, 0.8, 0.6, 0.1
  law = guidance.Law('truncated_normal', mean, s, 0.0, 10.0)  # cut at six deviations

  def draw(params, noise, cond, null):
    return jnp.ones(noise.shape) * (scale * (cond['omega'] - mean + tau * noise[:, 0, 0, 0]))[:, None, None, None]

  networks = types.SimpleNamespace(
    unet=types.SimpleNamespace(magnitude_preserving=False),
    law=law, sigma_max=1.0, draw=draw, latent=False,
    estimate=lambda params, images, labels: params['a'] + params['b'] * images.mean((1, 2, 3)) / scale,
  )
  phase = c.guide(steps=150, batch_size=4096, ema=0.95, optimizer=c.optimizer(name='sgd', learning_rate=0.2))
  step = jax.jit(guide.make_train_step(networks, phase, parts))
  train_state = state.init_teacher({'a': jnp.zeros(()), 'b': jnp.zeros(())}, phase)
  batch = {'image': np.zeros((4096, 2, 2, 1), np.uint8), 'label': np.zeros(4096, np.int32)}
  for _ in range(150):
    train_state, metrics = step(train_state, batch, {'teacher': {}}, jax.random.key(0))
  share = s**2 / (s**2 + tau**2)
  assert float(train_state.ema['a']) == pytest.approx(mean, abs=0.02)
  assert float(train_state.ema['b']) == pytest.approx(share, abs=0.02)
  assert float(metrics['loss']) == pytest.approx((1 - share) * s**2, rel=0.1)  # the posterior's variance
  # What a real picture is given: the same, in the law's range, and without a gradient.
  networks.law = law._replace(low=4.0, high=5.5)
  images = scale * jnp.array([-9.0, 0.25, 9.0])[:, None, None, None] * jnp.ones((3, 2, 2, 1))
  frozen = {'guide': {'a': mean, 'b': share}}
  found, pull = jax.vjp(lambda images: guide.estimated(networks, frozen, images, {}), images)
  np.testing.assert_allclose(found, [4.0, mean + share * 0.25, 5.5], rtol=1e-6)
  assert not np.any(pull(jnp.ones(3))[0])
  networks.estimate = None
  np.testing.assert_array_equal(guide.estimated(networks, {}, images, {}), np.full(3, mean, np.float32))


def test_samples_are_shown_to_the_estimator_as_pictures_are_stored():
  found = guide.as_pictures(jnp.array([-1.01, -1 + 0.9 / 255, 0.3, 1.2]))
  np.testing.assert_allclose(found, [-1, -1, np.round(1.3 * 127.5) / 127.5 - 1, 1], atol=1e-6)


def test_each_kind_of_caption_has_its_law():
  """And a picture's strength follows from its key and its kind, whatever else is drawn."""
  original, again = guidance.Law('uniform', low=2.0, high=10.0), guidance.Law('truncated_normal', 2.0, 3.0, 1.0, 10.0)
  laws, rng, keys = guidance.Laws((original, again)), jax.random.key(1), jnp.arange(4000)
  assert laws.ends == (1.0, 10.0) and laws.nearest(0.5) == 1.0
  kinds = keys % 2
  found = np.asarray(laws.of_pictures(rng, keys, kinds))
  np.testing.assert_array_equal(found[::2], np.asarray(original.of_pictures(rng, keys))[::2])
  assert found[::2].min() >= 2 and found[1::2].min() < 2
  # Mean of N(2, 3^2) cut to [1, 10]: 2 + 3 (phi(a) - phi(b)) / (Phi(b) - Phi(a)), a = -1/3, b = 8/3.
  phi, cumulative = stats.norm.pdf, stats.norm.cdf
  mean = 2 + 3 * (phi(-1 / 3) - phi(8 / 3)) / (cumulative(8 / 3) - cumulative(-1 / 3))
  assert found[1::2].mean() == pytest.approx(mean, abs=0.15) and found[::2].mean() == pytest.approx(6, abs=0.2)
  np.testing.assert_array_equal(laws.of_pictures(rng, keys[::-1], kinds[::-1]), found[::-1])
  other = np.asarray(laws.of_pictures(rng, keys, 1 - kinds))
  assert not np.any(other == found)
  drawn = np.asarray(laws.draw(rng, (4000,), kinds))
  np.testing.assert_array_equal(drawn[::2], np.asarray(original.draw(rng, (4000,)))[::2])
  with pytest.raises(ValueError, match="law 'Uniform': must be 'constant', 'uniform' or"):
    guidance.Law('Uniform', low=1.0, high=4.0).draw(rng, (3,))  # was a truncated normal
  with pytest.raises(ValueError, match="needs 'caption_kind'"):
    laws.draw(rng, (3,))
