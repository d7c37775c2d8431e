"""Sample grids drawn while training: the prior above, held-out images beside their reconstructions below."""

import numpy as np
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.data import noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.data.images import grid_of_both, image_grid, write_png
from pagoda_jax.method import guidance
from pagoda_jax.networks import growth
from pagoda_jax.runtime import distributed, sharding
from pagoda_jax.stages import sampler as sampling
from pagoda_jax.weights import autoencoders

GAP = 4  # grey rows of pixels between samples and reconstructions
SEED = 0  # the same noise in every grid of a run: how one picture changes is what the eye follows


def columns(config) -> int:
  """Images a row: one of each class where there are few."""
  return config.data.num_classes if 4 <= config.data.num_classes <= 16 else 8


def held_out(config) -> tuple[str, np.ndarray]:
  """(split, indices) of the pictures that grids reconstruct: training ones where nothing is held out."""
  split = 'holdout' if config.data.holdout else 'train'
  total = len(streams.open_source(config.data, split))
  # Spread over the classes of a sorted source.
  return split, np.linspace(0, total - 1, min(2 * columns(config), total)).astype(int)


def held_out_text(config) -> dict[str, np.ndarray]:
  """A caption of each of these pictures, as streams.LoadPicture's records have it, drawn by its number in the place of
  a key; {} without any."""
  if not configs.has_text(config):
    return {}
  split, indices = held_out(config)
  source = streams.open_source(config.data, split)
  rows = [source.text(int(index), int(index)) for index in indices]
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def texts(config, mesh, count: int | None = None) -> dict:
  """What a Sampler takes of these captions beside noise and labels, and for `count` images, again from the first where
  that is more; {} without captions."""
  found = guidance.text_of(held_out_text(config))
  if not found:
    return {}
  rows = np.arange(len(found['text']) if count is None else count) % len(found['text'])
  null = sharding.place(streams.open_source(config.data).null_text(), mesh)
  return {'text': {key: values[rows] for key, values in found.items()}, 'null': null}


def make(config, folder, name: str, mesh):
  """draw(path, state) -> [H, W, C] uint8, a phase's grid; every host takes part, the first one writes it.

  None for a phase that draws no images.
  """
  if config.phases[name].stage not in configs.IMAGE_STAGES:
    return None
  wide = columns(config)
  count = -(-config.log.samples // wide) * wide
  labels = sampling.parse_labels('cycle', count, config.data.num_classes, SEED)
  sampler = sampling.Sampler(config, name, mesh, count)
  # The prior is drawn with the captions of the pictures below, one after the other.
  captions, of_prior = texts(config, mesh), texts(config, mesh, count)
  phase = config.phases[name]
  decoder = sharding.place(autoencoders.with_decoder(config, {}), mesh)
  pairs = None
  if 'noise' in phase:
    store = epath.Path(folder) / phase.noise
    pairs = noise_store.read_holdout(store)
    if phase.standardize_noise:
      opened = noise_store.open_store(store, config.diffusion.sigma_max, standardize=True)
      pairs['noise'] = opened.standardized(pairs['noise'])
    real, _ = streams.epoch_pictures(
      config.data, configs.phase_resolution(config, name), *held_out(config), streams.sampling(config))
    real = autoencoders.shown(config, real)

  def draw(path, state):
    params = growth.merge(state.ema, getattr(state, 'fixed', {})) | decoder
    image = image_grid(sampler.draw(params, SEED, labels, **of_prior), wide)
    if pairs is not None:
      image = np.concatenate([image, reconstructions(params, image)])
    if distributed.is_primary():
      write_png(path, image)
    return image

  def reconstructions(params, above):
    made = sampler(params, pairs['noise'], pairs['label'], pairs.get('omega'), **captions)
    grid = grid_of_both(real, made, wide)
    gap = np.full((GAP, *above.shape[1:]), 128, np.uint8)
    return np.concatenate([gap, grid])

  return draw
