"""The U-Net, its growth and the split of its parameters, on tiny networks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.extend.random import threefry_2x32

from pagoda_jax.networks import chips, growth, layers
from pagoda_jax.networks.unet import EDM_ADM, EDM_DDPMPP, GUIDED_ADM, UNet

TINY = dict(resolution=8, channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), num_classes=3)
BASE = UNet(**TINY)
GROWN = BASE.clone(grown=((16, 1), {'channels': 8, 'num_blocks': 1, 'scale_shift': True}))
BATCH = 2
DROPOUT_KEYS = jax.random.split(jax.random.key(0), BATCH)


def shapes(module):
  x, c_noise = jnp.zeros((BATCH, module.resolution, module.resolution, 3)), jnp.zeros(BATCH)
  return jax.eval_shape(module.init, jax.random.key(0), x, c_noise, {'omega': jnp.ones(BATCH)})['params']


def random_params(module, seed=0):
  """Parameters of plausible size, none of them zero, without compiling `init`."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    z = rng.standard_normal(leaf.shape)
    if leaf.ndim == 1:
      return (0.1 * z + (path[-1].key == 'scale')).astype(np.float32)
    return (z / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes(module))


def random_inputs(module, seed=1):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((BATCH, module.resolution, module.resolution, 3)).astype(np.float32)
  return x, np.asarray([0.3, -1.1], np.float32), {'label': np.asarray([2, 0])}


@functools.cache
def apply(module):
  return jax.jit(lambda params, *args, **kwargs: module.apply({'params': params}, *args, **kwargs),
                 static_argnames='features_only')


def rms(x):
  return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


@pytest.mark.parametrize('form', [EDM_ADM, GUIDED_ADM, EDM_DDPMPP], ids=['edm_adm', 'guided_adm', 'edm_ddpmpp'])
def test_bfloat16_is_close_to_float32(form):
  module = UNet(**TINY, **form)
  params, inputs = random_params(module), random_inputs(module)
  exact = apply(module)(params, *inputs)
  rough = apply(module.clone(dtype=jnp.bfloat16))(params, *inputs)
  assert exact.dtype == rough.dtype == jnp.float32
  assert 1e-5 < rms(rough - exact) / rms(exact) < 2e-2


def test_growth_begins_as_the_old_features_upsampled():
  old = random_params(BASE)
  fresh = jax.jit(GROWN.init)(jax.random.key(0, impl='rbg'), *random_inputs(BASE))['params']  # rbg compiles faster
  params, report = growth.grow_params(fresh, old)
  flat, flat_old = (traverse_util.flatten_dict(tree, sep='/') for tree in (params, old))
  assert set(report.copied) | set(report.other_shape) == set(flat_old) and not report.left_out
  assert report.other_shape == ('out_conv/kernel', 'out_norm/bias', 'out_norm/scale')
  assert all(path.startswith(('dec_16_', 'dec_32_')) for path in report.new)
  assert all(flat[path] is flat_old[path] for path in report.copied)
  assert 'other shape: out_conv/kernel' in str(report)

  # One doubling at the same width; the second one changes the width, so its skip connection is convolved.
  same_width = {name: leaves for name, leaves in params.items() if not name.startswith('dec_32')}
  inputs = random_inputs(BASE)
  features = apply(BASE)(old, *inputs, features_only=True)
  grown = apply(BASE.clone(grown=GROWN.grown[:1]))(same_width, *inputs, features_only=True)
  np.testing.assert_allclose(grown, features.repeat(2, axis=1).repeat(2, axis=2), rtol=1e-5, atol=1e-5)
  assert apply(GROWN)(params, *inputs).shape == (BATCH, 32, 32, 3)


def test_growing_an_unrelated_network_fails():
  with pytest.raises(ValueError, match='no parameter in common'):
    growth.grow_params({'a': np.zeros(1)}, {'a': np.zeros(2)})


def test_thawed_parameters_are_split_off_and_merged_back():
  params = shapes(GROWN)
  trainable, fixed = growth.split_trainable(params, thaw=(8, 16, 32))
  assert set(trainable) == {
      'dec_8_up', 'dec_8_block0', 'dec_8_block1', 'dec_16_up', 'dec_16_block0', 'dec_32_up', 'dec_32_block0',
      'out_norm', 'out_conv'}
  assert growth.merge(trainable, fixed) == params
  assert set(growth.split_trainable(params, thaw=('dec_8_block1',))[0]) == {'dec_8_block1', 'out_norm', 'out_conv'}
  for missing in (64, 'dec_8_block', 'mid_block7'):
    with pytest.raises(ValueError, match='nothing to thaw'):
      growth.split_trainable(params, thaw=(missing,))


def test_last_layer_is_the_last_convolution_of_the_last_decoder_block():
  assert growth.last_layer(shapes(BASE)) == ('dec_8_block1', 'conv_1', 'kernel')
  assert growth.last_layer(shapes(GROWN)) == ('dec_32_block0', 'conv_1', 'kernel')
  # By number, not by letter.
  names = ['dec_128_block10', 'dec_128_block2', 'dec_64_block3', 'dec_128_up', 'mid_block0']
  assert growth.decoder_blocks(dict.fromkeys(names)) == [
      'dec_64_block3', 'dec_128_up', 'dec_128_block2', 'dec_128_block10']


def test_no_label_is_the_unconditional_network():
  params, (x, c_noise, cond) = random_params(BASE), random_inputs(BASE)
  without = {name: leaves for name, leaves in params.items() if name != 'label_embed'}
  unconditional = apply(BASE.clone(num_classes=0))(without, x, c_noise, cond)
  labelled = apply(BASE)(params, x, c_noise, cond)
  half = apply(BASE)(params, x, c_noise, {'label': np.asarray([-1, 0])})
  np.testing.assert_allclose(half[0], unconditional[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(half[1], labelled[1], rtol=1e-5, atol=1e-5)
  assert rms(labelled - unconditional) > 1e-2
  for form in (EDM_ADM, EDM_DDPMPP):  # what is no class is not taken for none either
    module = UNet(**TINY, **form)
    found = apply(module)(random_params(module), x, c_noise, {'label': np.asarray([3, 0])})
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_labels_of_augmentation_are_those_that_the_network_takes():
  inputs = random_inputs(BASE)
  for module in (BASE, BASE.clone(augment_dim=9)):
    with pytest.raises(ValueError, match=f'4 augmentation labels for .* augment_dim = {module.augment_dim}'):
      jax.eval_shape(module.apply, {'params': shapes(module)}, *inputs, augment=np.zeros((BATCH, 4)))


def test_guidance_strength_is_an_input():
  module = BASE.clone(omega_embedding=True)
  params, (x, c_noise, cond) = random_params(module), random_inputs(module)
  weak, strong = (apply(module)(params, x, c_noise, cond | {'omega': np.asarray([1.0, omega])}) for omega in (1.0, 4.0))
  np.testing.assert_array_equal(weak[0], strong[0])
  assert rms(weak[1] - strong[1]) > 1e-3
  with pytest.raises(ValueError, match="needs 'omega'"):
    jax.eval_shape(module.apply, {'params': params}, x, c_noise, cond)


def test_a_generator_begins_as_its_teacher_at_every_strength_of_guidance():
  """And what it learns of omega goes on with it when it grows."""
  guided = BASE.clone(omega_embedding=True)
  teacher, (x, c_noise, cond) = random_params(BASE), random_inputs(BASE)
  inputs = x, c_noise, cond | {'omega': np.ones(2)}
  begun = jax.jit(lambda: guided.init(jax.random.key(0), *inputs)['params']['omega_embed'])()  # compiles that alone
  fresh = random_params(guided) | {'omega_embed': begun}
  params, report = growth.grow_params(fresh, teacher)
  assert {path.split('/')[0] for path in report.new} == {'omega_embed'} and not report.left_out
  expected = apply(BASE)(teacher, x, c_noise, cond)
  for omega in ([1.0, 4.0], [0.0, 100.0]):
    np.testing.assert_array_equal(apply(guided)(params, x, c_noise, cond | {'omega': np.asarray(omega)}), expected)
  taught = params | {'omega_embed': random_params(guided)['omega_embed']}
  grown, _ = growth.grow_params(random_params(GROWN.clone(omega_embedding=True)), taught)
  jax.tree.map(np.testing.assert_array_equal, grown['omega_embed'], taught['omega_embed'])
  assert 'omega_embed' in growth.split_trainable(grown, (8, 16, 32))[1]


def test_an_estimator_is_the_encoder_with_one_output():
  module = BASE.clone(estimator=True)
  inputs = random_inputs(module)
  fresh = jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
  _, report = growth.grow_params(fresh, shapes(BASE))
  assert {path.split('/')[0] for path in report.new} == {'estimate', 'estimate_norm'} and not report.other_shape
  assert {path.split('/')[0].split('_')[0] for path in report.left_out} == {'dec', 'out'}
  found = apply(module)(random_params(module), *inputs)
  assert found.shape == (2,) and found[0] != found[1]


def test_remat_and_dropout():
  module = BASE.clone(dropout=0.5, channel_mult=(1,), attention_resolutions=(), mid_attention=False)
  params, inputs = random_params(module), random_inputs(module)

  def gradient(module):
    def loss(params):
      return jnp.sum(module.apply({'params': params}, *inputs, dropout_keys=DROPOUT_KEYS) ** 2)
    return jax.jit(jax.grad(loss))(params)

  plain, saved = gradient(module), gradient(module.clone(remat=[8]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, saved)
  assert 'remat' in str(jax.make_jaxpr(lambda p: module.clone(remat=[8]).apply({'params': p}, *inputs))(params))
  evaluated = apply(module)(params, *inputs)
  trained = apply(module)(params, *inputs, dropout_keys=DROPOUT_KEYS)
  assert rms(trained - evaluated) > 1e-2


@pytest.mark.parametrize('height', [1, 6, 100])
@pytest.mark.parametrize('chip', ['cpu', 'nvidia'])
def test_dropout_is_threefrys_bits_sixteen_for_each_value(chip, height, monkeypatch):
  monkeypatch.setattr(chips, 'chip', lambda: chip)
  x = np.random.default_rng(0).uniform(1, 2, (2, height, 100, 3)).astype(np.float32)
  chances, shape = 52429, (-(-height // 4), 100, 3)  # 0.8 of 65,536
  expected = []
  for key in DROPOUT_KEYS:
    count = np.arange(2 * math.prod(shape), dtype=np.uint32)
    first, second = np.asarray(threefry_2x32(jax.random.bits(key, 2), count)).reshape(2, *shape)
    expected.append(np.concatenate([first & 0xffff, first >> 16, second & 0xffff, second >> 16])[:height] < chances)
  y, pull = jax.vjp(lambda x: layers.dropped(x, 0.2, DROPOUT_KEYS), x)
  np.testing.assert_allclose(y, np.where(expected, x * (65536 / chances), 0), rtol=1e-6)
  np.testing.assert_allclose(pull(x)[0], y, rtol=1e-6)


def test_dropout_keeps_the_mean_and_gives_each_image_and_each_quarter_its_own():
  x = jnp.ones((2, 100, 100))
  y = np.asarray(layers.dropped(x, 0.2, DROPOUT_KEYS))
  assert set(np.unique(y)) == {np.float32(0), np.float32(65536 / 52429)}
  np.testing.assert_allclose(y.mean((1, 2)), 1, atol=0.02)
  parts = y.reshape(8, -1)  # two images of four quarters
  np.testing.assert_allclose(np.corrcoef(parts), np.eye(8), atol=0.08)  # 2,500 values each: four standard errors
  np.testing.assert_array_equal(layers.dropped(x[1:], 0.2, DROPOUT_KEYS[1:])[0], y[1])
  for rate, left in ((1e-9, 1), (1 - 1e-9, 0)):
    assert np.mean(np.asarray(layers.dropped(x, rate, DROPOUT_KEYS)) != 0) == pytest.approx(left, abs=1e-3)


@pytest.mark.parametrize('change, message', [
    (dict(resolution=16), 'input is 8x8, the network is for 16x16'),
    (dict(channel_mult=(1,) * 5), 'cannot be halved 4 times'),
    (dict(decoder_channel_mult=(1, 2, 3)), 'decoder_channel_mult has 3 levels'),
    (dict(num_heads=5), 'do not split into 5 attention heads'),
])
def test_sizes_that_do_not_fit_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(BASE.clone(**change).init, jax.random.key(0), *random_inputs(BASE))


@pytest.mark.parametrize('channels, min_group_channels, groups', [
    (192, 1, 32), (64, 4, 16), (128, 4, 32), (12, 4, 3), (48, 1, 24), (7, 4, 1), (2, 4, 1)])
def test_group_norm_follows_the_published_rule_or_the_next_smaller_divisor(channels, min_group_channels, groups):
  assert layers.group_norm(channels, min_group_channels, 1e-5, jnp.float32, 'norm').num_groups == groups
