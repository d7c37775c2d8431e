"""The networks of a phase, built from its config: what `make_train_step` and the samplers are given."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pagoda_jax import config as configs
from pagoda_jax import diffusion, losses
from pagoda_jax.networks import unet as unets
from pagoda_jax.networks.pyramid import PyramidDiscriminator, pixel_pyramid
from pagoda_jax.networks.unet import UNet

FORMS = {'edm': unets.EDM_ADM, 'guided': unets.GUIDED_ADM}


@dataclasses.dataclass(frozen=True)
class Networks:
  """Everything a train step applies; parameters are always arguments.

  Attributes:
    unet: the teacher or the generator.
    discriminator: None for the teacher.
    features: features(frozen, images) -> maps that the discriminator sees.
    distance: distance(frozen, images, others, rng) -> [B], L_rec's.
  """

  unet: UNet
  sigma_max: float = 80.0
  sigma_data: float = 0.5
  discriminator: nn.Module | None = None
  features: Callable[..., Any] | None = None
  distance: Callable[..., jax.Array] | None = None

  def apply(self, params, x, c_noise, cond, **kwargs) -> jax.Array:
    """The raw U-Net of a parameter tree."""
    return self.unet.apply({'params': params}, x, c_noise, cond, **kwargs)

  def denoise(self, params, x, sigma, cond, **kwargs) -> jax.Array:
    """The preconditioned denoiser D(x; sigma)."""
    return diffusion.precondition(self.apply, self.sigma_data)(params, x, sigma, cond, **kwargs)

  def generate(self, params, noise, cond) -> jax.Array:
    """One-step images [B, S, S, C] from noise [B, R, R, C] of standard deviation near sigma_max."""
    return diffusion.one_step(self.apply, params, noise, cond, self.sigma_max, self.sigma_data)

  def judge(self, variables, frozen, images, cond) -> tuple[jax.Array, dict]:
    """(logits [B, n], updated collections) of the discriminator in train mode."""
    collections = [name for name in variables if name != 'params']
    return self.discriminator.apply(
      variables, self.features(frozen, images), cond, train=True, mutable=collections
    )

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
  d, r = phase.discriminator, phase.reconstruction
  classes = config.data.num_classes if d.conditional else 0
  scales = [2**i for i in range(r.scales)]
  return Networks(
    **shared,
    discriminator=PyramidDiscriminator(d.channels, classes, unet.dtype),
    features=lambda frozen, images: pixel_pyramid(images, d.scales),
    distance=lambda frozen, images, others, rng: losses.pixel_distance(images, others, scales),
  )


def make_unet(config, phase_name: str) -> UNet:
  """The U-Net of a phase: the configured network, with one more decoder level for each doubling."""
  options = config.network.to_dict()
  form = FORMS[options.pop('form')]
  grown, resolution = [], config.base_resolution
  for growth in configs.growth_chain(config, phase_name):
    while resolution < growth.resolution:
      resolution *= 2
      grown.append(unets.GrownLevel(growth.channels, growth.num_blocks, growth.scale_shift))
  return UNet(
    resolution=config.base_resolution,
    image_channels=config.data.channels,
    num_classes=config.data.num_classes,
    grown=tuple(grown),
    dtype=jnp.dtype(config.precision),
    **form,
    **options,
  )


def init_unet(unet: UNet, rng: jax.Array):
  """Fresh parameters of a U-Net."""
  batch = (1, unet.resolution, unet.resolution, unet.image_channels)

  def init(rng):
    return unet.init(rng, jnp.zeros(batch), jnp.zeros(1), {'label': jnp.zeros(1, jnp.int32)})['params']

  return _compiled(init, rng)(rng)


def init_discriminator(networks: Networks, frozen, resolution: int, rng: jax.Array):
  """Fresh variables of the discriminator for images of a resolution."""

  def init(rng, frozen):
    images = jnp.zeros((1, resolution, resolution, networks.unet.image_channels))
    cond = {'label': jnp.zeros(1, jnp.int32)}
    return dict(networks.discriminator.init(rng, networks.features(frozen, images), cond, train=True))

  return _compiled(init, rng, frozen)(rng, frozen)


def _compiled(function, *args):
  """The function compiled quickly: it runs once, so on CPU the time to optimise it is never won back."""
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else {}
  return jax.jit(function).lower(*args).compile(compiler_options=options)


def count(params) -> int:
  """Number of parameters."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
