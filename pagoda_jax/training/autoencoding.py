"""What a phase that trains an autoencoder leaves besides checkpoints: grids, and the folder `weights` that others take.

The folder is one of `pagoda convert`'s, with the average of the weights, and the scaling and shift by which latents of
the training pictures have unit variance.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pagoda_jax.data import stream as streams
from pagoda_jax.data.images import grid_of_both, normalize, quantized, write_png
from pagoda_jax.runtime import buckets, distributed, sharding
from pagoda_jax.stages import autoencoder, decoding
from pagoda_jax.training import checkpoints, grids
from pagoda_jax.weights import autoencoders
from pagoda_jax.weights.convert import folders
from pagoda_jax.weights.convert.formats import Converted

WEIGHTS = 'weights'  # in the phase's folder
MEASURED = 2048  # training pictures that scaling and shift are measured on, drawn with a fixed seed
BATCH = 64  # pictures at once, fewer of large ones


def make_grid(config, mesh):
  """draw(path, state) -> [H, W, C] uint8: held-out pictures, and what is decoded of their mean latents below each."""
  pictures, _ = streams.epoch_pictures(config.data, config.base_resolution, *grids.held_out(config))
  wide = min(grids.columns(config), len(pictures))
  encode, decode = _coder(config)
  again = jax.jit(lambda params, images: quantized(decode(params, encode(params, images)[0])),
                  out_shardings=sharding.replicated(mesh))

  def draw(path, state):
    decoded = np.concatenate([np.asarray(again(state.ema, pictures[part])) for part in _parts(*pictures.shape[:2])])
    image = grid_of_both(pictures, decoded, wide)
    if distributed.is_primary():
      write_png(path, image)
    return image

  return draw


def _coder(config):
  """(encode(params, uint8 images) -> mean and log variance, decode(params, latents) -> images), in float32."""
  module = decoding.make_autoencoder(config, jnp.float32)
  return (lambda params, images: module.apply({'params': params}, normalize(images), method='encode'),
          lambda params, latents: module.apply({'params': params}, latents, method='decode'))


def _parts(count: int, side: int) -> list[slice]:
  """Of so many pictures, as many at once as a device has room for: 64 of 512 px would take tens of gigabytes, and that
  when the phase has made its last step."""
  size = max(min(BATCH, decoding.DECODED_AT_ONCE // side**2), 1)
  return [slice(start, start + size) for start in range(0, count, size)]


def leave_weights(config, folder, name: str) -> None:
  """Writes a finished phase's folder `weights`, unless it is there already, whole and of the newest checkpoint.

  Raises:
    CheckpointError: there is no checkpoint that can be read.
    OSError: it cannot be written; names it.
  """
  phase_folder = epath.Path(folder) / name
  params, step = checkpoints.read_generator(phase_folder)  # by all processes: none comes back from it alone
  distributed.from_primary(
    f'{name}: weights', functools.partial(_leave_weights, config, phase_folder / WEIGHTS, name, params, step))


def _leave_weights(config, target, name, params, step):
  source = {'phase': name, 'step': step, 'sha256': checkpoints.digest(params)}
  if _is_left(target, source):
    return
  if target.exists():
    distributed.say(f'{target}: of another checkpoint, or damaged; written anew')
    target.rmtree() if buckets.is_in_bucket(target) else shutil.rmtree(target)
  measured = measure(config, params, config.phases[name].sizes)
  options = autoencoders.options(config, measured['scaling'], measured['shift'])
  folders.write_converted(
    target, Converted({'params': params}, options, autoencoders.FORMAT), source | {'measured': measured})
  held = ', '.join(f'{value:.2f} dB at {side} px' for side, value in measured['psnr'].items())
  which = 'held-out' if config.data.holdout else 'training'
  distributed.say(f'{name}: PSNR of {measured["held_out"]} {which} pictures '
                  f'from their mean latents: {held}\n{name}: latents of mean {measured["shift"]:.4g} and standard '
                  f'deviation {1 / measured["scaling"]:.4g}, each known to {measured["deviation"]:.3g}\n'
                  f'{name}: config.autoencoder.weights={target}')


def _is_left(target, source) -> bool:
  try:
    folders.read_folder(target)  # reads it all: what is damaged is made again
  except folders.ConversionError:
    return False
  before = folders.read_description(target)['source']
  return {key: before.get(key) for key in source} == source


def measure(config, params, sizes: int) -> dict:
  """Of an autoencoder's parameters: 'scaling' and 'shift' of its latents, the mean 'deviation' of their distributions,
  and 'psnr' of held-out pictures ('held_out' of them) at each of the `sizes` that it has learnt."""
  side = config.base_resolution
  count = len(streams.open_source(config.data, 'train'))
  chosen = np.sort(np.random.default_rng(0).permutation(count)[:MEASURED])
  encode, decode = map(jax.jit, _coder(config))
  total = squares = deviations = numbers = 0.0
  for part in _parts(len(chosen), side):
    images, _ = streams.epoch_pictures(config.data, side, 'train', chosen[part])
    mean, log_variance = (np.asarray(x, np.float64) for x in encode(params, images))
    deviation = np.exp(log_variance / 2)
    total, numbers = total + mean.sum(), numbers + mean.size
    squares, deviations = squares + (mean**2 + deviation**2).sum(), deviations + deviation.sum()
  shift = total / numbers
  std = max((squares / numbers - shift**2) ** 0.5, 1e-12)
  split = 'holdout' if config.data.holdout else 'train'
  held = np.arange(min(len(streams.open_source(config.data, split)), MEASURED))
  psnr = {}
  for size in range(sizes):
    found = []
    for part in _parts(len(held), side >> size):
      images, _ = streams.epoch_pictures(config.data, side >> size, split, held[part])
      decoded = quantized(decode(params, encode(params, images)[0]))
      found.append(np.asarray(autoencoder.psnr(normalize(decoded), normalize(images))))
    psnr[str(side >> size)] = float(np.concatenate(found).mean())
  return {'scaling': 1 / std, 'shift': shift, 'deviation': deviations / numbers, 'psnr': psnr, 'held_out': len(held)}
