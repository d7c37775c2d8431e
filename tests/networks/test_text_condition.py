"""Text in the U-Net and in discriminators: what depends on it, and what does not."""

import functools

import jax
import jax.numpy as jnp
import network_tools
import numpy as np
import pytest
from flax import traverse_util

from pagoda_jax.networks import attention, growth, text_condition, token_heads
from pagoda_jax.networks.discriminator import Discriminator
from pagoda_jax.networks.pyramid import PyramidDiscriminator
from pagoda_jax.networks.unet import DEEPFLOYD, UNet

PLAIN = UNet(resolution=8, channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), image_channels=1)
TEXT = PLAIN.clone(text_width=6, text_pooled_width=5)
OF_IF = TEXT.clone(**DEEPFLOYD, text_attention='added_kv', text_pooled_width=0, text_pool_heads=2)
RNG = np.random.default_rng(0)
X, C_NOISE = RNG.standard_normal((2, 8, 8, 1)).astype(np.float32), np.zeros(2, np.float32)
COND = {'text': RNG.standard_normal((2, 4, 6)).astype(np.float16), 'text_mask': np.arange(4) < np.array([[2], [4]]),
        'text_pooled': RNG.standard_normal((2, 5)).astype(np.float16)}
OTHER = {key: value[::-1] for key, value in COND.items()}


@functools.cache
def params_of(module):
  return network_tools.random_variables(module, X, C_NOISE, COND)['params']


@functools.cache
def applied(module):
  return jax.jit(lambda cond: module.apply({'params': params_of(module)}, X, C_NOISE, cond))


def call(module, **changes):
  return np.asarray(applied(module)(COND | changes))


def paths(module):
  return set(traverse_util.flatten_dict(params_of(module), sep='/'))


@pytest.mark.parametrize('kind', text_condition.ATTENTIONS)
def test_a_network_of_text_has_the_plain_ones_parameters_and_depends_on_its_tokens(kind):
  module = TEXT.clone(text_attention=kind)
  assert paths(PLAIN) < paths(module)
  added = {path.split('/')[1 if path.startswith(('enc', 'mid', 'dec')) else 0] for path in paths(module) - paths(PLAIN)}
  assert added == {'text_embed'} | {
    'none': set(), 'cross': {'text_tokens', 'text_attention'}, 'added_kv': {'text_tokens', 'attention'}}[kind]
  plain = call(module)
  hidden = COND['text'].copy()
  hidden[0, 2:] = 7  # behind the mask
  np.testing.assert_array_equal(call(module, text=hidden), plain)
  seen = COND['text'].copy()
  seen[0, 1] = 7
  changed = np.abs(call(module, text=seen) - plain).max((1, 2, 3))
  assert (changed[0] > 1e-4) == (kind != 'none') and changed[1] == 0
  assert np.all(np.abs(call(module, text_pooled=OTHER['text_pooled']) - plain).max((1, 2, 3)) > 1e-4)


def test_no_token_at_all_is_no_attention_and_no_nan():
  module = TEXT.clone(text_attention='cross')
  none = call(module, text_mask=np.zeros((2, 4), bool))
  assert np.all(np.isfinite(none))
  np.testing.assert_array_equal(call(module, text_mask=np.zeros((2, 4), bool), text=7 * COND['text']), none)


def test_ifs_form_looks_at_every_token_and_at_no_mask():
  plain = call(OF_IF)
  assert plain.shape == (2, 8, 8, 1) and params_of(OF_IF)['out_conv']['kernel'].shape[-1] == 2
  np.testing.assert_array_equal(call(OF_IF, text_mask=~COND['text_mask']), plain)
  padding = COND['text'].copy()
  padding[0, 3] = 7
  assert np.abs(call(OF_IF, text=padding)[0] - plain[0]).max() > 1e-4


@pytest.mark.parametrize('module', [TEXT.clone(text_attention='cross'), OF_IF], ids=['cross', 'if'])
def test_it_grows_from_its_old_features(module):
  grown = module.clone(grown=((8, 1),))
  shapes = jax.eval_shape(lambda: grown.init(jax.random.key(0), X, C_NOISE, COND)['params'])
  fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)  # as new residual branches end
  params, report = growth.grow_params(fresh, params_of(module))
  assert not report.left_out and not report.other_shape and all(path.startswith('dec_16_') for path in report.new)
  features = lambda module, params: jax.jit(
    lambda: module.apply({'params': params}, X, C_NOISE, COND, features_only=True))()
  np.testing.assert_allclose(features(grown, params), features(module, params_of(module)).repeat(2, 1).repeat(2, 2),
                             atol=1e-6)


def test_text_that_is_missing_or_has_no_input_is_refused():
  with pytest.raises(ValueError, match='conditioned on text: cond needs text_mask, text_pooled'):
    jax.eval_shape(TEXT.init, jax.random.key(0), X, C_NOISE, {'text': COND['text']})
  with pytest.raises(ValueError, match='no input for text'):
    jax.eval_shape(TEXT.clone(magnitude_preserving=True).init, jax.random.key(0), X, C_NOISE, COND)
  with pytest.raises(ValueError, match='6 channels do not split into 4 attention heads'):
    jax.eval_shape(TEXT.clone(text_pool_heads=4).init, jax.random.key(0), X, C_NOISE, COND)


@pytest.mark.parametrize('make, maps', [
  (token_heads.TokenDiscriminator, [(2, 12, 8)]),
  (functools.partial(PyramidDiscriminator, 4, spectral_norm=False), [(2, 8, 8, 1)]),
  (functools.partial(Discriminator, ((4,),)), [(2, 8, 8, 3)]),
], ids=['dino', 'pixels', 'projected'])
def test_a_discriminator_judges_pictures_beside_their_text_and_omega(make, maps):
  maps = [RNG.standard_normal(shape).astype(np.float32) for shape in maps]
  net, omega = make(text=True, omega_embedding=True), {'omega': np.array([1.0, 2.0], np.float32)}
  variables = network_tools.random_variables(net, maps, COND | omega, train=False)
  logits = lambda cond: np.asarray(net.apply(variables, maps, cond, train=False))
  plain = logits(COND | omega)
  for other in (OTHER | omega, COND | {'omega': omega['omega'][::-1]}):
    assert np.all(np.abs(logits(other) - plain).max(1) > 1e-4)
  # Of an encoder without a vector of the whole, the mean of the tokens.
  tokens = {key: COND[key] for key in ('text', 'text_mask')}
  mean = np.stack([np.float32(text)[mask].mean(0) for text, mask in zip(*tokens.values())])
  np.testing.assert_allclose(text_condition.vector(tokens), mean, rtol=1e-3)
  with pytest.raises(ValueError, match='needs text, text_mask in cond'):
    net.apply(variables, maps, omega, train=False)


# Fewer keys than a block, and more; hidden ones at the end, within, and none.
@pytest.mark.parametrize('queries, keys, hidden', [(66, 5, 2), (130, 150, 40), (128, 130, 0)])
def test_kernels_and_plain_operations_hide_the_same_keys(queries, keys, hidden):
  key = iter(jax.random.split(jax.random.key(0), 3))
  q, k, v = (jax.random.normal(next(key), (2, count, 2, 64)) for count in (queries, keys, keys))
  mask = np.ones((2, keys), bool)
  mask[0, keys - hidden :], mask[1, 1 : 1 + hidden] = False, False

  def results(attend):
    output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask=jnp.asarray(mask)), q, k, v)
    return output, *pull(jnp.cos(output))

  kernel = jax.jit(lambda: results(functools.partial(attention.flash, interpret=True)))()
  plain = jax.jit(lambda: results(functools.partial(attention.attend, form='xla')))()
  for ours, expected in zip(kernel, plain):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
  # As of the keys that are left alone.
  alone = attention.attend(q[:1], k[:1, : keys - hidden], v[:1, : keys - hidden], 'xla')
  np.testing.assert_allclose(plain[0][:1], alone, rtol=1e-5, atol=1e-5)
