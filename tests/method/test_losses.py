"""Losses against hand-derived values and finite differences; golden values are in test_goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax.method import losses
from pagoda_jax.networks.frozen import maps


def features(seed, shapes=((2, 4, 4, 3), (2, 2, 2, 5))):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def assert_gradient(function, x, step=1e-2, rtol=2e-3):
  """Autodiff along a random direction against central differences, both in float32."""
  direction = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
  slope = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
  gradient = jax.grad(function)(x)
  # A direction may happen to be nearly orthogonal: the gradient's norm is the scale.
  np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=0, atol=rtol * jnp.linalg.norm(gradient))


def test_hinge_gradients_by_hand():
  real, fake = jnp.array([[0.5, 2.0], [-3.0, 1.5]]), jnp.array([[-2.0, 0.1], [-0.5, 4.0]])
  np.testing.assert_allclose(losses.hinge_discriminator(real, fake), (0.5 + 4) / 4 + (1.1 + 0.5 + 5) / 4, rtol=1e-6)
  to_real, to_fake = jax.grad(losses.hinge_discriminator, (0, 1))(real, fake)
  np.testing.assert_array_equal(to_real, [[-0.25, 0], [-0.25, 0]])
  np.testing.assert_array_equal(to_fake, [[0, 0.25], [0.25, 0.25]])
  np.testing.assert_array_equal(jax.grad(losses.hinge_generator)(fake), np.full((2, 2), -0.25))


def test_relativistic_losses_and_gradients_by_hand():
  real, fake = jnp.array([[0.0, 3.0]]), jnp.array([[np.log(3.0), 3.0]])
  # softplus(ln 3) = ln 4 and softplus(0) = ln 2; the other player's is softplus(-ln 3) = ln(4 / 3).
  np.testing.assert_allclose(losses.relativistic_discriminator(real, fake), (np.log(4) + np.log(2)) / 2, rtol=1e-6)
  np.testing.assert_allclose(losses.relativistic_generator(real, fake), (np.log(4 / 3) + np.log(2)) / 2, rtol=1e-6)
  to_real, to_fake = jax.grad(losses.relativistic_discriminator, (0, 1))(real, fake)
  np.testing.assert_allclose(to_fake, [[0.75 / 2, 0.5 / 2]], rtol=1e-6)
  np.testing.assert_allclose(to_real, -to_fake, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(losses.relativistic_generator, 1)(real, fake), [[-0.25 / 2, -0.5 / 2]], rtol=1e-6)
  # What both players' logits have in common does not count.
  np.testing.assert_allclose(
    losses.relativistic_discriminator(real + 7, fake + 7), losses.relativistic_discriminator(real, fake), rtol=1e-5)


def test_gradient_penalty_of_a_quadratic_judge_and_its_own_gradient():
  """Logits a_j x + x Q x / 2: the mean logit's gradient is a + Q x, its squared norm's by Q is 2 (a + Q x) x'."""
  rng = np.random.default_rng(0)
  a, root, x = rng.standard_normal((3, 12)), rng.standard_normal((12, 12)), rng.standard_normal((5, 2, 2, 3))
  q, flat = root + root.T, x.reshape(5, 12)

  def judge(images, q):
    rows = images.reshape(5, -1)
    return rows @ a.T + jnp.sum(rows @ q * rows, axis=1, keepdims=True) / 2, 'rest'

  def penalty(q):
    logits, rest, found = losses.with_gradient_penalty(lambda images: judge(images, q), jnp.asarray(x))
    return found, (logits, rest)

  slopes = a.mean(0) + flat @ q
  with jax.enable_x64(True):
    (found, (logits, rest)), by_q = jax.value_and_grad(lambda q: penalty(q), has_aux=True)(jnp.asarray(q))
    np.testing.assert_allclose(logits, judge(x, q)[0], rtol=1e-12)
    # The same by forward differentiation, image by image.
    mean_logit = lambda row: jnp.mean(row @ a.T) + row @ q @ row / 2
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(mean_logit))(jnp.asarray(flat)), slopes, rtol=1e-10)
  assert rest == 'rest'
  np.testing.assert_allclose(found, np.mean(np.sum(slopes**2, axis=1)), rtol=1e-6)
  # Reverse over reverse takes Q x as (Q + Q') x / 2.
  by_hand = 2 * np.einsum('bi,bj->ij', slopes, flat) / 5
  np.testing.assert_allclose(by_q, (by_hand + by_hand.T) / 2, rtol=1e-5, atol=1e-5 * np.abs(by_hand).max())


def test_projected_distance_gradient():
  a, b = features(0), features(2)
  assert_gradient(lambda x: jnp.sum(losses.projected_distance([x, a[1]], b)), a[0])


def test_lpips_distance_gradient_and_value():
  a, b = features(0), features(2)
  weights = [jnp.array([1.0, 0, 2]), jnp.linspace(0, 1, 5)]
  assert_gradient(lambda x: jnp.sum(maps.lpips_distance([a[0], x], b, weights)), a[1])
  unweighted = maps.lpips_distance(a, b, [jnp.ones(3), jnp.ones(5)])
  np.testing.assert_allclose(unweighted, losses.projected_distance(a, b), rtol=1e-6)


def test_projected_distance_is_at_most_four_a_map_and_zero_for_equals():
  a = features(0)
  np.testing.assert_array_equal(losses.projected_distance(a, a), np.zeros(2))
  # Opposite unit vectors are at squared distance 4, in each of the two maps.
  np.testing.assert_allclose(losses.projected_distance(a, [-x for x in a]), [8, 8], rtol=1e-6)


def test_dead_features_have_a_finite_gradient():
  dead = jnp.zeros((1, 2, 2, 3))
  alive = jnp.ones((1, 2, 2, 3))
  gradient = jax.grad(lambda x: jnp.sum(losses.projected_distance([x], [alive])))(dead)
  np.testing.assert_array_equal(gradient, dead)


@pytest.mark.parametrize('huber', [None, 0.1])
def test_pixel_distance(huber):
  a, b = features(0)[0], features(2)[0]
  penalty = (lambda d: d**2) if huber is None else (lambda d: np.sqrt(d**2 + huber**2) - huber)
  halves = np.asarray(a - b).reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
  expected = penalty(np.asarray(a - b)).mean((1, 2, 3)) + 0.5 * penalty(halves).mean((1, 2, 3))
  np.testing.assert_allclose(losses.pixel_distance(a, b, {1: 1.0, 2: 0.5}, huber), expected, rtol=1e-5)
  assert_gradient(lambda x: jnp.sum(losses.pixel_distance(x, b, (1, 2, 4), huber)), a)


def test_bfloat16_features_are_compared_in_float32():
  a, b = ([x.astype(jnp.bfloat16) for x in features(seed)] for seed in (0, 2))
  for loss in (
      losses.projected_distance(a, b),
      losses.pixel_distance(a[0], b[0]),
      losses.hinge_discriminator(a[0], b[0]),
      losses.hinge_generator(a[0]),
      maps.lpips_distance(a, b, [jnp.ones(3), jnp.ones(5)]),
  ):
    assert loss.dtype == jnp.float32
  with jax.enable_x64(True):
    assert losses.pixel_distance(a[0], b[0]).dtype == jnp.float32


def test_adaptive_weight_of_a_two_layer_linear_generator():
  """G(z) = B A z with last layer B; both gradients with respect to B written out in NumPy."""
  rng = np.random.default_rng(0)
  first, last = rng.standard_normal((5, 4)), rng.standard_normal((3, 5))
  z, target, prior, critic = (rng.standard_normal(shape) for shape in ((6, 4), (6, 3), (7, 4), (3,)))
  generator = lambda last, z: z @ first.T @ last.T
  rec_gradient = jax.grad(lambda last: jnp.mean((generator(last, z) - target) ** 2))(last)
  adv_gradient = jax.grad(lambda last: losses.hinge_generator(generator(last, prior) @ critic))(last)
  weight = losses.adaptive_weight(jnp.linalg.norm(rec_gradient), jnp.linalg.norm(adv_gradient), scale=0.2)

  hidden = z @ first.T
  rec = 2 / (6 * 3) * (hidden @ last.T - target).T @ hidden
  adv = -np.outer(critic, (prior @ first.T).mean(0))
  ratio = np.linalg.norm(rec) / (np.linalg.norm(adv) + 1e-4)
  assert 0.01 < ratio < 10
  np.testing.assert_allclose(weight, 0.2 * ratio, rtol=1e-5)


def test_adaptive_weight_is_clipped_and_has_no_gradient():
  np.testing.assert_allclose(losses.adaptive_weight(1.0, 0.0, scale=0.2), 2)
  np.testing.assert_allclose(losses.adaptive_weight(0.0, 1.0), 0.01, rtol=1e-6)
  assert jax.grad(losses.adaptive_weight)(1.0, 1.0) == 0


def test_misfits_are_refused():
  a = features(0)
  for call in (
      lambda: losses.projected_distance(a, a[:1]),
      lambda: losses.projected_distance(a, a[::-1]),
      lambda: maps.lpips_distance(a, a, [jnp.ones(3)]),
      lambda: losses.pixel_distance(a[0], a[0], (3,)),
      lambda: losses.weighting(1.0, 'cubic'),
      lambda: losses.relativistic_discriminator(jnp.ones((4, 2)), jnp.ones((1, 2))),
  ):
    with pytest.raises(ValueError):
      call()
