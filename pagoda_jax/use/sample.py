"""Images from a finished phase, and the files that hold them."""

import io

import numpy as np
from absl import logging
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.files import replacing
from pagoda_jax.stages import models, sampler
from pagoda_jax.training import checkpoints, workdir

FORMATS = ('.png', '.npz')


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
         omegas: tuple[float, ...] = ()):
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

  Returns:
    (uint8 [count * M, S, S, C], labels int32, the phase's name, the checkpoint's step): an image at all its M
    strengths, or its only one, then the next image.

  Raises:
    ValueError: there is no such phase or label, or the phase takes no guidance.
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
  params, step = checkpoints.read_generator(phase_folder, chosen)
  mesh = sharding.make_mesh()
  draw_batch = sampler.Sampler(config, name, mesh, min(batch_size, count))
  placed = sharding.place(params, mesh)
  images = np.stack([draw_batch.draw(placed, seed, classes, omega) for omega in omegas or (None,)], axis=1)
  return images.reshape(-1, *images.shape[2:]), classes.repeat(images.shape[1]), name, step


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
