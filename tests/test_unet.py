"""The U-Net, its growth and the split of its parameters, on tiny networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax.networks import generator
from pagoda_jax.networks.unet import EDM_ADM, EDM_DDPMPP, GUIDED_ADM, UNet

TINY = dict(resolution=8, channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), num_classes=3)
BATCH = 2


def random_params(module, seed=0, zeros=False):
  """Parameters of plausible size without compiling `init`; zero-initialised leaves are zero if `zeros`."""
  x, c_noise = jnp.zeros((BATCH, module.resolution, module.resolution, 3)), jnp.zeros(BATCH)
  cond = {'omega': jnp.ones(BATCH)}
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, c_noise, cond)['params']
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name, owner = path[-1].key, path[-2].key
    if name in ('scale', 'bias'):
      return (0.1 * rng.standard_normal(leaf.shape) + (name == 'scale')).astype(np.float32)
    if zeros and owner in ('conv_1', 'out', 'out_conv'):
      return np.zeros(leaf.shape, np.float32)
    fan_in = np.prod(leaf.shape[:-1])
    return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_inputs(module, seed=1):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((BATCH, module.resolution, module.resolution, 3)).astype(np.float32)
  c_noise = np.asarray([0.3, -1.1], np.float32)
  return x, c_noise, {'label': np.asarray([2, 0])}


@functools.cache
def apply(module):
  return jax.jit(lambda params, *args, **kw: module.apply({'params': params}, *args, **kw),
                 static_argnames=('train', 'features_only'))


def rms(x):
  return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


@pytest.mark.parametrize('form', [EDM_ADM, GUIDED_ADM, EDM_DDPMPP], ids=['edm_adm', 'guided_adm', 'edm_ddpmpp'])
def test_bfloat16_is_close_to_float32(form):
  module = UNet(**TINY, **form)
  params, inputs = random_params(module), random_inputs(module)
  exact = apply(module)(params, *inputs)
  assert exact.shape == (BATCH, 8, 8, 3) and exact.dtype == jnp.float32
  rough = apply(module.clone(dtype=jnp.bfloat16))(params, *inputs)
  assert rough.dtype == jnp.float32
  assert 1e-5 < rms(rough - exact) / rms(exact) < 2e-2
