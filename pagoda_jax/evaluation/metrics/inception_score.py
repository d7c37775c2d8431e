"""Inception Score (Salimans et al. 2016)."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
  """Probabilities, float64, over the last axis."""
  logits = np.asarray(logits, np.float64)
  exponentials = np.exp(logits - logits.max(-1, keepdims=True))
  return exponentials / exponentials.sum(-1, keepdims=True)


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
  """Mean and population standard deviation over consecutive splits of exp(E KL(p(y|x) || p(y))).

  Args:
    probabilities: [N, classes], rows summing to one; published scores use logits without bias.
    splits: how many groups; their sizes differ by at most one image.

  Raises:
    ValueError: fewer images than splits.
  """
  probabilities = np.asarray(probabilities, np.float64)
  if len(probabilities) < splits:
    raise ValueError(f'{len(probabilities)} images in {splits} splits')
  scores = []
  for start, end in zip(*_bounds(len(probabilities), splits)):
    part = probabilities[start:end]
    # A probability of zero adds nothing: x log x -> 0.
    ratio = np.where(part > 0, part / np.maximum(part.mean(0), 1e-300), 1)
    scores.append(np.exp(np.mean(np.sum(part * np.log(ratio), axis=1))))
  return float(np.mean(scores)), float(np.std(scores))


def _bounds(count, splits):
  edges = np.arange(splits + 1) * count // splits
  return edges[:-1], edges[1:]
