"""CMMD (Jayasumana et al. 2024): the squared MMD of CLIP embeddings under a Gaussian kernel."""

from collections.abc import Callable

import numpy as np

from pagoda_jax.evaluation.metrics.precision_recall import squared_distances

SIGMA = 10.0  # of the kernel
SCALE = 1000.0


def cmmd(samples: np.ndarray, reference: np.ndarray, block: int = 1024,
         distances: Callable = squared_distances) -> float:
  """1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), k(x, y) = exp(-|x - y|^2 / (2 * 10^2)).

  The biased estimate, as published: a picture's pair with itself counts, so that of few pictures it is larger, by less
  than 10 (1 / N + 1 / M) where no cosine of two embeddings is negative.

  Args:
    samples: embeddings [N, C] of length 1.
    reference: embeddings [M, C], of length 1 too.
    block: rows of the matrices of kernels that are held at a time; memory is block * max(N, M) * 16 bytes.
    distances: `squared_distances`, in float64 here, or those of precision_recall.on_devices.

  Raises:
    ValueError: a set is empty, they have other widths, or an embedding's length is not 1 (to 1 %).
  """
  if samples.shape[1] != reference.shape[1] or not min(len(samples), len(reference)):
    raise ValueError(f'features of shapes {samples.shape} and {reference.shape}')
  for name, rows in (('samples', samples), ('reference', reference)):
    lengths = np.linalg.norm(np.asarray(rows, np.float32), axis=1)
    if wrong := np.flatnonzero(~(np.abs(lengths - 1) < 0.01)).tolist():
      raise ValueError(f'{name}: embedding {wrong[0]} has the length {lengths[wrong[0]]:g}; must be 1, as '
                       'the kernel is of')
  if distances is squared_distances:
    samples, reference = (np.asarray(x, np.float64) for x in (samples, reference))
  else:  # distances of small vectors lose less to float32
    centre = np.mean(reference, axis=0, dtype=np.float64)
    samples, reference = ((x - centre).astype(np.float32) for x in (samples, reference))
  pairs = ((samples, samples, 1), (reference, reference, 1), (samples, reference, -2))
  return SCALE * sum(weight * _mean_kernel(a, b, block, distances) for a, b, weight in pairs)


def _mean_kernel(a, b, block, distances) -> float:
  """The mean of k(x, y) - 1: all lie near 1, and the ones, which cancel, would cost the digits that count."""
  total = 0.0
  for start in range(0, len(a), block):
    squared = distances(a[start : start + block], b).astype(np.float64)
    total += np.expm1(squared / (-2 * SIGMA**2)).sum()
  return float(total / (len(a) * len(b)))
