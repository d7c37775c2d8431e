"""The autoencoder of latent space, built from a config: pictures out of latents, in a loss or to draw images."""

import functools

import jax
import jax.numpy as jnp

from pagoda_jax.config import spaces
from pagoda_jax.method import microbatch
from pagoda_jax.networks.autoencoder import AutoencoderKL

AUTOENCODER = 'autoencoder'  # its variables, in `frozen` and beside a U-Net's parameters where pictures are drawn
DECODED_AT_ONCE = 2**22  # pixels of the pictures that a device decodes at once where pictures are drawn


def make_autoencoder(config, dtype=None) -> AutoencoderKL:
  """The autoencoder that config.autoencoder describes, in config.precision where nothing else is said."""
  network = config.autoencoder
  same = {key: network[key] for key in spaces.NETWORK_KEYS if key not in ('channels', 'widths')}
  return AutoencoderKL(
    channels=config.data.channels, latent_channels=network.channels, widths=tuple(network.widths), **same,
    remat=tuple(config.remat), dtype=jnp.dtype(config.precision) if dtype is None else dtype)


def make_decoder(config, dtype):
  """decode(autoencoder's variables, latents [B, h, w, c] of unit variance) -> pictures [B, H, W, C] near [-1, 1]."""
  module, (scaling, shift) = make_autoencoder(config, dtype), normalization(config)

  @jax.named_scope('decoder')
  def decode(variables, latents):
    return module.apply(variables, latents / scaling + shift, method='decode')

  return decode


def normalization(config) -> tuple[float, float]:
  """(scaling, shift): networks see (latent - shift) * scaling; (1, 0) where no folder has told them yet."""
  network = config.autoencoder
  return (float(network.scaling), float(network.shift)) if network.scaling else (1.0, 0.0)


def make_drawing_decoder(config):
  """`make_decoder` in float32, a few pictures at a time."""
  decode, factor = make_decoder(config, jnp.float32), spaces.factor(config)

  def decode_in_parts(variables, latents):
    count, parts = latents.shape[0], 1
    if isinstance(count, int):  # not of an exported program, which takes any number
      share = count // max(jax.sharding.get_abstract_mesh().size, 1)
      most = max(DECODED_AT_ONCE // (factor * latents.shape[1]) ** 2, 1)
      parts = next((n for n in range(1, share + 1) if share % n == 0 and share // n <= most), 1)
    return microbatch.mapped(functools.partial(decode, variables), parts)(latents)

  return decode_in_parts


def decoder_shapes(config):
  """The variables of config.autoencoder's decoder, as ShapeDtypeStructs."""
  return decoder_part(variables_shapes(config))


def variables_shapes(config):
  """All variables of config.autoencoder, as ShapeDtypeStructs."""
  return jax.eval_shape(functools.partial(fresh_variables, config), jax.random.key(0))


def fresh_variables(config, rng):
  """Fresh variables of config.autoencoder."""
  module, side = make_autoencoder(config), 2 * spaces.factor_of(config.autoencoder.widths)
  return module.init(rng, jnp.zeros((1, side, side, module.channels)))


def decoder_part(variables):
  """Of an autoencoder's variables, what decoding takes."""
  return {'params': {key: value for key, value in variables['params'].items() if key in ('decoder', 'unquantize')}}
