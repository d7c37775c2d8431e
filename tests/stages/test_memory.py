"""Microbatches, remat and the placement of frozen networks: less memory, the same result."""

import dataclasses
import functools
import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import network_tools
import numpy as np
import pytest
import step_tools
import tiny
from flax import linen as nn
from jax.extend import core
from step_tools import PLAIN, RNG

from pagoda_jax import config as configs
from pagoda_jax.method import microbatch, perception
from pagoda_jax.networks.discriminator import Discriminator
from pagoda_jax.networks.frozen.projections import ProjectedFeatures
from pagoda_jax.planning import costs, programs
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import distill, gradients, grow, models, state, teacher
from pagoda_jax.training import workdir
from pagoda_jax.weights import frozen_weights

COUNT = 16  # images in a batch: two for each of eight devices


def experiment(**changes):
  """Few blocks, as nearly all the time goes into compiling; random draws of every kind. One plain gradient step:
  an adaptive one would amplify rounding where gradients are near zero."""
  config = tiny.get_config()
  config.network.update({'channels': 16, 'num_blocks': 0, 'mid_attention': False, 'dropout': 0.2})
  config.phases.teacher.label_dropout = 0.5
  config.phases.grow_16.num_blocks = 0
  config.phases.grow_16.discriminator.update({'spectral_norm': False, 'augment': ('translation',)})
  config.phases.grow_16.adversarial.update({'loss': 'relativistic', 'r1': 1.0, 'r2': 0.5})
  for name in PLAIN:
    phase = config.phases[name]
    phase.batch_size = COUNT
    for key in {'optimizer', 'discriminator_optimizer'} & set(phase):
      phase[key] = configs.optimizer(name='sgd', learning_rate=1e-3 if name == 'teacher' else 1e-1)
  config.update(changes)
  return config


class Outcome(NamedTuple):
  """What a step made of `before`, and the program that it was."""

  before: object
  after: object
  metrics: dict
  program: jax.stages.Compiled

  @property
  def temporaries(self) -> int:
    return self.program.memory_analysis().temp_size_in_bytes


def test_a_device_works_on_no_more_images_at_once_than_it_shall():
  for batch, devices, most in ((10, 1, 4), (9, 1, 4), (16, 2, 3), (16, 2, 4), (7, 1, 2), (8, 8, 4), (8, 1, 0)):
    parts, share = microbatch.count_parts(batch, devices, most), batch // devices
    assert share % parts == 0 and (share // parts <= most or parts == 1)
    assert (parts == 1) == (most in (0, *range(share, 100)))
  with pytest.raises(ValueError, match='a batch of 8 cannot be worked through in 3 equal parts'):
    microbatch.mapped(jnp.sin, 3)(jnp.ones(8))


def step_once(config, name, networks, before, mesh, frozen) -> Outcome:
  """One step from the state `before` (host arrays), with `frozen` on the mesh."""
  parts = microbatch.count_parts(COUNT, mesh.size, config.microbatch)
  make = {'teacher': teacher, 'distill': distill, 'grow_16': grow}[name].make_train_step
  step = make(networks, config.phases[name], parts)
  with jax.set_mesh(mesh):
    placed = sharding.place(before, mesh)
    # On CPU this pass lets what is to be computed again be merged with its first computation. Accelerators keep it.
    jitted = step_tools.jitted(step, placed, mesh, xla_disable_hlo_passes='cse_barrier_expander')
    batch = sharding.place_batch(step_tools.batch_of(config, name, COUNT), mesh)
    program = jitted.lower(placed, batch, frozen, RNG).compile()
    after, metrics = program(placed, batch, frozen, RNG)
    return Outcome(before, jax.device_get(after), jax.device_get(metrics), program)


@functools.cache
def start(name):
  return step_tools.start_of(experiment(), name)[1]


@functools.cache
def outcome(name, devices=1, **changes) -> Outcome:
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  config = experiment(**changes)
  return step_once(config, name, models.build(config, name), start(name), mesh, {})


def flat(tree) -> np.ndarray:
  return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def difference(a, b, before) -> float:
  """How far two trees are apart, relative to what the step changed."""
  return np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(a) - flat(before))


def assert_same(plain, other):
  """Equal to rounding: every parameter, and what the step changed as a whole (biases before a batch norm move by
  rounding alone)."""
  assert other.metrics['loss'] == pytest.approx(plain.metrics['loss'], rel=1e-6)
  for a, b in zip(jax.tree.leaves(plain.after.params), jax.tree.leaves(other.after.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
  for part in ('params', 'discriminator', 'pairs_discriminator'):
    if getattr(plain.after, part, {}):
      assert difference(*(getattr(x, part) for x in (plain.after, other.after, plain.before))) < 1e-5, part


SWITCHES = {
  'microbatch': {'microbatch': 4},
  'remat': {'remat': (8, 16)},
  'both on eight devices': {'microbatch': 1, 'remat': (8, 16), 'devices': 8},
}
# Growth's step is distillation's: each is tried on one of them, in CI both together on growth.
CASES = [*itertools.product(['teacher'], SWITCHES), ('grow_16', 'both on eight devices'),
         *(pytest.param(*case, marks=pytest.mark.slow) for case in (('distill', 'remat'), ('grow_16', 'microbatch')))]


@pytest.mark.parametrize('name, switch', CASES)
def test_a_step_is_the_same(name, switch):
  assert_same(outcome(name), outcome(name, **SWITCHES[switch]))


@pytest.mark.parametrize('name, switch', CASES)
def test_the_compiled_step_needs_less_memory(name, switch):
  most = {'microbatch': 0.4, 'remat': 0.6, 'both on eight devices': 0.2}[switch]
  assert outcome(name, **SWITCHES[switch]).temporaries < most * outcome(name).temporaries


@pytest.mark.parametrize('name', ['teacher', 'grow_16'])
def test_no_image_leaves_its_device(name):
  """Where every device has the whole parameters, nothing but sums is communicated."""
  text = outcome(name, **SWITCHES['both on eight devices']).program.as_text()
  found = re.findall(r' (all-[a-z-]+?|collective-[a-z-]+?|reduce-scatter)(?:-start|-done)?\(', text)
  assert set(found) == {'all-reduce'}


def test_gradients_of_losses_of_single_images_are_summed_once_a_step():
  whole, parts = (costs.sent_bytes(outcome('teacher', devices=8, **changes).program.as_text(), 8)
                  for changes in ({}, {'microbatch': 1, 'remat': (8, 16)}))
  assert parts == whole and whole['all-reduce'] > 4 * models.count(start('teacher').params)


@pytest.mark.parametrize('axes, sizes, count', [(sharding.AXES, (8, 1, 1), 20), (('mine',), (8,), 32)])
def test_meshes_of_others_and_batches_that_do_not_split_give_the_same_gradient(axes, sizes, count):
  mesh = jax.make_mesh(sizes, axes, (jax.sharding.AxisType.Auto,) * len(axes))
  x = np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32)
  losses_of = lambda w, x: jnp.sum(jnp.tanh(x * w), axis=1)
  w = jnp.float32([1.0, -2.0, 0.5])
  expected = gradients.mean_and_grad(losses_of, 1)(w, x)
  with jax.set_mesh(mesh):
    found = jax.jit(gradients.mean_and_grad(losses_of, 4))(w, x)
  for one, other in zip(found, expected):
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize('name', ['teacher', pytest.param('grow_16', marks=pytest.mark.slow)])
def test_bfloat16_with_both_switches_is_close_to_float32(name):
  exact, rough = outcome(name), outcome(name, precision='bfloat16', microbatch=4, remat=(8, 16))
  assert all(np.isfinite(value) for value in rough.metrics.values()) and rough.after.skipped == 0
  assert {leaf.dtype for leaf in jax.tree.leaves(rough.after.params)} == {np.dtype(np.float32)}
  assert rough.metrics['loss'] == pytest.approx(exact.metrics['loss'], rel=5e-3)
  assert 1e-4 < difference(exact.after.params, rough.after.params, exact.before.params) < 5e-2


class Backbone(nn.Module):
  """One map, for the four of a published feature network."""

  @nn.compact
  def __call__(self, x):
    return [nn.silu(nn.Conv(16, (3, 3), 2)(x))]


@pytest.fixture
def projected(monkeypatch):
  """(networks, frozen) of a distill phase whose losses see projected features and batch norms."""
  monkeypatch.setattr(perception, 'RESIZED', 16)
  feature_network = {'small': ProjectedFeatures(Backbone(), widths=(16,), mixed_widths=(16,), input_size=16)}
  variables = network_tools.random_variables(feature_network['small'], np.zeros((1, 8, 8, 1)))
  feature_draws, features = perception.projected_view(feature_network, 8, ('brightness', 'translation'))
  distance_draws, distance = perception.projected_distance(feature_network, 8, ('brightness', 'translation'))
  networks = dataclasses.replace(
    models.build(experiment(), 'distill'),
    discriminator=Discriminator(widths=((8, 8),)),
    feature_draws=feature_draws,
    features=lambda *args: features(*args)['small'],
    distance_draws=distance_draws,
    distance=distance,
  )
  return networks, {'features': {'small': variables}}


def bytes_on_first_device(tree) -> int:
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_frozen_networks_whole_or_split_and_batches_whole_or_in_parts_make_the_same_step(projected, monkeypatch):
  networks, frozen = projected
  mesh = sharding.make_mesh(fsdp=8)
  whole = sharding.place(frozen, mesh, by_rule=False)
  with monkeypatch.context() as patch:
    patch.setattr(sharding, 'SHARDED_FROM', 16)  # this network is tiny
    split = sharding.place(frozen, mesh, by_rule=True)
  assert bytes_on_first_device(whole) == sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
  assert bytes_on_first_device(split) < 0.3 * bytes_on_first_device(whole)

  opponent = models.init_discriminator(networks, frozen, 8, RNG)
  config = experiment()
  before = jax.device_get(state.init_generator(start('distill').params, {}, opponent, config.phases.distill))
  plain = step_once(config, 'distill', networks, before, mesh, whole)
  other = step_once(experiment(microbatch=1), 'distill', networks, before, mesh, split)
  assert_same(plain, other)


def test_maps_and_distance_of_an_image_do_not_depend_on_the_batch(projected):
  networks, frozen = projected

  def seen(images, others, draws, view_draws):
    return networks.distance(frozen, images, others, draws), networks.features(frozen, images, view_draws)

  seen = jax.jit(seen)
  images, others = np.random.default_rng(0).uniform(-1, 1, (2, 4, 8, 8, 1)).astype(np.float32)
  batch = (images, others, networks.distance_draws(RNG, 4), networks.feature_draws(RNG, 4))
  rows = np.array([3, 1, 3, 1])
  some = seen(*jax.tree.map(lambda x: x[rows], batch))
  for a, b in zip(jax.tree.leaves(seen(*batch)), jax.tree.leaves(some), strict=True):
    np.testing.assert_allclose(a[rows], b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_a_run_can_go_on_with_other_switches():
  config, other = experiment(), experiment(microbatch=2, remat=(8,), shard_frozen=True, attention='xla')
  other.mesh.fsdp, other.phases.grow_16.microbatch = 2, 1
  assert workdir.identity(config, 'grow_16') == workdir.identity(other, 'grow_16')
  unets = [models.make_unet(c, 'grow_16') for c in (config, other)]
  plain, remat = (jax.eval_shape(functools.partial(models.fresh_params, unet), RNG) for unet in unets)
  assert unets[1].remat == (8,) and plain == remat


def test_a_phases_own_microbatch_comes_before_the_experiments():
  config = experiment(microbatch=4)
  trace = lambda: str(programs.make(config, 'teacher').trace().jaxpr)
  turns = lambda: re.findall(r'scan\[[^\]]*length=(\d+)', trace(), re.DOTALL)
  assert turns() == ['4']
  config.phases.teacher.microbatch = 1
  assert turns() == ['16']


def at_once(jaxpr, scope) -> set[int]:
  """How many images the convolutions within a named scope are of."""
  found = set()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'conv_general_dilated' and scope in str(eqn.source_info.name_stack):
      found.add(eqn.invars[0].aval.shape[0])
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)):
      if hasattr(value, 'jaxpr') or hasattr(value, 'eqns'):
        found |= at_once(getattr(value, 'jaxpr', value), scope)
  return found


@pytest.mark.parametrize('variant, name, pairs, images', [
  ('', 'distill', 'data', {'denoiser': 2}), ('', 'distill', 'teacher', {'denoiser': 2}),
  ('roads', 'encode', 'data', {'denoiser': 2}), ('guided', 'guide', '', {'denoiser': 4, 'estimator': 2}),
  ('guided', 'distill', 'data', {'denoiser': 4, 'estimator': 2})])  # 4: each with its label and without
def test_teacher_and_estimator_work_through_the_parts_too(variant, name, pairs, images):
  config = tiny.get_config(variant)
  config.microbatch, config.phases.invert.store = 2, False
  if pairs:
    config.phases[name].pairs = pairs
  jaxpr = programs.make(config, name).trace().jaxpr.jaxpr
  assert {scope: at_once(jaxpr, scope) for scope in images} == {scope: {count} for scope, count in images.items()}


def test_the_configs_form_of_attention_reaches_every_network():
  config = experiment(attention='flash')
  config.phases.distill.discriminator.features = 'projected'
  networks = models.build(config, 'distill')
  assert networks.unet.attention_form == 'flash'
  maps = lambda frozen, images: networks.features(frozen, images, networks.feature_draws(RNG, 1))
  with pytest.raises(ValueError, match="attention 'flash' is a kernel of TPUs, and this program is for cpu"):
    jax.eval_shape(maps, frozen_weights.shapes(config, 'distill'), jax.ShapeDtypeStruct((1, 8, 8, 3), 'float32'))
