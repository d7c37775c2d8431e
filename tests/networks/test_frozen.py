"""Frozen networks and the autoencoder: bfloat16, small configurations, conversion of their variants."""

import functools

import jax
import jax.numpy as jnp
import network_tools
import numpy as np
import pytest

from pagoda_jax.networks import autoencoder, discriminator
from pagoda_jax.networks.frozen import projections
from pagoda_jax.networks.frozen.deit import DeiT
from pagoda_jax.networks.frozen.efficientnet_lite0 import EfficientNetLite
from pagoda_jax.networks.frozen.inception import InceptionV3
from pagoda_jax.networks.frozen.projections import ProjectedFeatures
from pagoda_jax.networks.frozen.vgg_lpips import LPIPS, VGGFeatures
from pagoda_jax.weights.convert import (
  convnext,
  diffusers,
  inception,
  lpips,
  mapping,
  random_projections,
  siglip,
  stylegan_xl,
  timm,
)

SMALL_DEIT = {'width': 32, 'depth': 4, 'head_channels': 16, 'mlp_width': 64, 'patch': 4, 'grid': 8}
SMALL_LITE = {'stem': 8, 'repeats': (1, 2, 1, 1, 1, 1, 1), 'widths': (4, 6, 8, 8, 10, 12, 14)}
SMALL_MIX = {'widths': (4, 8, 16, 32), 'mixed_widths': (4, 4, 8, 16), 'input_size': None}


@functools.cache
def images(side=32, channels=3, batch=2):
  return np.random.default_rng(0).uniform(-1, 1, (batch, side, side, channels)).astype(np.float32)


def projected(backbone, dtype=jnp.float32, **kwargs):
  return ProjectedFeatures(backbone(dtype=dtype), dtype=dtype, **(SMALL_MIX | kwargs))


# name: (network, gain of the random kernels, inputs)
NETWORKS = {
    'efficientnet_lite0': (EfficientNetLite, np.sqrt(2), images(64)),
    'deit': (functools.partial(DeiT, **SMALL_DEIT), 1, images(32)),
    'projected lite': (
        functools.partial(projected, functools.partial(EfficientNetLite, **SMALL_LITE)),
        np.sqrt(2),
        images(64),
    ),
    'projected deit': (
        functools.partial(projected, functools.partial(DeiT, **SMALL_DEIT), reassembly_widths=(4, 8, 16, 32)),
        1,
        images(32),
    ),
    'inception': (InceptionV3, np.sqrt(2), images(32, batch=1)),
    'vgg': (VGGFeatures, np.sqrt(2), images(32)),
    'lpips': (LPIPS, np.sqrt(2), images(32), images(32)[::-1]),
    'autoencoder': (functools.partial(autoencoder.AutoencoderKL, widths=(16, 32), groups=8, blocks=1), 1, images(32)),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_bfloat16_is_close_to_float32(name):
  """Within 2e-2 in root mean square, of every output.

  EfficientNet's inverted residuals with random weights are ill-conditioned: merely rounding the weights
  moves its coarser maps by 6e-2. Computing in bfloat16 may move them by little more than that.
  """
  network, gain, *inputs = NETWORKS[name]
  variables = network_tools.random_variables(network(), *inputs, gain=gain)
  reference, out = (outputs(network(dtype=dtype), variables, inputs) for dtype in (jnp.float32, jnp.bfloat16))
  limit = 2e-2
  if name == 'efficientnet_lite0':
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), variables)
    limit = 1.25 * network_tools.relative_error(outputs(network(), rounded, inputs), reference)
  assert 0 < network_tools.relative_error(out, reference) <= limit


def outputs(net, variables, inputs):
  """The tree of results to compare."""
  if isinstance(net, autoencoder.AutoencoderKL):
    encode, decode = (jax.jit(functools.partial(net.apply, method=name)) for name in ('encode', 'decode'))
    mean, _ = encode(variables, *inputs)
    return mean, decode(variables, np.random.default_rng(1).standard_normal(mean.shape).astype(np.float32))
  out = jax.jit(net.apply)(variables, *inputs)
  return {key: out[key] for key in ('features', 'logits')} if isinstance(net, InceptionV3) else out


@pytest.mark.parametrize('train', [False, True])
def test_bfloat16_discriminator_is_close_to_float32(train):
  maps = [np.random.default_rng(i).standard_normal((4, 32 >> i, 32 >> i, 8)).astype(np.float32) for i in range(2)]
  network = functools.partial(discriminator.Discriminator, widths=((16, 32), (32,)), num_classes=5)
  cond = {'label': jnp.arange(4)}
  variables = network_tools.random_variables(network(), maps, cond, train=False)
  # Singular vectors as training has them, that the spectral norm is one.
  for _ in range(20):
    _, updated = network().apply(variables, maps, cond, train=True, mutable=('batch_stats', 'spectral'))
    variables |= {'spectral': updated['spectral']}
  apply = lambda dtype: network(dtype=dtype).apply(
      variables, maps, cond, train=train, mutable=('batch_stats', 'spectral')
  )
  (reference, reference_state), (out, state) = apply(jnp.float32), apply(jnp.bfloat16)
  assert out.dtype == jnp.float32
  assert 0 < network_tools.relative_error(out, reference) <= 2e-2
  assert network_tools.relative_error(state['spectral'], reference_state['spectral']) < 1e-6
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))


# Conversion of what the golden files do not have.


def assert_lossless(fmt, state_dict, **arguments):
  """Options are inferred, and the way there and back is bit-identical."""
  options = fmt.options(state_dict, **arguments)
  tree, extras = mapping.to_ours(state_dict, fmt.leaves(options), fmt.carried)
  back = mapping.to_theirs(tree, fmt.leaves(options), extras)
  assert back.keys() == state_dict.keys()
  for name, value in state_dict.items():
    assert back[name].dtype == value.dtype and np.array_equal(back[name], value), name
  return options, tree


def state_dict_of(leaves, **extras):
  """Random tensors of the leaves' shapes under their names."""
  rng = np.random.default_rng(0)
  return {leaf.theirs: rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves} | extras


@pytest.mark.parametrize('options', [
    {'architecture': 'efficientnet_lite', **SMALL_LITE, 'expansions': (1, 6, 4, 6, 6, 6, 6), 'kernels': (3,) * 7},
    {'architecture': 'deit', **SMALL_DEIT, 'distilled': False},
    {'architecture': 'deit', **SMALL_DEIT, 'distilled': True},
])
def test_timm_backbones_carry_their_heads(options):
  heads = {'classifier.weight': np.ones((3, 2)), 'head.bias': np.ones(2), 'bn2.num_batches_tracked': np.array(3)}
  state_dict = state_dict_of(timm.leaves(options), **heads)
  arguments = {'head_channels': 16} if options['architecture'] == 'deit' else {}
  inferred, tree = assert_lossless(timm, state_dict, **arguments)
  assert inferred == options
  shapes = jax.eval_shape(projections.backbone(options).init, jax.random.key(0), images(32))
  assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, shapes)


def test_published_encoders_are_known_by_the_shapes_of_their_tensors():
  """ConvNeXt V2-B and So400m/16, whose sizes are timm's: 88.7 M with its classifier of 1.03 M, and 427.9 M."""
  tower = {'architecture': 'deit', 'width': 1152, 'depth': 27, 'head_channels': 72, 'mlp_width': 4304, 'patch': 16,
           'grid': 16, 'distilled': False, 'class_token': False, 'approximate_gelu': True}
  for fmt, options, count in ((convnext, {'depths': (3, 3, 27, 3), 'widths': (128, 256, 512, 1024)}, 87_690_752),
                              (siglip, tower, 427_888_064)):
    shapes = {leaf.theirs: np.broadcast_to(np.float32(0), leaf.shape) for leaf in fmt.leaves(options)}
    assert fmt.options(shapes) == options
    assert sum(value.size for value in shapes.values()) == count


@pytest.mark.parametrize('naming, convolutions', [('to_q', False), ('query', False), ('query', True), (None, False)])
def test_autoencoder_attention_of_all_versions(naming, convolutions):
  options = {
      'channels': 1,
      'latent_channels': 3,
      'widths': (8, 16, 16),
      'blocks': 2,
      'groups': 4,
      'quant_conv': naming is not None,
      'post_quant_conv': naming == 'query',
      'mid_attention': naming is not None,
      'attention_naming': naming,
      'attention_convolutions': convolutions,
      'scaling_factor': 0.3611,
      'shift_factor': 0.1159,
  }
  inferred, tree = assert_lossless(diffusers, state_dict_of(diffusers.leaves(options)), groups=4,
                                   scaling_factor=0.3611, shift_factor=0.1159)
  assert inferred == options
  shapes = jax.eval_shape(diffusers.network(options).init, jax.random.key(0), images(16, channels=1))
  assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize('options', [
    {'architecture': 'efficientnet_lite', **SMALL_LITE, 'expansions': (1, *(6,) * 6), 'kernels': (3,) * 7},
    {'architecture': 'deit', **SMALL_DEIT, 'distilled': True},
])
def test_a_published_backbone_under_freshly_drawn_projections(options):
  published = projections.backbone(options)
  backbone = network_tools.random_variables(published, images(32))
  net = projections.projected(projections.options_of_backbone(options, width=4), input_size=None)
  drawn = network_tools.random_variables(net, images(32), seed=1)
  variables = random_projections.with_backbone(drawn, backbone)
  maps = net.apply(variables, images(32), method='stages_of_features')
  if options['architecture'] == 'efficientnet_lite':
    raw = published.apply(backbone, images(32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), maps['raw'], raw)
  # Twice the size of raw maps, which are a quarter of the image, or 4 times the grid of patches of 4 pixels.
  side = 16 if options['architecture'] == 'efficientnet_lite' else 64
  assert [x.shape[1::2] for x in maps['mixed']] == [(side, 4), (side // 2, 4), (side // 4, 8), (side // 8, 16)]
  # What the projections are is written and read back by the names of StyleGAN-XL.
  leaves = random_projections.leaves(projections.options_of_backbone(options, width=4))
  state_dict = mapping.to_theirs(variables, leaves)
  assert_lossless(random_projections, state_dict, head_channels=16)
  with pytest.raises(mapping.ConversionError, match='missing'):
    random_projections.with_backbone(drawn, {})


def test_lpips_from_its_two_published_files():
  package = state_dict_of(lpips.leaves({'widths': (2, 3, 4, 5, 6), 'depths': (2, 2, 3, 3, 3)}))
  linear = {name: value for name, value in package.items() if name.startswith('lin')}
  vgg = {f"features.{name.split('.', 2)[2]}": value for name, value in package.items() if name not in linear}
  joined = lpips.from_torchvision(vgg | {'classifier.0.weight': np.ones((2, 2))}, linear)
  assert joined.keys() == package.keys() | {'classifier.0.weight'}
  assert_lossless(lpips, joined)


@pytest.mark.parametrize('fmt', [
  timm, random_projections, stylegan_xl, lpips, inception, diffusers, convnext, siglip])
def test_another_architecture_is_refused(fmt):
  with pytest.raises(mapping.ConversionError):
    fmt.options({'model.0.weight': np.zeros((2, 2))})
  with pytest.raises(mapping.ConversionError):
    lpips.from_torchvision({}, {})


# Behaviour of their own.


def test_gray_images_equal_gray_colour_images():
  gray = images(32, channels=1)
  for net, inputs in (
      (projected(functools.partial(EfficientNetLite, **SMALL_LITE)), lambda x: (x,)),
      (LPIPS(widths=(2, 3, 4, 5, 6)), lambda x: (x, -x)),
  ):
    variables = network_tools.random_variables(net, *inputs(gray))
    out, colour = (jax.jit(net.apply)(variables, *inputs(x)) for x in (gray, np.repeat(gray, 3, -1)))
    assert network_tools.relative_error(out, colour) < 1e-5


def test_projection_widths_must_chain():
  with pytest.raises(ValueError, match='widths'):
    net = projected(functools.partial(EfficientNetLite, **SMALL_LITE), mixed_widths=(4, 8, 8, 16))
    jax.eval_shape(net.init, jax.random.key(0), images(32))


def test_tensorflow_graph_scales_and_resizes_its_own_way():
  pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3)).astype(np.float32)
  net = InceptionV3()
  out = net.apply({}, pixels / 127.5 - 1, method='preprocessed')
  assert out.shape == (1, 299, 299, 3)
  # New pixel i lies at 2 i / 299 of the old ones; beyond the last one its value is held.
  expected = (pixels[0, 0, 0] * (1 - 200 / 299) + pixels[0, 0, 1] * 200 / 299 - 128) / 128
  np.testing.assert_allclose(out[0, 0, 100], expected, atol=1e-4)
  np.testing.assert_allclose(out[0, -1, -1], (pixels[0, 1, 1] - 128) / 128, atol=1e-5)
  with pytest.raises(ValueError, match='graph'):
    InceptionV3(graph='torch').apply({}, pixels, method='preprocessed')
