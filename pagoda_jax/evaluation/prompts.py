"""The captions of a run's data, as what its networks are told to draw when they are measured."""

import dataclasses
from typing import Any

import numpy as np

from pagoda_jax.data import captions, sources
from pagoda_jax.method import guidance


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Captions of a part of the data: image i is drawn of picture i's first, then of its second, and so on around.

  Attributes:
    source: with embeddings of its captions.
    described: JSON values that tell which captions these are.
  """

  source: sources.Source
  described: dict[str, Any]

  def _place(self, number):
    return int(number) % len(self.source), int(number) // len(self.source)

  def embedded(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
    """(text [n, L, W], text_mask [n, L], text_pooled [n, P]) of the captions of images with these numbers."""
    rows = []
    for picture, turn in map(self._place, numbers):
      found = self.source.texts_of(picture)
      rows.append(found[turn % len(found)])
    return tuple(np.stack([row[key] for row in rows]) for key in guidance.TEXT)

  def captions(self, numbers: np.ndarray) -> list[str]:
    """The captions themselves."""
    rows = []
    for picture, turn in map(self._place, numbers):
      found = captions.of_record(self.source[picture])
      rows.append(found[turn % len(found)][1])
    return rows

  @property
  def null(self) -> dict[str, np.ndarray]:
    """The empty caption's embeddings."""
    return self.source.null_text()


def of_data(config) -> Prompts:
  """The captions of an experiment's data: of the held-out pictures, where there are any, else of the training ones.

  Raises:
    SourceError: they are missing or damaged.
  """
  part = 'holdout' if config.data.holdout else 'train'
  source = sources.at(sources.open_source(config.data, part), 0)  # at the smallest size, which is read fastest
  return Prompts(source, {'captions_of': part, 'pictures': len(source), 'sha256': source.digest,
                          'encoder_sha256': config.text.sha256})
