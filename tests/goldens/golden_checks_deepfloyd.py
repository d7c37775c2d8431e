"""DeepFloyd IF's first stage against diffusers: what its network computes, its levels, its config.json."""

import json
import pathlib
import tempfile

import golden_tools
import jax
import numpy as np
from golden_tools import assert_close, in_float32, nchw, nhwc

from pagoda_jax.method import ddpm
from pagoda_jax.networks import text_condition
from pagoda_jax.networks.unet import UNet
from pagoda_jax.weights.convert import deepfloyd, formats


def cases():
  """(name, check) of this file."""
  if not golden_tools.exists('deepfloyd'):
    return []
  return [('deepfloyd/network', in_float32(check_network)), ('deepfloyd/levels', check_levels)]


def golden(folder):
  """(arrays, network, our parameters), told as `pagoda convert` is told: by tensors and the config.json beside them."""
  arrays, meta = golden_tools.load('deepfloyd')
  (folder / 'config.json').write_text(json.dumps(meta['config']))
  theirs = golden_tools.rule_state_dict(meta['params'], meta['prefix'])
  assert formats.detected(theirs) == 'deepfloyd'
  converted = formats.from_state_dict(theirs, 'deepfloyd', **deepfloyd.described(folder / 'model.safetensors'))
  back = formats.to_state_dict(converted)
  assert back.keys() == theirs.keys() and all((back[name] == theirs[name]).all() for name in theirs)
  return arrays, UNet(**converted.options), converted.variables['params']


def check_network():
  with tempfile.TemporaryDirectory() as folder:
    arrays, net, params = golden(pathlib.Path(folder))
  # What the mask says of padding is not looked at, as there.
  cond = {'text': arrays['text'], 'text_mask': np.zeros(arrays['text'].shape[:2], bool)}
  pool = text_condition.PooledTokens(net.embed_width, net.text_pool_heads)
  assert_close(pool.apply({'params': params['text_pool']}, cond), arrays['pooled'], 1e-4, 'pooled text')
  call = jax.jit(lambda cond: net.apply({'params': params}, nhwc(arrays['x']), np.float32(arrays['t']), cond))
  assert_close(nchw(call(cond)), arrays['out'][:, :3], 1e-4, 'noise')


def check_levels():
  """Every level's alphabar as the scheduler has it, in float32."""
  arrays, _ = golden_tools.load('deepfloyd')
  np.testing.assert_allclose(1 / (1 + ddpm.sigmas(1000) ** 2), arrays['alphas_cumprod'], rtol=2e-5)
