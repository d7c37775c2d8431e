"""What a small labelled data set can tell about samples without downloaded networks.

Class accuracy: an RBF support vector machine trained on the real training images says how many samples
show the class that was asked for. Frechet distance: between Gaussians fitted to the images' first
principal components (Heusel et al. 2017 with another feature space). Full FID and its relatives work on
Inception features (metrics/). With guidance also spread and recall, at several strengths of it.
"""

import dataclasses
import functools
import importlib.util
import json

import numpy as np
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import stream as streams
from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.runtime import distributed, sharding
from pagoda_jax.runtime.files import read_sealed, write_sealed
from pagoda_jax.stages import sampler as sampling
from pagoda_jax.training import checkpoints, grids, workdir
from pagoda_jax.weights import autoencoders

SEED = 1234  # other noise than the grids show


@dataclasses.dataclass(frozen=True)
class Reference:
  """The real images of one resolution, with what is fitted to them once."""

  images: np.ndarray  # [N, R, R, C] uint8, the training split
  labels: np.ndarray
  held_images: np.ndarray
  held_labels: np.ndarray

  @functools.cached_property
  def classifier(self):
    from sklearn.svm import SVC  # only for this: the training machine may lack it

    return SVC(C=5.0, gamma='scale').fit(_flat(self.images), self.labels)

  @functools.cached_property
  def components(self):
    """(mean, principal directions as columns, largest first) of the training images."""
    flat = _flat(self.images)
    mean = flat.mean(0)
    return mean, np.linalg.svd(np.cov(flat - mean, rowvar=False), hermitian=True)[0]

  def accuracy(self, images, labels) -> float:
    """Share of the images [N, R, R, C] uint8 that the classifier puts in the class of their label."""
    return float(np.mean(self.classifier.predict(_flat(images)) == labels))

  def frechet(self, images, components: int) -> float:
    """Frechet distance to the training images in their first principal components."""
    return frechet_distance(self.projected(self.images, components), self.projected(images, components))

  def recall(self, images, components: int) -> float:
    """Share of the training images within the samples' manifold, in the same components (metrics/)."""
    from pagoda_jax.evaluation.metrics import precision_recall

    return precision_recall.precision_recall(
      self.projected(self.images, components), self.projected(images, components))[1]

  def projected(self, images, components: int) -> np.ndarray:
    """[N, components] of images."""
    mean, directions = self.components
    return (_flat(images) - mean) @ directions[:, :components]


def check_installed(config) -> None:
  """Before days of training: ConfigError where `summary` would find nothing to grade samples with, in process 0."""
  present = lambda: importlib.util.find_spec('sklearn') is not None
  if config.evaluation.samples and not distributed.from_primary('a look for scikit-learn', present):
    raise configs.ConfigError(
      f'config.evaluation.samples={config.evaluation.samples}: scikit-learn grades them, which is not installed: '
      'pip install "pagoda_jax[mnist]", or 0 for none')


def spread(images: np.ndarray, labels: np.ndarray) -> float:
  """Mean Euclidean distance of uint8 images to the mean of their class, with white at 1."""
  flat = _flat(images)
  means = {label: flat[labels == label].mean(0) for label in set(labels.tolist())}
  return float(np.mean([np.linalg.norm(x - means[label]) for x, label in zip(flat, labels.tolist())]))


def _flat(images):
  return images.reshape(len(images), -1).astype(np.float64) / 255


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
  """Squared Frechet distance of Gaussians fitted to two sets of features [N, D]."""
  from pagoda_jax.evaluation.metrics import frechet

  return frechet.frechet_distance(*frechet.mean_and_covariance(a), *frechet.mean_and_covariance(b))


@functools.cache
def _reference(config_json: str, resolution: int) -> Reference:
  from ml_collections import ConfigDict

  config, parts = ConfigDict(json.loads(config_json)), []
  for split in ('train', 'holdout'):
    images, labels = streams.epoch_pictures(config.data, resolution, split, drawn=streams.sampling(config))
    parts += [autoencoders.shown(config, images), labels]
  return Reference(*parts)


def reference(config, name: str) -> Reference:
  """The real images at a phase's resolution."""
  return _reference(workdir.as_json(config), configs.phase_resolution(config, name))


def evaluate(config, folder, name: str) -> dict[str, float]:
  """Figures of a phase's samples (EMA weights, balanced labels), beside those of the held-out images.

  Returns:
    accuracy, frechet and, as accuracy_real and frechet_real, the same of the held-out images. Kept in
    <phase>/evaluation.json for the checkpoint's step and for what config.evaluation asked for; where that file is not
    as it was written, measured again.
  """
  phase_folder = epath.Path(folder) / name
  params, step = checkpoints.read_generator(phase_folder)
  path = phase_folder / 'evaluation.json'
  known = distributed.from_primary(f'evaluation of {name}', lambda: _known(path))
  asked = json.loads(workdir.as_json(config.evaluation))
  if (known.get('step'), known.get('asked')) == (step, asked):
    return known
  mesh = sharding.make_mesh(**config.mesh)
  labels = sampling.parse_labels('cycle', config.evaluation.samples, config.data.num_classes, SEED)
  draw, params = sampling.Sampler(config, name, mesh).draw, autoencoders.with_decoder(config, params)
  images = draw(sharding.place(params, mesh), SEED, labels)
  # The same noise and labels at each strength.
  guided = {omega: draw(sharding.place(params, mesh), SEED, labels, omega) for omega in config.evaluation.guidance}

  def measure():
    real, components = reference(config, name), config.evaluation.components
    figures = {
      'step': step,
      'asked': asked,
      'resolution': images.shape[1],
      'accuracy': real.accuracy(images, labels),
      'accuracy_real': real.accuracy(real.held_images, real.held_labels),
      'frechet': real.frechet(images, components),
      'frechet_real': real.frechet(real.held_images, components),
    }
    if guided:
      of = lambda images, labels: {'accuracy': real.accuracy(images, labels), 'spread': spread(images, labels),
                                   'recall': real.recall(images, components)}
      figures['guided'] = {f'{omega:g}': of(drawn, labels) for omega, drawn in guided.items()}
      figures['guided']['held out'] = of(real.held_images, real.held_labels)
    write_sealed(path, figures)
    return figures

  return distributed.from_primary(f'figures of {name}', measure)


def _known(path) -> dict:
  """The figures in evaluation.json; {} without any that can be believed."""
  try:
    return read_sealed(path)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    distributed.say(f'{path}: damaged ({error}); measured again')
    return {}


def summary(config, folder) -> str:
  """The table that ends a run: one row a phase that makes images."""
  rows = ['phase        px   samples in the asked-for class   (real, held out)   Frechet, first '
          f'{config.evaluation.components} components   (real, held out)   ratio']
  for name in config.order:
    if config.phases[name].stage not in configs.IMAGE_STAGES or not workdir.progress(folder, config, name):
      continue
    f = evaluate(config, folder, name)
    rows.append(f'{name:<12} {f["resolution"]:>3}  {f["accuracy"]:>30.1%}   {f["accuracy_real"]:>16.1%}   '
                f'{f["frechet"]:>30.3f}   {f["frechet_real"]:>16.3f}   {f["frechet"] / f["frechet_real"]:>5.2f}')
  return '\n'.join(rows + guidance_rows(config, folder))


def guidance_rows(config, folder) -> list[str]:
  """The table of what guidance does to teacher and generators; [] where config.evaluation.guidance asks for none."""
  rows = []
  for name in config.order if config.evaluation.guidance else ():
    if config.phases[name].stage not in configs.IMAGE_STAGES or not workdir.progress(folder, config, name):
      continue
    found = evaluate(config, folder, name)
    rows += [f'{name:<12} {found["resolution"]:>3}  {omega:>8}  {f["accuracy"]:>30.1%}   {f["spread"]:>6.3f}   '
             f'{f["recall"]:>6.3f}' for omega, f in found['guided'].items()]
  return ['', 'phase        px     omega   samples in the asked-for class   spread   recall', *rows] if rows else []


def write_ladder(config, folder, path) -> None:
  """A picture of the same noise through every generator: one row a phase, every picture at the largest size."""
  generators = [n for n in config.order if config.phases[n].stage in configs.GENERATOR_STAGES
                and workdir.progress(folder, config, n)]
  if not generators:
    return
  mesh = sharding.make_mesh(**config.mesh)
  wide = 2 * grids.columns(config)
  labels = sampling.parse_labels('cycle', wide, config.data.num_classes, grids.SEED)
  largest = max(configs.phase_resolution(config, n) for n in generators) * spaces.factor(config)
  rows = []
  for name in generators:
    params = autoencoders.with_decoder(config, checkpoints.read_generator(epath.Path(folder) / name)[0])
    images = sampling.Sampler(config, name, mesh).draw(
      sharding.place(params, mesh), grids.SEED, labels, **grids.texts(config, mesh, wide))
    factor = largest // images.shape[1]
    rows.append(images.repeat(factor, 1).repeat(factor, 2))
  if distributed.is_primary():
    write_png(path, image_grid(np.concatenate(rows), wide))
