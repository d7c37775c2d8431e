"""What the layers do in bfloat16 that Linen's do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax.networks import discriminator, layers

BFLOAT16 = {'dtype': jnp.bfloat16}


@pytest.mark.parametrize('layer', [
    layers.Conv(1, (1, 1), **BFLOAT16), layers.Dense(1, **BFLOAT16), discriminator.SpectralConv(1, (1, 1), **BFLOAT16)
], ids=lambda layer: type(layer).__name__)
def test_the_gradient_of_a_bias_is_a_float32_sum(layer):
  """Of 131,072 ones. In bfloat16 a sum of ones ends at 256; a CPU's, several at once, came to 4,096."""
  x = jnp.zeros((2, 256, 256, 1), jnp.bfloat16)
  more = (False,) if isinstance(layer, discriminator.SpectralConv) else ()
  variables = layer.init(jax.random.key(0), x, *more)
  run = lambda bias: layer.apply({**variables, 'params': {**variables['params'], 'bias': bias}}, x, *more)
  y, transposed = jax.vjp(run, jnp.zeros(1))
  assert y.dtype == jnp.bfloat16
  assert transposed(jnp.ones_like(y))[0] == 131072


@pytest.mark.parametrize('ratio', [1, 16, 256])
def test_one_pass_variance_loses_less_than_bfloat16_has_lost(ratio):
  """A mean of `ratio` deviations: at 256, neighbours in bfloat16 are one to two deviations apart."""
  kinds = (layers.group_norm(192, 4, 1e-5, dtype, 'norm') for dtype in (jnp.bfloat16, jnp.float32))
  one_pass, two_pass = (
    jax.jit(functools.partial(kind.clone(dtype=jnp.float32, use_bias=False, use_scale=False).apply, {}))
    for kind in kinds
  )
  exact = ratio + np.random.default_rng(0).standard_normal((1, 64, 64, 192)).astype(np.float32)
  rounded = jnp.asarray(exact, jnp.bfloat16)
  rms = lambda x: np.sqrt(np.mean(np.square(x, dtype=np.float64)))
  lost = rms(two_pass(rounded) - two_pass(exact))
  assert 0 < rms(one_pass(rounded) - two_pass(rounded)) < lost / 5
