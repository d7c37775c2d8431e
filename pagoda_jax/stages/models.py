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
from pagoda_jax.method import diffusion, perception
from pagoda_jax.networks import unet as unets
from pagoda_jax.networks.discriminator import DiscriminatorEnsemble
from pagoda_jax.networks.pyramid import PyramidDiscriminator
from pagoda_jax.networks.token_heads import TokenDiscriminator
from pagoda_jax.networks.unet import UNet
from pagoda_jax.stages import architectures


@dataclasses.dataclass(frozen=True)
class Networks:
  """Everything a train step applies; parameters are always arguments.

  Attributes:
    unet: the teacher or the generator.
    discriminator: None for the teacher.
    feature_draws: feature_draws(rng, count) -> random parameters of the augmentation of `count` images.
    features: features(frozen, images, draws) -> maps that the discriminator sees, of the augmented images;
      equal draws make equal augmentations.
    distance_draws: the same for the distance.
    distance: distance(frozen, images, others, draws) -> [B], L_rec's. `frozen` holds the parameters of
      frozen feature networks, as frozen_weights.load makes it.
    invert: invert(teacher's params, batch) -> noise [B, R, R, C], where the step inverts its batch itself
      (inverting.make_inverter); None where batches bring their noise.
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
    return diffusion.one_step(self.apply, params, noise, cond, self.sigma_max, self.sigma_data)

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
  unet = make_unet(config, phase_name)
  shared = {'unet': unet, 'sigma_max': config.diffusion.sigma_max, 'sigma_data': config.diffusion.sigma_data}
  if phase.stage not in configs.GENERATOR_STAGES:
    return Networks(**shared)
  resolution = configs.phase_resolution(config, phase_name)
  discriminator, view = _discriminator(phase.discriminator, config.data.num_classes, resolution, unet.dtype)
  distance = _distance(phase.reconstruction, resolution, unet.dtype)
  return Networks(**shared, discriminator=discriminator, feature_draws=view[0],
                  features=jax.named_scope('features')(view[1]), distance_draws=distance[0],
                  distance=jax.named_scope('distance')(distance[1]))


def _discriminator(config, num_classes: int, resolution: int, dtype):
  """(module, (draw, features): what it sees)."""
  classes = num_classes if config.conditional else 0
  if config.features == 'projected':
    networks = perception.projected_networks(config.backbones, resolution, dtype)
    return DiscriminatorEnsemble(classes, dtype), perception.projected_view(networks, resolution, config.augment)
  if config.features == 'dino':
    network = perception.dino_network(resolution, dtype)
    return TokenDiscriminator(classes, dtype=dtype), perception.dino_view(network, resolution, config.augment)
  pixels = PyramidDiscriminator(config.channels, classes, config.spectral_norm, dtype)
  return pixels, perception.pixel_view(config.scales, resolution, config.augment)


def _distance(config, resolution: int, dtype):
  """(draw, distance): L_rec's distance."""
  if config.distance == 'projected':
    networks = perception.projected_networks(config.backbones, resolution, dtype)
    return perception.projected_distance(networks, resolution, config.augment)
  if config.distance == 'lpips':
    return perception.lpips_distance(dtype)
  return perception.pixel_distance(config.scale_weights)


def make_unet(config, phase_name: str) -> UNet:
  """The U-Net of a phase: the configured network, with one more decoder level for each doubling."""
  chain = configs.growth_chain(config, phase_name)
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
    remat=config.remat,
    dtype=jnp.dtype(config.precision),
    **architectures.fields_of(config.network),
  )


def fresh_params(unet: UNet, rng: jax.Array):
  """Fresh parameters of a U-Net; `init_unet` is its compiled form."""
  batch = (1, unet.resolution, unet.resolution, unet.image_channels)
  return unet.init(rng, jnp.zeros(batch), jnp.zeros(1), {'label': jnp.zeros(1, jnp.int32)})['params']


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
    return dict(networks.discriminator.init(rng, zeros, {'label': jnp.zeros(1, jnp.int32)}, train=True))

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
