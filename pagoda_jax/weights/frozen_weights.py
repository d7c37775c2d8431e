"""The parameters of frozen feature networks: read from published files, projections drawn from the seed.

They are an argument of the train step: never donated, never in a checkpoint, never in the program.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.method import perception
from pagoda_jax.networks.frozen.clip_image import CLIPImage
from pagoda_jax.runtime import distributed, randomness
from pagoda_jax.stages import decoding, models
from pagoda_jax.weights import autoencoders, locate
from pagoda_jax.weights.convert import formats, random_projections, stylegan_xl, torch_files
from pagoda_jax.weights.convert.mapping import ConversionError

LPIPS_FILES = ('vgg16', 'lpips_vgg')
# Of EfficientNet-lite0 on ImageNet; the heads on every feature network start with it (StyleGAN-XL).
CLASS_EMBEDDING = 'in_embeddings_tf_efficientnet_lite0'
IMAGENET_CLASSES = 1000


def names(phase) -> list[str]:
  """The published files that a phase needs, by their names in the registry."""
  if phase.stage not in (*configs.GENERATOR_STAGES, 'autoencoder'):
    return []
  files = list(_backbones(phase)) + [perception.CLIP_NAME] * _sees_captions(phase)
  return files + list(LPIPS_FILES) if phase.reconstruction.distance == 'lpips' else files


def _sees_captions(phase) -> bool:
  """Whether a phase compares pictures with captions by CLIP."""
  pairs = phase.get('reconstruction_adversarial')
  return bool(phase.adversarial.clip_weight or (pairs and pairs.weight and pairs.clip_weight))


def check_present(config, phase_names) -> None:
  """Finds every published file that these phases need, before the first of them runs.

  Raises:
    MissingWeightsError, WrongDigestError: says which file, where it comes from and where to put it.
  """
  for name in dict.fromkeys(file for phase in phase_names for file in names(config.phases[phase])):
    locate.find(name, config.weights_dir)
  if config.data.num_classes == IMAGENET_CLASSES and any(_knows_classes(config.phases[name]) for name in phase_names):
    _class_embedding(config)  # which may be missing, and not damaged


def _knows_classes(phase) -> bool:
  """Whether a phase has a discriminator that begins with the published class embedding where that can be had."""
  seen = phase.get('discriminator')
  return phase.stage in configs.GENERATOR_STAGES and seen.features == 'projected' and seen.conditional


def _class_embedding(config):
  """(the file, ''), or (None, why there is none)."""
  try:
    return locate.find(CLASS_EMBEDDING, config.weights_dir), ''
  except locate.MissingWeightsError as error:
    return None, str(error)


def load(config, phase_name: str) -> dict:
  """What a phase's train step takes as `frozen`: {'features': {name: variables}} as host arrays, or {}.

  'autoencoder' is beside them where a loss sees pictures decoded from latents.

  Raises:
    MissingWeightsError, WrongDigestError: as `check_present`.
    ConversionError: a file is of another architecture.
  """
  phase = config.phases[phase_name]
  decoder = {}
  if spaces.decodes(config, phase):
    decoder[decoding.AUTOENCODER] = decoding.decoder_part(autoencoders.load(config))
  if not names(phase):
    return decoder
  features = {name: _as_computed(config, name, _variables(config, name)) for name in _backbones(phase)}
  if _sees_captions(phase):
    features[perception.CLIP_NAME] = _clip(config)
  if phase.reconstruction.distance == 'lpips':
    vgg, linear = (locate.find(name, config.weights_dir) for name in LPIPS_FILES)
    features[perception.LPIPS_NAME] = formats.read_converted(vgg, 'lpips', linear=linear).variables
  return {'features': features} | decoder


def shapes(config, phase_name: str) -> dict:
  """What `load` gives, as ShapeDtypeStructs; no file is looked for."""
  phase = config.phases[phase_name]
  decoder = {decoding.AUTOENCODER: decoding.decoder_shapes(config)} if spaces.decodes(config, phase) else {}
  if not names(phase):
    return decoder
  features = {name: jax.eval_shape(functools.partial(_as_computed, config, name), _shapes(name))
              for name in _backbones(phase)}
  if _sees_captions(phase):
    tower = CLIPImage(**perception.CLIP_OPTIONS)
    features[perception.CLIP_NAME] = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  if phase.reconstruction.distance == 'lpips':
    images = jnp.zeros((1, perception.RESIZED, perception.RESIZED, 3))
    network = perception.lpips_network(jnp.float32)
    features[perception.LPIPS_NAME] = jax.eval_shape(network.init, jax.random.key(0), images, images)
  return {'features': features} | decoder


def _as_computed(config, name: str, variables: dict) -> dict:
  """The variables with kernels of a transformer's blocks in the type of the computation, the only one they enter in.

  Else every step would make bfloat16 of them anew: 3 % of growth from 64 to 128 px of one image on a v5e.
  """
  dtype = jnp.dtype(config.precision)
  if dtype == jnp.float32 or perception.BACKBONES[name]['architecture'] != 'deit':
    return variables

  def converted(path, leaf):
    keys = [part.key for part in path]
    inner = keys[-1] == 'kernel' and any(re.fullmatch(r'block\d+', key) for key in keys)
    return leaf.astype(dtype) if inner else leaf

  return jax.tree.map_with_path(converted, variables)


def _backbones(phase) -> tuple[str, ...]:
  """The feature networks that the discriminator or the reconstruction distance sees, each once."""
  chosen = {'pixels': (), 'projected': tuple(phase.discriminator.backbones), 'dino': (perception.DINO_NAME,)}[
    phase.discriminator.features
  ]
  if phase.reconstruction.distance == 'projected':
    chosen += tuple(phase.reconstruction.backbones)
  return tuple(dict.fromkeys(chosen))


def _network(name: str):
  """(ProjectedFeatures of a backbone, or DINO; images to initialise it with)."""
  if name == perception.DINO_NAME:
    network = perception.dino_network(perception.RESIZED, jnp.float32)
  else:
    network = perception.projected_networks([name], perception.RESIZED, jnp.float32)[name]
  return network, jnp.zeros((1, perception.RESIZED, perception.RESIZED, 3))


def _shapes(name: str) -> dict:
  network, images = _network(name)
  return jax.eval_shape(network.init, jax.random.key(0), images)


def _clip(config) -> dict:
  converted = formats.read_converted(locate.find(perception.CLIP_NAME, config.weights_dir), 'clip_image')
  expected = CLIPImage(**perception.CLIP_OPTIONS)
  if wrong := [f'{name} = {value}, not {getattr(expected, name)}' for name, value in converted.options.items()
               if value != getattr(expected, name)]:
    raise ConversionError(f'{perception.CLIP_NAME}: not CLIP ViT-L/14: {", ".join(wrong)}')
  return converted.variables


def _variables(config, name: str) -> dict:
  """A published backbone's variables, under projections drawn from config.seed if it has any.

  The draw depends on the seed and the backbone alone: every phase of a run sees the same projections.
  """
  network, images = _network(name)
  backbone = formats.read_converted(locate.find(name, config.weights_dir), 'timm').variables

  def random_part(rng):
    params = network.init(rng, images)['params']
    return {part: leaves for part, leaves in params.items() if part != 'backbone'}

  rng = randomness.key_for(config.seed, f'projections/{name}')
  drawn = jax.device_get(models.run_once(random_part, rng))
  expected = _shapes(name)
  variables = {**expected, 'params': {**expected['params'], **drawn}}
  return random_projections.with_backbone(variables, backbone)


def with_class_embedding(config, phase_name: str, discriminator: dict) -> tuple[dict, str]:
  """A fresh discriminator's variables with the published ImageNet class embedding, where that can be had.

  It needs a conditional projected discriminator, 1000 classes and the file.

  Returns:
    (variables, which embedding it is, in words; '' where there is none).

  Raises:
    WrongDigestError, WeightsFileError: the file is damaged.
    MissingWeightsError: process 0 has it and this one not, or the other way round.
  """
  if not _knows_classes(config.phases[phase_name]):
    return discriminator, ''
  if config.data.num_classes != IMAGENET_CLASSES:
    return discriminator, f"class embedding random: {config.data.num_classes} classes, not ImageNet's"
  path, lacking = _class_embedding(config)
  if (there := distributed.from_primary('class embedding', lambda: not lacking)) == bool(lacking):
    have, lack = ('process 0', 'this one') if there else ('this process', 'process 0')
    raise locate.MissingWeightsError(
      f'{CLASS_EMBEDDING}: {have} has the file, and {lack} has not: their discriminators would begin with other '
      f'numbers. {lacking or path}')
  if lacking:
    return discriminator, f'class embedding random: {lacking}'
  (embedding,) = torch_files.read(path).tensors.values()
  heads = {
    name: stylegan_xl.with_class_embedding({'params': params}, np.asarray(embedding))['params']
    for name, params in discriminator['params'].items()
  }
  return {**discriminator, 'params': heads}, f'class embedding of {path}'
