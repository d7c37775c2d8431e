"""What of a program's values is counted as held in memory at once."""

import jax
import jax.numpy as jnp
import pytest

from pagoda_jax import config as c
from pagoda_jax.networks import attention
from pagoda_jax.planning import memory, plan
from pagoda_jax.runtime import topologies

FLOAT32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
X, KERNEL = FLOAT32(8, 10, 10, 4), FLOAT32(3, 3, 4, 4)
MAP, WEIGHTS = 4 * 8 * 10 * 10 * 4, 4 * 3 * 3 * 4 * 4  # bytes


def peak(function, *shapes, **how):
  return memory.peak_bytes(jax.make_jaxpr(function)(*shapes).jaxpr, **how)


def conv(x, kernel):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def test_what_is_computed_where_it_is_used_takes_no_memory():
  assert peak(lambda x: jnp.sum(jnp.exp(2 * x + 1) ** 2), X) == 4
  assert peak(lambda x: jnp.exp(2 * x + 1), X) == MAP  # the result itself
  # Two convolutions and what the second takes; the first lives no longer than that.
  assert peak(lambda x, k: jnp.sum(conv(jnp.tanh(conv(x, k)), k)), X, KERNEL) == 2 * MAP
  # Within calls as without.
  assert peak(lambda x, k: jax.jit(lambda y: jnp.sum(conv(jax.nn.silu(y), k)))(conv(x, k)), X, KERNEL) == 2 * MAP


def test_what_is_computed_anew_keeps_what_it_is_computed_from():
  def f(x, kernel):
    y = conv(x, kernel)
    later = y + 1  # not made before it is used, after the other convolution
    return jnp.sum(conv(y, kernel)) * jnp.sum(later)

  assert peak(f, X, KERNEL) == 2 * MAP + 4
  # A gradient needs a convolution's input again: of three in a row those of the second and third, which are two of the
  # four maps at most.
  three = lambda x, kernels: jnp.sum(conv(jnp.tanh(conv(jnp.tanh(conv(x, kernels[0])), kernels[1])), kernels[2]))
  assert peak(jax.grad(three, 1), X, [KERNEL] * 3, parameters=[KERNEL.shape]) == 4 * MAP


def test_copies_and_gradients_of_parameters_are_counted_apart():
  loss = lambda kernel, x: jnp.sum(conv(x, kernel.astype(jnp.bfloat16).astype(jnp.float32)))
  whole = peak(jax.grad(loss), KERNEL, FLOAT32(1, 3, 3, 4))
  assert whole >= WEIGHTS and peak(jax.grad(loss), KERNEL, FLOAT32(1, 3, 3, 4), parameters=[KERNEL.shape]) < WEIGHTS


def test_a_loops_turn_counts_once():
  def f(x, kernel):
    return jax.lax.scan(lambda total, _: (total + jnp.sum(conv(conv(x, kernel), kernel)), None), 0.0, length=5)[0]

  assert 2 * MAP <= peak(f, X, KERNEL) <= 2 * MAP + 16


@pytest.mark.parametrize('tokens, dtype, without', [
  (1024, jnp.bfloat16, ('tpu', 'nvidia')), (256, jnp.bfloat16, ('nvidia',)), (1024, jnp.float32, ('tpu',)),
])
def test_attention_keeps_no_logits_on_chips_that_have_a_kernel(tokens, dtype, without):
  q = jax.ShapeDtypeStruct((1, tokens, 2, 64), dtype)
  loss = lambda *qkv: jnp.sum(attention.attend(*qkv, form='xla').astype(jnp.float32) ** 2)
  logits, one = 4 * 2 * tokens * tokens, tokens * 2 * 64 * jnp.dtype(dtype).itemsize
  for chip in ('', 'cpu', 'tpu', 'nvidia'):
    found = peak(jax.grad(loss, (0, 1, 2)), q, q, q, chip=chip)
    assert found <= 6 * one < logits if chip in without else found > logits, chip


@pytest.mark.slow
def test_a_published_networks_step_takes_what_an_h200_was_seen_to_take():
  """ADM-64's teacher, 64 images at once: XLA took 13.5 GB beside its arguments."""
  config = c.experiment(base_resolution=64, precision='bfloat16')
  config.data.update({'resolution': 64, 'channels': 3, 'num_classes': 1000})
  config.network = c.network(form='guided', channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
                             attention_resolutions=(32, 16, 8), dropout=0.1)
  c.add_phase(config, 'teacher', c.teacher(batch_size=64))
  found = plan.phase_costs(config, 'teacher', topologies.parse('1xh200'))
  assert found.gradients + found.copies + found.activations == pytest.approx(13.5e9, rel=0.05)
