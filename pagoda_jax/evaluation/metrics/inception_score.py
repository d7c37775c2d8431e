"""Inception Score (Salimans et al. 2016)."""

import numpy as np


class Splits:
  """The score of probabilities that come in parts; two rows of sums a split however many come.

  Args:
    split_of: [N] int, the split that image i belongs to: `consecutive` ones for published scores.
    classes: of the probabilities.
  """

  def __init__(self, split_of: np.ndarray, classes: int):
    self._split_of = np.asarray(split_of)
    splits = int(self._split_of.max(initial=-1)) + 1
    self._probabilities, self._negative_entropy = np.zeros((splits, classes)), np.zeros(splits)

  def add(self, start: int, probabilities: np.ndarray) -> None:
    """Counts images start, start + 1, ... in: probabilities [n, classes], rows summing to one."""
    p = np.asarray(probabilities, np.float64)
    splits = self._split_of[start : start + len(p)]
    np.add.at(self._probabilities, splits, p)
    # A probability of zero adds nothing: x log x -> 0.
    np.add.at(self._negative_entropy, splits, np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1))

  def score(self) -> tuple[float, float]:
    """Mean and population standard deviation over the splits of exp(E KL(p(y|x) || p(y)))."""
    sizes = np.bincount(self._split_of, minlength=len(self._negative_entropy))
    q = self._probabilities / sizes[:, None]
    scores = np.exp(self._negative_entropy / sizes - np.sum(q * np.log(np.where(q > 0, q, 1)), axis=1))
    return float(np.mean(scores)), float(np.std(scores))


def consecutive(count: int, size: int, order: np.ndarray | None = None) -> np.ndarray:
  """The split of each of `count` images, `size` after `size` in the order of their numbers, or in `order`."""
  splits = np.arange(count) // size
  return splits if order is None else splits[np.argsort(order)]


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
    ValueError: fewer images than splits, or a row that is no probabilities (to 1 %).
  """
  count, classes = np.shape(probabilities)
  if count < splits:
    raise ValueError(f'{count} images in {splits} splits')
  sums = np.sum(probabilities, axis=1, dtype=np.float64)
  if np.min(probabilities) < 0 or not np.all(np.abs(sums - 1) < 0.01):
    raise ValueError('rows of probabilities must be of no negative numbers and sum to 1; softmax makes them of logits')
  edges = np.arange(1, splits) * count // splits
  groups = Splits(np.searchsorted(edges, np.arange(count), side='right'), classes)
  groups.add(0, probabilities)
  return groups.score()
