"""PSNR and LPIPS between pictures and what they should be: two sets in the same order, or a generator's own pairs."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import images as images_lib
from pagoda_jax.data import noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.evaluation.pictures import EvaluationError, Pictures
from pagoda_jax.evaluation.sums import sweep
from pagoda_jax.method import guidance
from pagoda_jax.networks.frozen.vgg_lpips import LPIPS
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import decoding, models
from pagoda_jax.stages import sampler as sampling
from pagoda_jax.weights import frozen_weights, locate
from pagoda_jax.weights.convert import formats

MOST_PSNR = 100.0  # dB, of equal pictures too
LPIPS_SIDE = 16  # pixels that VGG16's pools need


def _comparing(metrics, height, width, weights_dir):
  """(compare(variables, uint8 images, uint8 images) -> {metric: [B, 1]}, variables)."""
  variables, network = {}, LPIPS()
  if 'lpips' in metrics:
    vgg, linear = (locate.find(name, weights_dir) for name in frozen_weights.LPIPS_FILES)
    variables = formats.read_converted(vgg, 'lpips', linear=linear).variables

  def compare(variables, images, others):
    a, b = (images_lib.normalize(x) for x in (images, others))
    found = {'psnr': psnr(images, others)}
    if 'lpips' in metrics:
      with jax.default_matmul_precision('highest'):
        found['lpips'] = network.apply(variables, a, b)
    return {name: found[name][:, None] for name in metrics}

  return compare, variables


def _check(metrics, height, width, weights_dir) -> None:
  """Refuses pictures that are too small for a metric, and weights that are not here."""
  if 'lpips' not in metrics:
    return
  if min(height, width) < LPIPS_SIDE:
    raise EvaluationError(f'--metrics=lpips: pictures of {width} x {height} pixels; it takes {LPIPS_SIDE} or more')
  for wanted in map(locate.entry, frozen_weights.LPIPS_FILES):
    if locate.located(wanted, weights_dir) is None:
      raise locate.MissingWeightsError(locate.how_to_get(wanted, weights_dir))


def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio in dB of 8-bit pictures [B, H, W, C], [B]; at most MOST_PSNR."""
  difference = images.astype(jnp.float32) - others.astype(jnp.float32)
  error = jnp.mean(difference**2, axis=(1, 2, 3)) / 255**2
  return jnp.minimum(-10 * jnp.log10(jnp.maximum(error, 1e-30)), MOST_PSNR)


class _Means:
  def __init__(self):
    self._sums, self._count = {}, 0

  def add(self, start, found):
    del start
    self._count += len(next(iter(found.values())))
    for name, values in found.items():
      self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values, dtype=np.float64))

  def values(self):
    return {name: total / self._count for name, total in self._sums.items()}


def check_pictures(metrics, samples: Pictures, others: Pictures | None, weights_dir) -> None:
  """What `of_pictures` would refuse: before all else that is measured, which may take hours.

  Raises:
    EvaluationError: they are not as many, or of other sizes or too small, or the reference has no pictures.
    MissingWeightsError: LPIPS's are not here.
  """
  shape = lambda x: f'{x.count} of {x.width} x {x.height} x {x.channels}'
  if others is None or shape(samples) != shape(others):
    raise EvaluationError(f'{" and ".join(metrics)} compare picture by picture, and the samples are {shape(samples)}, '
                          f'the reference {"holds statistics only" if others is None else "is " + shape(others)}')
  _check(metrics, samples.height, samples.width, weights_dir)


def of_pictures(metrics, samples: Pictures, others: Pictures, mesh, batch_size: int, weights_dir) -> dict[str, float]:
  """Means over pairs of two sets in the same order, after `check_pictures`."""
  compare, variables = _comparing(metrics, samples.height, samples.width, weights_dir)
  placed, means = sharding.place(variables, mesh, by_rule=False), _Means()
  compiled = jax.jit(compare, out_shardings=sharding.replicated(mesh))
  with jax.set_mesh(mesh):
    sweep(lambda *batch: compiled(placed, *batch), lambda numbers: (samples.read(numbers), others.read(numbers)),
          samples.count, mesh, batch_size, means.add, 'pairs')
  return means.values()


def check_phase(metrics, config, folder, name: str, weights_dir) -> None:
  """What `of_phase` would refuse: before all else that is measured, which may take hours.

  Raises:
    EvaluationError: the noise is not stored, or pictures are too small.
    NoiseStoreError: it is damaged.
    MissingWeightsError: LPIPS's are not here.
  """
  phase, side = config.phases[name], configs.phase_resolution(config, name) * spaces.factor(config)
  if not config.phases[phase.noise].store:
    raise EvaluationError(f'{" and ".join(metrics)}: {phase.noise} stores no noise (store = False): there are no '
                          'pairs to compare')
  _check(metrics, side, side, weights_dir)
  noise_store.open_store(epath.Path(folder) / phase.noise, config.diffusion.sigma_max, phase.standardize_noise)


def of_phase(metrics, config, folder, name: str, params, mesh, count: int, batch_size: int,
             weights_dir) -> dict[str, float]:
  """Means over a generator's reconstructions: from the stored noise of training pictures to these pictures.

  After `check_phase`.

  Args:
    metrics: of plans.PAIRED.
    config, folder, name: experiment, work directory, phase.
    params: on the mesh.
    count: of pairs, spread over all there are.

  Raises:
    NoiseStoreError: the noise is damaged.
  """
  phase, side = config.phases[name], configs.phase_resolution(config, name)
  networks = models.build(config, name)
  store = noise_store.open_store(epath.Path(folder) / phase.noise, networks.sigma_max, phase.standardize_noise)
  load = streams.LoadPicture(*streams.source_keys(config.data), side, config.data.channels, store,
                             text=configs.has_text(config), drawn=streams.sampling(config),
                             band_of=streams.band_of(config.data))
  keys = np.linspace(0, len(store) - 1, min(count, len(store))).astype(int)
  pixels = side * spaces.factor(config)
  compare, variables = _comparing(metrics, pixels, pixels, weights_dir)
  decode = decoding.make_drawing_decoder(config) if spaces.is_latent(config) else None
  draw = sampling.make_draw(config, name)
  columns = ('image', 'noise', 'label', *(['omega'] if networks.law is not None else []))
  null = None
  if configs.has_text(config):
    columns, null = (*columns, *guidance.TEXT), load.source.null_text()

  def step(params, variables, images, noise, labels, *more):
    drawn = draw(params, noise, labels, *sampling.draw_arguments(more, null))
    if decode:
      images = images_lib.quantized(decode(params[decoding.AUTOENCODER], images))
    return compare(variables, images_lib.quantized(drawn), images)

  def rows(numbers):
    records = [load(int(key)) for key in keys[numbers]]
    return tuple(np.stack([record[column] for record in records]) for column in columns)

  compiled, means = jax.jit(step, out_shardings=sharding.replicated(mesh)), _Means()
  placed = sharding.place(variables, mesh, by_rule=False)
  with jax.set_mesh(mesh):
    sweep(lambda *batch: compiled(params, placed, *batch), rows, len(keys), mesh, batch_size, means.add,
          'reconstructions')
  return {f'reconstruction_{key}': value for key, value in means.values().items()} | {
    'reconstructions': len(keys)}
