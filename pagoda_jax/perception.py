"""How images are compared and judged: as pixels, or through frozen feature networks.

What `models.build` gives a train step. The parameters of feature networks are always an argument,
frozen = {'features': {name: variables}}; frozen_weights.py makes it.
"""

from collections.abc import Mapping, Sequence

import jax

from pagoda_jax import augment, losses, resize
from pagoda_jax.convert import random_projections
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
}
LPIPS_NAME = 'lpips'  # VGG16 and the linear weights, in frozen['features']


def projected_networks(names: Sequence[str], resolution: int, dtype) -> dict[str, ProjectedFeatures]:
  """The feature networks with their random projections, for images of a resolution."""
  size = RESIZED if resolution < NATIVE_FROM else None
  return {
    name: random_projections.network(
      random_projections.options_of_backbone(BACKBONES[name], PROJECTED_WIDTH), input_size=size, dtype=dtype
    )
    for name in names
  }


def lpips_network(dtype) -> LPIPS:
  """VGG16 with the learned weights of its maps."""
  return LPIPS(dtype=dtype)


def pixel_view(scales: int, policy: Sequence[str]):
  """features(frozen, images, rng) -> a pyramid of the augmented images themselves."""

  def features(frozen, images, rng):
    del frozen
    return pixel_pyramid(augment.diff_augment(rng, images, policy), scales)

  return features


def projected_view(networks: Mapping[str, ProjectedFeatures], policy: Sequence[str]):
  """features(frozen, images, rng) -> {name: projected maps} of images augmented at their own size.

  Each feature network has its own draw of the augmentation.
  """

  def features(frozen, images, rng):
    return {
      name: network.apply(frozen['features'][name], augment.diff_augment(key, images, policy))
      for (name, network), key in zip(networks.items(), jax.random.split(rng, len(networks)))
    }

  return features


def pixel_distance(weights: Sequence[float]):
  """distance(frozen, images, others, rng) -> [B]: weighted mean squared differences, finest resolution first."""
  factors = {2**i: weight for i, weight in enumerate(weights) if weight}
  return lambda frozen, images, others, rng: losses.pixel_distance(images, others, factors)


def projected_distance(networks: Mapping[str, ProjectedFeatures], policy: Sequence[str]):
  """distance(frozen, images, others, rng) -> [B], in the projected features of all networks.

  Unlike for the discriminator, images are first resized and then augmented, as in PaGoDA's release;
  both get the same draw, and each feature network its own.
  """

  def distance(frozen, images, others, rng):
    images, others = enlarged(images), enlarged(others)
    total = 0.0
    for (name, network), key in zip(networks.items(), jax.random.split(rng, len(networks))):
      maps = [
        network.apply(frozen['features'][name], augment.diff_augment(key, x, policy)) for x in (images, others)
      ]
      total += losses.projected_distance(*maps)
    return total

  return distance


def lpips_distance(dtype):
  """distance(frozen, images, others, rng) -> [B], LPIPS of images resized as for the other networks."""
  network = lpips_network(dtype)
  return lambda frozen, images, others, rng: network.apply(
    frozen['features'][LPIPS_NAME], enlarged(images), enlarged(others)
  )


def enlarged(images: jax.Array) -> jax.Array:
  """[B, H, W, C] below NATIVE_FROM pixels resized bilinearly to RESIZED, others as they are."""
  return resize.resize(images, RESIZED, 'bilinear') if images.shape[1] < NATIVE_FROM else images
