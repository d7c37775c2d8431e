"""Images from a finished phase: one step for generators, the Heun sampler for teachers; `pagoda sample`."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pagoda_jax import checkpoints, diffusion, logs, models, sharding, workdir

CHUNK = 100  # images a call where nothing else is asked for


def noise_of(seed: int, indices: np.ndarray, shape: tuple[int, ...], sigma_max: float) -> jax.Array:
  """[N, *shape] of standard deviation sigma_max: image i's noise depends on the seed and i alone."""
  key = jax.random.key(seed)
  draws = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(jnp.asarray(indices))
  return sigma_max * draws


class Sampler:
  """Draws images of one phase; compiled once for one batch size.

  Args:
    config: the experiment.
    name: a phase of stage teacher, distill or grow.
    mesh: where to draw.
    batch_size: images a call; rounded up to what the mesh divides.
  """

  def __init__(self, config, name: str, mesh, batch_size: int = CHUNK):
    self.networks = models.build(config, name)
    self.mesh = mesh
    self.batch_size = -(-batch_size // mesh.size) * mesh.size
    phase = config.phases[name]
    levels = diffusion.sigmas(phase.sample_levels, **schedule(config)) if phase.stage == 'teacher' else None
    self._draw = jax.jit(functools.partial(_draw, self.networks, levels), out_shardings=sharding.replicated(mesh))

  def __call__(self, params, noise, labels) -> np.ndarray:
    """uint8 [N, S, S, C] of noise [N, R, R, C] (standard deviation near sigma_max) and labels [N]."""
    out = []
    for start in range(0, len(labels), self.batch_size):
      part = slice(start, start + self.batch_size)
      missing = self.batch_size - len(labels[part])
      padded_noise = np.pad(np.asarray(noise[part]), [(0, missing), (0, 0), (0, 0), (0, 0)])
      batch = sharding.place_global((padded_noise, np.pad(labels[part], (0, missing))), self.mesh)
      images = np.asarray(self._draw(params, *batch))
      out.append(logs.to_uint8(images[: self.batch_size - missing]))
    return np.concatenate(out)

  def draw(self, params, seed: int, labels: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, C] of the prior; image i depends on seed, i and its label alone."""
    shape = self.networks.noise_shape(1)[1:]
    return self(params, noise_of(seed, np.arange(len(labels)), shape, self.networks.sigma_max), labels)


def _draw(networks, levels, params, noise, labels):
  cond = {'label': labels}
  if levels is None:
    return networks.generate(params, noise, cond)
  return diffusion.heun_sample(functools.partial(networks.denoise, params), noise, levels, cond)


def schedule(config) -> dict:
  """Arguments of diffusion.sigmas from the config."""
  d = config.diffusion
  return {'sigma_min': d.sigma_min, 'sigma_max': d.sigma_max, 'rho': d.rho}


def parse_labels(text: str, count: int, num_classes: int, seed: int) -> np.ndarray:
  """Labels [count] int32 of 'cycle', 'random' or a list such as '3,5,7', which is repeated.

  Raises:
    ValueError: not a number, or out of range.
  """
  if not num_classes:
    return np.full(count, -1, np.int32)
  if text == 'cycle':
    return (np.arange(count) % num_classes).astype(np.int32)
  if text == 'random':
    return np.random.default_rng(seed).integers(0, num_classes, count).astype(np.int32)
  try:
    labels = [int(part) for part in text.split(',')]
  except ValueError:
    raise ValueError(f"--labels={text}: must be 'cycle', 'random' or numbers such as 3,5,7") from None
  wrong = [label for label in labels if not 0 <= label < num_classes]
  if wrong:
    raise ValueError(f'--labels={text}: {wrong[0]} is no class; there are 0 to {num_classes - 1}')
  return np.resize(np.array(labels, np.int32), count)


def last_finished(folder, config) -> str:
  """The last phase in the order that has images to give.

  Raises:
    WorkdirError: none has a checkpoint yet.
  """
  for name in reversed(config.order):
    if config.phases[name].stage != 'invert' and workdir.progress(folder, config, name):
      return name
  raise workdir.WorkdirError(f'{folder}: no phase there has a checkpoint yet; start one with `pagoda run`')


def define_flags(fv) -> None:
  from absl import flags

  flags.DEFINE_string('workdir', None, 'Work directory of a run.', flag_values=fv)
  flags.DEFINE_string('phase', '', 'Phase to draw from; default: the last that has a checkpoint.', flag_values=fv)
  flags.DEFINE_string('step', '', "Step of the checkpoint, or 'best'; default: the newest.", flag_values=fv)
  flags.DEFINE_integer('num_images', 64, 'Number of images.', lower_bound=1, flag_values=fv)
  flags.DEFINE_string('labels', 'cycle', "Classes: 'cycle', 'random', or a list such as 3,5,7.", flag_values=fv)
  flags.DEFINE_integer('seed', 0, 'Seed: the same seed gives the same images.', lower_bound=0, flag_values=fv)
  flags.DEFINE_integer('batch_size', CHUNK, 'Images a call.', lower_bound=1, flag_values=fv)
  flags.DEFINE_string('out', 'samples.png', 'File to write: .png (a grid) or .npz (arr_0, arr_1).', flag_values=fv)
  flags.mark_flags_as_required(['workdir'], flag_values=fv)


def run(fv, args) -> int:
  """`pagoda sample`."""
  del args
  if epath.Path(fv.out).suffix not in ('.png', '.npz'):
    raise ValueError(f'--out={fv.out}: must end in .png or .npz')
  config = workdir.read_config(fv.workdir)
  name = fv.phase or last_finished(fv.workdir, config)
  if name not in config.phases or config.phases[name].stage == 'invert':
    choices = [n for n in config.order if config.phases[n].stage != 'invert']
    raise ValueError(f'--phase={name}: must be one of {", ".join(choices)}')
  labels = parse_labels(fv.labels, fv.num_images, config.data.num_classes, fv.seed)
  folder = epath.Path(fv.workdir) / name
  params, step = checkpoints.read_generator(folder, checkpoints.chosen_step(folder, fv.step, config.checkpoint))
  mesh = sharding.make_mesh()
  images = Sampler(config, name, mesh, min(fv.batch_size, fv.num_images)).draw(
    sharding.place(params, mesh), fv.seed, labels
  )
  write(fv.out, images, labels)
  print(f'{fv.out}: {len(images)} images of {images.shape[1]} px, phase {name}, step {step}')
  return 0


def write(path, images: np.ndarray, labels: np.ndarray) -> None:
  """A PNG grid, or the npz that the guided-diffusion evaluator reads: arr_0 uint8 NHWC, arr_1 labels."""
  path = epath.Path(path)
  if path.suffix == '.png':
    logs.write_png(path, logs.image_grid(images))
    return
  buffer = io.BytesIO()
  np.savez(buffer, arr_0=images, arr_1=labels.astype(np.int64))
  partial = path.parent / (path.name + '.partial')
  path.parent.mkdir(parents=True, exist_ok=True)
  partial.write_bytes(buffer.getvalue())
  partial.replace(path)
