"""Improved precision and recall (Kynkaanniemi et al. 2019) by nearest neighbours in feature space."""

import numpy as np


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3, block: int = 1024) -> tuple[float, float]:
  """(precision, recall): the part of fakes within the real manifold, and of reals within the fakes'.

  A manifold is the union of balls around its points, of the distance to the k-th other point.

  Args:
    real: features [N, C].
    fake: features [M, C].
    k: which neighbour.
    block: rows of the distance matrix held at a time; memory is block * max(N, M) * 8 bytes.

  Raises:
    ValueError: no k + 1 points in one of the sets, or other feature widths.
  """
  real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
  if real.shape[1] != fake.shape[1] or min(len(real), len(fake)) <= k:
    raise ValueError(f'features of shapes {real.shape} and {fake.shape} for k = {k}')
  precision = covered(fake, real, neighbour_radii(real, k, block), block)
  recall = covered(real, fake, neighbour_radii(fake, k, block), block)
  return float(precision.mean()), float(recall.mean())


def neighbour_radii(points: np.ndarray, k: int = 3, block: int = 1024) -> np.ndarray:
  """Euclidean distance of each point [N, C] to its k-th nearest other one, float64 [N]."""
  radii = []
  for start in range(0, len(points), block):
    squared = _squared_distances(points[start : start + block], points)
    # A point is its own nearest neighbour, whatever rounding makes of that distance.
    rows = np.arange(len(squared))
    squared[rows, start + rows] = -1
    radii.append(np.partition(squared, k, axis=1)[:, k])
  return np.sqrt(np.concatenate(radii))


def covered(points: np.ndarray, centres: np.ndarray, radii: np.ndarray, block: int = 1024) -> np.ndarray:
  """Whether each of points [M, C] lies in a ball (border included) of centres [N, C], radii [N]; bool [M]."""
  inside = []
  for start in range(0, len(points), block):
    squared = _squared_distances(points[start : start + block], centres)
    inside.append((squared <= radii**2).any(axis=1))
  return np.concatenate(inside)


def _squared_distances(a, b):
  products = a @ b.T
  return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * products, 0)
