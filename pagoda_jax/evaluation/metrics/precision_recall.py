"""Improved precision and recall (Kynkaanniemi et al. 2019) by nearest neighbours in feature space."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.runtime import sharding


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Squared Euclidean distances [N, M] of the rows of a [N, C] and b [M, C], in their type, on the host."""
  products = a @ b.T
  return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * products, 0)


def on_devices(mesh) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """`squared_distances` in float32 on a mesh, the rows of `a` over its devices."""

  def compute(a, b):
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * products, 0)

  compiled = jax.jit(compute, out_shardings=sharding.replicated(mesh))
  placed = {}  # the points that every block is compared with

  def distances(a, b):
    if placed.get('of') is not b:
      placed.update({'of': b, 'b': sharding.place(np.asarray(b, np.float32), mesh, by_rule=False)})
    rows = -(-len(a) // mesh.size) * mesh.size
    padded = np.pad(np.asarray(a, np.float32), ((0, rows - len(a)), (0, 0)))
    return np.array(compiled(sharding.place_global(padded, mesh), placed['b']))[: len(a)]

  return distances


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3, block: int = 1024,
                     distances: Callable = squared_distances) -> tuple[float, float]:
  """(precision, recall): the part of fakes within the real manifold, and of reals within the fakes'.

  A manifold is the union of balls around its points, of the distance to the k-th other point.

  Args:
    real: features [N, C].
    fake: features [M, C].
    k: which neighbour.
    block: rows of the distance matrix held at a time; memory is block * max(N, M) * 8 bytes.
    distances: `squared_distances`, in float64 here, or those of `on_devices`.

  Raises:
    ValueError: no k + 1 points in one of the sets, other feature widths, k below 1, or a value is not finite.
  """
  if k < 1:  # a point would be its own neighbour, and its ball hold nothing
    raise ValueError(f'k = {k}: must be at least 1')
  if real.shape[1] != fake.shape[1] or min(len(real), len(fake)) <= k:
    raise ValueError(f'features of shapes {real.shape} and {fake.shape} for k = {k}: more than k points are needed')
  if not (np.isfinite(real).all() and np.isfinite(fake).all()):  # a NaN would lie in no ball, and be in none's way
    raise ValueError('the features are not finite')
  if distances is squared_distances:
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
  else:  # what all points have in common would cost the squares of float32 digits
    centre = np.mean(real, axis=0, dtype=np.float64)
    real, fake = ((x - centre).astype(np.float32) for x in (real, fake))
  precision = covered(fake, real, neighbour_radii(real, k, block, distances), block, distances)
  recall = covered(real, fake, neighbour_radii(fake, k, block, distances), block, distances)
  return float(precision.mean()), float(recall.mean())


def neighbour_radii(points: np.ndarray, k: int = 3, block: int = 1024,
                    distances: Callable = squared_distances) -> np.ndarray:
  """Euclidean distance of each point [N, C] to its k-th nearest other one, float64 [N]."""
  radii = []
  for start in range(0, len(points), block):
    squared = distances(points[start : start + block], points)
    # A point is its own nearest neighbour, whatever rounding makes of that distance.
    rows = np.arange(len(squared))
    squared[rows, start + rows] = -1
    radii.append(np.partition(squared, k, axis=1)[:, k])
  return np.sqrt(np.concatenate(radii).astype(np.float64))


def covered(points: np.ndarray, centres: np.ndarray, radii: np.ndarray, block: int = 1024,
            distances: Callable = squared_distances) -> np.ndarray:
  """Whether each of points [M, C] lies in a ball (border included) of centres [N, C], radii [N]; bool [M]."""
  inside = []
  for start in range(0, len(points), block):
    squared = distances(points[start : start + block], centres)
    # Of roots, as the radii are: a root's square may be less than what it is the root of.
    inside.append((np.sqrt(squared, dtype=np.float64) <= radii).any(axis=1))
  return np.concatenate(inside)

