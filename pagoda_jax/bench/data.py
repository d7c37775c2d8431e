"""`pagoda bench data`: pictures a second that a core decodes, crops, resizes and batches; it makes them itself."""

import pathlib
import tempfile
import time

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from pagoda_jax import config as configs
from pagoda_jax.data import folders, pictures, prepare, records
from pagoda_jax.data import stream as streams

LARGE, SMALL = 512, 64
LARGE_COUNT, SMALL_COUNT, BATCH = 48, 2048, 128


def natural_picture(rng: np.random.Generator, side: int) -> np.ndarray:
  """[side, side, 3] uint8 with a falling spectrum: as a JPEG it weighs, and decodes, much as photographs do."""
  frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
  frequency[0, 0] = 1
  phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
  waves = np.fft.irfft2(phases / frequency**1.4, (side, side))
  # Colours go together, as in photographs.
  mixed = np.einsum('ij,jhw->hwi', [[1, 0.3, 0], [1, 0, 0.2], [1, -0.3, 0.1]], waves)
  return np.clip(128 + 55 * mixed / mixed.std(), 0, 255).astype(np.uint8)


def rate(step, seconds: float) -> float:
  """Calls of `step`() a second; each returns how many pictures it made. The first call is not timed."""
  step()
  count, start = 0, time.perf_counter()
  while (passed := time.perf_counter() - start) < seconds:
    count += step()
  return count / passed


def measure_jpeg(folder: pathlib.Path, seconds: float) -> float:
  """Pictures a second of one process: a 512 px JPEG file to its 512 and 64 px pixels."""
  rng = np.random.default_rng(0)
  for number in range(LARGE_COUNT):
    (folder / f'{number:03d}.jpg').write_bytes(pictures.encode(natural_picture(rng, LARGE), 'jpeg', 90))
  source, turn = folders.open_folder(str(folder), check=False), iter(range(10**9))

  def step():
    image = source[next(turn) % LARGE_COUNT]['image']
    pictures.picture(image, LARGE, 3), pictures.picture(image, SMALL, 3)
    return 1

  return rate(step, seconds)


class NaturalSource:
  """64 px pictures of ten classes, made when they are read."""

  class_names = tuple('0123456789')
  digest = 'natural'
  resolution = SMALL

  def __len__(self):
    return SMALL_COUNT

  def __getitem__(self, index):
    image = Image.fromarray(natural_picture(np.random.default_rng(index), SMALL))
    return {'image': image, 'label': index % 10, 'name': str(index)}


def record_settings(folder: pathlib.Path, workers: int) -> ConfigDict:
  """`config.data` of the prepared 64 px pictures."""
  settings = configs.experiment().data
  settings.update({'source': 'array_record', 'path': str(folder), 'resolution': SMALL, 'num_classes': 10,
                   'workers': workers})
  return settings


def measure_records(folder: pathlib.Path, seconds: float, workers: int) -> float:
  """Pictures a second: 64 px ArrayRecord to shuffled batches of 128, by `workers` processes (0: this one)."""
  batches = streams.Stream(record_settings(folder, workers), SMALL, seed=0).batches(BATCH)
  return rate(lambda: len(next(batches)['image']), seconds)


def data_table(seconds: float, workers: int) -> str:
  """The rows of `pagoda bench data`."""
  rows = [f'{"what":<42} {"processes":>9} {"images/s":>9} {"images/s per core":>18}']
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / 'jpeg').mkdir()
    measured = [(f'{LARGE} px JPEG -> {LARGE} + {SMALL} px', 1, measure_jpeg(folder / 'jpeg', seconds))]
    source = NaturalSource()
    for image_format in ('png', 'raw'):
      recipe = records.Recipe((SMALL,), image_format, 95)
      prepare.prepare(source, folder / image_format, recipe, SMALL_COUNT // 4, 1, 0.0)
      source = records.open_records(str(folder / image_format))  # to make them again would take longer
      for count in sorted({0, workers}):
        found = measure_records(folder / image_format, seconds, count)
        measured.append((f'{SMALL} px ArrayRecord ({image_format}) -> batch of {BATCH}', max(count, 1), found))
  for what, processes, found in measured:
    rows.append(f'{what:<42} {processes:>9} {found:>9.0f} {found / processes:>18.0f}')
  return '\n'.join(rows)
