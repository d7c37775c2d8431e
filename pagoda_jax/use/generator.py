"""A finished network that draws images, from wherever it lies: `pagoda_jax.load(path)`.

    generator = pagoda_jax.load('runs/mnist')
    images = generator(labels=[3, 5], seed=0)  # uint8 [2, 32, 32, 1]
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from pagoda_jax import config as configs
from pagoda_jax.config import ranges, spaces
from pagoda_jax.networks.unet import UNet
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import architectures, models, sampler
from pagoda_jax.training import checkpoints, claims, starts, workdir
from pagoda_jax.use import exported
from pagoda_jax.weights import autoencoders, published
from pagoda_jax.weights.convert import folders
from pagoda_jax.weights.convert.formats import UNET_FORMATS

LARGEST_SEED = 2**32 - 1  # of larger ones, JAX's keys take the last 32 bits


class WeightsError(ValueError):
  """A folder holds no network that draws images."""


@dataclasses.dataclass(eq=False)
class Generator:
  """A network that draws images, on a mesh; parameters are read when they are first used.

  Attributes:
    config: an experiment with the phase that draws.
    name: of that phase.
    where: in words, what it is, such as 'phase grow_32, step 450'.
    source: JSON values on where it comes from.
    read: read() -> its parameters, NumPy.
    mesh: where to draw; images do not depend on it, but for rounding.
    folder: its work directory; '' without one.
  """

  config: Any
  name: str
  where: str
  source: dict
  read: Callable[[], Any]
  mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)
  folder: str = ''
  _programs: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

  @functools.cached_property
  def params(self):
    """The parameters, on the mesh."""
    return sharding.place(self.read(), self.mesh)

  @functools.cached_property
  def networks(self) -> models.Networks:
    return models.build(self.config, self.name)

  @property
  def kind(self) -> str:
    """'teacher' draws with the Heun sampler, 'generator' in one step."""
    return 'teacher' if self.config.phases[self.name].stage == 'teacher' else 'generator'

  @property
  def resolution(self) -> int:
    """Side in pixels of the images."""
    return (self.networks.unet.resolution << len(self.networks.unet.grown)) * spaces.factor(self.config)

  @property
  def channels(self) -> int:
    return self.config.data.channels

  @property
  def num_classes(self) -> int:
    """0: it knows none."""
    return self.config.data.num_classes

  @property
  def takes_text(self) -> bool:
    """Whether it draws what captions say."""
    return bool(self.networks.unet.text_width)

  def __call__(self, labels=None, seed: int = 0, *, num_images: int | None = None, guidance=None, prompts=None,
               truncate: float = 1.0, batch_size: int | None = None) -> np.ndarray:
    """uint8 [N, S, S, C]: image i depends on seed, i, its label or prompt and its strength of guidance alone.

    Args:
      labels: a class or several, an image each; 'cycle', 'random' or a list in text as `pagoda sample` takes it;
        None: one class after the other.
      seed: 0 to 2**32 - 1.
      num_images: None: as many as there are labels or prompts, or one. Fewer labels or prompts are repeated.
      guidance: strength, a number or [N]; None: none, or the nearest to it that the network knows.
      prompts: a text or several, an image each, for a network that was trained with captions.
      truncate: what the noise is multiplied by; below 1: images nearer to the average one, and less varied.
      batch_size: images a call; None: all, up to sampler.CHUNK. A program is compiled for each.

    Raises:
      ValueError: there is no such label, seed or strength; or labels and prompts, or of both the wrong one.
    """
    prompts = listed(prompts)
    if prompts and labels is not None:
      raise ValueError('labels and prompts: give one of them')
    if num_images is None and prompts:
      num_images = len(prompts)
    labels = self.labels(labels, num_images, seed)
    texts = self.texts(prompts, len(labels))
    omegas = self.strengths(guidance, len(labels))
    return self.of_noise(self.noise(seed, len(labels), truncate), labels, omegas, batch_size, texts)

  def texts(self, prompts, count: int) -> dict | None:
    """What `of_noise` takes of prompts for so many images, repeated where there are fewer; None of a network that
    takes none.

    Raises:
      ValueError: the network takes prompts and there are none, or the other way round; or the encoder's.
    """
    prompts = list(prompts)
    if not self.takes_text:
      if prompts:
        raise ValueError(f'prompts: {self.name} was not trained with captions; give labels')
      return None
    if not prompts:
      raise ValueError(f'{self.name} was trained with captions: give prompts')
    if self.config.text.encoder == architectures.UNKNOWN_ENCODER:
      raise ValueError(f'{self.where}: which encoder of captions it knows is not in the weights: give text_encoder '
                       '(--text_encoder), as config.text.encoder has it')
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
      raise ValueError(f'prompts: {wrong[0]!r} is no text')
    from pagoda_jax.use import text  # which encoders need: only where there are prompts

    encoded = text.encode(self.config, [*prompts, ''])
    rows = np.arange(count) % len(prompts)
    return {'text': {key: np.asarray(values)[rows] for key, values in encoded.items()},
            'null': {key: np.asarray(values)[-1] for key, values in encoded.items()}}

  def labels(self, labels, num_images: int | None, seed: int) -> np.ndarray:
    """int32 [N] of what `__call__` takes as labels; -1 where the network knows no classes."""
    if num_images is not None and (num_images < 1 or num_images % 1):
      raise ValueError(f'num_images = {num_images}: must be at least 1, and whole')
    num_images = num_images and int(num_images)
    if labels is None or isinstance(labels, str):
      text, seed = labels or 'cycle', checked_seed(seed)
      count = num_images or (1 if text in ('cycle', 'random') else text.count(',') + 1)
      return sampler.parse_labels(text, count, self.num_classes, seed)
    if np.ndim(labels) > 1:  # one-hot rows would be so many labels of 0 and 1
      raise ValueError(f'labels are {list(np.shape(labels))}; must be a class, or a list of them [N]')
    try:
      values = [operator.index(label) for label in np.asarray(labels).reshape(-1)]
    except TypeError:
      raise ValueError(f'labels = {labels!r}: must be whole numbers') from None
    if not values:
      raise ValueError('labels: there are none')
    if not self.num_classes:
      raise ValueError(f'labels = {labels!r}: {self.name} knows no classes; give num_images instead')
    wrong = [label for label in values if not 0 <= label < self.num_classes]
    if wrong:
      raise ValueError(f'labels: {wrong[0]} is no class; there are 0 to {self.num_classes - 1}')
    return np.resize(np.array(values, np.int32), num_images or len(values))

  def noise(self, seed: int, count: int, truncate: float = 1.0) -> jax.Array:
    """[count, R, R, C], what `count` images of a seed are made of; standard deviation truncate * sigma_max."""
    seed = checked_seed(seed)
    if not 0 <= truncate <= 10:
      raise ValueError(f'truncate = {truncate}: must be in 0 to 10')
    shape = self.networks.noise_shape(1)[1:]
    return np.float32(truncate) * sampler.noise_of(seed, np.arange(count), shape, self.networks.sigma_max)

  def of_noise(self, noise, labels, omegas=None, batch_size: int | None = None, texts=None) -> np.ndarray:
    """uint8 [N, S, S, C] of noise [N, R, R, C], labels [N] as of `labels` or -1 for none, omegas as of `strengths`,
    texts as of `texts`.

    Raises:
      ValueError: they are of other shapes or not finite, there is no such label, or the network takes no strength.
    """
    if self.takes_text and texts is None:
      raise ValueError(f'{self.name} was trained with captions: give prompts')
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in 'iu':
      raise ValueError(f'labels are {labels.dtype} {list(labels.shape)}; must be whole numbers [N]')
    if self.num_classes and (wrong := labels[(labels < -1) | (labels >= self.num_classes)].tolist()):
      raise ValueError(f'labels: {wrong[0]} is no class; there are 0 to {self.num_classes - 1}, and -1 for none')
    if omegas is not None and np.shape(omegas) != labels.shape:
      raise ValueError(f'omegas are {list(np.shape(omegas))}; must be {list(labels.shape)}')
    if omegas is not None and self.kind == 'generator' and self.networks.law is None:
      raise ValueError(f'omegas: {self.name} was trained without guidance and takes no strength of it')
    if batch_size is not None and (batch_size < 1 or batch_size % 1):
      raise ValueError(f'batch_size = {batch_size}: must be at least 1, and whole')
    if np.shape(noise) != self.networks.noise_shape(len(labels)):
      raise ValueError(f'noise is {list(np.shape(noise))}; must be {list(self.networks.noise_shape(len(labels)))}')
    if not all(np.isfinite(given).all() for given in (noise, 1.0 if omegas is None else omegas)):
      raise ValueError('noise, omegas: a number in them is not finite')  # such pictures would be black
    size = int(batch_size or min(sampler.CHUNK, len(labels)))
    draw = self.program(('draw', size), lambda: sampler.Sampler(self.config, self.name, self.mesh, size))
    return draw(self.params, noise, labels.astype(np.int32), omegas, **(texts or {}))

  def program(self, key, make: Callable[[], Any]):
    """What make() returned when it was first asked for under a key, so that it is compiled once."""
    if key not in self._programs:
      self._programs[key] = make()
    return self._programs[key]

  def strengths(self, guidance, count: int) -> np.ndarray | None:
    """float32 [count] of a strength of guidance or [count] of them; None of None. Raises as `check_guidance`."""
    if guidance is None:
      return None
    omegas = np.asarray(guidance, np.float64)  # an end of the law's range, rounded, may lie outside of it
    if omegas.shape not in ((), (count,)):
      raise ValueError(f'guidance: {omegas.size} strengths for {count} images; give one, or one for each')
    check_guidance(self.config, self.name, tuple(np.unique(omegas).tolist()))
    return np.broadcast_to(omegas.astype(np.float32), count)


def checked_seed(seed) -> int:
  """The seed; ValueError where it is none."""
  try:
    found = operator.index(seed)
  except TypeError:
    found = -1
  if not 0 <= found <= LARGEST_SEED:
    raise ValueError(f'seed = {seed}: must be in 0 to {LARGEST_SEED}, and whole')
  return found


def listed(prompts) -> tuple[str, ...]:
  """Prompts of a text, of several in a list or an array, or of None."""
  return (prompts,) if isinstance(prompts, str) else () if prompts is None else tuple(prompts)


def with_text_encoder(generator: Generator, name: str) -> Generator:
  """The generator, its prompts embedded by an encoder named as in config.text.encoder; '': the one of its config.

  Raises:
    ValueError: it takes no prompts.
  """
  if name and not generator.takes_text:
    raise ValueError(f'text_encoder = {name!r}: {generator.name} was not trained with captions')
  if name:
    generator.config.text.encoder = name
  return generator


def load(path, *, phase: str = '', step: str = '', ema: str = '', kind: str = '', levels: int | None = None,
         text_encoder: str = '', mesh: Mesh | None = None) -> Generator:
  """The generator, or teacher, in a folder.

  Args:
    path: a work directory, a phase in one (WORKDIR/PHASE), or a folder of `pagoda convert`, `export` or `publish`.
    phase, step, ema: of a work directory, as `pagoda sample` has them: by default the last phase that draws, its
      newest checkpoint, its first average. The latter two of a phase also.
    kind, levels: of a folder of `pagoda convert`: 'teacher' or 'generator' where nothing tells, noise levels.
    text_encoder: what embeds prompts, as in config.text.encoder: where the weights do not tell (`pagoda convert`), or
      its folder lies elsewhere than in training.
    mesh: of `runtime.sharding.make_mesh`; None: all devices.

  Raises:
    ValueError, WeightsError: nothing there draws images, or one of the others does not fit it.
    WorkdirError, CheckpointError, ConversionError, ExportError: it is damaged.
  """
  path = epath.Path(path).expanduser()
  there = {'mesh': mesh} if mesh is not None else {}
  if not path.is_dir():
    raise WeightsError(f'{path}: no such folder; give a work directory, a phase, or a folder of `pagoda convert`, '
                       '`export` or `publish`')
  of_run = {name: value for name, value in (('phase', phase), ('step', step), ('ema', ema)) if value}
  if folders.is_converted(path) or exported.is_exported(path):
    if of_run:
      raise ValueError(f'{next(iter(of_run))} = {next(iter(of_run.values()))!r}: {path} is no work directory')
    generator = of_weights(path, kind, levels, **there)
  else:
    if kind or levels is not None:
      raise ValueError(f'kind and levels are of converted weights, and {path} holds none')
    if (path / claims.FILE).exists():
      path = claims.at_its_place(path)
      if phase not in ('', path.name):
        raise ValueError(f'phase = {phase!r}: {path} is phase {path.name}')
      path, phase = path.parent, path.name
    generator = of_phase(path, phase, step, ema, **there)
  generator = with_text_encoder(generator, text_encoder)
  _ = generator.params  # what is damaged is refused here, and not when the first image is drawn
  return generator


def of_phase(folder, phase: str = '', step: str = '', average: str = '', **kwargs) -> Generator:
  """The network of a phase in a work directory.

  Args:
    folder: the work directory.
    phase: of stage teacher, distill or grow; '' takes the last that has a checkpoint.
    step: of the checkpoint, or 'best'; '' takes the newest.
    average: which of the phase's averages of its weights, such as 'std_0.1'; '' takes the first.
    **kwargs: `mesh`.

  Raises:
    ValueError: there is no such phase or step.
    WorkdirError, CheckpointError: there is nothing to draw from, or it is damaged.
  """
  config, name = workdir.image_phase(folder, phase)
  phase_folder = epath.Path(folder) / name
  chosen = starts.chosen_step(phase_folder, str(step), config.checkpoint)
  chosen = checkpoints.newest_step(phase_folder) if chosen is None else chosen
  read = lambda: autoencoders.with_decoder(config, starts.read_average(config, phase_folder, average, chosen)[0])
  source = {'phase': name, 'step': chosen} | ({'average': average} if average else {})
  return Generator(config, name, f'phase {name}, step {chosen}', source, read, folder=str(folder), **kwargs)


def of_weights(folder, kind: str = '', levels: int | None = None, **kwargs) -> Generator:
  """The network in a folder of `pagoda convert`, `export` or `publish`.

  Args:
    kind: 'teacher' draws with the Heun sampler, 'generator' in one step; '' where the folder tells which it is.
    levels: noise levels of a teacher's sampler; None: as many as a teacher phase's default, or as exported.
    **kwargs: `mesh`.

  Raises:
    ValueError: the network is not of the kind.
    WeightsError: what the folder holds draws no images.
    ConversionError, ExportError: it is neither, or damaged.
  """
  if levels is not None and (levels < 2 or levels % 1):
    raise ValueError(f'levels = {levels}: must be at least 2, and whole')
  if exported.is_exported(folder):
    description, read = exported.read_description(folder), lambda: exported.read_params(folder)
    if kind not in ('', description['kind']):
      raise ValueError(f'--kind={kind}: {folder} holds a {description["kind"]}')
    kind, levels, source = description['kind'], levels or description['levels'], description['source']
    unet = UNet(**description['options'])
  elif (file := epath.Path(folder) / claims.FILE).exists() and not claims.of_something_else(file):
    raise WeightsError(f'{folder}: a phase of a run, not converted weights; give --workdir and --phase')
  else:
    description, read = folders.read_description(folder), lambda: folders.load_converted(folder)[0]['params']
    if description['format'] not in UNET_FORMATS:
      raise WeightsError(f'{folder}: weights of format {description["format"]} draw no images; a teacher or a '
                         f'generator is of {" or ".join(UNET_FORMATS)}')
    unet, source = UNet(**description['options']), description['source']
    kind = _kind(folder, description, unet, kind)
  if kind == 'teacher':
    phase = configs.teacher() if levels is None else configs.teacher(sample_levels=levels)
    if unet.text_width and folders.is_converted(folder):
      phase.init_from = str(folder)  # no file tells how it was trained; published ones of captions can be guided
  else:
    if levels is not None:
      raise ValueError(f'--levels={levels}: {folder} holds a generator, which draws in one step')
    # Of what it would be trained with nothing is used; this fits every resolution.
    phase = configs.grow(discriminator=configs.discriminator(scales=1))
  config = architectures.experiment_of(unet, kind, phase)
  exported.set_up(config, kind, description)
  if rows := architectures.differences(unet, models.make_unet(config, kind)):
    raise WeightsError(f'{folder}: a network that no config can say:\n  ' + '\n  '.join(rows))
  return Generator(config, kind, f'{kind} of {folder}', source, read, **kwargs)


def _kind(folder, description, unet, asked):
  """'teacher' or 'generator': what was asked for, what has been published under the file's name, or what it must be."""
  entry = published.by_file_name(description['source'].get('file', ''))
  known = 'generator' if unet.grown else entry.kind if entry else ''
  if not (asked or known):
    raise ValueError(f'{folder}: whether {description["source"].get("file")} is a teacher or a one-step generator is '
                     'not in the file: give --kind=teacher or --kind=generator')
  if asked and known and asked != known:
    raise ValueError(f'--kind={asked}: {folder} holds a {known}'
                     + (f', with levels above its input of {unet.resolution} px' if unet.grown else f', {entry.name}'))
  return asked or known


def check_guidance(config, name: str, omegas: tuple[float, ...]) -> None:
  """Refuses strengths of guidance that a phase cannot be drawn with, and warns of those that it was not trained at.

  Raises:
    ValueError: says why it cannot.
  """
  shown = ','.join(f'{omega:g}' for omega in omegas)
  if not omegas:
    return
  if wrong := [omega for omega in omegas if not ranges.OMEGA.holds(omega)]:
    raise ValueError(f'--guidance={shown}: {wrong[0]:g} must be {ranges.OMEGA.must}')
  if not config.data.num_classes and not configs.has_text(config):
    raise ValueError(f'--guidance={shown}: {name} knows no classes to be guided to')
  if config.phases[name].stage == 'teacher':
    if not config.phases[name].label_dropout and not config.phases[name].init_from and set(omegas) != {1.0}:
      raise ValueError(f'--guidance={shown}: teacher {name} was trained with label_dropout = 0, and so has no answer '
                       'without label to be guided away from')
    return
  law = models.law_of(config)
  if law is None:
    raise ValueError(f"--guidance={shown}: {name} was trained without guidance (config.guidance.law = 'none') and "
                     'takes no strength of it')
  low, high = law.ends
  if outside := [f'{omega:g}' for omega in omegas if not low <= omega <= high]:
    logging.warning('--guidance: %s was trained with strengths of %g to %g; what it makes at %s is a guess',
                    name, low, high, ', '.join(outside))
