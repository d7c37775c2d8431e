"""What the layers do in bfloat16 that Linen's do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl

from pagoda_jax.networks import chips, discriminator, group_norm, layers, place_sums

BFLOAT16 = {'dtype': jnp.bfloat16}


@pytest.mark.parametrize('chip', ['cpu', 'tpu'])
@pytest.mark.parametrize('layer', [
    layers.Conv(1, (1, 1), **BFLOAT16), layers.Dense(1, **BFLOAT16), discriminator.SpectralConv(1, (1, 1), **BFLOAT16)
], ids=lambda layer: type(layer).__name__)
def test_the_gradient_of_a_bias_is_a_float32_sum(layer, chip, monkeypatch):
  """Of 131,072 ones. In bfloat16 a sum of ones ends at 256; a CPU's, several at once, came to 4,096."""
  monkeypatch.setattr(chips, 'chip', lambda: chip)
  x = jnp.zeros((2, 256, 256, 1), jnp.bfloat16)
  more = (False,) if isinstance(layer, discriminator.SpectralConv) else ()
  variables = layer.init(jax.random.key(0), x, *more)
  run = lambda bias: layer.apply({**variables, 'params': {**variables['params'], 'bias': bias}}, x, *more)
  y, transposed = jax.vjp(run, jnp.zeros(1))
  assert y.dtype == jnp.bfloat16
  assert transposed(jnp.ones_like(y))[0] == 131072


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_product_for_a_biass_gradient_is_the_sum(dtype, monkeypatch):
  """On a TPU; float32 gradients are not rounded to the matrix units' type."""
  dy, programs = jax.random.normal(jax.random.key(0), (2, 1024, 4)).astype(dtype), []
  for chip in ('cpu', 'tpu'):
    monkeypatch.setattr(chips, 'chip', lambda chip=chip: chip)
    gradient = lambda dy: jax.vjp(layers.with_bias, jnp.zeros_like(dy), jnp.zeros(4))[1](dy)[1]
    programs.append(str(jax.make_jaxpr(gradient)(dy)))
    np.testing.assert_allclose(gradient(dy), np.asarray(dy, np.float64).sum((0, 1)), rtol=1e-5, atol=1e-4)
  assert ('dot_general' in programs[1]) == (dtype == jnp.bfloat16) and 'dot_general' not in programs[0]


def test_a_dense_layer_of_two_axes_is_that_of_both_side_by_side():
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
  layer = layers.Dense(6, axes=2)
  variables = layer.init(jax.random.key(1), x)
  assert jax.tree.map(jnp.shape, variables['params']) == {'kernel': (12, 6), 'bias': (6,)}
  expected = layers.Dense(6).apply(variables, x.reshape(2, 5, 12))
  np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize('side, channels, activation, scaled, biased', [
  (16, 192, 'silu', True, True), (12, 96, 'gelu', False, True), (8, 64, '', True, False), (8, 20, 'silu', False, True)])
def test_the_norm_of_gpus_is_the_norm_and_its_gradients(monkeypatch, side, channels, activation, scaled, biased):
  """Of bfloat16 maps, against float64: what they round is the result and the gradient of the maps."""
  monkeypatch.setattr(chips, 'chip', lambda: 'nvidia')
  monkeypatch.setattr(place_sums.pl, 'pallas_call', functools.partial(pl.pallas_call, interpret=True))
  rng = np.random.default_rng(0)
  draw = lambda *shape, mean=0.0: jnp.asarray(mean + rng.standard_normal(shape), jnp.float32)
  x, dy = (draw(3, side, side, channels, mean=mean).astype(jnp.bfloat16) for mean in (2.0, 0.0))
  variables = {'params': {'scale': draw(channels), 'bias': draw(channels)}}
  more = {'scale': 0.3 * draw(3, 1, 1, channels), 'shift': draw(3, 1, 1, channels)} if scaled else {}
  more |= {'bias': draw(channels)} if biased else {}
  norm = layers.group_norm(channels, 4, 1e-5, jnp.bfloat16, 'norm')
  assert jax.tree.map(jnp.shape, norm.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, variables)

  def exact(x, variables, more):
    plain = nn.GroupNorm(norm.num_groups, epsilon=1e-5, use_fast_variance=False, dtype=x.dtype)
    y = plain.apply(variables, x + more.get('bias', 0))
    return group_norm.ACTIVATIONS[activation](y * (1 + more['scale']) + more['shift'] if scaled else y)

  def ours(x, variables, more):
    return norm.apply(variables, x, activation=activation, **more)

  y, pull = jax.jit(lambda *a: jax.vjp(ours, *a))(x, variables, more)
  dx, *rest = pull(dy)
  with jax.enable_x64(True):
    exactly = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
    expected, pull_exact = jax.vjp(exact, *map(exactly, (x, variables, more)))
    dx_exact, *rest_exact = pull_exact(exactly(dy))
  # As NumPy's: outside, JAX would make float32 of them again.
  expected, dx_exact, rest_exact = jax.device_get((expected, dx_exact, rest_exact))
  far = lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
  assert y.dtype == dx.dtype == jnp.bfloat16
  assert far(y, expected) < 2e-3 and far(dx, dx_exact) < 2e-3
  assert max(jax.tree.leaves(jax.tree.map(far, rest, rest_exact))) < 1e-6


@pytest.mark.parametrize('activation', group_norm.ACTIVATIONS)
def test_derivatives_of_activations(activation):
  """Of all that a bfloat16 network may meet; where exponentials overflow too."""
  z = np.concatenate([np.linspace(-12, 12, 4001), [-3e38, -1e4, -200, -90, 90, 200, 1e4, 3e38]]).astype(np.float32)
  exact = jax.vmap(jax.grad(group_norm.ACTIVATIONS[activation]))(z[:-8])
  ours = group_norm.DERIVATIVES[activation](jnp.asarray(z))
  np.testing.assert_allclose(ours[:-8], exact, atol=4e-7)
  np.testing.assert_array_equal(ours[-8:], np.ones(8) if activation == '' else [0] * 4 + [1] * 4)


def test_a_norm_that_adds_the_bias_of_a_convolution_is_both(monkeypatch):
  """Everywhere else to the bit: a bare convolution and the norm of its bias are the convolution and the norm."""
  x, dy = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 64)).astype(jnp.bfloat16)
  shape = {'features': 64, 'kernel_size': (3, 3), 'dtype': jnp.bfloat16}
  whole, bare, norm = layers.Conv(**shape), layers.BareConv(**shape), layers.group_norm(64, 4, 1e-5, jnp.bfloat16, 'n')
  of_conv, of_norm = whole.init(jax.random.key(1), x), norm.init(jax.random.key(2), x)
  of_conv['params']['bias'] += 0.3
  assert jax.tree.map(jnp.shape, of_conv) == jax.tree.map(jnp.shape, bare.init(jax.random.key(1), x))

  def apart(x, of_conv, of_norm):
    y, bias = bare.apply(of_conv, x)
    return norm.apply(of_norm, y, activation='silu', bias=bias)

  both = lambda x, of_conv, of_norm: norm.apply(of_norm, whole.apply(of_conv, x), activation='silu')
  values, gradients = zip(*((y, pull(dy)) for y, pull in (jax.vjp(f, x, of_conv, of_norm) for f in (apart, both))))
  jax.tree.map(np.testing.assert_array_equal, *values)
  jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_patches_are_a_convolution_of_a_stride_of_its_size():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 13, 3)), jnp.float32)
  convolution = nn.Conv(5, (4, 4), (4, 4), 'VALID')
  variables = convolution.init_with_output(jax.random.key(0), x)[1]
  variables['params']['bias'] += 1.0
  run = lambda layer: jax.vjp(lambda x: layer.apply(variables, x), x)
  (ours, pull), (theirs, pull_theirs) = run(layers.Patches(5, 4)), run(convolution)
  assert ours.shape == (2, 2, 3, 5)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  np.testing.assert_allclose(pull(ours)[0], pull_theirs(ours)[0], atol=1e-5)
