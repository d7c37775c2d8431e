"""bfloat16 that can be trusted: no step sums in it, and its gradients are those of float32."""

import jax
import numpy as np
import pytest
import step_tools
import tiny

from pagoda_jax import config as configs
from pagoda_jax.method import perception
from pagoda_jax.planning import programs
from pagoda_jax.stages import distill, grow, models, teacher


@pytest.mark.parametrize('name, features', [*((name, 'projected') for name in step_tools.PLAIN), ('distill', 'dino')])
def test_a_step_sums_nothing_in_bfloat16(name, features, monkeypatch):
  monkeypatch.setattr(perception, 'BACKBONES', step_tools.TINY_BACKBONES)
  config = tiny.get_config()
  config.precision = 'bfloat16'
  # All layers of a U-Net in the teacher, all frozen networks in distillation; growth's discriminator sees pixels.
  config.network.update({'channel_mult': (1, 2) if name == 'teacher' else (1,), 'num_blocks': 0})
  config.phases.grow_16.num_blocks = 0
  config.phases.distill.discriminator = configs.discriminator(features=features)
  config.phases.distill.adversarial.update({'loss': 'relativistic', 'r1': 1.0, 'r2': 1.0} if features == 'dino' else {})
  config.phases.distill.reconstruction.distance = 'lpips'
  assert step_tools.sums_in_bfloat16(programs.make(config, name).trace().jaxpr.jaxpr) == []


def test_an_autoencoders_step_sums_nothing_in_bfloat16():
  config = configs.experiment(base_resolution=8, precision='bfloat16')
  config.autoencoder.update({'widths': (4, 4), 'blocks': 1, 'groups': 2})
  configs.add_phase(config, 'autoencoder', configs.autoencoder(
    batch_size=2, discriminator=configs.discriminator(channels=4, conditional=False, scales=1)))
  assert step_tools.sums_in_bfloat16(programs.make(config, 'autoencoder').trace().jaxpr.jaxpr) == []


def experiment(name, precision):
  config = tiny.get_config()
  config.precision = precision
  config.network['num_blocks'] = 0
  config.phases.grow_16.num_blocks = 0
  for key in {'optimizer', 'discriminator_optimizer'} & set(config.phases[name]):
    config.phases[name][key] = configs.optimizer(name='sgd', learning_rate=1.0)
  return config


def gradients(config, name, before, count):
  """{player: its gradient}: what one plain gradient step, at a rate of 1, takes from the parameters of `before`."""
  make = {'teacher': teacher, 'distill': distill, 'grow_16': grow}[name].make_train_step
  step = jax.jit(make(models.build(config, name), config.phases[name]))
  after, _ = step(before, step_tools.batch_of(config, name, count), {}, step_tools.RNG)
  taken = lambda a, b: jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, a, b)
  found = {'params': taken(before.params, after.params)}
  if name != 'teacher':
    found['discriminator'] = taken(before.discriminator['params'], after.discriminator['params'])
  return found


def rms(leaf) -> float:
  return np.sqrt(np.mean(np.square(leaf)))


# The discriminator's biases sum what real and fake ask for, which all but cancels.
BOUNDS = {'params': 4e-2, 'discriminator': 1e-1}


@pytest.mark.parametrize('name, count', [('teacher', 1024), ('distill', 1024), ('grow_16', 256)])
def test_gradients_are_those_of_float32_leaf_by_leaf(name, count):
  """Within BOUNDS of each leaf's rms (a single number has none). The sums are over 65,536 places: in bfloat16 they took
  biases 0.09 to 0.4 of their rms away."""
  _, before = step_tools.start_of(experiment(name, 'float32'), name)
  exact, rough = (gradients(experiment(name, kind), name, before, count) for kind in ('float32', 'bfloat16'))
  for player, bound in BOUNDS.items():
    leaves, others = jax.tree.leaves_with_path(exact.get(player, {})), jax.tree.leaves(rough.get(player, {}))
    errors = {
      jax.tree_util.keystr(path, simple=True, separator='/'): rms(leaf - other) / rms(leaf)
      for (path, leaf), other in zip(leaves, others, strict=True) if leaf.size > 1
    }
    assert {name: error for name, error in errors.items() if error > bound} == {}, player
