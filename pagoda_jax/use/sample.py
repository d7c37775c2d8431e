"""Images from a finished phase, and the files that hold them."""

import io

import numpy as np
from etils import epath

from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.files import replacing
from pagoda_jax.stages import sampler
from pagoda_jax.training import checkpoints, starts, workdir

FORMATS = ('.png', '.npz')


def draw(folder, phase: str, step: str, count: int, labels: str, seed: int, batch_size: int,
         average: str = ''):
  """Images of a phase in a work directory.

  Args:
    folder: the work directory.
    phase: a phase of stage teacher, distill or grow; '' takes the last that has a checkpoint.
    step: of the checkpoint, or 'best'; '' takes the newest.
    count: number of images.
    labels: 'cycle', 'random' or a list such as '3,5,7'.
    seed: the same seed gives the same images.
    batch_size: images a call.
    average: which of the phase's averages of its weights, such as 'std_0.1'; '' takes the first.

  Returns:
    (uint8 [count, S, S, C], labels [count] int32, the phase's name, the checkpoint's step).

  Raises:
    ValueError: there is no such phase, label or average.
    WorkdirError, CheckpointError: there is nothing to draw from, or it is damaged.
  """
  config = workdir.read_config(folder)
  name = phase or workdir.last_finished(folder, config)
  if name not in config.phases or config.phases[name].stage == 'invert':
    choices = [n for n in config.order if config.phases[n].stage != 'invert']
    raise ValueError(f'--phase={name}: must be one of {", ".join(choices)}')
  classes = sampler.parse_labels(labels, count, config.data.num_classes, seed)
  phase_folder = epath.Path(folder) / name
  chosen = checkpoints.chosen_step(phase_folder, step, config.checkpoint)
  params, step = starts.read_average(config, phase_folder, average, chosen)
  mesh = sharding.make_mesh()
  draw_batch = sampler.Sampler(config, name, mesh, min(batch_size, count))
  return draw_batch.draw(sharding.place(params, mesh), seed, classes), classes, name, step


def write(path, images: np.ndarray, labels: np.ndarray) -> None:
  """A PNG grid, or the npz that the guided-diffusion evaluator reads: arr_0 uint8 NHWC, arr_1 labels."""
  path = epath.Path(path)
  if path.suffix == '.png':
    write_png(path, image_grid(images))
    return
  buffer = io.BytesIO()
  np.savez(buffer, arr_0=images, arr_1=labels.astype(np.int64))
  with replacing(path) as file:
    file.write(buffer.getbuffer())
