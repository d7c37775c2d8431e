"""The autoencoder of latent space, in the folder that config.autoencoder.weights names: whether it is the right one.

The folder is one of `pagoda convert` (format diffusers), or `weights` in that of a phase that trained one. A run
settles what its config leaves to the folder (scaling, shift, digest) before anything else, and holds to it.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import latents
from pagoda_jax.data.images import normalize, quantized
from pagoda_jax.runtime import buckets, sharding
from pagoda_jax.stages import decoding
from pagoda_jax.weights.convert import diffusers, folders

FORMAT = 'diffusers'
SHOWN = 64  # pictures that are decoded in one call


class AutoencoderError(ValueError):
  """The autoencoder is not the one that a config or cached latents are of; the message says what differs."""


def describe(folder) -> dict:
  """A folder's converted.json; 'options' are the network's, with scaling_factor and shift_factor.

  Raises:
    AutoencoderError: the weights there are no autoencoder's.
    ConversionError: there is no such folder, or it is damaged.
  """
  description = folders.read_description(folder)
  if description['format'] != FORMAT:
    raise AutoencoderError(f'{folder}: weights of format {description["format"]}; an autoencoder is of {FORMAT} '
                           "(AutoencoderKL), as `pagoda convert` or a phase of stage 'autoencoder' leaves it")
  return description


def settle(config) -> None:
  """Takes what config.autoencoder leaves to its folder, in latent space; elsewhere nothing.

  Raises:
    AutoencoderError: the folder holds another autoencoder; names what differs.
    ConversionError: as `describe`.
  """
  if not spaces.is_latent(config):
    return
  asked, description = config.autoencoder, describe(config.autoencoder.weights)
  there, here = network_of(description['options']), network_of(options(config))
  rows = [f'{_key(field)}: there {there[field]!r}, in the config {here[field]!r}'
          for field in there if there[field] != here[field]]
  if rows:
    raise AutoencoderError(f'{asked.weights}: another autoencoder than the config describes:\n  ' + '\n  '.join(rows))
  digest = description['variables_sha256']
  if asked.sha256 not in ('', digest):
    raise AutoencoderError(f'{asked.weights}: the autoencoder there is {digest[:16]}, and config.autoencoder.sha256 is '
                           f'{asked.sha256[:16]}')
  asked.sha256 = digest
  asked.weights = str(buckets.absolute(epath.Path(asked.weights).expanduser()))  # images are drawn from elsewhere too
  if not asked.scaling:
    asked.scaling, asked.shift = normalization(description)


def _key(field):
  names = {'channels': 'config.data.channels', 'latent_channels': 'config.autoencoder.channels'}
  return names.get(field, f'config.autoencoder.{field}')


def normalization(description: dict) -> tuple[float, float]:
  """(scaling, shift) that a folder's latents are brought to unit variance with; (1, 0) where it tells none."""
  found = description['options']
  return float(found.get('scaling_factor', 1.0)), float(found.get('shift_factor', 0.0))


def options(config, scaling: float = 1.0, shift: float = 0.0) -> dict:
  """What a converted folder holds as options of the network that config.autoencoder describes."""
  module = decoding.make_autoencoder(config)
  fields = {key: getattr(module, key) for key in (*spaces.NETWORK_KEYS, 'latent_channels')}
  naming = 'to_q' if module.mid_attention else None
  return fields | {'attention_naming': naming, 'attention_convolutions': False,
                   'scaling_factor': scaling, 'shift_factor': shift}


def network_of(options: dict) -> dict:
  """Those of the options that decide what the network computes."""
  return {key: options[key] for key in ('channels', 'latent_channels', *spaces.NETWORK_KEYS[1:])}


def config_lines(folder, options: dict) -> list[str]:
  """Python lines that make an experiment work on the latents of an autoencoder."""
  network = {'channels': options['latent_channels']} | {
    key: options[key] for key in spaces.NETWORK_KEYS if key != 'channels'}
  defaults = configs.autoencoder_network().to_dict()
  said = {'weights': str(folder)} | {key: value for key, value in network.items() if value != defaults[key]}
  return ["config.space = 'latent'", f"config.data.channels = {options['channels']}",
          f'config.autoencoder = c.autoencoder_network({", ".join(f"{key}={value!r}" for key, value in said.items())})']


def load(config) -> dict:
  """The variables of config.autoencoder, NumPy.

  Raises:
    AutoencoderError: other numbers than the run began with.
    ConversionError: the folder is not there, or damaged.
  """
  return _load(config.autoencoder.weights, config.autoencoder.sha256)


@functools.lru_cache(maxsize=1)
def _load(folder, sha256):
  digest = describe(folder)['variables_sha256']
  if sha256 not in ('', digest):
    raise AutoencoderError(f'{folder}: the autoencoder there is {digest[:16]}, and these latents are of {sha256[:16]}; '
                           'put that one back')
  return folders.load_converted(folder)[0]


def shown(config, images: np.ndarray) -> np.ndarray:
  """uint8 pictures [N, S, S, C] of what networks see: latents [N, h, w, c], decoded; uint8 pictures as they are."""
  if not spaces.is_latent(config):
    return images
  variables = with_decoder(config, {})[decoding.AUTOENCODER]
  decode = _drawing_decoder(config.autoencoder.to_json(), config.data.channels)
  size = min(SHOWN, len(images))
  found = []
  with jax.default_matmul_precision(config.evaluation.matmul_precision):
    for start in range(0, len(images), size):
      part = images[start : start + size]
      padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.float32)])
      found.append(np.asarray(decode(variables, padded))[: len(part)])
  return np.concatenate(found)


@functools.lru_cache(maxsize=4)
def _drawing_decoder(network: str, image_channels: int):
  """decode(variables, latents) -> uint8 pictures, compiled once for a config.autoencoder in JSON."""
  config = configs.experiment(space='latent', autoencoder=configs.autoencoder_network(**json.loads(network)))
  config.data.channels = image_channels
  decode = decoding.make_drawing_decoder(config)
  return jax.jit(lambda variables, latents: quantized(decode(variables, latents)))


def encoder(folder, matmul_precision: str = 'highest') -> latents.Encoder:
  """The autoencoder in a folder, for `pagoda prepare` and for edits; on all devices of this host.

  Raises:
    AutoencoderError, ConversionError: as `describe`.
  """
  description, (variables, network) = describe(folder), folders.load_converted(folder)
  module = diffusers.network(network)
  mesh = sharding.make_mesh(devices=jax.local_devices())
  kept = {key: value for key, value in variables['params'].items() if key in ('encoder', 'quantize')}
  placed = sharding.place({'params': kept}, mesh)

  @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh))
  def moments(variables, images):
    with jax.default_matmul_precision(matmul_precision):
      mean, log_variance = module.apply(variables, normalize(images), method='encode')
    return mean, jnp.exp(log_variance / 2)

  def encode(images):
    missing = -len(images) % mesh.size
    padded = np.concatenate([images, np.repeat(images[:1], missing, 0)])
    found = moments(placed, sharding.place_global(padded, mesh))
    return tuple(np.asarray(x)[: len(images)] for x in found)

  return latents.Encoder(encode, description['variables_sha256'], spaces.factor_of(module.widths),
                         module.latent_channels, module.channels, mesh.size)


def with_decoder(config, params: dict) -> dict:
  """A U-Net's parameters as images are drawn with (sampler.make_draw): in latent space, the decoder beside them."""
  if not spaces.is_latent(config):
    return params
  return params | {decoding.AUTOENCODER: decoding.decoder_part(load(config))}
