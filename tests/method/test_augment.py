"""DiffAugment: ranges and determinism of the draw, policies, one channel, differentiability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax.method import augment


def images(channels=3, size=(10, 12)):
  return jax.random.normal(jax.random.key(0), (2, *size, channels))


def test_draw_is_within_the_published_ranges():
  params = jax.device_get(augment.draw(jax.random.key(1), 4000, (16, 32)))
  for name, low, high in (('brightness', -0.5, 0.5), ('saturation', 0, 2), ('contrast', 0.5, 1.5)):
    assert low <= params[name].min() < low + 0.01 and high - 0.01 < params[name].max() <= high
  assert params['translation'].min(0).tolist() == [-2, -4] and params['translation'].max(0).tolist() == [2, 4]
  # 0.2 * 16 rounds to an odd 3 (centres 0..15), 0.2 * 32 to an even 6 (centres 0..32).
  assert params['cutout'].min(0).tolist() == [0, 0] and params['cutout'].max(0).tolist() == [15, 32]


def test_policy_selects_without_changing_other_draws():
  every = augment.draw(jax.random.key(2), 3, 8)
  some = augment.draw(jax.random.key(2), 3, 8, ('contrast', 'cutout'))
  assert set(some) == {'contrast', 'cutout'}
  for name, value in some.items():
    np.testing.assert_array_equal(value, every[name])
  np.testing.assert_array_equal(augment.apply(images(), augment.draw(jax.random.key(2), 2, 8, ())), images())
  with pytest.raises(ValueError, match='shear'):
    augment.draw(jax.random.key(2), 3, 8, ('shear',))


def test_translation_and_cutout_against_loops():
  x = np.asarray(images())
  shift, centre = jnp.array([[1, -2], [-1, 0]]), jnp.array([[0, 11], [9, 5]])
  moved, cut = np.zeros_like(x), x.copy()
  for b, row, column in np.ndindex(2, 10, 12):
    source = row + int(shift[b, 0]), column + int(shift[b, 1])
    if 0 <= source[0] < 10 and 0 <= source[1] < 12:
      moved[b, row, column] = x[b, source[0], source[1]]
    # 0.2 of 10 and of 12 both round to 2 pixels: the one before the centre, and the centre.
    if row - int(centre[b, 0]) in (-1, 0) and column - int(centre[b, 1]) in (-1, 0):
      cut[b, row, column] = 0
  np.testing.assert_array_equal(augment.translated(x, shift), moved)
  np.testing.assert_array_equal(augment.cut_out(x, centre), cut)


@pytest.mark.parametrize('channels', [1, 4])
def test_gradient_with_any_number_of_channels(channels):
  x = images(channels)
  params = augment.draw(jax.random.key(3), 2, x.shape[1:3])
  weights = jax.random.normal(jax.random.key(4), x.shape)
  direction = jax.random.normal(jax.random.key(5), x.shape)
  objective = lambda x: jnp.vdot(weights, augment.apply(x, params))
  # The augmentation is linear in the image but for its constants: differences are exact.
  slope = objective(x + direction) - objective(x)
  np.testing.assert_allclose(jnp.vdot(jax.grad(objective)(x), direction), slope, rtol=1e-4)
