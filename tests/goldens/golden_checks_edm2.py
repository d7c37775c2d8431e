"""EDM2's network against the original code: what it computes, its loss and gradients, its forced weights."""

import functools
import math
import zlib

import golden_tools
import jax
import jax.numpy as jnp
import numpy as np
from golden_tools import assert_close, in_float32, nchw, nhwc

from pagoda_jax.networks import edm2
from pagoda_jax.networks.unet import UNet
from pagoda_jax.stages import models, teacher
from pagoda_jax.use import to_published
from pagoda_jax.weights.convert import edm2 as published
from pagoda_jax.weights.convert import formats, mapping


def cases():
  """(name, check) of this file."""
  if not golden_tools.exists('edm2_unet'):
    return []
  checks = [('edm2_unet/outputs', check_outputs), ('edm2_unet/gradients', check_gradients),
            ('edm2_unet/forced', check_forced)]
  return [(name, in_float32(check)) for name, check in checks]


@functools.cache
def golden():
  """(arrays, json, network, our parameters)."""
  arrays, meta = golden_tools.load('edm2_unet')

  def tensor(name, shape):
    z = np.random.default_rng(zlib.crc32((meta['prefix'] + name).encode())).standard_normal(tuple(shape))
    return z.astype(np.float32) * np.float32(2 * math.pi if name.endswith(('freqs', 'phases')) else 1)

  theirs = {name: tensor(name, shape) for name, shape in meta['params']}
  converted = formats.from_state_dict(theirs, 'edm2', channels_per_head=meta['kwargs']['channels_per_head'])
  return arrays, meta, UNet(**converted.options), converted.variables['params']


def in_their_names(tree):
  """Our tree as a state dict."""
  return mapping.to_theirs(jax.device_get(tree), published.leaves(to_published.options_of(golden()[2])))


def check_outputs():
  arrays, _, net, params = golden()
  call = jax.jit(lambda label: net.apply({'params': params}, nhwc(arrays['x']), jnp.log(arrays['sigma']) / 4,
                                         {'label': label}))
  assert_close(nchw(call(arrays['class_idx'])), arrays['F'], 1e-4, 'F')
  assert_close(nchw(call(np.full(3, -1))), arrays['F_unlabelled'], 1e-4, 'F without labels')
  logvar = net.apply({'params': params}, None, jnp.log(arrays['sigma']) / 4, {}, logvar_only=True)
  assert_close(logvar, arrays['logvar'], 1e-5, 'u')


def check_gradients():
  """Of the loss over what the network expects of it, equation 21: every gradient's norm, and three whole ones."""
  arrays, meta, net, params = golden()
  networks = models.Networks(net)
  images, noise, label = nhwc(arrays['images']), nhwc(arrays['noise']), arrays['class_idx']
  losses = lambda params: teacher.losses_of(
    networks, True, params, images, {'label': label}, None, arrays['sigma'], noise, None)
  mean = lambda params: (jnp.mean(found := losses(params)), found)
  (_, found), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
  np.testing.assert_allclose(found, arrays['loss'], rtol=1e-5)
  grads = in_their_names(grads)
  norms = [np.linalg.norm(grads[name].astype(np.float64)) for name in meta['grad_names']]
  np.testing.assert_allclose(norms, arrays['grad_norms'], rtol=1e-4)
  for name in (name.removeprefix('grad/') for name in arrays if name.startswith('grad/')):
    assert_close(grads[name], arrays[f'grad/{name}'], 3e-4, name)


def check_forced():
  """What the weights are after the original has looked at them in training."""
  arrays, _, _, params = golden()
  forced = jax.jit(lambda params: edm2.forced(params, params))
  after = in_their_names(forced(params))
  for name in (name.removeprefix('forced/') for name in arrays if name.startswith('forced/')):
    assert_close(after[name], arrays[f'forced/{name}'], 1e-5, name)
