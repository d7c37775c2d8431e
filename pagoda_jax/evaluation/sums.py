"""One pass over pictures, and what of their features is kept: moments, splits' sums, and features where need be."""

from collections.abc import Callable

import numpy as np

from pagoda_jax.evaluation.metrics import frechet, inception_score
from pagoda_jax.evaluation.pictures import EvaluationError
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.progress import Progress

SHUFFLE_SEED = 2020  # of the order for `is_shuffled`, and of the choice among reference pictures: torch-fidelity's
SPLIT = 5000  # images of a split of the Inception Score


class Sums:
  """What a pass keeps of `count` pictures.

  Args:
    count: how many pictures.
    moments: outputs whose mean and covariance are wanted.
    kept: output -> its width, of outputs that are kept as they are, float32.
    kept_numbers: output -> of which pictures, ascending; of all where it is not there.
    logits: (output, classes) that Inception Scores are of; None for no score.
    beside: (output, vectors(numbers [n]) -> [n, C]): whose products with an output of length 1, cosines, are averaged.
    split: images of a split.
  """

  def __init__(self, count: int, moments=(), kept=None, kept_numbers: dict[str, np.ndarray] | None = None, logits=None,
               beside=None, split: int = SPLIT):
    self.count = count
    self._moments = {name: frechet.Moments() for name in moments}
    self._numbers = {name: (kept_numbers or {}).get(name, np.arange(count)) for name in kept or {}}
    self.kept = {name: np.zeros((len(self._numbers[name]), width), np.float32) for name, width in (kept or {}).items()}
    self._beside, self._cosines = beside, 0.0
    self._logits, self._scores = None, {}
    if logits:
      self._logits, classes = logits
      shuffled = np.random.RandomState(SHUFFLE_SEED).permutation(count)
      orders = {'is': None, 'is_shuffled': shuffled}
      self._scores = {
        name: inception_score.Splits(inception_score.consecutive(count, split, order), classes)
        for name, order in orders.items()}

  @property
  def outputs(self) -> set[str]:
    """What a pass has to give."""
    return {*self._moments, *self.kept, *([self._logits] if self._logits else []),
            *([self._beside[0]] if self._beside else [])}

  def add(self, start: int, found: dict[str, np.ndarray]) -> None:
    """Counts pictures start, start + 1, ... in; EvaluationError where a feature is not finite."""
    for name in self.outputs:
      if not np.isfinite(found[name]).all():
        row = int(np.flatnonzero(~np.isfinite(found[name]).all(axis=1))[0])
        raise EvaluationError(f'picture {start + row}: its {name} are not finite; the network, or the picture, is '
                              'damaged')
    for name, moments in self._moments.items():
      moments.add(found[name])
    for name, rows in self.kept.items():
      numbers = self._numbers[name]
      here = slice(*np.searchsorted(numbers, (start, start + len(found[name]))))
      rows[here] = found[name][numbers[here] - start]
    if self._beside:
      output, vectors = self._beside
      numbers = start + np.arange(len(found[output]))
      self._cosines += float(np.sum(found[output].astype(np.float64) * vectors(numbers)))
    if self._logits:
      probabilities = inception_score.softmax(found[self._logits])
      for splits in self._scores.values():
        splits.add(start, probabilities)

  def moments(self, output: str) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance)."""
    return self._moments[output].mean_and_covariance()

  def scores(self) -> dict[str, float]:
    """'is', 'is_std', 'is_shuffled', 'is_shuffled_std'; {} without logits."""
    found = {}
    for name, splits in self._scores.items():
      found[name], found[f'{name}_std'] = splits.score()
    return found

  @property
  def mean_cosine(self) -> float:
    """Of all pictures and what was beside them."""
    return self._cosines / self.count

  @property
  def held_bytes(self) -> int:
    """Bytes that grow with the number of pictures."""
    return sum(rows.nbytes for rows in self.kept.values())


def sweep(step: Callable, rows: Callable[[np.ndarray], tuple], count: int, mesh, batch_size: int,
          add: Callable[[int, dict], None], what: str) -> None:
  """Runs a program over pictures 0 to count - 1, the next batch read while one is computed.

  Args:
    step: step(*batch) -> {output: [B, C]}, of global arrays; its results are on every device.
    rows: rows(numbers) -> host arrays of a batch, first axis over the pictures, the whole on every host.
    count: of the pictures.
    mesh: over whose devices a batch is split.
    batch_size: pictures a call; rounded up to what the mesh divides.
    add: add(start, {output: [n, C] NumPy}) for each batch, in order.
    what: is shown of it.
  """
  size = -(-batch_size // mesh.size) * mesh.size
  progress, pending = Progress(what, count, unit='image'), None
  for start in range(0, count, size):
    batch = rows(np.arange(start, min(start + size, count)))
    given = len(batch[0])
    padded = [np.concatenate([part, np.repeat(part[-1:], size - given, 0)]) for part in map(np.asarray, batch)]
    found = step(*sharding.place_global(tuple(padded), mesh))
    if pending:
      _take(pending, add, progress)
    pending = start, given, found
  if pending:
    _take(pending, add, progress)


def _take(pending, add, progress):
  start, given, found = pending
  add(start, {name: np.asarray(value)[:given] for name, value in found.items()})
  progress.update(start + given, given)
