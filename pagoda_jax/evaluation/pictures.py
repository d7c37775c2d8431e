"""Sets of finished pictures to be measured: the array of an .npz file, a folder, any source of data."""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pagoda_jax.data import folders, pictures, prepare, sources
from pagoda_jax.runtime.files import file_digest
from pagoda_jax.weights.convert import torch_files

ARRAY = 'arr_0'  # of samples and references of the ADM evaluation
PROMPTS = 'prompt'  # beside it: what each was drawn of, as `pagoda sample` writes it
NO_RESOLUTION = 0


class EvaluationError(ValueError):
  """What was asked for cannot be measured; the message says why, and what would be right."""


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Random access to pictures of one size.

  Attributes:
    read: read(numbers [n]) -> uint8 [n, height, width, channels].
    count, height, width, channels: of all.
    described: JSON values that tell which pictures these are, their SHA-256 among them.
    source: where they are cut from, with its labels; None of arrays.
    captions: captions(numbers) -> what each should be a picture of; None where nobody says.
  """

  read: Callable[[np.ndarray], np.ndarray]
  count: int
  height: int
  width: int
  channels: int
  described: dict[str, Any]
  source: sources.Source | None = None
  captions: Callable[[np.ndarray], list[str]] | None = None

  def part(self, numbers: np.ndarray) -> 'Pictures':
    """Those of these numbers."""
    return dataclasses.replace(self, read=lambda places: self.read(numbers[places]), count=len(numbers))


def of_array(images: np.ndarray, where: str, described: dict) -> Pictures:
  """Pictures of an array [N, H, W, C].

  Raises:
    EvaluationError: no such array of 8-bit pictures, or none in it.
  """
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
    raise EvaluationError(f'{where}: {images.dtype} {list(images.shape)}; must be uint8 [pictures, height, width, '
                          '3 or 1 (grey)]')
  if not len(images):
    raise EvaluationError(f'{where}: no pictures in it')
  return Pictures(lambda numbers: images[numbers], *images.shape, described)


def open_samples(path: str, resolution: int = NO_RESOLUTION) -> Pictures:
  """Anybody's samples: an .npz with `arr_0`, or a folder of pictures in the order of their paths.

  Args:
    path: of the file or folder.
    resolution: side in pixels that a folder's pictures are cut to, as ADM's references are; NO_RESOLUTION: they are
      taken as they are, and must be of one size.

  Raises:
    EvaluationError: neither of the two; no pictures; pictures of several sizes.
    SourceError: a file in the folder cannot be read.
    WeightsFileError: a damaged or dangerous .npz.
  """
  if os.path.isdir(path):
    source = folders.open_folder(path, max_unreadable=0.0)
    found, said = of_source(source, f'folder:{path}', resolution, channels=3), [x.captions for x in source.entries]
    return dataclasses.replace(found, captions=lambda numbers: [said[n][0][1] for n in numbers]) if all(said) else found
  if pathlib.PurePath(path).suffix != '.npz':
    raise EvaluationError(f'--images={path}: must be an .npz file with {ARRAY}, or a folder of pictures'
                          + ('' if os.path.exists(path) else '; there is no such file or folder'))
  if resolution:
    raise EvaluationError(f'--resolution={resolution}: is of folders; the pictures of {path} are taken as they are')
  return of_npz(path, read_arrays(path))


def read_arrays(path) -> dict[str, np.ndarray]:
  """The arrays of an .npz, read-only; those that are not compressed stay in the file.

  Raises:
    FileNotFoundError, WeightsFileError: it is not there, damaged, or holds Python objects.
  """
  return torch_files.read(path).tensors


def of_npz(path, arrays: dict[str, np.ndarray]) -> Pictures:
  """The pictures of an .npz with these arrays; EvaluationError where it has none."""
  if ARRAY not in arrays:
    raise EvaluationError(f'{path}: holds {", ".join(arrays)}, but no pictures ({ARRAY})')
  found = of_array(arrays[ARRAY], f'{path}, {ARRAY}', {'file': str(path), 'sha256': file_digest(path)})
  said = arrays.get(PROMPTS)
  if said is None:
    return found
  if said.dtype.kind != 'U' or said.shape != (found.count,):
    raise EvaluationError(f'{path}, {PROMPTS}: {said.dtype} {list(said.shape)}; must be a text for each of the '
                          f'{found.count} pictures')
  return dataclasses.replace(found, captions=lambda numbers: said[numbers].tolist())


def of_source(source: sources.Source, name: str, resolution: int, channels: int, band_of: int = 0,
              **described) -> Pictures:
  """The pictures of a source at a resolution, cut as for training (and as ADM's references); in their own order.

  Args:
    source: of any kind.
    name: for `described`.
    resolution: their side; NO_RESOLUTION takes them as they are, all of the first one's size.
    channels: 1 or 3.
    band_of: side of those whose Haar bands they are, as in pictures.cuts; 0: cut.
    **described: what else tells which they are.

  Raises:
    EvaluationError, SourceError: there are none, or latents in their place; on reading, of several sizes or damaged.
  """
  if not len(source):
    raise EvaluationError(f'{name}: no pictures in it')
  if getattr(sources.prepared(source), 'autoencoder', None):
    raise EvaluationError(f'{name}: holds latents; name the pictures that they are of, or data (of a --workdir), which '
                          'decodes them')
  source = sources.at(source, band_of or resolution) if resolution else source
  as_they_are = lambda record: np.asarray(record['image'].convert('L' if channels == 1 else 'RGB')).reshape(
    *record['image'].size[::-1], channels)
  if resolution:
    height = width = resolution
  else:
    height, width, _ = as_they_are(source[0]).shape

  def one(number):
    record = source[int(number)]
    if resolution:
      return pictures.picture_of(record, resolution, channels, band_of=band_of)
    pixels = as_they_are(record)
    if pixels.shape[:2] != (height, width):
      raise EvaluationError(f'{name}: {record["name"]} has {pixels.shape[1]} x {pixels.shape[0]} pixels, those before '
                            f'it {width} x {height}; give --resolution=N to cut all to N x N')
    return pixels

  def read(numbers):
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count(), 16)) as pool:  # Pillow leaves the lock alone
      return np.stack(list(pool.map(one, numbers)))

  described = {'source': name, 'sha256': source.digest, **({'haar_of': band_of} if band_of else {}), **described}
  if resolution:
    described['cut_to'] = resolution
  return Pictures(read, len(source), height, width, channels, described, source)


def open_source(text: str) -> sources.Source:
  """The source that --reference names: folder:PATH, tfds:NAME, array_record:PATH, mnist, or the path of a folder.

  Raises:
    EvaluationError: there is no such kind of source.
    SourceError: there is no such source.
  """
  if os.path.isdir(text):
    text = f'folder:{text}'
  try:
    return prepare.open_input(text)
  except prepare.PrepareError:
    raise EvaluationError(f'--reference={text}: must be data (of --workdir), statistics or pictures in .npz or .pkl, '
                          'a name of `pagoda weights list`, folder:PATH, tfds:NAME, array_record:PATH or mnist'
                          ) from None


