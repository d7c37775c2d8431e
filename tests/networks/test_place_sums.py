"""Sums over places by the kernel of NVIDIA GPUs, interpreted, and where it is left out."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from network_tools import H100, on

from pagoda_jax.networks import chips, group_norm, place_sums
from pagoda_jax.runtime import sharding


@pytest.fixture
def calls(monkeypatch):
  """Shapes of the sums of each use of the kernel, on what is taken for an NVIDIA GPU."""
  found = []

  def interpreted(kernel, *, out_shape, **options):
    found.append([leaf.shape for leaf in out_shape])
    return pl_call(kernel, out_shape=out_shape, interpret=True, **options)

  pl_call = pl.pallas_call
  monkeypatch.setattr(place_sums.pl, 'pallas_call', interpreted)
  monkeypatch.setattr(chips, 'chip', lambda: 'nvidia')
  return found


def terms(x, y, a):
  product = x.astype(jnp.float32) * a * y
  return product, product * x, y.astype(jnp.float32)


def drawn(shape, dtype=jnp.bfloat16):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
  return (x, y), (jnp.asarray(rng.standard_normal((shape[0], shape[2])), jnp.float32),)


@pytest.mark.parametrize('shape, tiles', [
  ((2, 512, 192), (4, 192)),  # 64 channels wide, 128 places each
  ((3, 144, 96), (9, 96)),  # 16 places each, 32 channels wide
  ((1, 8, 32), (1, 32))])
def test_the_kernels_sums_are_the_sums(calls, shape, tiles):
  maps, factors = drawn(shape)
  sums = place_sums.place_sums(terms, maps, factors)
  assert calls == [[(shape[0], *tiles)] * 3]
  x, y, a = (np.asarray(leaf, np.float64) for leaf in (*maps, factors[0][:, None]))
  for ours, values in zip(sums, (x * a * y, x * a * y * x, y)):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, values.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('activation', group_norm.ACTIVATIONS)
def test_norms_are_lowered_for_a_gpu_that_is_not_here(activation):
  """Triton lacks some operations, which only lowering tells: one kernel each forward and backward."""
  x, of_channels = (jax.ShapeDtypeStruct(*each) for each in (((2, 64, 64), jnp.bfloat16), ((2, 64), jnp.float32)))

  def gradients(dy, *arguments):
    return jax.vjp(lambda *each: group_norm.normalized(*each, 8, 1e-5, activation), *arguments)[1](dy)

  with on(H100):
    program = jax.jit(gradients).trace(x, x, *[of_channels] * 3).lower(lowering_platforms=('cuda',))
  assert program.as_text().count('__gpu$xla.gpu.triton') == 2


@pytest.mark.parametrize('shape, dtype, missing', [
  ((2, 49, 64), jnp.bfloat16, ''), ((2, 4, 64), jnp.bfloat16, ''), ((2, 64, 20), jnp.bfloat16, ''),
  ((2, 64, 64), jnp.float32, ''), *(((2, 64, 64), jnp.bfloat16, what) for what in ('chip', 'triton', 'ampere'))])
def test_what_it_does_not_take_is_left_to_xla(calls, monkeypatch, shape, dtype, missing):
  if missing == 'chip':
    monkeypatch.setattr(chips, 'chip', lambda: 'tpu')
  if missing == 'triton':
    monkeypatch.setattr(place_sums, 'triton', None)
  if missing == 'ampere':  # a Turing, which XLA compiles no Triton for
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(compute_capability='7.5')])
  maps, factors = drawn(shape, dtype)
  sums = jax.jit(functools.partial(place_sums.place_sums, terms))(maps, factors)
  assert calls == []
  assert jax.tree.map(jnp.shape, sums) == [(shape[0], shape[2])] * 3


def test_every_device_of_a_mesh_sums_its_own_images(calls):
  mesh = sharding.make_mesh(fsdp=2)
  maps, factors = drawn((2 * mesh.size, 64, 32))
  split = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    summed = functools.partial(place_sums.place_sums, terms)
    program = jax.jit(summed, in_shardings=split).lower(maps, factors).compile()
    sums = program(*jax.device_put((maps, factors), split))
  assert calls == [[(2, 1, 32)] * 3]
  assert 'all-gather' not in program.as_text()
  np.testing.assert_allclose(sums[2], np.asarray(maps[1], np.float64).sum(1), rtol=1e-5, atol=1e-4)
