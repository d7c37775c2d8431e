"""Conversion of the published U-Nets: options read back from names and shapes, lossless both ways, misfits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax.networks.unet import EDM_DDPMPP, GUIDED_ADM, UNet
from pagoda_jax.weights.convert import edm, mapping, pagoda, unets

# Some are of full size: leaves are lists of shapes, so that costs nothing.
EDM_NETWORKS = {
    'imagenet64': dict(resolution=64, stem_channels=192, num_classes=1000, augment_dim=9),
    'narrow': dict(resolution=16, channels=32, channel_mult=(0.5, 1.5), stem_channels=16, num_blocks=2,
                   attention_resolutions=(), mid_attention=False, image_channels=1, in_channels=1),
    'one_level': dict(resolution=8, channels=96, channel_mult=(1,), stem_channels=96, attention_resolutions=(8,)),
    'cifar10': EDM_DDPMPP | dict(resolution=32, channels=128, channel_mult=(2, 2, 2), stem_channels=128, num_blocks=4,
                                 attention_resolutions=(16,), num_classes=10, augment_dim=9),
    'ddpmpp_plain': EDM_DDPMPP | dict(resolution=16, channels=32, channel_mult=(1, 3), stem_channels=32, num_blocks=1,
                                      attention_resolutions=()),
}
PAGODA_NETWORKS = {
    'base64': dict(resolution=64, num_classes=1000),
    '64to512': dict(resolution=64, num_classes=1000, grown=((192, 2), (192, 2), (96, 2))),
    '32to64': dict(resolution=32, channels=256, channel_mult=(1, 2, 4), attention_resolutions=(16, 8),
                   grown=((192, 2, True),)),
    'odd': dict(resolution=16, channels=64, channel_mult=(1, 2, 2), decoder_channel_mult=(1, 1, 3), num_blocks=2,
                attention_resolutions=(16, 4), num_heads=2, scale_shift=False, grown=((32, 2),)),
    'one_level': dict(resolution=8, channels=32, channel_mult=(1,), num_blocks=1, attention_resolutions=()),
}
ASKED_PAGODA = ('resolution', 'num_heads', 'channels_per_head')


def random_state_dict(leaves):
  rng = np.random.default_rng(0)
  return {leaf.theirs: rng.integers(0, 99, leaf.shape).astype(np.float32) for leaf in leaves}


def small(networks):
  return [name for name, options in networks.items() if options['resolution'] <= 16]


def pagoda_options(name):
  options = GUIDED_ADM | {'channels': 192} | PAGODA_NETWORKS[name]
  return options | {'stem_channels': options['channels']}


def shapes(leaves):
  """A state dict of full size that takes no memory."""
  return {leaf.theirs: np.broadcast_to(np.float32(0), leaf.shape) for leaf in leaves}


@pytest.mark.parametrize('name', EDM_NETWORKS)
def test_edm_options_are_read_back(name):
  expected = UNet(**EDM_NETWORKS[name])
  found = UNet(**edm.options(shapes(edm.leaves(EDM_NETWORKS[name]))))
  assert edm.leaves(EDM_NETWORKS[name]) and found.blocks() == expected.blocks()
  assert (found.num_classes, found.augment_dim, found.in_channels or found.image_channels) == (
      expected.num_classes, expected.augment_dim, expected.in_channels or expected.image_channels)


@pytest.mark.parametrize('name', PAGODA_NETWORKS)
def test_pagoda_options_are_read_back(name):
  expected = UNet(**pagoda_options(name))
  asked = {field: getattr(expected, field) for field in ASKED_PAGODA}
  found = UNet(**pagoda.options(shapes(pagoda.leaves(pagoda_options(name))), **asked))
  assert found.blocks() == expected.blocks()
  assert (found.num_classes, found.grown) == (expected.num_classes, expected.grown)


def test_the_input_of_the_published_widths_is_known_and_another_is_warned_of(caplog):
  """32 px: 256 channels times (1, 2, 4), attention at 16 and 8; without it, the same tensors may be another's."""
  theirs = shapes(pagoda.leaves(pagoda_options('32to64')))
  found = pagoda.options(theirs)
  assert (found['resolution'], found['attention_resolutions']) == (32, (16, 8)) and not caplog.records
  assert pagoda.options(shapes(pagoda.leaves(pagoda_options('64to512'))))['resolution'] == 64
  assert pagoda.options(theirs, resolution=64)['resolution'] == 64
  assert "resolution = 64: 256 channels times (1, 2, 4)" in caplog.text and 'networks of 32 px' in caplog.text
  plain = pagoda_options('32to64') | {'attention_resolutions': (8,)}
  assert pagoda.options(shapes(pagoda.leaves(plain)))['resolution'] == 64  # as it was


@pytest.mark.parametrize('name', small(EDM_NETWORKS))
def test_edm_round_trip_is_lossless(name):
  leaves = edm.leaves(EDM_NETWORKS[name])
  theirs = random_state_dict(leaves)
  theirs['model.enc.8x8_down.skip.resample_filter'] = np.full((1, 1, 2, 2), 0.25, np.float32)
  check_round_trip(theirs, leaves, edm.carried)


@pytest.mark.parametrize('order', pagoda.QKV_AXES)
@pytest.mark.parametrize('name', small(PAGODA_NETWORKS))
def test_pagoda_round_trip_is_lossless(name, order):
  leaves = pagoda.leaves(pagoda_options(name), attention_order=order)
  check_round_trip(random_state_dict(leaves), leaves, pagoda.carried)


def check_round_trip(theirs, leaves, carried):
  params, extras = mapping.to_ours(theirs, leaves, carried)
  back = mapping.to_theirs(params, leaves, extras)
  assert back.keys() == theirs.keys()
  for name, value in back.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.parametrize('axes, place', [
    ('hct', lambda t, h, c: h * 12 + c * 3 + t),  # EDM
    ('htc', lambda t, h, c: h * 12 + t * 4 + c),  # legacy
    ('thc', lambda t, h, c: t * 8 + h * 4 + c),  # flash
])
def test_qkv_order(axes, place):
  expected = [place(t, h, c) for t in range(3) for h in range(2) for c in range(4)]
  np.testing.assert_array_equal(unets.qkv_order(axes, channels=8, heads=2), expected)


def test_every_leaf_of_ours_has_one_of_theirs():
  for options, leaves in [(EDM_NETWORKS['ddpmpp_plain'], edm.leaves), (EDM_NETWORKS['narrow'], edm.leaves),
                          (pagoda_options('odd'), pagoda.leaves)]:
    module = UNet(**options)
    x = jnp.zeros((1, module.resolution, module.resolution, module.in_channels or 3))
    ours = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), {})['params']
    converted, _ = mapping.to_ours(shapes(leaves(options)), leaves(options))
    assert jax.tree.map(lambda leaf: leaf.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, converted)


def test_another_architecture_is_refused():
  some_edm, some_pagoda = (random_state_dict(edm.leaves(EDM_NETWORKS['ddpmpp_plain'])),
                           random_state_dict(pagoda.leaves(pagoda_options('odd'))))
  with pytest.raises(mapping.ConversionError, match="not a network of EDM's"):
    edm.options(some_pagoda)
  with pytest.raises(mapping.ConversionError, match='0 input blocks'):
    pagoda.options(some_edm)
  with pytest.raises(mapping.ConversionError, match='NCSN'):
    edm.options(some_edm | {'model.map_noise.freqs': np.zeros(16)})
  with pytest.raises(mapping.ConversionError, match='filter'):
    edm.options(some_edm | {'model.enc.8x8_down.skip.resample_filter': np.zeros((1, 1, 4, 4))})
  with pytest.raises(mapping.ConversionError, match='resblock_updown'):
    pagoda.options(some_pagoda | {'input_blocks.3.0.op.weight': np.zeros((64, 64, 3, 3))})
  with pytest.raises(mapping.ConversionError, match='missing +model.map_layer0.weight'):
    edm.options({name: value for name, value in some_edm.items() if 'map_layer0' not in name})


def test_what_is_asked_must_fit():
  theirs = random_state_dict(pagoda.leaves(pagoda_options('odd')))
  with pytest.raises(mapping.ConversionError, match='give grown_num_blocks'):
    pagoda.options(theirs, resolution=16, grown_num_blocks=1)
  with pytest.raises(mapping.ConversionError, match='none of flash, legacy, xformers'):
    pagoda.options(theirs, resolution=16, attention_order='fast')
  assert pagoda.options(theirs, resolution=16, attention_order='xformers', num_heads=2)['num_heads'] == 1


def test_grown_levels_have_no_name_in_edm():
  options = EDM_NETWORKS['ddpmpp_plain']
  leaves = edm.leaves(options | {'grown': ((32, 1),)})
  tree, _ = mapping.to_ours(random_state_dict(leaves), leaves)
  with pytest.raises(mapping.ConversionError, match='unexpected'):
    mapping.to_theirs(tree | {'dec_32_up': {'conv_0': {'kernel': np.zeros(1)}}}, leaves)
