"""The resumable stream of batches that a phase trains on.

A *key* is one training picture: image number i, mirrored or not. Streams are shuffled lists of keys;
their position is one integer that does not depend on how many hosts read, so a run resumes anywhere.
"""

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import ZipMapDataset

from pagoda_jax.config import spaces
from pagoda_jax.data import latents
from pagoda_jax.data.pictures import cuts_of, picture_of
from pagoda_jax.data.sources import Source, at, open_source
from pagoda_jax.runtime import buckets, processes

MOST_WORKERS = 8  # that a run starts by itself
BUCKET_READS = grain.ReadOptions(num_threads=buckets.AT_ONCE, prefetch_buffer_size=4 * buckets.AT_ONCE)
# Of files read threads cost more than they hide where decoding is Python: workers do the parallel part.
FILE_READS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Of the record of an independent real image, where it has them.
REAL_PARTS = ('image', 'label', 'base_image', 'text', 'text_mask', 'text_pooled', 'caption_kind')
LEAST_SHARED_MEMORY = 2**30  # bytes free, for them to bring batches in; containers often have 64 MiB in all


def sampling(config) -> latents.Sampling | None:
  """How latents of the experiment are drawn; None of pictures."""
  if not spaces.is_latent(config):
    return None
  network = config.autoencoder
  return latents.Sampling(int(config.seed), float(network.scaling) or 1.0,
                          float(network.shift) if network.scaling else 0.0)


def band_of(data) -> int:
  """Side of the pictures whose Haar bands all smaller ones are (config.data.downsampling); 0: of none."""
  return data.resolution if data.get('downsampling') == 'haar' else 0


def pictures_digest(data, resolutions) -> str:
  """SHA-256 that changes when a training picture at one of these resolutions may have changed."""
  source, resolutions = open_source(data), {band_of(data)} if band_of(data) else resolutions
  digests = list(dict.fromkeys(at(source, side).digest for side in sorted(resolutions)))
  return digests[0] if len(digests) == 1 else hashlib.sha256(''.join(digests).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Keys:
  """The training pictures of a source: every image, and every mirror image where `mirror` says so."""

  images: int
  mirror: bool

  def __len__(self) -> int:
    return self.images * (2 if self.mirror else 1)

  def __getitem__(self, key: int) -> tuple[int, bool]:
    """(image number, mirrored) of a key; a picture and its mirror image are neighbours.

    Raises:
      IndexError: there is no such key: -1 would be the last image's, and to go through all would never end.
    """
    if not 0 <= key < len(self):
      raise IndexError(f'key {key}: the keys are 0 to {len(self) - 1}')
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
  ToInvert the same picture as `base_image`; so it has where `base` says at which resolution. With `text` it has a
  caption's embedding: text, text_mask, text_pooled, caption_kind (texts.TextStore.text).

  With `band_of` all pictures are Haar bands of those at that resolution (pictures.cuts).

  Of latents (`drawn` says how) a picture of L_adv or of a teacher is drawn anew in every epoch; those
  of pairs, and those that are inverted, are the first epoch's draw, so that noise and image stay of one another.
  """

  source: Source
  keys: Keys
  resolution: int
  channels: int
  noise: Any = None
  base: int = 0
  text: bool = False
  drawn: latents.Sampling | None = None
  band_of: int = 0

  def in_place(self, place: int, key: int) -> dict[str, np.ndarray]:
    """The record of a key at a place of a stream that holds each key once an epoch."""
    return self(key, place // len(self.keys))

  def __call__(self, key: int, epoch: int = 0) -> dict[str, np.ndarray]:
    index, flip = self.keys[int(key)]
    cut = self._cuts(index, flip) if self.drawn is None else self._draws(int(key), index, flip, epoch)
    record = {'image': cut[self.resolution], 'label': np.int32(cut['label']), 'key': np.int32(key)}
    if self._base:
      record['base_image'] = cut[self._base]
    if self.noise is not None and not isinstance(self.noise, ToInvert):
      record |= self.noise.pair(int(key))
    if self.text:
      record |= self.source.text(index, int(key))
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
      cut |= cuts_of(stored, sides, self.channels, flip, self.band_of) | {'label': stored['label']}
    return cut

  def _draws(self, key, index, flip, epoch):
    """As `_cuts`, of latents."""
    drawn = {}
    for source, (side,) in self._reads:
      stored = source.oriented(index, flip)
      drawn |= {side: self.drawn.sampled(stored['image'], key, epoch), 'label': stored['label']}
    return drawn

  @functools.cached_property
  def _reads(self) -> list[tuple[Source, list[int]]]:
    """The sources to read, each with the sides to cut of its pictures."""
    sides = {self.resolution} | ({self._base} if self._base else set())
    found = {}
    for side in sorted(sides):
      source = at(self.source, self.band_of or side)
      found.setdefault(source.resolution, (source, []))[1].append(side)
    return list(found.values())


def source_keys(data) -> tuple[Source, Keys]:
  """The training source and its keys."""
  source = open_source(data, 'train')
  return source, Keys(len(source), data.mirror)


def pair_and_real(pair: dict, real: dict) -> dict:
  """One element of a generator's batch: a pair for L_rec, an independent real image for L_adv."""
  return pair | {f'real_{part}': real[part] for part in REAL_PARTS if part in real}


@dataclasses.dataclass(frozen=True)
class Stream:
  """What a phase trains on.

  Args:
    data: `config.data`.
    resolution: side of the images in pixels.
    seed: shuffles the order of the keys, anew in each epoch.
    noise: store of inversions (noise_store.NoiseStore); with it, each element is a pair
      {image, label, key, noise} beside an independent {real_image, real_label}. With ToInvert in its place
      each has base_image instead of noise.
    reals: whether the independent ones are there.
    pairs_fraction: share of the keys that serve as pairs.
    real_base: resolution at which the elements have their real_image once more, as real_base_image; 0: not.
    text: whether they have the embeddings of captions, as LoadPicture's records and, with real_ before, of real_image.
    drawn: how latents are drawn; None of pictures.
  """

  data: Any
  resolution: int
  seed: int
  noise: Any = None
  pairs_fraction: float = 1.0
  real_base: int = 0
  text: bool = False
  drawn: latents.Sampling | None = None
  reals: bool = True

  def dataset(self) -> grain.MapDataset:
    source, keys = source_keys(self.data)
    parts = {'text': self.text, 'drawn': self.drawn, 'band_of': band_of(self.data)}
    load = LoadPicture(source, keys, self.resolution, self.data.channels, base=self.real_base, **parts)
    real = self._shuffled(range(len(keys)), self.seed)
    real = real.map(load) if self.drawn is None else real.map_with_index(load.in_place)
    if self.noise is None:
      return real
    # Of all, numbers that lie in memory would be a gigabyte, here and in every worker, of a hundred million pictures.
    stored = chosen = range(len(self.noise))
    if (count := max(1, round(self.pairs_fraction * len(stored)))) < len(stored):
      # The subset is drawn once, from its own seed: the same pairs in every epoch and after a restart.
      chosen = np.sort(np.random.default_rng(self.seed).permutation(len(stored))[:count])
    pairs = self._shuffled(chosen, self.seed + 1).map(
      LoadPicture(source, keys, self.resolution, self.data.channels, self.noise, **parts)
    )
    if not self.reals:
      return pairs
    return ZipMapDataset([pairs, real]).map(lambda both: pair_and_real(*both))

  @staticmethod
  def _shuffled(keys: Sequence[int] | np.ndarray, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(keys).seed(seed).shuffle().repeat(None)

  def batches(self, batch_size: int, rows: np.ndarray | None = None) -> 'Batches':
    """This host's rows of the batches (sharding.local_rows); None reads them whole."""
    rows = np.arange(batch_size) if rows is None else rows
    far = any(map(buckets.is_in_bucket, (self.data.path, getattr(self.noise, 'folder', ''))))
    workers = default_workers(self.data.source, far) if self.data.workers == -1 else self.data.workers
    return Batches(self.dataset(), batch_size, rows, workers, BUCKET_READS if far else FILE_READS)


def default_workers(source: str, far: bool = False) -> int:
  """How many processes config.data.workers = -1 means: for files as many as this process has cores, less two.

  `far`: whether records are read from a bucket, which is work too.

  Two cores stay for JAX and this process: where there are no more, workers would take 3 s to start, and then time
  from these. Other sources have 0: what `pagoda prepare` wrote is read fast enough without.
  """
  if source not in ('folder', 'webdataset') and not far:
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

  def __init__(self, dataset: grain.MapDataset, batch_size: int, rows: np.ndarray, workers: int,
               reads: grain.ReadOptions = FILE_READS):
    self._source = _Rows(dataset, batch_size, rows)
    self._workers, self._reads = workers, reads
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
    # No remainder: Grain would count it in float, in which as many batches of one as there are do not fit.
    dataset = grain.MapDataset.source(self._source)[first:].batch(width, drop_remainder=True)
    dataset = dataset.to_iter_dataset(self._reads)
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


def epoch_pictures(data, resolution: int, split: str, indices=None, drawn: latents.Sampling | None = None
                   ) -> tuple[np.ndarray, np.ndarray]:
  """(images [N, R, R, C] uint8, labels [N]) of a split in its own order, unmirrored; `indices` picks some.

  Of latents (`drawn` given) the images are their means, float32, as networks see them.
  """
  band = band_of(data)
  source = at(open_source(data, split), band or resolution)
  records = [source[int(i)] for i in (range(len(source)) if indices is None else indices)]
  if drawn is None:
    images = [picture_of(record, resolution, data.channels, band_of=band) for record in records]
  else:
    images = [drawn.middle(record['image']) for record in records]
  return np.stack(images), np.array([record['label'] for record in records], np.int32)
