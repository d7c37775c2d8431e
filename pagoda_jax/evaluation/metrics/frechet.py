"""Frechet distance between Gaussians fitted to two sets of features (FID, Heusel et al. 2017)."""

import numpy as np


class Moments:
  """Mean and covariance of features that come in parts: float64, C^2 numbers however many come.

  Parts are joined by the differences of their means (Chan et al. 1979), which neither their sizes nor a large mean
  costs digits.
  """

  def __init__(self):
    self.count, self._mean, self._scatter = 0, 0.0, 0.0

  def add(self, features: np.ndarray) -> None:
    """Counts features [N, C] in."""
    if not len(features):
      return
    features = np.asarray(features, np.float64)
    mean, total = features.mean(0), self.count + len(features)
    centred, step = features - mean, mean - self._mean
    if self.count:
      self._scatter += centred.T @ centred + np.outer(step, step) * (self.count * len(features) / total)
      self._mean = self._mean + step * (len(features) / total)
    else:
      self._mean, self._scatter = mean, centred.T @ centred
    self.count = total

  def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
    """Mean [C] and unbiased covariance [C, C]; ValueError where fewer than two samples were counted in."""
    if self.count < 2:
      raise ValueError(f'a covariance needs two samples or more, got {self.count}')
    return self._mean, self._scatter / (self.count - 1)


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean [C] and unbiased covariance [C, C], float64, of features [N, C]; ValueError if N < 2."""
  moments = Moments()
  moments.add(features)
  return moments.mean_and_covariance()


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
  """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), squared as in FID.

  The trace of the root is taken through symmetric eigen-decompositions, which need no regularisation
  where there are fewer samples than features (pytorch-fid adds 1e-6 to the diagonals then).

  Raises:
    ValueError: shapes differ, or a value is not finite.
  """
  mean_a, cov_a, mean_b, cov_b = (np.asarray(x, np.float64) for x in (mean_a, cov_a, mean_b, cov_b))
  if mean_a.shape != mean_b.shape or cov_a.shape != cov_b.shape:
    raise ValueError(f'statistics of {mean_a.shape} and of {mean_b.shape} features')
  if not all(np.isfinite(x).all() for x in (mean_a, cov_a, mean_b, cov_b)):
    raise ValueError('the feature statistics are not finite')
  root = _square_root(cov_a)
  product = root @ cov_b @ root
  eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
  trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
  return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root)


def _square_root(matrix):
  """Of a symmetric positive semi-definite matrix; rounding's negative eigenvalues are taken as zero."""
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
