"""Golden check of the adaptive weight, with the gradient norms of a U-Net generator (pagoda_losses)."""

import functools

import golden_tools
import jax
import jax.numpy as jnp
import numpy as np
from golden_checks_unets import labels, pagoda_network

from pagoda_jax.method import diffusion, losses
from pagoda_jax.networks import growth


def cases():
  """Yields (id, check)."""
  if golden_tools.exists('pagoda_losses'):
    yield 'losses-adaptive-weight', golden_tools.in_float32(check_adaptive_weight)


def golden_gradients():
  """(fake images, loss1, loss2, norms of their gradients at the last layer) of the golden's generator."""
  arrays, meta = golden_tools.load('pagoda_losses')
  network = pagoda_network(meta['generator'])
  target, direction, z = (golden_tools.nhwc(arrays[f'adapt/{name}']) for name in ('target', 'w', 'z'))
  path = growth.last_layer(network.params)
  theirs = {leaf.ours: leaf.theirs for leaf in network.leaves}
  assert theirs['/'.join(path)] == meta['generator']['last_layer']

  @jax.jit
  def norms(params):
    def sampled(params):
      cond = labels(network, arrays['adapt/y'])
      return diffusion.one_step(network.apply, params, z, cond, meta['sigma_max'], meta['sigma_data'])

    # Both losses as in goldens/README: a squared error and a linear function, per sample.
    fake, pull_back = jax.vjp(sampled, params)
    values, found = [], []
    for loss in (
        lambda fake: losses.pixel_distance(fake, target),
        lambda fake: -50 * jnp.mean(fake * direction, (1, 2, 3)),
    ):
      values.append(loss(fake))
      gradient, = pull_back(jax.grad(lambda fake, loss=loss: jnp.mean(loss(fake)))(fake))
      found.append(jnp.linalg.norm(functools.reduce(lambda tree, key: tree[key], path, gradient)))
    return fake, *values, *found

  return norms(network.params)


def check_adaptive_weight():
  arrays, _ = golden_tools.load('pagoda_losses')
  fake, loss1, loss2, norm1, norm2 = golden_gradients()
  golden_tools.assert_close(golden_tools.nchw(fake), arrays['adapt/fake'], 1e-3)
  golden_tools.assert_close(loss1, arrays['adapt/loss1'], 1e-3)
  golden_tools.assert_close(loss2, arrays['adapt/loss2'], 1e-3)
  np.testing.assert_allclose(norm1, arrays['adapt/grad_norm1'], rtol=1e-3)
  np.testing.assert_allclose(norm2, arrays['adapt/grad_norm2'], rtol=1e-3)
  for name, weight in {
      'weight_raw': losses.adaptive_weight(norm1, norm2, low=0, high=1e4),
      'weight_raw_given_norm': losses.adaptive_weight(0.37, norm2, low=0, high=1e4),
      'weight_clipped': losses.adaptive_weight(norm1, norm2),
      'weight_clipped_small_loss2': losses.adaptive_weight(norm1, norm2 * 1e-4),
      'weight_clipped_large_loss2': losses.adaptive_weight(norm1, norm2 * 1e5),
  }.items():
    np.testing.assert_allclose(weight, arrays[f'adapt/{name}'], rtol=1e-3, err_msg=name)
