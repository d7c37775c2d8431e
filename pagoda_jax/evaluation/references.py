"""What samples are compared with: published statistics, or pictures.

ADM's .npz (mu, sigma, mu_s, sigma_s, arr_0), EDM's .npz (mu, sigma), EDM2's .pkl ({'fid', 'fd_dinov2'} of mu, sigma),
an .npz of pictures, any source of data.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import sources
from pagoda_jax.data import stream as streams
from pagoda_jax.evaluation import pictures
from pagoda_jax.evaluation.pictures import EvaluationError, Pictures
from pagoda_jax.runtime.files import file_digest
from pagoda_jax.training import workdir
from pagoda_jax.weights import autoencoders, locate, published
from pagoda_jax.weights.convert import torch_files
from pagoda_jax.weights.convert.unpickle import WeightsFileError

DATA = 'data'
# (mean, covariance) of a file -> what they are of
STATISTICS = {('mu', 'sigma'): 'inception/features', ('mu_s', 'sigma_s'): 'inception/spatial'}
EDM2_KEYS = {'fid': 'inception/features', 'fd_dinov2': 'dinov2/features'}
ASYMMETRY = 1e-5  # of a covariance's largest entry; published ones are float64, some of them of float32 features


@dataclasses.dataclass(frozen=True)
class Reference:
  """What samples are compared with.

  Attributes:
    described: JSON values that tell which it is, its SHA-256 among them.
    statistics: ENCODER/OUTPUT -> (mean [C], covariance [C, C]) that a file holds.
    pictures: None where a file holds statistics only.
    held_out: pictures of the same data that no phase trained on; None without.
  """

  described: dict[str, Any]
  statistics: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
  pictures: Pictures | None = None
  held_out: Pictures | None = None


def of_data(config, name: str) -> Reference:
  """The training pictures of an experiment as phase `name` sees them, but not mirrored, and those held out."""
  side, data = configs.phase_resolution(config, name), config.data
  of = lambda part: pictures.of_source(sources.open_source(data, part), _data_name(data), side, data.channels,
                                       streams.band_of(data), part=part)
  if spaces.is_latent(config):
    of = lambda part: _decoded(config, part, side)
  train = of('train')
  return Reference(train.described, pictures=train, held_out=of('holdout') if data.holdout else None)


def _decoded(config, part: str, side: int) -> Pictures:
  """Pictures decoded of the mean latents of a part of the data: what the autoencoder loses, they have lost."""
  source, pixels = sources.open_source(config.data, part), side * spaces.factor(config)
  read = lambda numbers: autoencoders.shown(
    config, streams.epoch_pictures(config.data, side, part, numbers, streams.sampling(config))[0])
  described = {'source': _data_name(config.data), 'sha256': source.digest, 'part': part, 'decoded_by':
               config.autoencoder.sha256}
  return Pictures(read, len(source), pixels, pixels, config.data.channels, described, source)


def _data_name(data) -> str:
  return ':'.join(filter(None, (data.source, data.name or data.path)))


def open_reference(text: str, folder, phase: str, samples: Pictures | None, resolution: int, weights_dir) -> Reference:
  """The reference that a flag names.

  Args:
    text: 'data', a file, a name of the registry, or a source.
    folder, phase: the work directory and phase of 'data'; '' without.
    samples: that are compared with it, whose size a source's pictures are cut to; None: a phase's.
    resolution: that they are cut to, where it is given.
    weights_dir: looked in for published files first.

  Raises:
    EvaluationError: there is no such reference, or its statistics are none.
    SourceError, WeightsFileError, MissingWeightsError, WrongDigestError: it cannot be read.
  """
  config = workdir.read_config(folder) if folder else None
  if text == DATA:
    if config is None:
      raise EvaluationError('--reference=data: is the data of --workdir; of --images, name a file or a source')
    return of_data(config, phase)
  if text in {entry.name for entry in published.REGISTRY}:
    text = str(locate.find(text, weights_dir))
  suffix = pathlib.PurePath(text).suffix
  if suffix in ('.npz', '.pkl'):
    return _of_file(text, suffix)
  source = pictures.open_source(text)
  if samples is not None:
    side, channels = resolution or samples.height, samples.channels
    if not resolution and samples.height != samples.width:
      raise EvaluationError(f'--reference={text}: its pictures are cut to squares, and the samples have '
                            f'{samples.width} x {samples.height} pixels')
  else:
    side, channels = configs.phase_resolution(config, phase) * spaces.factor(config), config.data.channels
  of_all = pictures.of_source(source, text, side, channels)
  return Reference(of_all.described, pictures=of_all)


def _of_file(path: str, suffix: str) -> Reference:
  if suffix == '.pkl':
    return Reference({'file': path, 'sha256': file_digest(path)}, _of_edm2(path))
  arrays, statistics = pictures.read_arrays(path), {}
  for (mean, covariance), output in STATISTICS.items():
    if (mean in arrays) != (covariance in arrays):
      raise EvaluationError(f'{path}: holds only one of {mean} and {covariance}')
    if mean in arrays:
      statistics[output] = checked(arrays[mean], arrays[covariance], f'{path}, {mean} and {covariance}')
  of_array = pictures.of_npz(path, arrays) if pictures.ARRAY in arrays else None
  if not statistics and of_array is None:
    raise EvaluationError(f'{path}: holds {", ".join(arrays)}; a reference has mu and sigma, or pictures (arr_0)')
  return Reference({'file': path, 'sha256': file_digest(path)}, statistics, of_array)


def _of_edm2(path: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  statistics = {}
  for key, output in EDM2_KEYS.items():
    try:
      found = torch_files.read(path, key).tensors
    except WeightsFileError as error:
      if 'no tensors under key' not in str(error):
        raise
      continue
    if not {'mu', 'sigma'} <= set(found):
      raise EvaluationError(f'{path}: {key} holds {", ".join(found)}, not mu and sigma')
    statistics[output] = checked(found['mu'], found['sigma'], f'{path}, {key}')
  if not statistics:
    raise EvaluationError(f'{path}: no reference of EDM2, which has {" or ".join(EDM2_KEYS)}, each with mu and sigma')
  return statistics


def checked(mean: np.ndarray, covariance: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
  """A file's mean and covariance as float64.

  Raises:
    EvaluationError: they are none: of other shapes, not finite, or not symmetric.
  """
  if not all(np.issubdtype(x.dtype, np.floating) for x in (mean, covariance)):
    raise EvaluationError(f'{where}: of types {mean.dtype} and {covariance.dtype}, not floating-point numbers')
  if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
    raise EvaluationError(f'{where}: of shapes {mean.shape} and {covariance.shape}; must be a mean [C] and a '
                          'covariance [C, C]')
  mean, covariance = (np.asarray(x, np.float64) for x in (mean, covariance))
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise EvaluationError(f'{where}: NaN or infinite numbers')
  if np.abs(covariance - covariance.T).max(initial=0) > ASYMMETRY * np.abs(covariance).max(initial=0):
    raise EvaluationError(f'{where}: not symmetric, and so no covariance; the file is damaged')
  if len(covariance) and covariance.diagonal().min() < 0:
    raise EvaluationError(f'{where}: a negative variance; the file is damaged')
  return mean, covariance
