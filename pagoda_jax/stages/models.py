"""The networks of a phase, built from its config: what `make_train_step` and the samplers are given."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pagoda_jax import config as configs
from pagoda_jax import ladder
from pagoda_jax.method import diffusion, guidance, perception
from pagoda_jax.networks import unet as unets
from pagoda_jax.networks.discriminator import DiscriminatorEnsemble
from pagoda_jax.networks.pyramid import PyramidDiscriminator
from pagoda_jax.networks.token_heads import TokenDiscriminator
from pagoda_jax.networks.unet import UNet
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import architectures


@dataclasses.dataclass(frozen=True)
class Networks:
  """Everything a train step applies; parameters are always arguments.

  Attributes:
    unet: the teacher, the generator or the estimator of omega.
    discriminator: None for the teacher.
    feature_draws: feature_draws(rng, count) -> random parameters of the augmentation of `count` images.
    features: features(frozen, images, draws) -> maps that the discriminator sees, of the augmented images;
      equal draws make equal augmentations.
    distance_draws: the same for the distance.
    distance: distance(frozen, images, others, draws) -> [B], L_rec's. `frozen` holds the parameters of
      frozen feature networks, as frozen_weights.load makes it.
    invert: invert(teacher's params, batch) -> noise [B, R, R, C], where the step inverts its batch itself
      (inverting.make_inverter); None where batches bring their noise.
    law: of the strength of guidance that the generator takes as an input; None: it takes none.
    omega_of_keys: omega_of_keys(int32 [B]) -> [B], that pictures are inverted with, where the step inverts them.
    estimate: estimate(omega_phi's params, images [B, R, R, C], labels) -> omega [B]; None without such a network.
    draw: draw(teacher's params, noise, cond) -> images [B, R, R, C] that the step learns from: the estimator's guided
      ones, or the pairs of a phase whose `pairs` are the teacher's; None for others.
  """

  unet: UNet
  sigma_max: float = 80.0
  sigma_data: float = 0.5
  discriminator: nn.Module | None = None
  feature_draws: Callable[..., Any] | None = None
  features: Callable[..., Any] | None = None
  distance_draws: Callable[..., Any] | None = None
  distance: Callable[..., jax.Array] | None = None
  invert: Callable[..., jax.Array] | None = None
  law: guidance.Law | None = None
  omega_of_keys: Callable[..., jax.Array] | None = None
  estimate: Callable[..., jax.Array] | None = None
  draw: Callable[..., jax.Array] | None = None

  def apply(self, params, x, c_noise, cond, **kwargs) -> jax.Array:
    """The raw U-Net of a parameter tree."""
    return self.unet.apply({'params': params}, x, c_noise, cond, **kwargs)

  @jax.named_scope('denoiser')
  def denoise(self, params, x, sigma, cond, **kwargs) -> jax.Array:
    """The preconditioned denoiser D(x; sigma)."""
    return diffusion.precondition(self.apply, self.sigma_data)(params, x, sigma, cond, **kwargs)

  @jax.named_scope('generator')
  def generate(self, params, noise, cond) -> jax.Array:
    """One-step images [B, S, S, C] from noise [B, R, R, C] of standard deviation near sigma_max."""
    noise = sharding.split_as_batch(noise)
    return sharding.split_as_batch(
      diffusion.one_step(self.apply, params, noise, cond, self.sigma_max, self.sigma_data))

  @jax.named_scope('discriminator')
  def judge(self, variables, maps, cond) -> tuple[jax.Array, dict]:
    """(logits [B, n], updated collections) of the discriminator in train mode, from what `features` returns."""
    collections = [name for name in variables if name != 'params']
    return self.discriminator.apply(variables, maps, cond, train=True, mutable=collections)

  def noise_shape(self, batch: int) -> tuple[int, int, int, int]:
    """Shape of the noise that makes `batch` images."""
    return (batch, self.unet.resolution, self.unet.resolution, self.unet.image_channels)


def build(config, phase_name: str) -> Networks:
  """The networks that a phase trains (or, for `invert`, applies)."""
  phase = config.phases[phase_name]
  unet, law = make_unet(config, phase_name), law_of(config)
  shared = {'unet': unet, 'sigma_max': config.diffusion.sigma_max, 'sigma_data': config.diffusion.sigma_data}
  if phase.stage == 'guide':
    return Networks(**shared, law=law, estimate=_estimator(unet, config.diffusion, law))
  if phase.stage not in configs.GENERATOR_STAGES:
    return Networks(**shared)
  estimate = _estimator(make_unet(config, phase.guide), config.diffusion, law) if phase.get('guide') else None
  resolution = configs.phase_resolution(config, phase_name)
  penalised = phase.adversarial.r1 or phase.adversarial.r2  # kernels of attention cannot be differentiated twice
  discriminator, view = _discriminator(
    phase.discriminator, config.data.num_classes, law is not None, resolution, unet.dtype,
    'xla' if penalised else unet.attention_form)
  distance = _distance(phase.reconstruction, resolution, unet)
  return Networks(**shared, law=law, estimate=estimate, discriminator=discriminator, feature_draws=view[0],
                  features=jax.named_scope('features')(view[1]), distance_draws=distance[0],
                  distance=jax.named_scope('distance')(distance[1]))


def law_of(config) -> guidance.Law | None:
  """The law of the strength of guidance in an experiment; None without."""
  if not configs.has_guidance(config):
    return None
  law = config.guidance
  return guidance.Law(law.law, float(law.mean), float(law.std), float(law.low), float(law.high))


def _estimator(unet: UNet, levels, law: guidance.Law):
  """estimate(params, images, labels) -> omega [B]: the law's middle at first, and not clipped to its range.

  Images are shown as the teacher's states at its lowest noise level, which its encoder, that this begins as, knows.
  """
  low, high = law.ends
  _, _, c_in, c_noise = diffusion.coefficients(np.float64(levels.sigma_min), levels.sigma_data)

  @jax.named_scope('estimator')
  def estimate(params, images, labels):
    raw = unet.apply({'params': params}, np.float32(c_in) * images, jnp.full(len(images), np.float32(c_noise)),
                     {'label': labels})
    return (low + high) / 2 + (high - low) / 2 * raw

  return estimate


def _discriminator(config, num_classes: int, guided: bool, resolution: int, dtype, attention_form):
  """(module, (draw, features): what it sees)."""
  classes = num_classes if config.conditional else 0
  if config.features == 'projected':
    networks = perception.projected_networks(config.backbones, resolution, dtype, attention_form)
    ensemble = DiscriminatorEnsemble(classes, guided, dtype)
    return ensemble, perception.projected_view(networks, resolution, config.augment)
  if config.features == 'dino':
    network = perception.dino_network(resolution, dtype, attention_form)
    return TokenDiscriminator(classes, dtype=dtype), perception.dino_view(network, resolution, config.augment)
  pixels = PyramidDiscriminator(config.channels, classes, config.spectral_norm, guided, dtype)
  return pixels, perception.pixel_view(config.scales, resolution, config.augment)


def _distance(config, resolution: int, unet):
  """(draw, distance): L_rec's distance, in the type and form of attention of the U-Net."""
  if config.distance == 'projected':
    networks = perception.projected_networks(config.backbones, resolution, unet.dtype, unet.attention_form)
    return perception.projected_distance(networks, resolution, config.augment)
  if config.distance == 'lpips':
    return perception.lpips_distance(unet.dtype)
  return perception.pixel_distance(config.scale_weights)


def make_unet(config, phase_name: str) -> UNet:
  """The U-Net of a phase: the configured network, with one more decoder level for each doubling.

  With guidance generators take its strength as an input, and the estimator has no decoder.
  """
  stage = config.phases[phase_name].stage
  chain = ladder.growth_chain(config, phase_name)
  grown = [unets.grown_level(level) for level in (chain[0].init_levels if chain else ())]
  resolution = config.base_resolution << len(grown)
  for growth in chain:
    while resolution < growth.resolution:
      resolution *= 2
      grown.append(unets.GrownLevel(growth.channels, growth.num_blocks, growth.scale_shift))
  return UNet(
    resolution=config.base_resolution,
    image_channels=config.data.channels,
    num_classes=config.data.num_classes,
    grown=tuple(grown),
    omega_embedding=configs.has_guidance(config) and stage in configs.GENERATOR_STAGES,
    estimator=stage == 'guide',
    remat=config.remat,
    attention_form=config.get('attention', 'auto'),  # config.json of an earlier version has none
    dtype=jnp.dtype(config.precision),
    **architectures.fields_of(config.network),
  )


def make_teacher(config, phase_name: str) -> UNet:
  """The U-Net of the teacher that a phase of stage invert, guide or distill starts from."""
  return make_unet(config, phase_name).clone(omega_embedding=False, estimator=False)


def any_cond(batch: int) -> dict[str, jax.Array]:
  """Conditions of so many pictures, to initialise networks with."""
  return {'label': jnp.zeros(batch, jnp.int32), 'omega': jnp.ones(batch)}


def fresh_params(unet: UNet, rng: jax.Array):
  """Fresh parameters of a U-Net; `init_unet` is its compiled form."""
  batch = (1, unet.resolution, unet.resolution, unet.image_channels)
  return unet.init(rng, jnp.zeros(batch), jnp.zeros(1), any_cond(1))['params']


def init_unet(unet: UNet, rng: jax.Array):
  """Fresh parameters of a U-Net, as device arrays."""
  return run_once(functools.partial(fresh_params, unet), rng)


def init_discriminator(networks: Networks, frozen, resolution: int, rng: jax.Array):
  """Fresh variables of the discriminator for images of a resolution.

  `frozen` (or its shapes) tells the shapes of the maps; no feature network is run.
  """
  images = jax.ShapeDtypeStruct((1, resolution, resolution, networks.unet.image_channels), jnp.float32)
  seen = lambda frozen, images, rng: networks.features(frozen, images, networks.feature_draws(rng, 1))
  maps = jax.eval_shape(seen, frozen, images, rng)

  def init(rng):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), maps)
    return dict(networks.discriminator.init(rng, zeros, any_cond(1), train=True))

  return run_once(init, rng)


def run_once(function, *args):
  """function(*args), compiled quickly: as it runs once, the time to optimise it on CPU is never won back."""
  if isinstance(jnp.zeros(()), jax.core.Tracer):  # within jax.eval_shape: only its shapes are asked for
    return function(*args)
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else {}
  return jax.jit(function, compiler_options=options)(*args)


def at_matmul_precision(precision: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, its matrix products and convolutions at a config's `matmul_precision` but for those that say.

  At the default a TPU rounds the factors of float32 products to bfloat16 (8 bits), and a GPU to TF32 (11 bits).
  """

  def at_precision(*args):
    with jax.default_matmul_precision(precision):
      return function(*args)

  return at_precision


def count(params) -> int:
  """Number of parameters."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
