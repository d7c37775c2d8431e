"""Averages of weights against their definitions and the closed forms of Karras et al. 2022 and 2024."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax.method import ema


def averaged(values, rates):
  """The average of float32 scalars `values`, one a step, by a rate a step."""
  average = {'w': jnp.float32(7.0)}  # where it starts is forgotten
  for value, rate in zip(values, rates):
    average = ema.moved(average, {'w': jnp.float32(value)}, rate)
  return float(average['w'])


def test_a_half_life_is_one():
  """Without ramp-up, what was seen `halflife` images ago weighs half of what is seen now."""
  rate = float(ema.halflife_rate(jnp.int32(10**6), 4096, 50e6, 0.0))
  assert rate == pytest.approx(1 - 0.5 ** (4096 / 50e6), rel=1e-6)
  assert 1 - rate == pytest.approx(0.99994, abs=5e-6)  # METHOD: 50 M images at batch 4096
  assert (1 - rate) ** (50e6 / 4096) == pytest.approx(0.5, rel=1e-4)
  # Where decay rounds to 1 in float32, the rate does not round to 0.
  assert float(ema.halflife_rate(jnp.int32(10**9), 1, 1e12, 0.0)) == pytest.approx(math.log(2) * 1e-12, rel=1e-5)


def test_a_half_life_ramps_up_with_the_images_seen():
  def decay(seen):
    return 1 - float(ema.halflife_rate(jnp.int32(seen), 128, 500_000, 0.05))

  assert decay(0) == 0
  assert decay(1_000_000) == pytest.approx(0.5 ** (128 / 50_000), rel=1e-6)
  assert decay(10_000_000) == decay(100_000_000) == pytest.approx(0.5 ** (128 / 500_000), rel=1e-6)
  # Constant at 0.9999, 61 % of the start is left after 5000 steps; with ramp-up, nothing.
  left = np.prod([1 - np.float64(ema.halflife_rate(jnp.int32(128 * s), 128, 887_000, 0.05)) for s in range(50)])
  assert left == 0 and 0.9999**5000 == pytest.approx(0.61, abs=0.01)


@pytest.mark.parametrize('std, exponent', [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_the_papers(std, exponent):
  """Karras et al. 2024, section 3.1: sigma_rel = 0.05 and 0.10 are gamma = 16.97 and 6.94."""
  assert ema.exponent_of(std) == pytest.approx(exponent, abs=0.005)
  assert ema.std_of(ema.exponent_of(std)) == pytest.approx(std, rel=1e-12)


def test_a_standard_deviation_is_that_of_the_profile():
  tau = (np.arange(10**6) + 0.5) / 10**6
  for exponent in (0.0, 3.0, 16.97):
    profile = tau**exponent / np.sum(tau**exponent)
    mean = np.sum(profile * tau)
    assert ema.std_of(exponent) == pytest.approx(math.sqrt(np.sum(profile * (tau - mean) ** 2)), rel=1e-4)
  assert ema.exponent_of(ema.LARGEST_STD) == pytest.approx(0, abs=1e-9)
  for wrong in (0.0, -0.1, 0.3, math.nan, math.inf):
    with pytest.raises(ValueError, match='must be in'):
      ema.exponent_of(wrong)


def test_a_power_function_average_is_its_definition():
  """After t steps the weights of step tau count by tau^gamma, up to terms of 1/t."""
  count, std = 400, 0.1
  values = np.random.default_rng(0).normal(size=count).cumsum() / 20
  got = averaged(values, [ema.power_rate(jnp.int32(s), std) for s in range(1, count + 1)])
  exponent = ema.exponent_of(std)
  # Step tau holds the time from tau - 1 to tau: exactly what (1 - 1/t)^(gamma + 1) makes of it.
  weights = np.diff((np.arange(count + 1) / count) ** (exponent + 1))
  assert got == pytest.approx(np.sum(weights * values), rel=1e-4)
  assert float(ema.power_rate(jnp.int32(1), std)) == 1
  assert float(ema.power_rate(jnp.int32(10**9), std)) == pytest.approx((exponent + 1) * 1e-9, rel=1e-5)


def test_profile_products_are_integrals():
  tau = (np.arange(10**6) + 0.5) / 10**6 * 5

  def profile(time, exponent):
    return np.where(tau <= time, (exponent + 1) * tau**exponent / time ** (exponent + 1), 0)

  for a, b in (((5, 2.0), (5, 7.0)), ((3, 7.0), (5, 2.0)), ((5, 0.0), (1, 16.0))):
    assert ema.profile_product(*a, *b) == pytest.approx(np.sum(profile(*a) * profile(*b)) * 5e-6, rel=1e-4)
    assert ema.profile_product(*a, *b) == ema.profile_product(*b, *a)


def test_a_stored_average_is_found_again_and_another_profile_from_snapshots():
  count, every = 2048, 128
  steps = np.arange(count + 1) / count
  values = np.sin(np.arange(1, count + 1) / 200) + np.arange(1, count + 1) / count
  of = lambda std, time: np.sum(np.diff((steps[: time + 1] * count / time) ** (ema.exponent_of(std) + 1))
                                * values[:time])
  times = [time for time in range(every, count + 1, every) for _ in range(2)]
  stds = [0.05, 0.1] * (len(times) // 2)
  stored = np.array([of(std, time) for std, time in zip(stds, times)])
  factors, error = ema.post_hoc_weights(times, stds, count, 0.1)
  np.testing.assert_allclose(factors, [0.0] * (len(times) - 1) + [1.0], atol=1e-6)
  assert error < 1e-6
  # At the end, and earlier than the last snapshot.
  for std, time in ((0.06, 2048), (0.075, 2048), (0.15, 2048), (0.2, 2048), (0.12, 1536)):
    factors, error = ema.post_hoc_weights(times, stds, time, std)
    assert factors.sum() == pytest.approx(1, abs=0.02) and error < 0.1
    # By the inequality of Cauchy and Schwarz, and 1e-3 for what sums of steps differ from integrals.
    norm = math.sqrt(ema.profile_product(1, ema.exponent_of(std), 1, ema.exponent_of(std)))
    bound = error * norm * math.sqrt(np.mean(values[:time] ** 2)) + 1e-3
    assert factors @ stored == pytest.approx(of(std, time), abs=min(bound, 0.01))
  # Two averages of one moment tell little of another profile, and the error says so.
  assert ema.post_hoc_weights(times[-2:], stds[-2:], count, 0.2)[1] > 0.3
  with pytest.raises(ValueError, match='after 0'):
    ema.post_hoc_weights([], [], 1, 0.1)
