"""The teacher's regularisation: augmentation, dropout and averages act in its training, and nowhere else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_tools
import tiny

from pagoda_jax import config as configs
from pagoda_jax import validation
from pagoda_jax.method import ema, guidance
from pagoda_jax.networks.unet import UNet
from pagoda_jax.planning import programs
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import invert, models, sampler, state, teacher

BATCH = 8


@functools.cache
def experiment():
  config = tiny.get_config()
  config.network.update({'augment_dim': 9, 'dropout': 0.3})
  config.phases.teacher.update({'ema_halflife': (100, 20), 'ema_std': (0.1,)})
  config.phases.teacher.augmentation.rate = 0.9
  validation.validate(config, 8)
  return config


@functools.cache
def states(devices):
  """(state at step 0, after one step, after two), as host arrays."""
  config = experiment()
  networks, start = step_tools.start_of(config, 'teacher')
  step = teacher.make_train_step(networks, config.phases.teacher)
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  found = [start]
  with jax.set_mesh(mesh):
    placed = sharding.place(start, mesh)
    jitted = step_tools.jitted(step, placed, mesh)
    for seed in range(2):
      batch = sharding.place_batch(step_tools.batch_of(config, 'teacher', BATCH, seed), mesh)
      placed, _ = jitted(placed, batch, {}, jax.device_get(step_tools.RNG))
      found.append(jax.device_get(placed))
  return found


def test_a_step_with_all_of_it_is_the_same_on_eight_devices():
  for one, eight in zip(states(1), states(8)):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(np.abs(a).max(), 1e-3))
  moved = states(1)[2].params['augment_embed']['kernel'] != states(1)[0].params['augment_embed']['kernel']
  assert moved.any(axis=1).sum() == 9  # every label was not zero for some picture


def test_averages_are_kept_by_half_life_and_by_power_function():
  names = configs.ema_names(experiment().phases.teacher)
  assert names == ('halflife_100', 'halflife_20', 'std_0.1')
  start, one, two = states(1)
  of = lambda state, name: (state.ema if name == names[0] else state.other_emas[name])['in_conv']['kernel']
  weights = [state.params['in_conv']['kernel'] for state in (start, one, two)]
  for name in names:
    np.testing.assert_array_equal(of(start, name), weights[0])
    np.testing.assert_allclose(of(one, name), weights[1], rtol=1e-5, atol=1e-7)  # ramped up from nothing
  # Before the second step 8 images were seen: a half-life of 0.05 * 8 = 0.4 images, or 2^-20 of the old left.
  np.testing.assert_allclose(of(two, names[0]), weights[2], rtol=1e-4, atol=1e-7)
  exponent = ema.exponent_of(0.1)
  expected = 0.5 ** (exponent + 1) * weights[1] + (1 - 0.5 ** (exponent + 1)) * weights[2]
  np.testing.assert_allclose(of(two, 'std_0.1'), expected, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_skipped_leaves_every_average():
  config = experiment()
  start, one, _ = states(1)
  new = one.replace(other_emas=jax.tree.map(lambda leaf: leaf + 1, one.other_emas))
  kept = jax.jit(state.guarded)((jnp.float32(np.nan),), new, start)
  for a, b in zip(jax.tree.leaves(kept.other_emas), jax.tree.leaves(start.other_emas), strict=True):
    np.testing.assert_array_equal(a, b)
  assert kept.step == 1 and config.phases.teacher.ema_std


def test_labels_and_images_that_would_be_taken_for_others_are_refused():
  config = experiment()
  networks, start = step_tools.start_of(config, 'teacher')
  step, batch = teacher.make_train_step(networks, config.phases.teacher), step_tools.batch_of(config, 'teacher')
  labels = batch['label']
  for given, said in (
    ({'label': labels[:, None]}, r'is int32 \[8, 1\]; must be integers \[8\]'),
    ({'label': np.eye(10, dtype=np.int32)[labels]}, r'is int32 \[8, 10\]; must be integers \[8\]'),
    ({'label': labels[:1]}, r'is int32 \[1\]; must be integers \[8\]'),
    ({'label': labels.astype(np.float32)}, r'is float32 \[8\]; must be integers'),
    ({'image': batch['image'].astype(np.int32)}, 'images are int32; must be uint8'),
  ):
    with pytest.raises(ValueError, match=said):
      jax.eval_shape(step, start, batch | given, {}, step_tools.RNG)
  with pytest.raises(ValueError, match=r"needs batch\['label'\]; got \['image', 'labels'\]"):
    jax.eval_shape(step, start, {'image': batch['image'], 'labels': labels}, {}, step_tools.RNG)


@pytest.mark.parametrize('kind', ['uint8', 'uint32', 'int64'])
def test_a_label_of_any_integers_is_dropped_to_none(kind):
  labels = np.arange(8)
  found = guidance.dropped(step_tools.RNG, {'label': labels.astype(kind)}, 0.5)['label']
  expected = guidance.dropped(step_tools.RNG, {'label': labels.astype(np.int32)}, 0.5)['label']
  assert -1 in expected and guidance.dropped(step_tools.RNG, {}, 0.5) == {}
  np.testing.assert_array_equal(found, expected)


def test_parameters_that_an_average_would_not_follow_are_refused():
  config = experiment()
  networks = models.build(config, 'teacher')
  params = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), models.unet_shapes(networks.unet))
  with pytest.raises(ValueError, match=r"parameter \['.*'\] is bfloat16; must be float32"):
    jax.eval_shape(lambda params: state.init_teacher(params, config.phases.teacher), params)


def test_neither_labels_nor_dropout_reach_sampling_inversion_or_a_generator(monkeypatch):
  """Whatever the network was told in training: its input of labels is zero, and no key for dropout is given."""
  config = experiment()
  told = []
  real = UNet.__call__

  def call(self, x, c_noise, cond, *, augment=None, dropout_keys=None, **kwargs):
    told.append((augment, dropout_keys))
    return real(self, x, c_noise, cond, augment=augment, dropout_keys=dropout_keys, **kwargs)

  monkeypatch.setattr(UNet, '__call__', call)
  networks = models.build(config, 'teacher')
  shapes = jax.eval_shape(lambda: models.fresh_params(networks.unet, jax.random.key(0)))
  told.clear()
  noise, label = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2, jnp.int32)
  jax.eval_shape(sampler.make_draw(config, 'teacher'), shapes, noise, label)
  jax.eval_shape(sampler.make_draw(config, 'distill'), shapes, noise, label)
  step = invert.make_invert_step(networks, np.array([1.0, 2.0, 3.0]))
  jax.eval_shape(step, shapes, {'image': noise, 'label': label}, jax.random.key(0))
  assert len(told) >= 3 and all(seen == (None, None) for seen in told)
  # Labels of zero are no labels, whatever the weights.
  params = states(1)[2].params
  apply = jax.jit(lambda augment: networks.apply(params, noise + 1.0, jnp.zeros(2), {'label': label}, augment=augment))
  np.testing.assert_array_equal(apply(jnp.zeros((2, 9))), jax.jit(
    lambda: networks.apply(params, noise + 1.0, jnp.zeros(2), {'label': label}))())
  assert np.abs(apply(jnp.ones((2, 9))) - apply(jnp.zeros((2, 9)))).max() > 1e-3


@pytest.mark.parametrize('stage', ['distill', 'grow_16'])
def test_a_generators_step_gives_its_network_no_dropout(stage, monkeypatch):
  config = experiment()
  told = []
  real = UNet.__call__
  call = lambda self, *args, **kwargs: told.append(kwargs) or real(self, *args, **kwargs)
  monkeypatch.setattr(UNet, '__call__', call)
  program = programs.make(config, stage)
  told.clear()
  jax.eval_shape(program.step, program.state, program.batch, program.frozen, program.rng)
  assert told and not any(kwargs.get('dropout_keys') is not None or kwargs.get('augment') is not None
                          for kwargs in told)
