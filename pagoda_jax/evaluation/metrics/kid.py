"""Kernel Inception Distance (Binkowski et al. 2018): the unbiased squared MMD under (x y / C + 1)^3."""

import numpy as np

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020  # torch-fidelity's: its subsets are ours


def kid(samples: np.ndarray, reference: np.ndarray, subsets: int = SUBSETS,
        size: int = SUBSET_SIZE) -> tuple[float, float]:
  """(mean, population standard deviation) over subsets of `size` drawn from each set, as torch-fidelity draws them.

  Args:
    samples: features [N, C].
    reference: features [M, C].
    subsets: how many.
    size: of a subset; the smaller set's where that has fewer.

  Raises:
    ValueError: fewer than two in a set or a subset, no subsets, or other feature widths.
  """
  if size < 2 or subsets < 1:
    raise ValueError(f'{subsets} subsets of {size}: must be at least one, of two or more')
  if samples.shape[1] != reference.shape[1] or min(len(samples), len(reference)) < 2:
    raise ValueError(f'features of shapes {samples.shape} and {reference.shape}')
  size = subset_size(len(samples), len(reference), size)
  rng = np.random.RandomState(SEED)
  values = []
  for _ in range(subsets):
    a, b = (np.asarray(x[rng.choice(len(x), size, replace=False)], np.float64) for x in (samples, reference))
    values.append(squared_mmd(a, b))
  return float(np.mean(values)), float(np.std(values))


def subset_size(samples: int, reference: int, size: int = SUBSET_SIZE) -> int:
  """Of sets of so many features."""
  return min(size, samples, reference)


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
  """The unbiased estimate from as many features [n, C] of each set."""
  count, width = a.shape
  of = lambda x, y: (x @ y.T / width + 1) ** 3
  within = sum(matrix.sum() - np.trace(matrix) for matrix in (of(a, a), of(b, b)))
  return float(within / (count * (count - 1)) - 2 * of(a, b).sum() / count**2)
