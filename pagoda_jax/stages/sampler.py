"""Images from a finished phase: one step for generators, the Heun sampler for teachers; `pagoda sample`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.config import spaces
from pagoda_jax.data.images import to_uint8
from pagoda_jax.method import diffusion, guidance
from pagoda_jax.runtime import randomness, sharding
from pagoda_jax.stages import decoding, models

CHUNK = 100  # images a call where nothing else is asked for


def noise_of(seed: int, indices: np.ndarray, shape: tuple[int, ...], sigma_max: float) -> jax.Array:
  """[N, *shape] of standard deviation sigma_max: image i's noise depends on the seed and i alone."""
  key = randomness.key_for(seed, randomness.PRIOR)
  # Of float64, which jax_enable_x64 makes the default, a seed's numbers are others.
  draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
  draws = jax.vmap(draw)(jnp.asarray(indices))
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
    self._draw = jax.jit(make_draw(config, name), out_shardings=sharding.replicated(mesh))

  def __call__(self, params, noise, labels, omegas=None, text=None, null=None) -> np.ndarray:
    """uint8 [N, S, S, C] of noise [N, R, R, C] (standard deviation near sigma_max), labels [N] and strengths of
    guidance [N] (None: none, or the nearest to it that a generator knows); with captions of text [N, ...] and null, as
    `make_draw` has them."""
    out = []
    if omegas is None and self.networks.law is not None:
      omegas = np.full(len(labels), self.networks.law.nearest(1.0))
    for start in range(0, len(labels), self.batch_size):
      part = slice(start, start + self.batch_size)
      missing = self.batch_size - len(labels[part])
      padded_noise = np.pad(np.asarray(noise[part]), [(0, missing), (0, 0), (0, 0), (0, 0)])
      batch = [padded_noise, np.pad(labels[part], (0, missing))]
      if omegas is not None or text:
        batch.append(None if omegas is None else
                     np.pad(np.asarray(omegas[part], np.float32), (0, missing), constant_values=1))
      if text:
        batch.append({key: np.pad(rows[part], [(0, missing), *[(0, 0)] * (rows.ndim - 1)])
                      for key, rows in text.items()})
      batch = sharding.place_global(batch, self.mesh)
      with jax.set_mesh(self.mesh):  # for kernels that do not divide themselves among devices
        images = np.asarray(self._draw(params, *batch, *([null] if text else [])))
      out.append(to_uint8(images[: self.batch_size - missing]))
    return np.concatenate(out)

  def draw(
      self, params, seed: int, labels: np.ndarray, omega: float | None = None, text=None, null=None
  ) -> np.ndarray:
    """uint8 [N, S, S, C] of the prior; image i depends on seed, i, its label, or its text, and omega alone."""
    shape = self.networks.noise_shape(1)[1:]
    omegas = None if omega is None else np.full(len(labels), omega)
    noise = noise_of(seed, np.arange(len(labels)), shape, self.networks.sigma_max)
    return self(params, noise, labels, omegas, text, null)


def make_draw(config, name: str):
  """draw(params, noise, labels, omegas=None, text=None, null=None) -> images [N, S, S, C] near [-1, 1] of a phase of
  configs.IMAGE_STAGES.

  omegas [N]: strengths of guidance; a teacher takes two evaluations for each of its own with them, and a generator
  that was trained without guidance takes none. text: embeddings of prompts, guidance.TEXT; null: those of the empty
  one, which a guided teacher needs. In latent space params hold the decoder too, under decoding.AUTOENCODER, and images
  are decoded.
  """
  phase = config.phases[name]
  levels = diffusion.sigmas(phase.sample_levels, **schedule(config)) if phase.stage == 'teacher' else None
  draw = functools.partial(_draw, models.build(config, name), levels)
  if spaces.is_latent(config):
    draw = _decoded(draw, decoding.make_drawing_decoder(config))
  return models.at_matmul_precision(config.evaluation.matmul_precision, draw)


def _decoded(draw, decode):
  def draw_pictures(params, *args, **kwargs):
    of_unet = {key: value for key, value in params.items() if key != decoding.AUTOENCODER}
    return decode(params[decoding.AUTOENCODER], draw(of_unet, *args, **kwargs))

  return draw_pictures


def draw_arguments(columns, null=None) -> tuple:
  """What `make_draw`'s function takes after the labels, of columns of a batch.

  Args:
    columns: strengths of guidance [N], if there are any, and with captions text, text_mask and text_pooled.
    null: embeddings of the empty caption; None: there are no captions.
  """
  if null is None:
    return tuple(columns)
  *omegas, text, mask, pooled = columns
  return (*(omegas or [None]), dict(zip(guidance.TEXT, (text, mask, pooled))), null)


def make_teachers_draw(config, name: str, num_levels: int):
  """draw(teacher's params, noise, cond, null=None) -> images that phase `name` learns from; guided where cond has an
  'omega'."""
  levels = diffusion.sigmas(num_levels, **schedule(config))
  networks = dataclasses.replace(models.build(config, name), unet=models.make_teacher(config, name))
  draw = models.at_matmul_precision(config.evaluation.matmul_precision, functools.partial(_draw, networks, levels))
  return lambda params, noise, cond, null=None: draw(
    params, noise, cond['label'], cond.get('omega'), guidance.text_of(cond), null)


def _draw(networks, levels, params, noise, labels, omegas=None, text=None, null=None):
  cond = {'label': labels} | (text or {}) | ({} if omegas is None else {'omega': omegas})
  if levels is None:
    return networks.generate(params, noise, cond)
  denoise = functools.partial(networks.denoise, params)
  if omegas is not None:
    denoise = guidance.guided(denoise, omegas, null)
  return diffusion.heun_sample(denoise, noise, levels, cond)


def schedule(config) -> dict:
  """Arguments of diffusion.sigmas from the config."""
  d = config.diffusion
  return {'sigma_min': d.sigma_min, 'sigma_max': d.sigma_max, 'rho': d.rho}


def parse_labels(text: str, count: int, num_classes: int, seed: int) -> np.ndarray:
  """Labels [count] int32 of 'cycle', 'random' or a list such as '3,5,7', which is repeated; -1 without classes.

  Raises:
    ValueError: not a number, or out of range; or a list for a network that knows no classes.
  """
  if not num_classes:
    if text not in ('cycle', 'random'):
      raise ValueError(f'--labels={text}: the network knows no classes')
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
