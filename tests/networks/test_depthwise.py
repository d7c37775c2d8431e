"""Both forms of EfficientNet's depthwise convolution are one function, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_tools import V5E, on

from pagoda_jax.networks.frozen import efficientnet_lite0 as lite


@pytest.mark.parametrize('side, kernel, stride', [(7, 3, 1), (8, 5, 1), (8, 3, 2), (7, 5, 2)])
def test_shifted_products_are_the_convolution(side, kernel, stride):
  x, weights = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(
    [(2, side, side + 3, 6), (kernel, kernel, 1, 6)]))
  run = jax.jit(lambda form, x: jax.vjp(lambda x: form(x, weights, stride), x), static_argnums=0)
  results = []
  for form in (lite.shifted_products, lite.depthwise_convolution):
    y, transposed = run(form, x)
    results.append((y, *transposed(jnp.cos(y))))
  for ours, plain in zip(*results):
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_it_sums_in_float32():
  """Of 25 products, 1 and 24 of 1/256: in bfloat16 each but the first would be lost."""
  x = jnp.ones((1, 5, 5, 2), jnp.bfloat16)
  kernel = jnp.full((5, 5, 1, 2), 1 / 256, jnp.bfloat16).at[0, 0].set(1)
  found = jax.jit(functools.partial(lite.shifted_products, stride=1))(x, kernel)
  assert found.dtype == jnp.bfloat16 and found[0, 2, 2, 0] == jnp.bfloat16(1 + 24 / 256)


def test_only_a_cpu_takes_shifted_products():
  layer, x = lite.Depthwise(3, 1), jnp.zeros((1, 4, 4, 2))
  variables = layer.init(jax.random.key(0), x)
  traced = lambda: str(jax.make_jaxpr(layer.apply)(variables, x))
  assert 'conv_general_dilated' not in traced()
  with on(V5E):
    assert 'conv_general_dilated' in traced()
