"""How images are compared and judged: as pixels, or through frozen feature networks.

What `models.build` gives a train step: pairs of a function of images and one that draws its augmentation,
draw(rng, count) -> tree of [count, ...]. Drawn apart, because a batch may be worked through in parts. The
parameters of feature networks are always an argument, frozen = {'features': {name: variables}};
frozen_weights.py makes it.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.method import augment, losses
from pagoda_jax.networks import text_condition
from pagoda_jax.networks.frozen import projections
from pagoda_jax.networks.frozen.clip_image import CLIPImage
from pagoda_jax.networks.frozen.dino import DINO
from pagoda_jax.networks.frozen.projections import ProjectedFeatures
from pagoda_jax.networks.frozen.vgg_lpips import LPIPS
from pagoda_jax.networks.pyramid import pixel_pyramid

# Smaller images are resized to RESIZED for the feature networks, larger ones enter as they are (PaGoDA's release).
NATIVE_FROM = 256
RESIZED = 224
# Channels of the finest projected map.
PROJECTED_WIDTH = 64
# Sizes of the published feature networks, as timm.options finds them in their files.
BACKBONES = {
  'tf_efficientnet_lite0': {
    'architecture': 'efficientnet_lite',
    'stem': 32,
    'repeats': (1, 2, 2, 3, 3, 4, 1),
    'widths': (16, 24, 40, 80, 112, 192, 320),
    'expansions': (1, 6, 6, 6, 6, 6, 6),
    'kernels': (3, 3, 5, 3, 5, 5, 3),
  },
  'deit_base_distilled_patch16_224': {
    'architecture': 'deit',
    'width': 768,
    'depth': 12,
    'head_channels': 64,
    'mlp_width': 3072,
    'patch': 16,
    'grid': 14,
    'distilled': True,
  },
  'dino_vits16': {
    'architecture': 'deit',
    'width': 384,
    'depth': 12,
    'head_channels': 64,
    'mlp_width': 1536,
    'patch': 16,
    'grid': 14,
    'distilled': False,
  },
}
DINO_NAME = 'dino_vits16'
DINO_PATCH = 16
CLIP_NAME = 'clip_vit_l14'
CLIP_OPTIONS = {}  # of CLIPImage: ViT-L/14's, its defaults
LPIPS_NAME = 'lpips'  # VGG16 and the linear weights, in frozen['features']


def projected_networks(
  names: Sequence[str], resolution: int, dtype, attention_form: str = 'auto'
) -> dict[str, ProjectedFeatures]:
  """The feature networks with their random projections, for images of a resolution."""
  size = RESIZED if resolution < NATIVE_FROM else None
  return {
    name: projections.projected(
      projections.options_of_backbone(BACKBONES[name], PROJECTED_WIDTH), attention_form, input_size=size, dtype=dtype
    )
    for name in names
  }


def lpips_network(dtype) -> LPIPS:
  """VGG16 with the learned weights of its maps."""
  return LPIPS(dtype=dtype)


def pixel_view(scales: int, resolution: int, policy: Sequence[str]):
  """(draw, features(frozen, images, draws) -> a pyramid of the augmented images themselves)."""

  def draw(rng, count):
    return augment.draw(rng, count, resolution, policy)

  def features(frozen, images, draws):
    del frozen
    return pixel_pyramid(augment.apply(images, draws), scales)

  return draw, features


def projected_view(networks: Mapping[str, ProjectedFeatures], resolution: int, policy: Sequence[str]):
  """(draw, features(frozen, images, draws) -> {name: projected maps} of images augmented at their own size)."""

  def features(frozen, images, draws):
    return {
      name: network.apply(frozen['features'][name], augment.apply(images, draws[name]))
      for name, network in networks.items()
    }

  return functools.partial(draw_for_each, networks, resolution, policy), features


def dino_network(resolution: int, dtype, attention_form: str = 'auto') -> DINO:
  """DINO ViT-S/16 for images of a resolution: from NATIVE_FROM pixels on, of the next whole number of patches."""
  size = RESIZED if resolution < NATIVE_FROM else DINO_PATCH * round(resolution / DINO_PATCH)
  options = BACKBONES[DINO_NAME]
  taps = tuple(options['depth'] * quarter // 4 for quarter in range(5))  # (0, 3, 6, 9, 12)
  return DINO(options, taps, size, dtype, attention_form)


def dino_view(network: DINO, resolution: int, policy: Sequence[str]):
  """(draw, features(frozen, images, draws) -> token sequences of images augmented at their own size)."""

  def draw(rng, count):
    return augment.draw(rng, count, resolution, policy)

  def features(frozen, images, draws):
    return network.apply(frozen['features'][DINO_NAME], augment.apply(images, draws))

  return draw, features


def clip_distance(network: CLIPImage):
  """distance(frozen, images, cond) -> [B]: 1 - cosine similarity of images and their captions' vectors by CLIP."""

  def distance(frozen, images, cond):
    of_image, of_text = network.apply(frozen['features'][CLIP_NAME], images), text_condition.vector(cond)
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    return 1 - jnp.sum(unit(of_image) * unit(of_text), axis=-1)

  return distance


def draw_for_each(networks: Iterable[str], size: int, policy: Sequence[str], rng: jax.Array, count: int):
  """{feature network: a draw of its own} of the augmentation of `count` images of a size."""
  names = tuple(networks)
  return {name: augment.draw(key, count, size, policy) for name, key in zip(names, jax.random.split(rng, len(names)))}


def draw_nothing(rng: jax.Array, count: int) -> dict:
  """For a distance of the images as they are."""
  del rng, count
  return {}


def pixel_distance(weights: Sequence[float]):
  """(draw, distance(frozen, images, others, draws) -> [B]): weighted mean squared differences, finest resolution first.
  """
  factors = {2**i: weight for i, weight in enumerate(weights) if weight}
  return draw_nothing, lambda frozen, images, others, draws: losses.pixel_distance(images, others, factors)


def projected_distance(networks: Mapping[str, ProjectedFeatures], resolution: int, policy: Sequence[str]):
  """(draw, distance(frozen, images, others, draws) -> [B]), in the projected features of all networks.

  Unlike for the discriminator, images are first resized and then augmented, as in PaGoDA's release;
  both get the same draw, and each feature network its own.
  """
  size = RESIZED if resolution < NATIVE_FROM else resolution

  def distance(frozen, images, others, draws):
    images, others = enlarged(images), enlarged(others)
    total = 0.0
    for name, network in networks.items():
      draw = augment.rescaled(draws[name], size, images.shape[1])  # an autoencoder compares smaller images too
      maps = [network.apply(frozen['features'][name], augment.apply(x, draw)) for x in (images, others)]
      total += losses.projected_distance(*maps)
    return total

  return functools.partial(draw_for_each, networks, size, policy), distance


def lpips_distance(dtype):
  """(draw, distance(frozen, images, others, draws) -> [B]), LPIPS of images resized as for the other networks."""
  network = lpips_network(dtype)
  return draw_nothing, lambda frozen, images, others, draws: network.apply(
    frozen['features'][LPIPS_NAME], enlarged(images), enlarged(others)
  )


def enlarged(images: jax.Array) -> jax.Array:
  """[B, H, W, C] below NATIVE_FROM pixels resized bilinearly to RESIZED, others as they are."""
  return resize.resize(images, RESIZED, 'bilinear') if images.shape[1] < NATIVE_FROM else images
