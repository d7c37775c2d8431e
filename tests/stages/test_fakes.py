"""Where the discriminator's fakes come from, on players of one number each."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax import config as c
from pagoda_jax.stages import distill, state

RNG = jax.random.key(3)
PLACE = ('dec_8_block0', 'conv_1', 'kernel')  # the last layer, at which adaptive weights are taken


def scale_of(params):
  return params[PLACE[0]][PLACE[1]][PLACE[2]]


# The generator scales its noise; a logit is an image's mean times the discriminator's number.
NETWORKS = types.SimpleNamespace(
  sigma_max=80.0,
  invert=None,
  generate=lambda params, noise, cond: scale_of(params) * noise / 80,
  distance=lambda frozen, a, b, draws: jnp.mean((a - b) ** 2, (1, 2, 3)),
  distance_draws=lambda rng, count: {},
  features=lambda frozen, images, draws: images,
  feature_draws=lambda rng, count: {},
  judge=lambda variables, maps, cond: (variables['params']['w'] * maps.mean((1, 2, 3)), {}),
)


def one_step(fakes):
  phase = c.distill(fakes=fakes, optimizer=c.optimizer(name='sgd', learning_rate=1.0))
  params = {PLACE[0]: {PLACE[1]: {PLACE[2]: jnp.float32(0.5)}}}
  start = state.init_generator(params, {}, {'params': {'w': jnp.float32(1)}}, phase)
  rng = np.random.default_rng(0)
  batch = {'image': rng.normal(size=(4, 8, 8, 1)).astype(np.float32), 'label': np.zeros(4, np.int32),
           'noise': 80 * rng.normal(size=(4, 8, 8, 1)).astype(np.float32)}
  batch |= {'real_image': batch['image'], 'real_label': batch['label']}
  return jax.jit(distill.make_train_step(NETWORKS, phase))(start, batch, {}, RNG)


def test_shared_fakes_are_those_of_the_generators_loss():
  _, metrics = one_step('shared')
  assert float(metrics['logit_fake']) == pytest.approx(-float(metrics['adversarial']), rel=1e-6)


def test_fresh_fakes_are_other_noise_through_the_generator_just_updated():
  after, metrics = one_step('fresh')
  noise = jax.random.normal(state.step_keys(RNG, jnp.int32(0), 6)[3], (4, 8, 8, 1))
  assert abs(float(scale_of(after.params)) - 0.5) > 0.1
  assert float(metrics['logit_fake']) == pytest.approx(float(scale_of(after.params) * noise.mean()), rel=1e-5)
  assert float(metrics['logit_fake']) != pytest.approx(-float(metrics['adversarial']), rel=1e-2)
