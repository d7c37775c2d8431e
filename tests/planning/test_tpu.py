"""Every stage's program, of every form of network, passes the TPU's own compiler (where `jax[tpu]` is installed)."""

import importlib.util

import pytest

from pagoda_jax import config as c
from pagoda_jax.planning import programs
from pagoda_jax.runtime import sharding, topologies

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs jax[tpu], and no TPU')]
# name -> (form of the network, its text_attention)
NETWORKS = {'classes': ('guided', 'none'), 'captions': ('guided', 'cross'), 'deepfloyd': ('deepfloyd', 'added_kv'),
            'edm2': ('edm2', 'none')}
CASES = [(name, phase) for name in NETWORKS for phase in ('teacher', 'guide', 'invert', 'distill', 'grow_64')]
CASES += [('bands', phase) for phase in ('encode', 'encoded', 'distill', 'grow_128')]


def experiment(name):
  """In bfloat16 and of so many tokens that attention is the TPU's kernel; all else as it comes."""
  form, text = NETWORKS.get(name, NETWORKS['classes'])
  config = c.experiment(base_resolution=32, precision='bfloat16')
  config.data.update({'source': 'folder', 'path': 'x', 'resolution': 64, 'channels': 3, 'num_classes': 10})
  config.network = c.network(form=form, channels=16, channel_mult=(1,), num_blocks=1, attention_resolutions=(32,),
                             text_attention=text, text_pool_heads=4 if form == 'deepfloyd' else 0)
  players = {'batch_size': 8, 'noise': 'invert', 'fakes': 'shared',
             'discriminator': c.discriminator(channels=16, scales=1)}
  if name == 'bands':
    return banded(config, players | {'noise': 'encoded'})
  if text != 'none':
    config.data.update({'source': 'array_record', 'num_classes': 0})
    config.text.update({'encoder': 'module:function', 'length': 77, 'width': 64, 'pooled_width': 32})
  config.guidance.update({'law': 'uniform', 'low': 1.0, 'high': 4.0})
  c.add_phase(config, 'teacher', c.teacher(batch_size=8, label_dropout=0.1))
  c.add_phase(config, 'guide', c.guide(batch_size=8, sample_levels=2))
  c.add_phase(config, 'invert', c.invert(batch_size=8, num_levels=3))
  players['guide'] = 'guide'
  c.add_phase(config, 'distill', c.distill(**players))
  grown = players | {'update': 'separate', 'reconstruction_adversarial': c.adversarial(weight=0.5)}
  c.add_phase(config, 'grow_64', c.grow(resolution=64, channels=16, num_blocks=1, **grown))
  return config


def banded(config, players):
  """Growth from the low band of doubled noise, which a learned encoder finds."""
  config.data.update({'resolution': 128, 'downsampling': 'haar'})
  c.add_phase(config, 'teacher', c.teacher(batch_size=8))
  c.add_phase(config, 'invert', c.invert(batch_size=8, num_levels=3, store=False))
  c.add_phase(config, 'encode', c.encode(batch_size=8))
  c.add_phase(config, 'encoded', c.invert(teacher='', encoder='encode', batch_size=8))
  c.add_phase(config, 'distill', c.distill(resolution=64, channels=16, num_blocks=1, **players))
  c.add_phase(config, 'grow_128', c.grow(resolution=128, channels=16, num_blocks=1, **players))
  return config


@pytest.mark.parametrize('name, phase', CASES)
def test_a_stage_and_what_it_draws_compile_for_a_v5e(name, phase, keeps_cache):
  config = experiment(name)
  mesh = sharding.make_mesh(devices=topologies.compile_devices(topologies.parse('v5e-1')))
  step = programs.make(config, phase).trace(mesh).lower().compile()
  assert 'tpu_custom_call' in step.as_text()
  if config.phases[phase].stage in ('teacher', 'distill', 'grow'):
    assert 'tpu_custom_call' in programs.sampling(config, phase, 8).trace(mesh).lower().compile().as_text()
