"""The space that an experiment's networks work in: pixels, or the latents of an autoencoder (config.space).

In latent space every resolution of a config is a latent's side; a picture has `factor` times as many pixels. What
networks see and make is called an image in either space.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from pagoda_jax import config as configs

SPATIAL = ('translation', 'cutout')  # augmentations that mean something of latents too
# Fields of the autoencoder's network (networks/autoencoder.py), beside the pictures' channels.
NETWORK_KEYS = ('channels', 'widths', 'blocks', 'groups', 'quant_conv', 'post_quant_conv', 'mid_attention')


def is_latent(config: ConfigDict) -> bool:
  """Whether an experiment's networks work on latents."""
  return config.get('space', 'pixel') == 'latent'  # configs from before latent space have no such key


def factor(config: ConfigDict) -> int:
  """Pixels of a picture for one place of what the networks see, along a side; of a config as a plain dict too."""
  return factor_of(config['autoencoder']['widths']) if is_latent(config) else 1


def factor_of(widths) -> int:
  """Pixels for one place of an autoencoder's latents, along a side, from the widths of its levels."""
  return 2 ** (len(widths) - 1)


def image_channels(config: ConfigDict) -> int:
  """Channels of what an experiment's networks see and make."""
  return config.autoencoder.channels if is_latent(config) else config.data.channels


def side_in_words(config: ConfigDict, side: int) -> str:
  """A resolution of the config, such as '64 px'."""
  return f'latents of {side}, {side * factor(config)} px' if is_latent(config) else f'{side} px'


def is_decoded(config: ConfigDict, phase: ConfigDict, key: str) -> bool:
  """Whether a phase's `reconstruction` or `adversarial` loss sees pictures, decoded from latents."""
  return is_latent(config) and phase[key].space == 'decoded'


def decodes(config: ConfigDict, phase: ConfigDict) -> bool:
  """Whether a phase's train step goes through the decoder."""
  return phase.stage in configs.GENERATOR_STAGES and any(
    is_decoded(config, phase, key) for key in ('reconstruction', 'adversarial'))


def loss_side(config: ConfigDict, name: str, key: str) -> int:
  """Side of what a phase's `reconstruction` or `adversarial` loss compares."""
  side = configs.phase_resolution(config, name)
  return side * factor(config) if is_decoded(config, config.phases[name], key) else side


def requirements(config: ConfigDict) -> Iterator[tuple[Any, str, Any, str]]:
  """(whether it is so, key, its value, what it must be) of what the space asks of other keys; validation checks."""
  network, latent = config.autoencoder, is_latent(config)
  for level, width in enumerate(network.widths):
    yield (width % network.groups == 0, 'config.autoencoder.widths', network.widths,
           f'{width} (level {level}) must be a multiple of config.autoencoder.groups = {network.groups}')
  trained = [name for name in config.order if config.phases[name].stage == 'autoencoder']
  yield (not latent or not trained, 'config.space', config.space,
         f"must be 'pixel': {', '.join(trained)} trains an autoencoder, of pictures. Its folder is then another "
         "experiment's config.autoencoder.weights")
  for name in config.order:
    phase, path = config.phases[name], f'config.phases.{name}'
    if phase.stage == 'autoencoder':
      yield from _of_training(config, phase, path)
    for key in ('reconstruction', 'adversarial', 'reconstruction_adversarial'):
      if key in phase:
        yield (latent or phase[key].space == 'latent', f'{path}.{key}.space', phase[key].space,
               f"must be 'latent', the space of the networks, while config.space = {config.space!r}: there is nothing "
               'to decode')
  if latent:
    yield from _of_latents(config)


def _of_training(config, phase, path):
  """Of a phase that trains an autoencoder."""
  side, times = config.base_resolution, factor_of(config.autoencoder.widths)
  smallest = side >> (phase.sizes - 1)
  yield (side % 2 ** (phase.sizes - 1) == 0 and smallest % times == 0, f'{path}.sizes', phase.sizes,
         f'pictures of {side} px halved {phase.sizes - 1} times must have a side that {times} divides, the factor of '
         'config.autoencoder.widths')
  adversarial = phase.adversarial
  yield (adversarial.loss == 'hinge', f'{path}.adversarial.loss', adversarial.loss,
         "must be 'hinge': an autoencoder is trained with no other")
  for key in ('r1', 'r2', 'clip_weight'):
    yield (not adversarial[key], f'{path}.adversarial.{key}', adversarial[key],
           'must be 0: an autoencoder is trained without')
  yield (adversarial.low <= adversarial.high, f'{path}.adversarial.low', adversarial.low,
         f'must not exceed {path}.adversarial.high = {adversarial.high}')
  yield (not phase.discriminator.conditional, f'{path}.discriminator.conditional', phase.discriminator.conditional,
         'must be False: an autoencoder knows no classes')


def _of_latents(config):
  """Of an experiment in latent space."""
  data, network = config.data, config.autoencoder
  yield (data.source == 'array_record', 'config.data.source', data.source,
         "must be 'array_record' while config.space = 'latent': `pagoda prepare --autoencoder=FOLDER` makes latents of "
         'any pictures')
  yield (data.downsampling == 'cut', 'config.data.downsampling', data.downsampling,
         "must be 'cut' in latent space: the Haar band of latents is not the latents of a smaller picture, which are "
         'encoded of that picture by `pagoda prepare`')
  yield (network.weights, 'config.autoencoder.weights', network.weights,
         "must name the folder of an autoencoder while config.space = 'latent': of `pagoda convert`, or `weights` in "
         'that of a phase that trained one')
  yield (network.scaling or not network.shift, 'config.autoencoder.shift', network.shift,
         'must be 0 while config.autoencoder.scaling is 0, by which both are as the folder has them')
  for name in config.order:
    phase, path = config.phases[name], f'config.phases.{name}'
    if phase.stage == 'teacher':
      yield (not phase.augmentation.rate, f'{path}.augmentation.rate', phase.augmentation.rate,
             'must be 0 in latent space: the augmentation turns and colours pictures, and latents do not follow')
    if phase.stage == 'invert':
      yield (not phase.clip_denoised, f'{path}.clip_denoised', phase.clip_denoised,
             'must be False in latent space: latents are not within [-1, 1]')
    if phase.stage in configs.GENERATOR_STAGES:
      yield from _of_losses(config, phase, path)


def _of_losses(config, phase, path):
  reconstruction, discriminator, channels = phase.reconstruction, phase.discriminator, config.autoencoder.channels
  decoded = {key: phase[key].space == 'decoded' for key in ('reconstruction', 'adversarial')}
  yield (decoded['reconstruction'] or reconstruction.distance == 'pixels', f'{path}.reconstruction.distance',
         reconstruction.distance, f'its feature networks see pictures, not latents of {channels} channels: must be '
         f"'pixels' (which compares the latents' numbers), or {path}.reconstruction.space = 'decoded'")
  yield (decoded['adversarial'] or discriminator.features == 'pixels', f'{path}.discriminator.features',
         discriminator.features, f'its feature networks see pictures, not latents of {channels} channels: must be '
         f"'pixels' (a discriminator of the latents), or {path}.adversarial.space = 'decoded'")
  yield (decoded['adversarial'] or set(discriminator.augment) <= set(SPATIAL), f'{path}.discriminator.augment',
         discriminator.augment, f'must be some of {", ".join(SPATIAL)} of latents, which have no colours, or '
         f"{path}.adversarial.space = 'decoded'")
  adversarial, of_pairs = phase.adversarial, phase.reconstruction_adversarial
  yield (not of_pairs.weight or of_pairs.space == adversarial.space, f'{path}.reconstruction_adversarial.space',
         of_pairs.space, f'must be {adversarial.space!r}, as {path}.adversarial.space is')
  for key, group in (('adversarial', adversarial), ('reconstruction_adversarial', of_pairs)):
    yield (not decoded['adversarial'] or not (group.r1 or group.r2), f'{path}.{key}.r1', group.r1,
           f"and r2 = {group.r2}: must be 0 with {path}.adversarial.space = 'decoded': they are gradients with respect "
           'to pixels, and the images here are latents')
    yield (not group.clip_weight, f'{path}.{key}.clip_weight', group.clip_weight,
           'must be 0: CLIP compares pictures with captions, and the images here are latents')
