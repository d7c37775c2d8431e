"""EDM2's U-Net: its invariances, its training, its published form (its numbers: goldens/golden_checks_edm2.py)."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import step_tools
import tiny
import torch_writers as writers

from pagoda_jax import config as configs
from pagoda_jax import validation
from pagoda_jax.networks import edm2, growth
from pagoda_jax.networks.unet import EDM2, UNet
from pagoda_jax.planning import programs
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import models, state, teacher
from pagoda_jax.weights.convert import edm2 as published
from pagoda_jax.weights.convert import formats
from pagoda_jax.weights.convert.mapping import ConversionError

OPTIONS = EDM2 | {'resolution': 8, 'channels': 16, 'channel_mult': (1, 2), 'num_blocks': 1, 'embed_channels': 24,
                  'attention_resolutions': (4,), 'channels_per_head': 8, 'num_classes': 3}  # fmt: skip
NET = UNet(**OPTIONS)


@functools.cache
def theirs():
  rng = np.random.default_rng(0)
  return {leaf.theirs: np.asarray(rng.standard_normal(leaf.shape), np.float32) for leaf in published.leaves(OPTIONS)}


@functools.cache
def params():
  return formats.from_state_dict(theirs(), 'edm2', channels_per_head=8).variables['params']


def rms(x, axes=None, keepdims=False):
  return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axes, keepdims=keepdims))


INPUTS = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32), np.array([0.3, -1.1], np.float32)
CALL = jax.jit(lambda params, label: NET.apply({'params': params}, *INPUTS, {'label': label}))


def test_the_size_of_weights_does_not_count_and_forced_ones_are_of_size_one():
  def other(path, leaf):
    return 3.0 * leaf if path[-1].key == 'kernel' else leaf

  label = np.array([2, 0])
  plain, forced = CALL(params(), label), edm2.forced(params(), params())
  for tree in (jax.tree_util.tree_map_with_path(other, params()), forced):
    np.testing.assert_allclose(CALL(tree, label), plain, atol=5e-3 * rms(plain))  # eps is 1e-4 of a size
  np.testing.assert_allclose(rms(forced['dec_8_block0']['conv_0']['kernel'], (0, 1, 2)), 1, atol=1e-3)
  # Other layers' kernels count, and an optimiser that shrinks all does not reach constants.
  dense, shrunk = {'kernel': 3 * np.ones((2, 2)), 'bias': np.ones(2)}, jax.tree.map(lambda leaf: 0.5 * leaf, params())
  after = edm2.forced(shrunk | {'omega_embed': dense}, params())
  assert after['omega_embed']['kernel'][0, 0] == 3 and after['out_gain'] == shrunk['out_gain']
  np.testing.assert_array_equal(after['embedding']['fourier']['freqs'], params()['embedding']['fourier']['freqs'])


def test_labels():
  """-1 is no label, as absence is; what is no class is not taken for one."""
  found = [np.asarray(CALL(params(), np.array(label))) for label in ([2, 0], [-1, -1], [3, 0])]
  assert rms(found[0] - found[1]) > 1e-2 * rms(found[0])
  assert np.isnan(found[2][0]).all() and np.array_equal(found[2][1], found[0][1])


def test_layers_keep_magnitudes():
  """Of independent normal numbers, in expectation: the claim of the paper's section 2.5."""
  a, b = jax.random.normal(jax.random.key(0), (2, 100_000, 8))
  assert rms(edm2.mp_silu(a)) == pytest.approx(1, abs=0.01)
  for t in (0.3, 0.5):
    assert rms(edm2.mp_sum(a, b, t)) == pytest.approx(1, abs=0.01)
  # Of unequal widths too, and each part has its share.
  both = edm2.mp_cat(a, jnp.concatenate([b, b, b], -1))
  assert rms(both) == pytest.approx(1, abs=0.01)
  assert np.sum(np.square(both[:, :8])) == pytest.approx(np.sum(np.square(both[:, 8:])), rel=0.01)
  assert rms(edm2.unit(7 * a, -1), -1) == pytest.approx(1, abs=1e-3)
  for size in (1, 3):
    layer = edm2.Weighted(32, size)
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 32))
    y = layer.apply(layer.init(jax.random.key(2), x), x)[:, 1:-1, 1:-1]  # a border of zeros has less
    assert rms(y) == pytest.approx(1, abs=0.05)


def test_every_block_of_a_fresh_network_keeps_magnitudes():
  net = NET.clone(channels=32, channel_mult=(1, 1), num_blocks=2, embed_channels=32)
  init = lambda: net.init(jax.random.key(0), *INPUTS, {'label': np.array([2, 0])})
  call = lambda: net.apply(init(), *INPUTS, {'label': np.array([2, 0])}, capture_intermediates=True, mutable=True)
  (out, kept) = jax.jit(call)()
  sizes = {name: rms(values['__call__'][0]) for name, values in kept['intermediates'].items()
           if name.startswith(('enc_', 'mid_', 'dec_'))}
  # Convolutions see zeros beyond the border, which is much of a map of 4 px.
  assert len(sizes) == 14 and all(0.65 < size < 1.3 for size in sizes.values()), sizes
  assert not np.any(out)  # the learned gain of the output begins at zero


def experiment(precision='float32'):
  config = tiny.get_config()
  config.precision = precision
  config.network.update({'form': 'edm2', 'attention_resolutions': (8,), 'dropout': 0.1})
  config.phases.teacher.update({'uncertainty': True, 'ema_std': (0.05, 0.1)})
  validation.validate(config, 8)
  return config


@functools.cache
def steps(devices):
  """(state at step 0, after three steps) of the teacher on so many devices, as host arrays."""
  config = experiment()
  networks, begun = step_tools.start_of(config, 'teacher')
  mesh = sharding.make_mesh(fsdp=min(devices, 2), devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    placed = sharding.place(begun, mesh)
    step = step_tools.jitted(teacher.make_train_step(networks, config.phases.teacher), placed, mesh)
    batch = sharding.place_batch(step_tools.batch_of(config, 'teacher'), mesh)
    for _ in range(3):
      placed, metrics = step(placed, batch, {}, jax.device_get(step_tools.RNG))
    assert np.isfinite(metrics['loss'])
    return begun, jax.device_get(jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(placed))


def test_a_teachers_steps_keep_weights_at_their_size_and_constants_as_they_are_on_any_devices():
  begun, after = steps(1)
  for (path, a), b in zip(jax.tree.leaves_with_path(begun.params), jax.tree.leaves(after.params), strict=True):
    name = jax.tree_util.keystr(path)
    assert np.array_equal(a, b) == name.endswith(("['freqs']", "['phases']")), name
    if path[-1].key == 'kernel':
      np.testing.assert_allclose(rms(b, tuple(range(b.ndim - 1))), 1, atol=1e-3, err_msg=name)
  for average in (after.ema, *after.other_emas.values()):
    for path in (('embedding', 'fourier'), ('logvar', 'fourier')):
      jax.tree.map(np.testing.assert_array_equal, average[path[0]][path[1]], begun.params[path[0]][path[1]])
  for one, eight in zip(jax.tree.leaves(after), jax.tree.leaves(steps(8)[1]), strict=True):
    np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-4 * max(np.abs(one).max(), 1e-3))


def test_averages_leave_constants_alone():
  tree = {'fourier': {'freqs': np.float32([0.1, 7.7])}, 'kernel': np.float32([0.1, 7.7])}
  mixed = jax.jit(lambda tree: jax.lax.fori_loop(0, 1000, lambda _, e: state.mix(e, tree, 0.999), tree))(tree)
  np.testing.assert_array_equal(mixed['fourier']['freqs'], tree['fourier']['freqs'])


def test_bfloat16_sums_nothing_and_is_close():
  assert step_tools.sums_in_bfloat16(programs.make(experiment('bfloat16'), 'teacher').trace().jaxpr.jaxpr) == []
  rough = jax.jit(lambda: NET.clone(dtype=jnp.bfloat16).apply(
    {'params': params()}, *INPUTS, {'label': np.array([2, 0])}))()
  exact = CALL(params(), np.array([2, 0]))
  assert rough.dtype == jnp.float32 and 1e-5 < rms(rough - exact) / rms(exact) < 3e-2


def test_a_generator_begins_as_the_teacher_and_growth_as_its_features_up_sampled():
  config = experiment()
  base = models.make_unet(config, 'distill')
  shapes = jax.eval_shape(lambda: models.fresh_params(base, jax.random.key(0)))
  rng = np.random.default_rng(3)
  old = jax.tree.map(lambda leaf: np.asarray(rng.standard_normal(leaf.shape), np.float32), shapes)
  grown = models.make_unet(config, 'grow_16')
  fresh = jax.jit(functools.partial(models.fresh_params, grown))(jax.random.key(0))
  params, report = growth.grow_params(fresh, old)
  assert not report.other_shape and not report.left_out
  trained, fixed = growth.split_trainable(params, (8, 16))
  assert {'out_conv', 'out_gain', 'dec_16_up', 'dec_16_block0', 'dec_8_block0', 'dec_8_block1'} == set(trained)
  assert growth.last_layer(trained) == ('dec_16_block0', 'conv_1', 'kernel')
  x, c_noise = rng.standard_normal((2, 8, 8, 1)).astype(np.float32), np.full(2, math.log(80) / 4, np.float32)
  features = jax.jit(lambda unet, params: unet.apply(
    {'params': params}, x, c_noise, {'label': np.array([1, 2])}, features_only=True), static_argnums=0,
    compiler_options=quick.SAME_ANY_SIZE)
  before, after = features(base, old), features(grown, growth.merge(trained, fixed))
  np.testing.assert_array_equal(after, before.repeat(2, 1).repeat(2, 2))


def test_a_published_pickle_is_read(tmp_path):
  """As NVIDIA's persistence writes it: half precision, with source code that is not run, beside an encoder."""
  def nested(prefix):
    own = {name.removeprefix(prefix): value.astype(np.float16) for name, value in theirs().items()
           if name.startswith(prefix) and '.' not in name.removeprefix(prefix)}
    children = {name.removeprefix(prefix).split('.')[0] for name in theirs()
                if name.startswith(prefix) and '.' in name.removeprefix(prefix)}
    return writers.persistent_module(own, {child: nested(f'{prefix}{child}.') for child in children})

  encoder = writers.persistent_module(cls='StandardRGBEncoder')
  writers.save_pickle(tmp_path / 'edm2.pkl', {'dataset_kwargs': {'path': 'x'}, 'encoder': encoder, 'ema': nested('')})
  converted = formats.read_converted(tmp_path / 'edm2.pkl', channels_per_head=8)
  assert converted.format == 'edm2' and {key: converted.options[key] for key in OPTIONS} == OPTIONS
  back = formats.to_state_dict(converted)
  assert back.keys() == theirs().keys()
  for name, value in theirs().items():
    np.testing.assert_array_equal(back[name], value.astype(np.float16).astype(np.float32), err_msg=name)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named():
  """Or others are, which the sizes read off it ask for; nothing else than ConversionError is raised."""
  optional = 'unet.emb_label.weight'  # a network without it is one without classes
  for name, value in theirs().items():
    for other in (None, value[..., None], np.zeros(0, np.float32), np.concatenate([value.ravel()] * 2)):
      tensors = {key: kept for key, kept in (theirs() | {name: other}).items() if kept is not None}
      try:
        formats.from_state_dict(tensors, 'edm2', channels_per_head=8)
      except ConversionError as error:
        assert name in str(error) or re.search('no network of format edm2|unexpected +unet', str(error))
      else:
        assert name == optional and other is None, f'{name} of shape {np.shape(other)} was taken'


def test_sizes_of_the_published_networks_are_read_back():
  """EDM2-S at 64 px: 280 M parameters (Karras et al. 2024, table 2, of the latent network, whose ends differ)."""
  options = EDM2 | {'resolution': 64, 'channels': 192, 'channel_mult': (1, 2, 3, 4), 'num_blocks': 3,
                    'attention_resolutions': (16, 8), 'num_classes': 1000, 'embed_channels': 768}
  shapes = {leaf.theirs: np.broadcast_to(np.float32(0), leaf.shape) for leaf in published.leaves(options)}
  assert sum(value.size for value in shapes.values()) / 1e6 == pytest.approx(280, abs=0.5)
  found = published.options(shapes)
  assert {key: found[key] for key in options} == options
  assert UNet(**found).blocks() == UNet(**options).blocks()


def test_what_it_has_no_input_for_is_refused():
  def refused(match, **changed):
    config = experiment()
    config.update_from_flattened_dict(changed)
    with pytest.raises(configs.ConfigError, match=match):
      validation.validate(config)

  refused("augment_dim = 9: must be 0 where config.network.form is 'edm2'", **{'network.augment_dim': 9})
  refused("augmentation.rate = 0.1: must be 0 where", **{'phases.teacher.augmentation.rate': 0.1})
  refused("stem_channels = 8: must be 0 where", **{'network.stem_channels': 8})
  refused("teacher.uncertainty = True: must be False where .*form = 'edm'", **{'network.form': 'edm'})
  with pytest.raises(ValueError, match='no input for augmentation labels'):
    jax.eval_shape(lambda: NET.clone(augment_dim=9).init(jax.random.key(0), *INPUTS, {}))
  with pytest.raises(ValueError, match='logvar'):
    jax.eval_shape(lambda: UNet(**OPTIONS | {'magnitude_preserving': False}).init(
      jax.random.key(0), *INPUTS, {}, logvar_only=True))


def test_the_learning_rate_falls_by_the_root_of_the_step():
  """EDM2's: after 10 steps of warm-up constant up to step 40, and half of it at step 160."""
  chosen = configs.optimizer(name='sgd', learning_rate=0.5, schedule='inverse_sqrt', warmup_steps=10, decay_from=40)
  optimizer = state.make_optimizer(chosen, 1000)

  def taken(step):
    counted = jax.tree.map(lambda leaf: jnp.full_like(leaf, step), optimizer.init(jnp.zeros(())))
    return -float(optimizer.update(jnp.ones(()), counted)[0])

  for step, expected in ((0, 0), (5, 0.25), (10, 0.5), (40, 0.5), (160, 0.25), (4000, 0.05)):
    assert taken(step) == pytest.approx(expected), step
