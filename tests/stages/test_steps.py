"""The train steps: what they change, what they leave alone, and that devices do not change the result."""

import contextlib
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_tools
import tiny
from step_tools import PHASES, RNG

from pagoda_jax import config as c
from pagoda_jax.method import guidance
from pagoda_jax.networks import chips, growth
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import encode, invert, models, state, turns

GUIDED_GROWTH = pytest.param('guided:grow_16', marks=pytest.mark.slow)  # in CI training/test_guided_run.py grows


def largest_change(a, b):
  changes = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0), a, b)
  return max(jax.tree.leaves(changes), default=0)


# Growth's step is distillation's, which is placed along all axes by two processes: runtime/test_processes.py.
@pytest.mark.parametrize('name, devices, axes', [
  ('teacher', 8, {'fsdp': 2}), ('guided:distill', 8, {'fsdp': 2}),
  *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    *(('distill', 8, axes) for axes in ({'fsdp': 2}, {'zero1': 8}, {'fsdp': 2, 'zero1': 2})),
    *(('grow_16', 8, axes) for axes in ({}, {'fsdp': 2}, {'fsdp': 8})),
    ('guided:grow_16', 8, {'fsdp': 2, 'zero1': 2})))])
def test_a_step_is_the_same_on_any_mesh(name, devices, axes, monkeypatch):
  monkeypatch.setattr(sharding, 'SHARDED_FROM', 16)  # so that the tiny networks are sharded at all
  one, one_metrics = step_tools.run_step(name, 1)
  many, many_metrics = step_tools.run_step(name, devices, **axes)
  assert many_metrics['loss'] == pytest.approx(one_metrics['loss'], rel=1e-6)
  players = lambda state: (state.params, state.ema, getattr(state, 'pairs_discriminator', {}).get('params'))
  for a, b in zip(jax.tree.leaves(players(one)), jax.tree.leaves(players(many))):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize('name', [*PHASES, GUIDED_GROWTH])
def test_a_step_changes_every_trained_leaf_and_counts(name):
  _, start = step_tools.setup(name)
  after, metrics = step_tools.run_step(name, 1)
  assert after.step == 1 and after.skipped == 0 and np.isfinite(metrics['loss'])
  before, now = jax.tree_util.tree_leaves_with_path(start.params), jax.tree.leaves(after.params)
  unchanged = [jax.tree_util.keystr(path) for (path, a), b in zip(before, now) if np.array_equal(a, b)]
  if name.startswith('guided:'):  # EDM2's frequencies are constants
    unchanged = [path for path in unchanged if "['fourier']" not in path]
  assert unchanged == []


def test_growth_trains_only_new_blocks_the_last_old_level_and_the_head():
  _, start = step_tools.setup('grow_16')
  after, _ = step_tools.run_step('grow_16', 1)
  assert {name.split('_block')[0] for name in start.params} == {'dec_8', 'dec_16_up', 'dec_16', 'out_norm', 'out_conv'}
  assert largest_change(start.fixed, after.fixed) == 0
  assert {name for name in start.fixed} >= {'in_conv', 'time_embed_0', 'label_embed', 'mid_block0'}
  for tree in (start.ema, start.opt_state[0].mu):
    assert set(tree) == set(start.params)


@pytest.mark.parametrize('name', [*(name for name in PHASES if name != 'guided:guide'), GUIDED_GROWTH])
def test_a_step_with_a_nan_is_skipped_and_counted(name):
  """Of pictures or noise; a guide learns from neither."""
  _, start = step_tools.setup(name)
  broken = step_tools.batch_of(*step_tools.of(name))
  if 'noise' in broken:
    broken['noise'][3, 0, 0, 0] = np.nan
  else:
    broken['image'] = broken['image'].astype(np.float32) / 127.5 - 1
    broken['image'][3, 0, 0, 0] = np.nan
  after, metrics = step_tools.run_step(name, 1, batch=broken)
  assert after.step == after.skipped == after.skipped_total == metrics['skipped_in_a_row'] == metrics['skipped'] == 1
  frozen_step = after.replace(step=start.step, skipped=start.skipped, skipped_total=start.skipped_total)
  assert largest_change(start, frozen_step) == 0


def test_what_growth_adds_is_as_in_a_fresh_network_and_nothing_else_is_made(monkeypatch):
  unet, old = (models.make_unet(step_tools.CONFIG, name) for name in ('grow_16', 'distill'))
  old_params, fresh = (models.init_unet(each, jax.random.key(seed)) for seed, each in enumerate((old, unet), 1))
  expected, report = growth.grow_params(fresh, old_params)
  params, found = models.grown(unet, old_params, jax.random.key(2))
  assert found == report and report.new
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  monkeypatch.setattr(models, 'run_once', None)
  assert models.grown(old, old_params, RNG)[0] == old_params


def test_the_generators_weight_is_the_clipped_ratio_of_last_layer_gradients():
  config = step_tools.CONFIG.phases.distill
  params = step_tools.setup('distill')[1].params
  rec, adv = jax.tree.map(jnp.ones_like, params), jax.tree.map(lambda x: 0.25 * jnp.ones_like(x), params)
  # All-ones gradients of n numbers against quarters: sqrt(n) / (sqrt(n) / 4 + 1e-4), times the configured 0.2.
  block, layer, kernel = growth.last_layer(params)
  root = np.sqrt(params[block][layer][kernel].size)
  weight = turns.adversarial_weight(config.adversarial, rec, adv)
  assert float(weight) == pytest.approx(0.2 * root / (root / 4 + 1e-4), rel=1e-5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  assert float(turns.adversarial_weight(config.adversarial, rec, zeros)) == pytest.approx(0.2 * 10)
  assert float(turns.adversarial_weight(config.adversarial, zeros, adv)) == pytest.approx(0.2 * 0.01)


def test_growth_by_pixels_holds_its_discriminator_back_by_default():
  """Unweighted, the adversarial gradient of a pixel distance's phase is tens of times L_rec's."""
  path = pathlib.Path(__file__).parents[2] / 'experiments' / 'folder.py'
  folder = runpy.run_path(str(path))['get_config']('base=8,target=16')
  for phase in (c.grow(), folder.phases.grow_16, folder.phases.distill):
    assert phase.reconstruction.distance == 'pixels'
    params = step_tools.setup('grow_16')[1].params
    rec = jax.tree.map(jnp.ones_like, params)
    weight = turns.adversarial_weight(phase.adversarial, rec, jax.tree.map(lambda x: 30 * jnp.ones_like(x), params))
    assert float(weight) == pytest.approx(phase.adversarial.weight / 30, rel=1e-3)


def test_one_row_is_not_taken_for_those_of_all_images():
  """A noise that every image is compared with, a key that adds the same noise to all."""
  config, batch = tiny.get_config('roads'), step_tools.batch_of(step_tools.CONFIG, 'distill')
  step = encode.make_train_step(models.build(config, 'encode'), config.phases.encode)
  for noise, match in ((batch['noise'][:1], 'holds 1, and .* 8; must be as many'),
                       (batch['noise'][:, :1], r'is \[8, 1, 8, 1\]; must be \[B, 8, 8, 1\]')):
    with pytest.raises(ValueError, match=f"batch\\['noise'\\] {match}"):
      jax.eval_shape(step, None, batch | {'noise': noise}, {}, RNG)
  networks = models.build(step_tools.CONFIG, 'invert')
  step = invert.make_invert_step(networks, np.array([1.0, 2.0]), add_noise=True)
  with pytest.raises(ValueError, match=r"batch\['key'\] is \[1\]; must be \[8\]"):
    jax.eval_shape(step, None, batch | {'key': np.arange(1)}, RNG)


@pytest.mark.parametrize('axes, taken', [({'fsdp': 3}, 6), ({'data': 4}, 4), ({'fsdp': -1}, 64), ({'zero1': 16}, 0)])
def test_a_mesh_that_leaves_devices_idle_is_refused(axes, taken):
  with pytest.raises(ValueError, match=f'takes {taken} devices, and there are 8'):
    sharding.make_mesh(**axes)


def test_an_ema_of_decay_zero_is_the_parameters_and_of_one_step_a_mix():
  tree = {'w': jnp.array([1.0, 2.0])}
  moved = {'w': jnp.array([3.0, 2.0])}
  np.testing.assert_allclose(state.mix(tree, moved, 0.0)['w'], [3, 2])
  np.testing.assert_allclose(state.mix(tree, moved, 0.75)['w'], [1.5, 2])


def test_dropped_labels_are_dropped_at_the_given_rate():
  dropped = guidance.dropped(RNG, {'label': jnp.full(10_000, 3)}, 0.1)['label']
  assert set(np.unique(dropped)) == {-1, 3}
  assert np.mean(dropped == -1) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize('axes, devices', [({}, 8), ({'zero1': 2}, 8), ({'fsdp': 2}, 8), (None, 8), (None, 1)])
def test_on_gpus_that_hold_parameters_whole_gradients_are_laid_out_and_their_norm_is_one_sum(
    axes, devices, monkeypatch):
  """XLA gathers what it is told the layout of, and sums of leaves that it is told to put together: neither where
  parameters or their update are split, or may be."""
  rng = np.random.default_rng(0)
  shapes = {'kernel': (3, 3, 64, 128), 'bias': (64,), 'gain': ()}
  params, grads = ({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
                   for _ in range(2))
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  made, norms = {}, []
  for chip in ('cpu', 'nvidia'):
    monkeypatch.setattr(chips, 'chip', lambda chip=chip: chip)
    optimizer = state.make_optimizer(c.optimizer(), 1)  # anew: a function is traced once
    with contextlib.nullcontext() if axes is None else jax.set_mesh(sharding.make_mesh(**axes)):
      lowered = jax.jit(optimizer.update).lower(grads, optimizer.init(params), params)
      made[chip] = jax.device_get(lowered.compile()(grads, optimizer.init(params), params))
      of_norm = jax.jit(lambda grads: state.global_norm(grads)).lower(grads)
      norms.append(of_norm.compile()(grads))
    whole = chip == 'nvidia' and (axes == {} or devices == 1)
    assert lowered.as_text().count('@LayoutConstraint') == whole * len(shapes)
    assert ('concatenate' in of_norm.as_text()) == whole
  jax.tree.map(np.testing.assert_array_equal, *made.values())
  exact = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in grads.values()))
  np.testing.assert_allclose(norms, exact, rtol=1e-6)
