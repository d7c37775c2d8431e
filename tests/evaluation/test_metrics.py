"""Metrics where the answer is known; golden values are in test_goldens."""

import numpy as np
import pytest

from pagoda_jax.evaluation.metrics import cmmd, frechet, inception_score, kid, precision_recall
from pagoda_jax.runtime import sharding


def test_frechet_distance_of_diagonal_gaussians():
  mean, deviation_a, deviation_b = np.array([1.0, -2]), np.array([1.0, 3]), np.array([2.0, 1])
  distance = frechet.frechet_distance(mean, np.diag(deviation_a**2), 0 * mean, np.diag(deviation_b**2))
  np.testing.assert_allclose(distance, 5 + np.sum((deviation_a - deviation_b) ** 2))


def test_frechet_distance_to_itself_is_zero_with_few_samples():
  moments = frechet.mean_and_covariance(np.random.default_rng(0).standard_normal((5, 20)))
  np.testing.assert_allclose(frechet.frechet_distance(*moments, *moments), 0, atol=1e-6)


def test_covariance_is_numpys():
  features = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
  mean, covariance = frechet.mean_and_covariance(features)
  np.testing.assert_allclose(mean, features.mean(0), rtol=1e-5)
  np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-5)
  assert mean.dtype == covariance.dtype == np.float64


def test_moments_in_parts_are_those_of_all_even_far_from_zero():
  features = 1e4 + np.random.default_rng(0).standard_normal((50, 6))
  whole, parts = frechet.mean_and_covariance(features), frechet.Moments()
  for start, end in ((0, 1), (1, 30), (30, 30), (30, 50)):
    parts.add(features[start:end])
  assert parts.count == 50
  for found, expected in zip(parts.mean_and_covariance(), whole):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_kid_is_the_unbiased_estimate():
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((7, 3)), rng.standard_normal((7, 3)) + 1
  kernel = lambda x, y: (x @ y / 3 + 1) ** 3
  others = [(i, j) for i in range(7) for j in range(7) if i != j]
  within = sum(kernel(x[i], x[j]) for x in (a, b) for i, j in others) / len(others)
  expected = within - 2 * np.mean([kernel(x, y) for x in a for y in b])
  np.testing.assert_allclose(kid.squared_mmd(a, b), expected)
  np.testing.assert_allclose(kid.kid(a, b, subsets=2), (expected, 0), atol=1e-12)  # of the smaller set's size: all


def test_cmmd_is_the_double_sum_over_all_pairs_in_parts_and_on_devices_too():
  rng = np.random.default_rng(0)
  samples, reference = rng.standard_normal((37, 6)) + 1, rng.standard_normal((45, 6))
  samples, reference = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (samples, reference))
  a, b = samples.astype(np.float64), reference.astype(np.float64)
  mean = lambda x, y: np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in y] for p in x])
  expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
  assert expected > 1
  np.testing.assert_allclose(cmmd.cmmd(samples, reference, block=16), expected, rtol=1e-9)
  on_devices = precision_recall.on_devices(sharding.make_mesh())
  np.testing.assert_allclose(cmmd.cmmd(samples, reference, block=16, distances=on_devices), expected, rtol=1e-5)
  np.testing.assert_allclose(cmmd.cmmd(samples, samples, distances=on_devices), 0, atol=1e-6)
  with pytest.raises(ValueError, match='shapes'):
    cmmd.cmmd(samples, reference[:, :5])


def test_precision_and_recall_on_devices_are_the_hosts():
  rng = np.random.default_rng(0)
  real, fake = (rng.standard_normal((count, 5)).astype(np.float32) + 1000 for count in (37, 45))
  real[1], fake[:3] = real[0], real[5:8]  # equal points: distances of zero
  distances = precision_recall.on_devices(sharding.make_mesh())
  found = precision_recall.precision_recall(real, fake, k=3, block=16, distances=distances)
  assert found == precision_recall.precision_recall(real, fake, k=3) and 0 < found[0] < 1


def test_inception_score_limits():
  assert inception_score.inception_score(np.full((20, 4), 0.25), 1) == (1.0, 0.0)
  np.testing.assert_allclose(inception_score.inception_score(np.tile(np.eye(4), (5, 1)), 5), (4, 0), atol=1e-12)


def test_softmax_of_large_logits():
  np.testing.assert_allclose(inception_score.softmax([[1000, 1000, -1000]]), [[0.5, 0.5, 0]])


def test_precision_and_recall_on_a_line():
  real, fake = np.arange(6.0)[:, None], np.array([[0.5], [1.5], [2.5], [40.0]])
  # Radius 1 around each real: three fakes are inside. Radii of fakes: 1, 1, 1, 37.5.
  assert precision_recall.precision_recall(real, fake, k=1, block=4) == (0.75, 1.0)
  np.testing.assert_allclose(precision_recall.neighbour_radii(fake, k=1, block=3), [1, 1, 1, 37.5])
  # Balls around 0 of radius sqrt(n), whose square may be less than n: their border belongs to them.
  for n in range(1, 9):
    corner = np.ones((1, n))
    radius = precision_recall.neighbour_radii(np.concatenate([0 * corner, corner]), k=1)[:1]
    assert precision_recall.covered(-corner, 0 * corner, radius).all()


@pytest.mark.parametrize(
    'call',
    [
        lambda x: frechet.mean_and_covariance(x[:1]),
        lambda x: frechet.frechet_distance(x[0], np.eye(2), x[0, :1], np.eye(1)),
        lambda x: frechet.frechet_distance(x[0] * np.nan, np.eye(2), x[0], np.eye(2)),
        lambda x: inception_score.inception_score(x, 4),
        lambda x: inception_score.inception_score(x, 1),  # logits, or what else sums to 2
        lambda x: inception_score.inception_score(x * [2, -1], 1),
        lambda x: cmmd.cmmd(x, x),  # of length sqrt(2)
        lambda x: precision_recall.precision_recall(x, x, k=3),
        lambda x: precision_recall.precision_recall(x, x[:, :1], k=1),
        lambda x: precision_recall.precision_recall(x, x, k=0),
        lambda x: kid.kid(x, x, size=1),
        lambda x: kid.kid(x, x, subsets=0),
        lambda x: precision_recall.precision_recall(x, x * [[1], [1], [np.nan]], k=1),
    ],
)
def test_impossible_input_is_refused(call):
  with pytest.raises(ValueError):
    call(np.ones((3, 2)))
