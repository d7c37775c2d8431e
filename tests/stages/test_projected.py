"""Training against projected features and LPIPS, on tiny feature networks in the published places."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import published_files
import pytest
import step_tools
import tiny

from pagoda_jax import config as configs
from pagoda_jax.method import augment, losses, perception
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import distill, models, state
from pagoda_jax.weights import frozen_weights, locate

LITE, DEIT = configs.BACKBONES
RNG = jax.random.key(0)


def experiment(distance='projected', **discriminator):
  config = tiny.get_config()
  config.phases.distill.reconstruction.distance = distance
  config.phases.distill.discriminator = configs.discriminator(features='projected', **discriminator)
  return config


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where tiny networks stand in for the published files: images enter them with 128 px, not 224."""
  monkeypatch.setattr(perception, 'BACKBONES', step_tools.TINY_BACKBONES)
  monkeypatch.setattr(perception, 'RESIZED', 128)
  monkeypatch.setattr(perception, 'PROJECTED_WIDTH', 4)
  monkeypatch.setenv(locate.ENVIRONMENT, str(tmp_path))
  published_files.unlocked(monkeypatch)
  published_files.write(tmp_path, LITE, DEIT)
  return tmp_path


def start(config):
  """(networks, frozen, state at step 0) of the distill phase."""
  networks, frozen = models.build(config, 'distill'), frozen_weights.load(config, 'distill')
  params = models.init_unet(networks.unet, RNG)
  rng = np.random.default_rng(0)  # zero-initialised leaves would hide most of the generator
  params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), params)
  opponent = models.init_discriminator(networks, frozen, 8, RNG)
  return networks, frozen, jax.device_get(state.init_generator(params, {}, opponent, config.phases.distill))


def batch(count=8):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, count, 8, 8, 1), np.uint8)
  labels = rng.integers(0, 10, (2, count)).astype(np.int32)
  noise = 80 * rng.standard_normal((count, 8, 8, 1), np.float32)
  return {'image': images[0], 'label': labels[0], 'noise': noise, 'real_image': images[1], 'real_label': labels[1]}


def run_step(config, networks, frozen, start, devices):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    placed, frozen = sharding.place(start, mesh), sharding.place(frozen, mesh)
    step = step_tools.jitted(distill.make_train_step(networks, config.phases.distill), placed, mesh)
    out, metrics = step(placed, sharding.place_batch(batch(), mesh), frozen, RNG)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    return jax.device_get(out), jax.device_get(metrics)


def norm_of_difference(a, b) -> float:
  squares = jax.tree.map(lambda x, y: np.sum((np.asarray(x, np.float64) - y) ** 2), a, b)
  return float(np.sqrt(sum(jax.tree.leaves(squares))))


def test_images_of_another_size_or_other_channels_than_the_generators_are_refused(folder):
  """Feature networks resize all, take grey for RGB, and would take them."""
  networks = models.build(config := experiment(), 'distill')
  step = distill.make_train_step(networks, config.phases.distill)
  for name in ('image', 'real_image'):
    for shape in ([8, 16, 16, 1], [8, 8, 8, 3]):
      with pytest.raises(ValueError, match=re.escape(f"batch['{name}'] is {shape}; must be [B, 8, 8, 1]")):
        jax.eval_shape(step, None, batch() | {name: np.zeros(shape, np.uint8)}, {}, RNG)
  for name in ('real_image', 'noise'):
    with pytest.raises(ValueError, match=re.escape(f"batch['{name}'] holds 1, and batch['image'] 8")):
      jax.eval_shape(step, None, batch() | {name: batch()[name][:1]}, {}, RNG)


# In CI on eight alone: test_memory.py compares, with one small feature network.
@pytest.mark.parametrize('devices', [(8,), pytest.param((8, 1), marks=pytest.mark.slow)])
def test_a_step_with_projected_features_is_the_same_on_one_and_on_eight_devices(folder, devices):
  config = experiment(backbones=(LITE,))  # one network for each loss: the compilation is what takes the time
  config.phases.distill.reconstruction.backbones = (DEIT,)
  networks, frozen, before = start(config)
  (many, metrics), *others = [run_step(config, networks, frozen, before, count) for count in devices]
  assert many.skipped == 0 and all(np.isfinite(value) for value in metrics.values())
  assert 0.2 * 0.01 < metrics['weight'] < 0.2 * 10  # adaptive, and not at a clip
  moved = {part: norm_of_difference(getattr(many, part), getattr(before, part)) for part in ('params', 'discriminator')}
  assert all(moved.values())
  for one, one_metrics in others:
    # Values to rounding; gradients less closely, as a ReLU whose input rounding takes across zero shows in them.
    for key, tolerance in (('loss', 1e-4), ('adversarial', 1e-4), ('discriminator', 1e-4), ('weight', 1e-3)):
      assert one_metrics[key] == pytest.approx(metrics[key], rel=tolerance), key
    # Against what the step changed, all leaves together: biases before batch norm move by rounding alone.
    for part, by in moved.items():
      difference = norm_of_difference(getattr(one, part), getattr(many, part))
      assert difference < 1e-2 * by, (part, difference / by)
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.discriminator, many.discriminator)
  assert set(frozen['features']) == {LITE, DEIT} and set(changed['params']) == {LITE}
  assert all(jax.tree.leaves(changed['spectral']))


@pytest.mark.slow
def test_a_step_on_dinos_tokens_with_r3gans_loss_is_the_same_on_one_and_on_eight_devices(folder):
  published_files.write(folder, perception.DINO_NAME)
  config = experiment('pixels')
  config.phases.distill.discriminator = configs.discriminator(features='dino')
  config.phases.distill.adversarial.update({'loss': 'relativistic', 'r1': 1.0, 'r2': 1.0})
  networks, frozen, before = start(config)
  assert set(frozen['features']) == {perception.DINO_NAME}
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(frozen_weights.shapes(config, 'distill')) == shapes(frozen)
  (one, metrics), (many, many_metrics) = [run_step(config, networks, frozen, before, count) for count in (1, 8)]
  assert one.skipped == 0 and metrics['r1'] > 0 and metrics['r2'] > 0
  for key in ('adversarial', 'discriminator', 'r1', 'r2'):
    assert many_metrics[key] == pytest.approx(metrics[key], rel=1e-3), key
  for part in ('params', 'discriminator'):
    moved, difference = (norm_of_difference(getattr(one, part), getattr(x, part)) for x in (before, many))
    assert 0 < moved and difference < 1e-2 * moved, (part, difference / moved)
  assert len(one.discriminator['params']) == 5 * 4  # a head for the embedding and each quarter of the blocks


def test_penalties_of_either_discriminator_keep_kernels_out_of_the_features_attention(monkeypatch):
  forms = []
  monkeypatch.setattr(perception, 'dino_network', lambda resolution, dtype, form: forms.append(form))
  config = experiment('pixels')
  phase = config.phases.distill
  phase.discriminator.features = 'dino'
  pairs = phase.reconstruction_adversarial
  for adversarial, pairs.r1, pairs.weight in (({}, 0.0, 0.0), ({}, 1.0, 0.0), ({}, 1.0, 0.5), ({'r2': 1.0}, 0.0, 0.0)):
    phase.adversarial.update(adversarial)
    models.build(config, 'distill')
  assert forms == ['auto', 'auto', 'xla', 'xla']


def test_the_distance_is_of_resized_then_augmented_images_with_one_draw_for_both(folder):
  config = experiment()
  networks, frozen = models.build(config, 'distill'), frozen_weights.load(config, 'distill')
  rng = np.random.default_rng(0)
  images, others = rng.uniform(-1, 1, (2, 2, 8, 8, 1)).astype(np.float32)
  draws = networks.distance_draws(RNG, 2)
  distance = networks.distance(frozen, images, others, draws)
  expected = 0
  modules = perception.projected_networks(configs.BACKBONES, 8, jnp.float32)
  for name, key in zip(configs.BACKBONES, jax.random.split(RNG, 2)):
    draw = augment.draw(key, 2, 128)
    seen = [augment.apply(perception.enlarged(x), draw) for x in (images, others)]
    expected += losses.projected_distance(*(modules[name].apply(frozen['features'][name], x) for x in seen))
  np.testing.assert_allclose(distance, expected, rtol=1e-5)
  assert np.all(networks.distance(frozen, images, images, draws) == 0)


@pytest.mark.parametrize('features', ['projected', 'dino'])
def test_kernels_that_are_kept_in_bfloat16_change_no_bit(features, folder):
  """What products of transformers' blocks take is made bfloat16 once, and not in every step; nothing else is."""
  published_files.write(folder, perception.DINO_NAME)
  config = experiment('pixels')
  config.phases.distill.discriminator = configs.discriminator(features=features, backbones=(DEIT,))
  whole = frozen_weights.load(config, 'distill')
  config.precision = 'bfloat16'
  networks, kept = models.build(config, 'distill'), frozen_weights.load(config, 'distill')
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert types(kept) == types(frozen_weights.shapes(config, 'distill'))
  flat = jax.tree.leaves_with_path(kept)
  halved = {jax.tree_util.keystr(path, simple=True, separator='/') for path, leaf in flat if leaf.dtype == jnp.bfloat16}
  depth = step_tools.TINY_BACKBONES[DEIT]['depth']
  assert len(halved) == 4 * depth and all('/backbone/block' in name for name in halved)  # qkv, out, two of the MLP
  images = jax.random.uniform(RNG, (2, 8, 8, 1), minval=-1)
  draws = networks.feature_draws(RNG, 2)

  def summed(frozen, images):
    return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in
               jax.tree.leaves(networks.features(frozen, images, draws)))

  for found, expected in zip(*map(jax.tree.leaves, (
      jax.jit(jax.value_and_grad(summed, argnums=1))(frozen, images) for frozen in (kept, whole)))):
    np.testing.assert_array_equal(found, expected)


def test_smaller_images_are_augmented_by_the_same_shares_of_their_sides():
  seen = []
  network = types.SimpleNamespace(apply=lambda variables, x: seen.append(x) or [x])
  draw, distance = perception.projected_distance({'a': network}, 512, ('translation', 'cutout'))
  draws = draw(RNG, 8) | {'a': {'translation': jnp.full((8, 2), 64), 'cutout': jnp.full((8, 2), 512)}}
  for side in (512, 256):
    distance({'features': {'a': {}}}, *jnp.ones((2, 8, side, side, 1)), draws)
  zero = [1 - np.asarray(x).mean() for x in seen]
  assert zero[0] == zero[1] == pytest.approx(zero[2], abs=0.01) and zero[0] > 0.2
  assert not np.any(seen[2][:, 256 - 32 :]) and np.all(seen[2][:, : 256 - 32, : 256 - 32] == 1)


def test_images_below_256_px_are_resized_and_others_enter_as_they_are(folder):
  def input_size(resolution):
    return perception.projected_networks([LITE], resolution, jnp.float32)[LITE].input_size

  assert [input_size(side) for side in (32, 128, 256, 512)] == [128, 128, None, None]
  dino = [perception.dino_network(side, jnp.float32).input_size for side in (32, 128, 256, 264, 512)]
  assert dino == [128, 128, 256, 256, 512]  # whole patches: what lies in half of one would not be seen
  assert perception.enlarged(jnp.zeros((1, 64, 64, 3))).shape == (1, 128, 128, 3)
  assert perception.enlarged(jnp.zeros((1, 256, 256, 3))).shape == (1, 256, 256, 3)


def test_projections_follow_from_the_seed_and_backbones_from_the_files(folder):
  config = experiment()
  first, again = (frozen_weights.load(config, 'distill')['features'] for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  config.seed = 1
  other = frozen_weights.load(config, 'distill')['features']
  for name in configs.BACKBONES:
    jax.tree.map(np.testing.assert_array_equal, first[name]['params']['backbone'], other[name]['params']['backbone'])
    kernel = first[name]['params']['projection']['channels0']['kernel']
    assert np.any(kernel != other[name]['params']['projection']['channels0']['kernel'])
    bound = 1 / np.sqrt(kernel.shape[2])  # torch's default: uniform in +-1 / sqrt(fan_in)
    assert 0.8 * bound < np.abs(kernel).max() <= bound


def test_a_phase_on_pixels_needs_no_files(monkeypatch, tmp_path):
  monkeypatch.setenv(locate.ENVIRONMENT, str(tmp_path))
  assert frozen_weights.load(tiny.get_config(), 'distill') == {}
  frozen_weights.check_present(tiny.get_config(), tiny.get_config().order)


def test_the_towers_of_clip_are_asked_for_where_a_loss_has_them():
  phase = tiny.get_config().phases.distill
  assert frozen_weights.names(phase) == []
  phase.reconstruction_adversarial.clip_weight = 0.5  # of no second discriminator
  assert frozen_weights.names(phase) == []
  phase.reconstruction_adversarial.weight = 0.5
  assert frozen_weights.names(phase) == [perception.CLIP_NAME]
  phase.reconstruction_adversarial.weight, phase.adversarial.clip_weight = 0.0, 0.5
  assert frozen_weights.names(phase) == [perception.CLIP_NAME]


def test_dino_is_asked_for_where_its_tokens_are_seen(folder):
  config = experiment('pixels')
  config.phases.distill.discriminator.features = 'dino'
  with pytest.raises(locate.MissingWeightsError, match='dino_vits16 is not there(.|\n)*dino_deitsmall16_pretrain.pth'):
    frozen_weights.check_present(config, tiny.get_config().order)


@pytest.mark.parametrize('distance, missing', [('projected', LITE), ('lpips', 'vgg16')])
def test_a_missing_file_is_asked_for_before_anything_runs(distance, missing, folder):
  for path in folder.iterdir():
    if missing == 'vgg16' or 'efficientnet' not in path.name:
      continue
    path.unlink()
  with pytest.raises(locate.MissingWeightsError, match=f'{missing} is not there(.|\n)*download(.|\n)*put it at'):
    frozen_weights.check_present(experiment(distance), tiny.get_config().order)


def test_a_backbone_of_another_size_is_refused_leaf_by_leaf(folder, monkeypatch):
  wider = step_tools.TINY_BACKBONES | {LITE: step_tools.TINY_BACKBONES[LITE] | {'stem': 8}}
  monkeypatch.setattr(perception, 'BACKBONES', wider)
  with pytest.raises(ValueError, match=r'other shape +params/stem/kernel +\(3, 3, 3, 4\) +\(3, 3, 3, 8\)'):
    frozen_weights.load(experiment(backbones=(LITE,)), 'distill')


def test_the_published_class_embedding_is_taken_for_imagenet_and_said(folder, monkeypatch):
  config = experiment(backbones=(LITE,))
  discriminator = {'params': {LITE: {'head0_embedding': {'embedding': np.zeros((1000, 320))}, 'head0_logits': {}}}}
  same, said = frozen_weights.with_class_embedding(config, 'distill', discriminator)
  assert same is discriminator and said == "class embedding random: 10 classes, not ImageNet's"
  config.data.num_classes = 1000
  same, said = frozen_weights.with_class_embedding(config, 'distill', discriminator)
  assert same is discriminator and 'in_embeddings_tf_efficientnet_lite0 is not there' in said
  published_files.write(folder, frozen_weights.CLASS_EMBEDDING)
  filled, said = frozen_weights.with_class_embedding(config, 'distill', discriminator)
  assert said.startswith('class embedding of ')
  assert np.std(filled['params'][LITE]['head0_embedding']['embedding']) == pytest.approx(1, abs=0.01)
  frozen_weights.check_present(config, ('distill',))
  with monkeypatch.context() as one, pytest.raises(locate.MissingWeightsError, match='this process has .* 0 has not'):
    one.setattr(frozen_weights.distributed, 'from_primary', lambda place, make: False)  # which lacks it
    frozen_weights.with_class_embedding(config, 'distill', discriminator)
  # A damaged one is told before the phases that come before its own.
  path = locate.find(frozen_weights.CLASS_EMBEDDING)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(locate.WrongDigestError, match='in_embeddings'):
    frozen_weights.check_present(config, ('distill',))


def test_lpips_trains_on_its_two_published_files(folder):
  published_files.write(folder, 'vgg16', 'lpips_vgg')
  config = experiment('lpips', backbones=(LITE,))
  networks, frozen = models.build(config, 'distill'), frozen_weights.load(config, 'distill')
  assert set(frozen['features']) == {LITE, 'lpips'}
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(frozen_weights.shapes(config, 'distill')) == shapes(frozen)
  images, others = np.random.default_rng(0).uniform(-1, 1, (2, 1, 8, 8, 1)).astype(np.float32)
  distance = lambda x: networks.distance(frozen, images, x, {})[0]
  value, gradient = jax.value_and_grad(distance)(others)
  module = perception.lpips_network(jnp.float32)
  large = (perception.enlarged(jnp.asarray(x)) for x in (images, others))
  np.testing.assert_allclose(value, module.apply(frozen['features']['lpips'], *large)[0], rtol=1e-5)
  assert value > 0 and np.all(np.isfinite(gradient)) and np.any(gradient != 0)


def test_frozen_parameters_are_in_no_state(folder):
  config = experiment(backbones=(LITE,))
  _, frozen, begun = start(config)
  fields = {field.name for field in dataclasses.fields(begun)}
  assert fields == {'step', 'skipped', 'skipped_total', 'params', 'fixed', 'ema', 'opt_state', 'discriminator',
                    'discriminator_opt_state', 'pairs_discriminator', 'pairs_discriminator_opt_state'}
  assert LITE in frozen['features'] and set(begun.discriminator['params']) == {LITE}
