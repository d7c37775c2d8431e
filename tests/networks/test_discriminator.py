"""The discriminator's state, conditioning and small configurations; golden values are in test_goldens."""

import jax
import jax.numpy as jnp
import network_tools
import numpy as np
import pytest

from pagoda_jax.networks import discriminator, pyramid
from pagoda_jax.weights.convert import mapping, stylegan_xl

COLLECTIONS = ('batch_stats', 'spectral')
MAPS = [np.random.default_rng(0).standard_normal((3, side, side, 4)).astype(np.float32) for side in (16, 8)]
LABEL = {'label': jnp.array([0, 2, 1])}


def small(**kwargs):
  return discriminator.Discriminator(widths=((6, 8), (5,)), embedding_width=7, projection_width=3, **kwargs)


def initialized(net):
  return network_tools.random_variables(net, MAPS, LABEL, train=False)


def test_published_widths():
  assert discriminator.published_widths() == ((64, 128, 256, 512), (128, 256, 512), (256, 512), (512,))
  assert discriminator.published_widths((56, 9)) == ((128, 256, 512), ())


def test_training_updates_both_collections_and_evaluation_neither():
  net = small(num_classes=3)
  variables = initialized(net)
  _, updated = net.apply(variables, MAPS, LABEL, train=True, mutable=COLLECTIONS)
  for name in COLLECTIONS:
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, updated[name], variables[name])))
  _, kept = net.apply(variables, MAPS, LABEL, train=False, mutable=COLLECTIONS)
  for name in COLLECTIONS:
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, kept[name], variables[name])))


def test_init_leaves_statistics_as_they_start():
  variables = small().init(jax.random.key(0), MAPS, {}, train=True)
  norm = variables['batch_stats']['head0_block0']['norm']
  np.testing.assert_array_equal(norm['mean'], np.zeros(6))
  u = variables['spectral']['head0_logits']['u']
  np.testing.assert_allclose(jnp.linalg.norm(u), 1, rtol=1e-6)


def test_power_iteration_finds_the_spectral_norm():
  net = discriminator.SpectralConv(5, (3, 3), use_bias=False)
  x = MAPS[0]
  variables = network_tools.random_variables(net, x, False)
  step = jax.jit(lambda variables: net.apply(variables, x, True, mutable=['spectral'])[1])
  for _ in range(60):
    variables = variables | step(variables)
  kernel = variables['params']['kernel']
  sigma = np.linalg.svd(kernel.reshape(-1, 5), compute_uv=False)[0]
  layout = ('NHWC', 'HWIO', 'NHWC')
  expected = jax.lax.conv_general_dilated(x, kernel / sigma, (1, 1), 'VALID', dimension_numbers=layout)
  np.testing.assert_allclose(net.apply(variables, x, False), expected, atol=1e-4)


def test_no_gradient_through_the_singular_vectors():
  net = discriminator.SpectralConv(5, (3, 3), use_bias=False)
  variables = network_tools.random_variables(net, MAPS[0], False)
  _, stored = net.apply(variables, MAPS[0], True, mutable=['spectral'])
  total = lambda params, spectral, train: jnp.sum(
      net.apply({'params': params, 'spectral': spectral}, MAPS[0], train, mutable=['spectral'])[0]
  )
  trained = jax.grad(total)(variables['params'], variables['spectral'], True)
  fixed = jax.grad(total)(variables['params'], stored['spectral'], False)
  np.testing.assert_allclose(trained['kernel'], fixed['kernel'], rtol=1e-4, atol=1e-4)


def test_batch_norm_normalizes_and_stores_the_unbiased_variance():
  net = discriminator.BatchNorm()
  x = 3 + 2 * MAPS[1]
  variables = {
      'params': {'scale': jnp.ones(4), 'bias': jnp.zeros(4)},
      'batch_stats': {'mean': jnp.zeros(4), 'var': jnp.ones(4)},
  }
  y, updated = net.apply(variables, x, True, mutable=['batch_stats'])
  np.testing.assert_allclose(np.mean(y, (0, 1, 2)), np.zeros(4), atol=1e-5)
  flat = x.reshape(-1, 4).astype(np.float64)
  np.testing.assert_allclose(updated['batch_stats']['mean'], 0.1 * flat.mean(0), rtol=1e-5)
  np.testing.assert_allclose(updated['batch_stats']['var'], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)


def test_logits_depend_on_the_label_only_when_conditional():
  conditional, plain = small(num_classes=3), small()
  variables = initialized(conditional)
  logits = [conditional.apply(variables, MAPS, {'label': jnp.full(3, y)}, train=False) for y in (0, 1)]
  # Heads of 16 / 4 and 8 / 2, less 3 for the last kernel: one place each.
  assert logits[0].shape == (3, 2) and not np.allclose(*logits)
  # No label is no class, and not the last one.
  table = lambda path, leaf: leaf * ('embedding' not in jax.tree_util.keystr(path))
  without = variables | {'params': jax.tree_util.tree_map_with_path(table, variables['params'])}
  none, last = (conditional.apply(variables, MAPS, {'label': jnp.full(3, y)}, train=False) for y in (-1, 2))
  np.testing.assert_array_equal(none, conditional.apply(without, MAPS, LABEL, train=False))
  assert not np.allclose(none, last)
  variables = initialized(plain)
  np.testing.assert_array_equal(
      plain.apply(variables, MAPS, {}, train=False), plain.apply(variables, MAPS, LABEL, train=False)
  )


def test_misuse_is_refused():
  net = small(num_classes=3)
  variables = initialized(net)
  with pytest.raises(ValueError, match='label'):
    net.apply(variables, MAPS, {}, train=False)
  with pytest.raises(ValueError, match='heads'):
    net.apply(variables, MAPS[:1], LABEL, train=False)


@pytest.mark.parametrize('num_classes', [0, 3])
def test_conversion_is_lossless_and_infers_the_options(num_classes):
  net = small(num_classes=num_classes)
  variables = initialized(net)
  options = {'widths': net.widths, 'input_widths': (4, 4), 'logits_kernel': 4}
  if num_classes:
    options |= {'num_classes': 3, 'embedding_width': 7, 'projection_width': 3}
  state_dict = mapping.to_theirs(variables, stylegan_xl.leaves(options))
  assert stylegan_xl.options(state_dict) == options
  back, _ = mapping.to_ours(state_dict, stylegan_xl.leaves(options), stylegan_xl.carried)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, variables)))


def test_class_embedding_enters_every_head():
  variables = initialized(small(num_classes=3))
  table = np.arange(21.0).reshape(3, 7)
  params = stylegan_xl.with_class_embedding(variables, table)['params']
  for head in range(2):
    np.testing.assert_array_equal(params[f'head{head}_embedding']['embedding'], table)
  with pytest.raises(mapping.ConversionError, match='shape'):
    stylegan_xl.with_class_embedding(variables, table.T)
  with pytest.raises(mapping.ConversionError, match='unconditional'):
    stylegan_xl.with_class_embedding(initialized(small()), table)


@pytest.mark.parametrize('classes', [3, 0])
@pytest.mark.parametrize('kind', ['projected', 'pixels'])
def test_logits_depend_on_the_strength_of_guidance_and_what_was_there_keeps_its_names(kind, classes):
  make = small if kind == 'projected' else (lambda **kwargs: pyramid.PyramidDiscriminator(channels=4, **kwargs))
  plain, guided = make(num_classes=classes), make(num_classes=classes, omega_embedding=True)
  shapes = {net: jax.eval_shape(lambda net=net: net.init(jax.random.key(0), MAPS, LABEL | {'omega': jnp.ones(3)},
                                                         train=False)['params']) for net in (plain, guided)}
  names = {net: {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
           for net, tree in shapes.items()}
  added = {name for name in names[guided] - names[plain] if 'omega' not in name}
  assert names[plain] <= names[guided] and (not added or not classes and all('projection' in name for name in added))
  variables = network_tools.random_variables(guided, MAPS, LABEL | {'omega': jnp.ones(3)}, train=False)
  weak, strong = (guided.apply(variables, MAPS, LABEL | {'omega': jnp.array([1.0, 1.0, omega])}, train=False)
                  for omega in (1.0, 3.0))
  np.testing.assert_array_equal(weak[:2], strong[:2])
  assert np.abs(weak[2] - strong[2]).max() > 1e-3
