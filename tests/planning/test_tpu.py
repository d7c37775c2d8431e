"""Every stage's program passes the TPU's own compiler, where that is installed (`jax[tpu]`)."""

import importlib.util

import pytest

from pagoda_jax import config as c
from pagoda_jax.planning import programs
from pagoda_jax.runtime import sharding, topologies

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs jax[tpu], and no TPU')]


def experiment():
  """In bfloat16 and of so many tokens that attention is the TPU's kernel; all else as it comes."""
  config = c.experiment(base_resolution=32, precision='bfloat16')
  config.data.update({'source': 'folder', 'path': 'x', 'resolution': 64, 'channels': 3, 'num_classes': 10})
  config.network = c.network(form='guided', channels=16, channel_mult=(1,), num_blocks=1, attention_resolutions=(32,))
  config.guidance.update({'law': 'uniform', 'low': 1.0, 'high': 4.0})
  players = {'batch_size': 8, 'guide': 'guide', 'noise': 'invert', 'fakes': 'shared',
             'discriminator': c.discriminator(channels=16, scales=1)}
  c.add_phase(config, 'teacher', c.teacher(batch_size=8, label_dropout=0.1))
  c.add_phase(config, 'guide', c.guide(batch_size=8, sample_levels=2))
  c.add_phase(config, 'invert', c.invert(batch_size=8, num_levels=3))
  c.add_phase(config, 'distill', c.distill(**players))
  c.add_phase(config, 'grow_64', c.grow(resolution=64, channels=16, num_blocks=1, update='separate', **players))
  return config


@pytest.mark.parametrize('name', ['teacher', 'guide', 'invert', 'distill', 'grow_64'])
def test_a_stage_and_what_it_draws_compile_for_a_v5e(name, keeps_cache):
  config = experiment()
  mesh = sharding.make_mesh(devices=topologies.compile_devices(topologies.parse('v5e-1')))
  step = programs.make(config, name).trace(mesh).lower().compile()
  assert 'tpu_custom_call' in step.as_text()
  if name in ('teacher', 'distill', 'grow_64'):
    assert 'tpu_custom_call' in programs.sampling(config, name, 8).trace(mesh).lower().compile().as_text()
