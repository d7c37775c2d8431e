"""Which chip programs are for, on a machine with an NVIDIA GPU: its device stands in for JAX's own."""

import re
import types

import jax
import pytest
import tiny
from flax import traverse_util

from pagoda_jax.networks import chips
from pagoda_jax.planning import plan, programs
from pagoda_jax.stages import models
from pagoda_jax.training import first_state
from pagoda_jax.use import exported


@pytest.fixture
def gpu(monkeypatch):
  device = types.SimpleNamespace(device_kind='NVIDIA H200', platform='gpu', compute_capability='9.0')
  monkeypatch.setattr(jax, 'devices', lambda *backend: [device])


def config():
  config = tiny.get_config()
  config.precision = 'bfloat16'
  config.network.channels = 32  # the norm's kernel would take them
  return config


def test_the_default_device_decides_without_a_mesh(gpu):
  assert chips.chip() == 'nvidia'
  with chips.on_cpu():
    assert chips.chip() == 'cpu'
  with jax.default_device('cpu'):
    assert chips.chip() == 'cpu'


@pytest.mark.parametrize('what', ['counted', 'exported'])
def test_what_is_counted_or_exported_holds_nothing_of_this_machines_gpu(what, request):
  """Its kernels can be lowered for no CPU, which counts, and run nowhere else."""
  def made():
    if what == 'counted':
      return plan.image_flops(config(), 'teacher'), plan.drawn_flops(config(), 'distill', 2)
    networks = models.build(config(), 'distill')
    params = traverse_util.flatten_dict(first_state.params_shapes(config(), 'distill'), sep='/')
    generator = types.SimpleNamespace(
      config=config(), name='distill', kind='generator', takes_text=False, networks=networks)
    # But for which lines of code its operations come from.
    return re.sub(r'(?m)^#loc.*\n| ?loc\(#\w+\)', '', exported.program(generator, params).mlir_module())

  before = made()
  request.getfixturevalue('gpu')
  assert chips.chip() == 'nvidia'
  with pytest.raises(ValueError, match='interpret'):  # so a kernel there would be
    program = programs.make(config(), 'teacher')
    jax.jit(program.step).lower(program.state, program.batch, program.frozen, program.rng)
  assert made() == before

