"""The networks of a phase, built from its config: what `make_train_step` and the samplers are given."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from pagoda_jax import config as configs
from pagoda_jax.config import ladder, spaces
from pagoda_jax.method import ddpm, diffusion, guidance, perception
from pagoda_jax.networks import growth
from pagoda_jax.networks import unet as unets
from pagoda_jax.networks.autoencoder import AutoencoderKL
from pagoda_jax.networks.discriminator import DiscriminatorEnsemble
from pagoda_jax.networks.frozen.clip_image import CLIPImage
from pagoda_jax.networks.pyramid import PyramidDiscriminator
from pagoda_jax.networks.token_heads import TokenDiscriminator
from pagoda_jax.networks.unet import UNet
from pagoda_jax.runtime import sharding, trees
from pagoda_jax.stages import architectures, decoding


@dataclasses.dataclass(frozen=True)
class Networks:
  """Everything a train step applies; parameters are always arguments.

  Attributes:
    unet: the teacher, the generator or the estimator of omega; None for an autoencoder.
    discriminator: None for the teacher.
    feature_draws: feature_draws(rng, count) -> random parameters of the augmentation of `count` images.
    features: features(frozen, images, draws) -> maps that the discriminator sees, of the augmented images;
      equal draws make equal augmentations.
    distance_draws: the same for the distance.
    distance: distance(frozen, images, others, draws) -> [B], L_rec's. `frozen` holds the parameters of
      frozen feature networks, as frozen_weights.load makes it.
    clip_distance: clip_distance(frozen, images, cond) -> [B], of images and their captions.
    invert: invert(teacher's params, batch, null) -> noise [B, R, R, C], where the step inverts its batch itself
      (inverting.make_inverter); None where batches bring their noise.
    law: of the strength of guidance that the generator takes as an input; None: it takes none.
    omega_of_keys: omega_of_keys(int32 [B], kinds of captions) -> [B], that pictures are inverted with, where the step
      inverts them.
    encode: encode(encoder's params, images [B, R, R, C], cond) -> their noise / sigma_max; None without such a network.
    estimate: estimate(omega_phi's params, images [B, R, R, C], cond) -> omega [B]; None without such a network.
    draw: draw(teacher's params, noise, cond, null) -> images [B, R, R, C] that the step learns from: the estimator's
      guided ones, or the pairs of a phase whose `pairs` are the teacher's; None for others.
    autoencoder: that the phase trains; None for others.
    latent: whether images are latents.
    vector_width: of captions' vectors, which discriminators see even where the U-Net does not; 0: no captions.
  """

  unet: UNet | None
  sigma_max: float = 80.0
  sigma_data: float = 0.5
  discriminator: nn.Module | None = None
  feature_draws: Callable[..., Any] | None = None
  features: Callable[..., Any] | None = None
  distance_draws: Callable[..., Any] | None = None
  distance: Callable[..., jax.Array] | None = None
  clip_distance: Callable[..., jax.Array] | None = None
  invert: Callable[..., jax.Array] | None = None
  law: guidance.Law | None = None
  omega_of_keys: Callable[..., jax.Array] | None = None
  encode: Callable[..., jax.Array] | None = None
  estimate: Callable[..., jax.Array] | None = None
  draw: Callable[..., jax.Array] | None = None
  autoencoder: AutoencoderKL | None = None
  latent: bool = False
  vector_width: int = 0

  @property
  def image_channels(self) -> int:
    return self.unet.image_channels if self.unet else self.autoencoder.channels

  def apply(self, params, x, c_noise, cond, **kwargs) -> jax.Array:
    """The raw U-Net of a parameter tree."""
    return self.unet.apply({'params': params}, x, c_noise, cond, **kwargs)

  @jax.named_scope('denoiser')
  def denoise(self, params, x, sigma, cond, **kwargs) -> jax.Array:
    """The preconditioned denoiser D(x; sigma)."""
    return diffusion.precondition(self.apply, self.sigma_data, of_sigma(self.unet))(params, x, sigma, cond, **kwargs)

  @jax.named_scope('generator')
  def generate(self, params, noise, cond) -> jax.Array:
    """One-step images [B, S, S, C] from noise [B, R, R, C] of standard deviation near sigma_max."""
    noise = sharding.split_as_batch(noise)
    return sharding.split_as_batch(
      diffusion.one_step(self.apply, params, noise, cond, self.sigma_max, self.sigma_data, of_sigma(self.unet)))

  @jax.named_scope('discriminator')
  def judge(self, variables, maps, cond) -> tuple[jax.Array, dict]:
    """(logits [B, n], updated collections) of the discriminator in train mode, from what `features` returns."""
    collections = [name for name in variables if name != 'params']
    return self.discriminator.apply(variables, maps, cond, train=True, mutable=collections)

  def noise_shape(self, batch: int) -> tuple[int, int, int, int]:
    """Shape of the noise that makes `batch` images."""
    return (batch, self.unet.resolution, self.unet.resolution, self.unet.image_channels)


def condition_of(networks: Networks, batch, prefix: str = '') -> dict[str, jax.Array]:
  """`guidance.condition_of` of a step's batch.

  Raises:
    ValueError: the U-Net knows classes, and the batch has no label, a whole number, for each image. Without any it
      would learn images of no class.
  """
  cond = guidance.condition_of(batch, prefix)
  if classes := getattr(getattr(networks, 'unet', None), 'num_classes', 0):  # a caller's own may be plainer
    name, count = f'{prefix}label', len(batch[f'{prefix}image'])
    if name not in batch:
      raise ValueError(f"a network of {classes} classes needs batch['{name}']; got {sorted(batch)}")
    label = cond['label'] = jnp.asarray(cond['label'])
    if label.shape != (count,) or not jnp.issubdtype(label.dtype, jnp.integer):
      raise ValueError(f"batch['{name}'] is {label.dtype} {list(label.shape)}; must be integers [{count}], the "
                       "number of each image's class")
  return cond


def check_sizes(networks: Networks, batch) -> None:
  """Refuses a batch of images of another size, or of other channels, than the network's, and other counts of them.

  Feature networks resize what they are given and take grey for RGB, and would compare them; one noise would be
  compared with every image's.
  """
  if not isinstance(networks.unet, UNet):
    return  # the caller's own
  count, base, channels = len(batch['image']), networks.unet.resolution, networks.unet.image_channels
  grown = base << len(networks.unet.grown)
  for name, side in (('image', grown), ('real_image', grown), ('noise', base)):
    shape = batch[name].shape if name in batch else (count, side, side, channels)
    if shape[1:] != (side, side, channels):
      raise ValueError(f"batch['{name}'] is {list(shape)}; must be [B, {side}, {side}, {channels}], as of the network")
    if shape[0] != count:
      raise ValueError(f"batch['{name}'] holds {shape[0]}, and batch['image'] {count}; must be as many")


def build(config, phase_name: str) -> Networks:
  """The networks that a phase trains (or, for `invert`, applies)."""
  phase = config.phases[phase_name]
  if phase.stage == 'autoencoder':
    return _of_autoencoder(config, phase)
  unet, law = make_unet(config, phase_name), law_of(config)
  shared = {'unet': unet, 'sigma_max': config.diffusion.sigma_max, 'sigma_data': config.diffusion.sigma_data,
            'latent': spaces.is_latent(config)}
  if phase.stage == 'guide':
    return Networks(**shared, law=law, estimate=_estimator(unet, config.diffusion, law))
  if phase.stage == 'encode' or phase.get('encoder'):
    return Networks(**shared, law=law, encode=_encoder(unet, config.diffusion))
  if phase.stage not in configs.GENERATOR_STAGES:
    return Networks(**shared)
  estimate = _estimator(make_unet(config, phase.guide), config.diffusion, law) if phase.get('guide') else None
  judged, compared = (spaces.loss_side(config, phase_name, key) for key in ('adversarial', 'reconstruction'))
  pairs = phase.reconstruction_adversarial
  judging = [phase.adversarial] + [pairs] * (pairs.weight > 0)  # on the same features
  penalised = any(adv.r1 or adv.r2 for adv in judging)  # kernels of attention cannot be differentiated twice
  discriminator, view = _discriminator(
    phase.discriminator, config.data.num_classes, law is not None, configs.has_text(config), judged, unet.dtype,
    'xla' if penalised else unet.attention_form)
  distance = _distance(phase.reconstruction, compared, unet.dtype, unet.attention_form)
  decode = decoding.make_decoder(config, unet.dtype)
  if spaces.is_decoded(config, phase, 'adversarial'):
    view = view[0], _of_pictures(view[1], decode, 1)
  if spaces.is_decoded(config, phase, 'reconstruction'):
    distance = distance[0], _of_pictures(distance[1], decode, 2)
  return Networks(**shared, law=law, estimate=estimate, discriminator=discriminator, feature_draws=view[0],
                  features=jax.named_scope('features')(view[1]), distance_draws=distance[0],
                  vector_width=config.text.pooled_width if configs.has_text(config) else 0,
                  clip_distance=jax.named_scope('clip')(perception.clip_distance(CLIPImage(**perception.CLIP_OPTIONS))),
                  distance=jax.named_scope('distance')(distance[1]))


def _of_autoencoder(config, phase) -> Networks:
  module, side, dtype = decoding.make_autoencoder(config), config.base_resolution, jnp.dtype(config.precision)
  attention = config.get('attention', 'auto')
  discriminator, view = _discriminator(phase.discriminator, 0, False, False, side, dtype, attention)
  distance = _distance(phase.reconstruction, side, dtype, attention)
  return Networks(None, autoencoder=module, discriminator=discriminator, feature_draws=view[0],
                  features=jax.named_scope('features')(view[1]), distance_draws=distance[0],
                  distance=jax.named_scope('distance')(distance[1]))


def _of_pictures(function, decode, images: int):
  """function(frozen, images, ..., draws) of latents, whose first `images` arguments after `frozen` it decodes."""

  def of_latents(frozen, *args):
    decoded = [decode(frozen[decoding.AUTOENCODER], latents) for latents in args[:images]]
    return function(frozen, *decoded, *args[images:])

  return of_latents


def of_sigma(unet: UNet) -> Callable[..., Any] | None:
  """of_sigma(sigma) -> coefficients of the network's parametrisation; None where they are EDM's."""
  return functools.partial(ddpm.coefficients, levels=unet.ddpm_levels) if unet.ddpm_levels else None


def law_of(config) -> guidance.Law | guidance.Laws | None:
  """The law of the strength of guidance in an experiment, or one for each kind of caption; None without."""
  if not configs.has_guidance(config):
    return None
  made = lambda law: guidance.Law(law.law, float(law.mean), float(law.std), float(law.low), float(law.high))
  own = made(config.guidance)
  return guidance.Laws((own, made(config.guidance.recaptions))) if configs.has_law_of_recaptions(config) else own


def _estimator(unet: UNet, levels, law: guidance.Law):
  """estimate(params, images, cond) -> omega [B]: the law's middle at first, and not clipped to its range."""
  low, high = law.ends
  raw_of = _of_clean(unet, levels)

  @jax.named_scope('estimator')
  def estimate(params, images, cond):
    return (low + high) / 2 + (high - low) / 2 * raw_of(params, images, cond)

  return estimate


def _encoder(unet: UNet, levels):
  """encode(params, images, cond) -> noise / sigma_max [B, R, R, C] of images, as an encoder makes it."""
  return jax.named_scope('encoder')(_of_clean(unet, levels))


def _of_clean(unet: UNet, levels):
  """raw(params, images, cond): what a network that begins as the teacher says of images, which it is shown as the
  teacher's states at its lowest noise level: the teacher knows these."""
  coefficients = of_sigma(unet) or functools.partial(diffusion.coefficients, sigma_data=levels.sigma_data)
  _, _, c_in, c_noise = coefficients(np.float64(levels.sigma_min))

  def raw(params, images, cond):
    c_noises = jnp.full(len(images), jnp.float32(c_noise))
    return unet.apply({'params': params}, jnp.float32(c_in) * images, c_noises, cond)

  return raw


def _discriminator(config, num_classes: int, guided: bool, text: bool, resolution: int, dtype, attention_form):
  """(module, (draw, features): what it sees)."""
  classes, text = (num_classes, text) if config.conditional else (0, False)
  if config.features == 'projected':
    networks = perception.projected_networks(config.backbones, resolution, dtype, attention_form)
    ensemble = DiscriminatorEnsemble(classes, guided, text, dtype)
    return ensemble, perception.projected_view(networks, resolution, config.augment)
  if config.features == 'dino':
    network = perception.dino_network(resolution, dtype, attention_form)
    heads = TokenDiscriminator(classes, text, guided, dtype=dtype)
    return heads, perception.dino_view(network, resolution, config.augment)
  pixels = PyramidDiscriminator(config.channels, classes, config.spectral_norm, guided, text, dtype)
  return pixels, perception.pixel_view(config.scales, resolution, config.augment)


def _distance(config, resolution: int, dtype, attention_form):
  """(draw, distance): L_rec's distance, in a type and form of attention."""
  if config.distance == 'projected':
    networks = perception.projected_networks(config.backbones, resolution, dtype, attention_form)
    return perception.projected_distance(networks, resolution, config.augment)
  if config.distance == 'lpips':
    return perception.lpips_distance(dtype)
  return perception.pixel_distance(config.scale_weights)


def make_unet(config, phase_name: str) -> UNet:
  """The U-Net of a phase: the configured network, with one more decoder level for each doubling.

  With guidance generators and encoders take its strength as an input, and the estimator has no decoder. A phase of
  stage invert applies its teacher, or its encoder.
  """
  phase_name = config.phases[phase_name].get('encoder') or phase_name
  stage = config.phases[phase_name].stage
  chain = ladder.growth_chain(config, phase_name)
  grown = [unets.grown_level(level) for level in ladder.first_levels(chain)]
  resolution = config.base_resolution << len(grown)
  for phase in chain:
    while resolution < phase.resolution:
      resolution *= 2
      grown.append(unets.GrownLevel(phase.channels, phase.num_blocks, phase.scale_shift))
  return UNet(
    resolution=config.base_resolution,
    image_channels=spaces.image_channels(config),
    num_classes=config.data.num_classes,
    grown=tuple(grown),
    omega_embedding=configs.has_guidance(config) and stage in (*configs.GENERATOR_STAGES, 'encode'),
    estimator=stage == 'guide',
    remat=config.remat,
    attention_form=config.get('attention', 'auto'),  # config.json of an earlier version has none
    dtype=jnp.dtype(config.precision),
    **architectures.text_fields_of(config),
    **architectures.fields_of(config.network),
  )


def make_teacher(config, phase_name: str) -> UNet:
  """The U-Net of the teacher that a phase of stage invert, encode, guide or distill starts from."""
  return make_unet(config, phase_name).clone(omega_embedding=False, estimator=False, grown=())


def any_cond(unet: UNet | None, batch: int) -> dict[str, jax.Array]:
  """Conditions of so many pictures, to initialise a U-Net and its opponents with; None: an autoencoder's."""
  cond = {'label': jnp.zeros(batch, jnp.int32), 'omega': jnp.ones(batch)}
  if unet is None:
    return cond
  if unet.text_width:
    cond |= {'text': jnp.zeros((batch, 1, unet.text_width)), 'text_mask': jnp.ones((batch, 1), bool)}
  if unet.text_pooled_width:
    cond['text_pooled'] = jnp.zeros((batch, unet.text_pooled_width))
  return cond


def fresh_params(unet: UNet, rng: jax.Array):
  """Fresh parameters of a U-Net; `init_unet` is its compiled form."""
  batch = (1, unet.resolution, unet.resolution, unet.image_channels)
  return unet.init(rng, jnp.zeros(batch), jnp.zeros(1), any_cond(unet, 1))['params']


def unet_shapes(unet: UNet):
  """Shapes of a U-Net's parameters."""
  return jax.eval_shape(lambda: fresh_params(unet, jax.random.key(0)))


def init_unet(unet: UNet, rng: jax.Array):
  """Fresh parameters of a U-Net, as device arrays."""
  return run_once(functools.partial(fresh_params, unet), rng)


def grown(unet: UNet, old_params, rng: jax.Array) -> tuple[dict, growth.GrowthReport]:
  """`growth.grow_params` of a smaller network's parameters: what is new is as in `init_unet`, and alone is made."""
  fresh = functools.partial(fresh_params, unet)
  params, report = growth.grow_params(jax.eval_shape(fresh, rng), old_params)
  missing = {*report.new, *report.other_shape}
  pick = lambda rng: {path: leaf for path, leaf in trees.flat_leaves(fresh(rng)).items() if path in missing}
  flat = trees.flat_leaves(params) | (run_once(pick, rng) if missing else {})
  return traverse_util.unflatten_dict(flat, sep='/'), report


def init_discriminator(networks: Networks, frozen, resolution: int, rng: jax.Array):
  """Fresh variables of the discriminator for images of a resolution.

  `frozen` (or its shapes) tells the shapes of the maps; no feature network is run.
  """
  images = jax.ShapeDtypeStruct((1, resolution, resolution, networks.image_channels), jnp.float32)
  seen = lambda frozen, images, rng: networks.features(frozen, images, networks.feature_draws(rng, 1))
  maps = jax.eval_shape(seen, frozen, images, rng)

  def init(rng):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), maps)
    cond = any_cond(networks.unet, 1)
    if networks.vector_width:
      cond['text_pooled'] = jnp.zeros((1, networks.vector_width))
    return dict(networks.discriminator.init(rng, zeros, cond, train=True))

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
