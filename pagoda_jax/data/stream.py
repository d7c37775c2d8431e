"""The resumable stream of batches that a phase trains on, and the check that a config fits its pictures.

A *key* is one training picture: image number i, mirrored or not. Streams are shuffled lists of keys;
their position is one integer that does not depend on how many hosts read, so a run resumes anywhere.
"""

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import shutil
from typing import Any

import grain
import numpy as np
from absl import logging
from grain.experimental import ZipMapDataset

from pagoda_jax import config as configs
from pagoda_jax.data.pictures import SourceError, cuts_of, picture_of
from pagoda_jax.data.sources import Source, at, open_source, prepared
from pagoda_jax.runtime import processes

MOST_WORKERS = 8  # that a run starts by itself
LEAST_SHARED_MEMORY = 2**30  # bytes free, for them to bring batches in; containers often have 64 MiB in all


def settle(config) -> None:
  """Opens the source of an experiment, before any device work, and checks that the config fits it.

  config.data.num_classes = -1 becomes the number of classes that the source has; where that is 0,
  `conditional` of every discriminator becomes False. Warns of resolutions that are not cut from the originals.

  Raises:
    SourceError: the source is missing or damaged; its pictures are stored smaller than config.data.resolution;
      or a picture's label is not one of config.data.num_classes, where the first such picture is named.
  """
  source, data = open_source(config.data), config.data
  if source.resolution is not None and source.resolution < data.resolution:
    raise SourceError(f'config.data.resolution = {data.resolution}: the pictures of source {data.source} {data.path} '
                      f'are stored at {source.resolution} px')
  _warn_of_stored(source, config)
  if data.num_classes == -1:
    set_classes(config, len(source.class_names))
  check_labels(source, data.num_classes)


def _warn_of_stored(source, config):
  """Says which resolutions a prepared folder does not hold."""
  if (whole := prepared(source)) is None:
    return
  needed = {config.base_resolution, *(configs.phase_resolution(config, name) for name in config.order)}
  if lacking := sorted(needed - {*whole.resolutions}):
    rows = [f'{side} px of those of {whole.at(side).resolution} px' for side in lacking]
    logging.warning(
      'config.data.path = %s holds pictures of %s px only. Cut from these, not from the originals, which would give '
      'other pixels: %s. `pagoda prepare --resolutions=%s` stores each, cut from the originals.',
      whole.folder, ', '.join(map(str, whole.resolutions)), ', '.join(rows), ','.join(map(str, sorted(needed))))


def pictures_digest(data, resolutions) -> str:
  """SHA-256 that changes when a training picture at one of these resolutions may have changed."""
  source = open_source(data)
  digests = list(dict.fromkeys(at(source, side).digest for side in sorted(resolutions)))
  return digests[0] if len(digests) == 1 else hashlib.sha256(''.join(digests).encode()).hexdigest()


def set_classes(config, count: int) -> None:
  """Gives an experiment its number of classes; without any, no discriminator is conditional."""
  config.data.num_classes = count
  for phase in config.phases.values():
    if not count and 'discriminator' in phase:
      phase.discriminator.conditional = False


def check_labels(source: Source, num_classes: int) -> None:
  """Refuses labels that are not in 0..num_classes-1; with 0 classes labels are not looked at.

  Raises:
    SourceError: names the first picture whose label is out of range, or that has none.
  """
  if not num_classes:
    return
  labels, found = source.all_labels, len(source.class_names)
  wrong = [] if labels is None else np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    first = source[int(wrong[0])]
    label = f'label {first["label"]}' if first['label'] >= 0 else 'no label'
    raise SourceError(f'config.data.num_classes = {num_classes}: the picture {first["name"]} has {label} '
                      f'({len(wrong)} of {len(source)} pictures are out of range); the source has {found} classes')
  if labels is None and found > num_classes:
    raise SourceError(f'config.data.num_classes = {num_classes}: the source has {found} classes')
  if found < num_classes:
    logging.warning('config.data.num_classes = %d: the source has only %d classes', num_classes, found)


@dataclasses.dataclass(frozen=True)
class Keys:
  """The training pictures of a source: every image, and every mirror image where `mirror` says so."""

  images: int
  mirror: bool

  def __len__(self) -> int:
    return self.images * (2 if self.mirror else 1)

  def __getitem__(self, key: int) -> tuple[int, bool]:
    """(image number, mirrored) of a key; a picture and its mirror image are neighbours."""
    return (key // 2, bool(key % 2)) if self.mirror else (int(key), False)


@dataclasses.dataclass(frozen=True)
class ToInvert:
  """Stands where a store of noise would: the pictures of keys 0 to count - 1, for the train step to invert."""

  count: int
  resolution: int  # the base resolution, which the teacher works at

  def __len__(self) -> int:
    return self.count


@dataclasses.dataclass(frozen=True)
class LoadPicture:
  """Map from a key to the record {image, label, key} at one resolution.

  With a store as `noise` the record has the key's `noise` too (and the `omega` that it was inverted with), with
  ToInvert the same picture as `base_image`; so it has where `base` says at which resolution.
  """

  source: Source
  keys: Keys
  resolution: int
  channels: int
  noise: Any = None
  base: int = 0

  def __call__(self, key: int) -> dict[str, np.ndarray]:
    index, flip = self.keys[int(key)]
    cut = self._cuts(index, flip)
    record = {'image': cut[self.resolution], 'label': np.int32(cut['label']), 'key': np.int32(key)}
    if self._base:
      record['base_image'] = cut[self._base]
    if self.noise is not None and not isinstance(self.noise, ToInvert):
      record |= self.noise.pair(int(key))
    return record

  @property
  def _base(self) -> int:
    """Side of `base_image`; 0: the record has none."""
    return self.noise.resolution if isinstance(self.noise, ToInvert) else self.base

  def _cuts(self, index, flip):
    """{side: pixels, 'label': label}: every picture that is read is opened once, and gives all that is cut of it."""
    cut = {}
    for source, sides in self._reads:
      stored = source[index]
      cut |= cuts_of(stored, sides, self.channels, flip) | {'label': stored['label']}
    return cut

  @functools.cached_property
  def _reads(self) -> list[tuple[Source, list[int]]]:
    """The sources to read, each with the sides to cut of its pictures."""
    sides = {self.resolution} | ({self._base} if self._base else set())
    found = {}
    for side in sorted(sides):
      source = at(self.source, side)
      found.setdefault(source.resolution, (source, []))[1].append(side)
    return list(found.values())


def source_keys(data) -> tuple[Source, Keys]:
  """The training source and its keys."""
  source = open_source(data, 'train')
  return source, Keys(len(source), data.mirror)


def pair_and_real(pair: dict, real: dict) -> dict:
  """One element of a generator's batch: a pair for L_rec, an independent real image for L_adv."""
  return pair | {f'real_{part}': real[part] for part in ('image', 'label', 'base_image') if part in real}


@dataclasses.dataclass(frozen=True)
class Stream:
  """What a phase trains on.

  Args:
    data: `config.data`.
    resolution: side of the images in pixels.
    seed: shuffles the order of the keys, anew in each epoch.
    noise: store of inversions (inversions.NoiseStore); with it, each element is a pair
      {image, label, key, noise} beside an independent {real_image, real_label}. With ToInvert in its place
      each has base_image instead of noise.
    pairs_fraction: share of the keys that serve as pairs.
    real_base: resolution at which the elements have their real_image once more, as real_base_image; 0: not.
  """

  data: Any
  resolution: int
  seed: int
  noise: Any = None
  pairs_fraction: float = 1.0
  real_base: int = 0

  def dataset(self) -> grain.MapDataset:
    source, keys = source_keys(self.data)
    real = self._shuffled(np.arange(len(keys)), self.seed).map(
      LoadPicture(source, keys, self.resolution, self.data.channels, base=self.real_base)
    )
    if self.noise is None:
      return real
    # The subset is drawn once, from its own seed: the same pairs in every epoch and after a restart.
    stored = len(self.noise)
    chosen = np.random.default_rng(self.seed).permutation(stored)
    chosen = np.sort(chosen[: max(1, round(self.pairs_fraction * stored))])
    pairs = self._shuffled(chosen, self.seed + 1).map(
      LoadPicture(source, keys, self.resolution, self.data.channels, self.noise)
    )
    return ZipMapDataset([pairs, real]).map(lambda both: pair_and_real(*both))

  @staticmethod
  def _shuffled(keys: np.ndarray, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(keys).seed(seed).shuffle().repeat(None)

  def batches(self, batch_size: int, rows: np.ndarray | None = None) -> 'Batches':
    """This host's rows of the batches (sharding.local_rows); None reads them whole."""
    rows = np.arange(batch_size) if rows is None else rows
    workers = default_workers(self.data.source) if self.data.workers == -1 else self.data.workers
    return Batches(self.dataset(), batch_size, rows, workers)


def default_workers(source: str) -> int:
  """How many processes config.data.workers = -1 means: for folders as many as this process has cores, less two.

  Two cores stay for JAX and this process: where there are no more, workers would take 3 s to start, and then time
  from these. Other sources have 0: what `pagoda prepare` wrote is read fast enough without.
  """
  if source != 'folder':
    return 0
  try:
    cores, room = len(os.sched_getaffinity(0)), shutil.disk_usage('/dev/shm').free
  except (AttributeError, OSError):  # not Linux
    return 0
  return min(max(cores - 2, 0), MOST_WORKERS) if room >= LEAST_SHARED_MEMORY else 0


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Some rows of every batch of a dataset, one after the other."""

  dataset: grain.MapDataset
  batch_size: int
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.dataset) // self.batch_size * len(self.rows)

  def __getitem__(self, index: int) -> dict:
    batch, place = divmod(index, len(self.rows))
    return self.dataset[batch * self.batch_size + int(self.rows[place])]


class WorkerError(RuntimeError):
  """A worker process is gone; the message says which and how."""


class Batches:
  """Iterator of dicts of arrays [len(rows), ...] whose state is one position, the same on every host.

  Each row of each global batch is the same picture on any number of hosts, so that the randomness of a
  train step, which goes by row, meets the same pictures. (Grain's ElasticIterator deals pictures out to
  the hosts one by one, which changes their rows with the number of hosts.)
  """

  def __init__(self, dataset: grain.MapDataset, batch_size: int, rows: np.ndarray, workers: int):
    self._source = _Rows(dataset, batch_size, rows)
    self._workers = workers
    self._position = 0
    self._iterator = None
    self._processes = set()

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """The next batch.

    Raises:
      SourceError: a picture cannot be read.
      WorkerError: a worker process was killed.
    """
    if self._iterator is None:
      self._iterator = self._open()
    if len(self._processes) < self._workers:  # they start one after the other
      self._processes |= set(multiprocessing.active_children())
    try:
      batch = next(self._iterator)
    except RuntimeError as error:
      gone = [f'worker process {p.pid} {processes.ending(p.exitcode)}' for p in self._processes if p.exitcode]
      if gone or 'Worker process' in str(error):  # Grain's words, of one that did not even start
        raise WorkerError(f'config.data.workers = {self._workers}: {", ".join(gone) or error}; start the same command '
                          'again to go on from the last checkpoint') from None
      raise
    self._position += self._source.batch_size
    return batch

  def _open(self):
    width = len(self._source.rows)
    first = self._position // self._source.batch_size * width
    # Read threads cost more than they hide where decoding is Python: workers do the parallel part.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(self._source)[first:].batch(width).to_iter_dataset(read)
    if self._workers:
      processes.free_segments()
      options = grain.MultiprocessingOptions(num_workers=self._workers)
      dataset = dataset.mp_prefetch(options, worker_init_fn=processes.begin_worker)
    return iter(dataset)

  def get_state(self) -> dict[str, int]:
    """{'global_next_index': position}, in pictures of all hosts, whatever their number."""
    return {'global_next_index': self._position}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on from a position of `get_state`, of any host."""
    self.close()
    self._position = state['global_next_index']

  def close(self) -> None:
    """Ends the worker processes."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator, self._processes = None, set()


def epoch_pictures(data, resolution: int, split: str, indices=None) -> tuple[np.ndarray, np.ndarray]:
  """(images [N, R, R, C] uint8, labels [N]) of a split in its own order, unmirrored; `indices` picks some."""
  source = at(open_source(data, split), resolution)
  records = [source[int(i)] for i in (range(len(source)) if indices is None else indices)]
  images = [picture_of(record, resolution, data.channels) for record in records]
  return np.stack(images), np.array([record['label'] for record in records], np.int32)
