"""Images from a finished phase or from converted weights, and the files that hold them."""

import io

import numpy as np
from absl import logging
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.networks.unet import UNet
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.files import replacing
from pagoda_jax.stages import architectures, models, sampler
from pagoda_jax.training import checkpoints, claims, starts, workdir
from pagoda_jax.weights import published
from pagoda_jax.weights.convert import folders
from pagoda_jax.weights.convert.formats import UNET_FORMATS

FORMATS = ('.png', '.npz')


class WeightsError(ValueError):
  """Converted weights are of no network that draws images."""


def parse_guidance(text: str) -> tuple[float, ...]:
  """Strengths of guidance of a list such as '1,2,4'; () of ''.

  Raises:
    ValueError: not a number in the range that a config may ask for.
  """
  if not text:
    return ()
  try:
    omegas = tuple(float(part) for part in text.split(','))
  except ValueError:
    raise ValueError(f'--guidance={text}: must be a number, or several such as 1,2,4') from None
  if wrong := [omega for omega in omegas if not configs.OMEGA.holds(omega)]:
    raise ValueError(f'--guidance={text}: {wrong[0]:g} must be {configs.OMEGA.must}')
  return omegas


def check_guidance(config, name: str, omegas: tuple[float, ...]) -> None:
  """Refuses strengths of guidance that a phase cannot be drawn with, and warns of those that it was not trained at.

  Raises:
    ValueError: says why it cannot.
  """
  shown = ','.join(f'{omega:g}' for omega in omegas)
  if not omegas:
    return
  if not config.data.num_classes:
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


def draw(folder, phase: str, step: str, count: int, labels: str, seed: int, batch_size: int,
         omegas: tuple[float, ...] = (), average: str = ''):
  """Images of a phase in a work directory.

  Args:
    folder: the work directory.
    phase: a phase of stage teacher, distill or grow; '' takes the last that has a checkpoint.
    step: of the checkpoint, or 'best'; '' takes the newest.
    count: number of images.
    labels: 'cycle', 'random' or a list such as '3,5,7'.
    seed: the same seed gives the same images.
    batch_size: images a call.
    omegas: strengths of guidance, each for all images; (): none, or the nearest to it that a generator knows.
    average: which of the phase's averages of its weights, such as 'std_0.1'; '' takes the first.

  Returns:
    (uint8 [count * M, S, S, C], labels int32, the phase's name, the checkpoint's step): an image at all its M
    strengths, or its only one, then the next image.

  Raises:
    ValueError: there is no such phase, label or average, or the phase takes no guidance.
    WorkdirError, CheckpointError: there is nothing to draw from, or it is damaged.
  """
  config = workdir.read_config(folder)
  name = phase or workdir.last_finished(folder, config)
  if name not in config.phases or config.phases[name].stage not in configs.IMAGE_STAGES:
    choices = [n for n in config.order if config.phases[n].stage in configs.IMAGE_STAGES]
    raise ValueError(f'--phase={name}: must be one of {", ".join(choices)}')
  check_guidance(config, name, omegas)
  classes = sampler.parse_labels(labels, count, config.data.num_classes, seed)
  phase_folder = epath.Path(folder) / name
  chosen = checkpoints.chosen_step(phase_folder, step, config.checkpoint)
  params, step = starts.read_average(config, phase_folder, average, chosen)
  mesh = sharding.make_mesh()
  draw_batch = sampler.Sampler(config, name, mesh, min(batch_size, count))
  return *_at_strengths(draw_batch, sharding.place(params, mesh), seed, classes, omegas), name, step


def _at_strengths(draw_batch, params, seed, classes, omegas):
  """(images, labels): each noise and label at all strengths of guidance, one after the other."""
  images = np.stack([draw_batch.draw(params, seed, classes, omega) for omega in omegas or (None,)], axis=1)
  return images.reshape(-1, *images.shape[2:]), classes.repeat(images.shape[1])


def draw_weights(folder, kind: str, levels: int | None, count: int, labels: str, seed: int, batch_size: int,
                 omegas: tuple[float, ...] = ()):
  """Images of a network in a folder of `pagoda convert`.

  Args:
    folder: the folder.
    kind: 'teacher' draws with the Heun sampler, 'generator' in one step; '' where the folder tells which it is.
    levels: noise levels of a teacher's sampler; None: as many as a teacher phase's default.
    count, labels, seed, batch_size, omegas: as in `draw`.

  Returns:
    (uint8 [count, S, S, C], labels [count] int32, the kind).

  Raises:
    ValueError: there is no such label, or the network is not of the kind, or takes no guidance.
    WeightsError: what the folder holds draws no images.
    ConversionError: it is none of `pagoda convert`'s, or damaged.
  """
  if (epath.Path(folder) / claims.FILE).exists():
    raise WeightsError(f'{folder}: a phase of a run, not converted weights; give --workdir and --phase')
  description = folders.read_description(folder)
  if description['format'] not in UNET_FORMATS:
    raise WeightsError(f'{folder}: weights of format {description["format"]} draw no images; a teacher or a generator '
                       f'is of {" or ".join(UNET_FORMATS)}')
  unet = UNet(**description['options'])
  kind = _kind(folder, description, unet, kind)
  if kind == 'teacher':
    phase = configs.teacher() if levels is None else configs.teacher(sample_levels=levels)
  else:
    if levels is not None:
      raise ValueError(f'--levels={levels}: {folder} holds a generator, which draws in one step')
    # Of what it would be trained with nothing is used; this fits every resolution.
    phase = configs.grow(discriminator=configs.discriminator(scales=1))
  config = architectures.experiment_of(unet, kind, phase)
  if rows := architectures.differences(unet, models.make_unet(config, kind)):
    raise WeightsError(f'{folder}: a network that no config can say:\n  ' + '\n  '.join(rows))
  check_guidance(config, kind, omegas)
  classes = sampler.parse_labels(labels, count, unet.num_classes, seed)
  variables, _ = folders.load_converted(folder)
  mesh = sharding.make_mesh()
  draw_batch = sampler.Sampler(config, kind, mesh, min(batch_size, count))
  return *_at_strengths(draw_batch, sharding.place(variables['params'], mesh), seed, classes, omegas), kind


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


def write(path, images: np.ndarray, labels: np.ndarray, omegas: tuple[float, ...] = ()) -> None:
  """A PNG grid, a row of it as wide as there are strengths of guidance where these are several; or the npz that the
  guided-diffusion evaluator reads: arr_0 uint8 NHWC, arr_1 labels, and `omega` of each image where there are any."""
  path = epath.Path(path)
  if path.suffix == '.png':
    write_png(path, image_grid(images, len(omegas) if len(omegas) > 1 else 0))
    return
  buffer = io.BytesIO()
  more = {'omega': np.resize(np.float32(omegas), len(images))} if omegas else {}
  np.savez(buffer, arr_0=images, arr_1=labels.astype(np.int64), **more)
  with replacing(path) as file:
    file.write(buffer.getbuffer())
