"""StyleGAN-T's heads: what their parts leave unchanged; golden values are in test_goldens."""

import jax
import jax.numpy as jnp
import network_tools
import numpy as np
import pytest

from pagoda_jax.networks import token_heads

TOKENS = [np.random.default_rng(i).standard_normal((4, 12, 8)).astype(np.float32) for i in range(2)]
LABEL = {'label': jnp.array([0, 2, 1, 1])}


def initialized(net):
  return network_tools.random_variables(net, TOKENS, LABEL, train=False)


def test_tokens_are_taken_as_a_ring():
  net = token_heads.TokenDiscriminator(num_classes=3)
  variables = initialized(net)
  apply = lambda tokens: net.apply(variables, tokens, LABEL, train=False).reshape(4, 2, 12)
  turned = apply([np.roll(x, 5, axis=1) for x in TOKENS])
  np.testing.assert_allclose(turned, np.roll(apply(TOKENS), 5, axis=2), atol=1e-4)


def test_an_image_depends_on_its_group_of_the_batch_alone():
  norm = token_heads.LocalBatchNorm()
  x = 3 + 2 * np.random.default_rng(0).standard_normal((12, 5, 4)).astype(np.float32)
  variables = norm.init(jax.random.key(0), x)
  assert set(variables) == {'params'}  # nothing is stored
  y = norm.apply(variables, x)
  groups = np.asarray(y).reshape(2, 6, 5, 4)  # 8 does not divide 12: groups of 6
  np.testing.assert_allclose(groups.mean((1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(groups.std((1, 2)), 1, atol=1e-4)
  np.testing.assert_allclose(norm.apply(variables, x[:6]), y[:6], atol=1e-5)
  alone = norm.apply(variables, x[:11])  # 11 is prime: each image by itself
  np.testing.assert_allclose(alone[3], norm.apply(variables, x[3:4])[0], atol=1e-5)


def test_training_renews_the_singular_vectors_and_evaluation_does_not():
  net = token_heads.TokenDiscriminator(num_classes=3)
  variables = initialized(net)
  assert set(variables) == {'params', 'spectral'}
  for train in (True, False):
    _, updated = net.apply(variables, TOKENS, LABEL, train=train, mutable=['spectral'])
    same = jax.tree.map(np.array_equal, updated['spectral'], variables['spectral'])
    assert all(jax.tree.leaves(same)) != train


def test_only_a_conditional_one_looks_at_the_label_and_needs_it():
  net, plain = token_heads.TokenDiscriminator(num_classes=3), token_heads.TokenDiscriminator()
  variables = initialized(net)
  logits = [net.apply(variables, TOKENS, {'label': jnp.full(4, y)}, train=False) for y in (0, 1)]
  assert logits[0].shape == (4, 24) and not np.allclose(*logits)
  with pytest.raises(ValueError, match='3 classes needs cond'):
    net.apply(variables, TOKENS, {}, train=False)
  assert plain.apply(initialized(plain), TOKENS, {}, train=False).shape == (4, 24)


def test_bfloat16_is_close_to_float32():
  variables = initialized(token_heads.TokenDiscriminator(num_classes=3))
  for _ in range(20):  # singular vectors as training has them, that the spectral norm is one
    _, updated = token_heads.TokenDiscriminator(num_classes=3).apply(
      variables, TOKENS, LABEL, train=True, mutable=['spectral'])
    variables |= updated
  reference, out = (
    token_heads.TokenDiscriminator(num_classes=3, dtype=dtype).apply(variables, TOKENS, LABEL, train=False)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert out.dtype == jnp.float32
  assert 0 < network_tools.relative_error(out, reference) <= 2e-2
