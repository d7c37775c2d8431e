"""Images from a finished phase or from converted weights, and the files that hold them."""

import io

import numpy as np
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.networks.unet import UNet
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.files import replacing
from pagoda_jax.stages import architectures, models, sampler
from pagoda_jax.training import checkpoints, claims, workdir
from pagoda_jax.weights import published
from pagoda_jax.weights.convert import folders
from pagoda_jax.weights.convert.formats import UNET_FORMATS

FORMATS = ('.png', '.npz')


class WeightsError(ValueError):
  """Converted weights are of no network that draws images."""


def draw(folder, phase: str, step: str, count: int, labels: str, seed: int, batch_size: int):
  """Images of a phase in a work directory.

  Args:
    folder: the work directory.
    phase: a phase of stage teacher, distill or grow; '' takes the last that has a checkpoint.
    step: of the checkpoint, or 'best'; '' takes the newest.
    count: number of images.
    labels: 'cycle', 'random' or a list such as '3,5,7'.
    seed: the same seed gives the same images.
    batch_size: images a call.

  Returns:
    (uint8 [count, S, S, C], labels [count] int32, the phase's name, the checkpoint's step).

  Raises:
    ValueError: there is no such phase or label.
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
  params, step = checkpoints.read_generator(phase_folder, chosen)
  mesh = sharding.make_mesh()
  draw_batch = sampler.Sampler(config, name, mesh, min(batch_size, count))
  return draw_batch.draw(sharding.place(params, mesh), seed, classes), classes, name, step


def draw_weights(folder, kind: str, levels: int | None, count: int, labels: str, seed: int, batch_size: int):
  """Images of a network in a folder of `pagoda convert`.

  Args:
    folder: the folder.
    kind: 'teacher' draws with the Heun sampler, 'generator' in one step; '' where the folder tells which it is.
    levels: noise levels of a teacher's sampler; None: as many as a teacher phase's default.
    count, labels, seed, batch_size: as in `draw`.

  Returns:
    (uint8 [count, S, S, C], labels [count] int32, the kind).

  Raises:
    ValueError: there is no such label, or the network is not of the kind.
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
  classes = sampler.parse_labels(labels, count, unet.num_classes, seed)
  variables, _ = folders.load_converted(folder)
  mesh = sharding.make_mesh()
  draw_batch = sampler.Sampler(config, kind, mesh, min(batch_size, count))
  return draw_batch.draw(sharding.place(variables['params'], mesh), seed, classes), classes, kind


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
