"""EDM's augmentation against the matrices of Karras et al. 2022 (appendix F.2) and Karras et al. 2020 (ADA).

Geometry is told by where a value comes from, colour by what becomes of it.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax import config as configs
from pagoda_jax.method import edm_augment

SIDE = 16
KEYS = jax.random.split(jax.random.key(1), 20_000)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
AUGMENTED = jax.jit(functools.partial(edm_augment.augmented, transforms=edm_augment.TRANSFORMS))


def draw(**values):
  return {name: jnp.asarray(np.atleast_1d(value), jnp.float32) for name, value in values.items()}


def picture(channels=3, side=SIDE):
  return np.random.default_rng(0).uniform(-1, 1, (side, side, channels)).astype(np.float32)


def waves(side=SIDE, shift=(0.0, 0.0), turn=0.0, zoom=1.0):
  """A picture that is smooth from pixel to pixel, moved exactly: shifted, then turned and zoomed about its centre."""
  place = np.arange(side) + 0.5 - side / 2
  y, x = np.meshgrid(place, place, indexing='ij')
  x, y = x - shift[0], y - shift[1]
  x, y = math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y
  x, y = x / zoom, y / zoom
  return np.stack([np.sin(0.35 * x + 0.2 * y), np.cos(0.3 * y), np.sin(0.25 * x - 0.2)], -1)


def rotation(angle):
  return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])


def test_flips_turns_and_whole_pixels_move_values_as_they_are():
  x = picture()
  apply = lambda **values: np.asarray(edm_augment.apply(x, draw(**values)))
  np.testing.assert_array_equal(apply(x_flip=1), x[:, ::-1])
  np.testing.assert_array_equal(apply(y_flip=1), x[::-1])
  for quarters in range(4):
    np.testing.assert_array_equal(apply(quarter_turn=quarters), np.rot90(x, quarters))
  # At most an eighth of the side: two pixels; beyond the border the picture goes on mirrored.
  moved = apply(integer_translation=(1.0, -0.5))
  np.testing.assert_array_equal(moved[:-1, 2:], x[1:, :-2])
  np.testing.assert_array_equal(moved[:-1, :2], x[1:, 2:0:-1])
  np.testing.assert_array_equal(moved[-1, 2:], x[-2, :-2])


def test_geometry_is_the_published_matrices():
  """Inverses of Scale2D, Rotate2D(-a), Rotate2D(-r) Scale2D Rotate2D(r) and Translate2D, applied in that order.

  As the released code has them (x to the right, y downwards): EDM's weights go on learning with the labels they know.
  """
  a = {'scale': 0.7, 'rotation': 0.4, 'anisotropy': (-1.2, 0.9), 'translation': (0.3, -0.8)}
  grow, squeeze, (angle, moved) = 2 ** (0.2 * 0.7), 2 ** (0.2 * -1.2), (0.9, np.array([0.3, -0.8]) * SIDE / 8)
  matrices = {
    'scale': np.diag([grow, grow, 1]),
    'rotation': rotation(-0.4),
    'anisotropy': rotation(-angle) @ np.diag([squeeze, 1 / squeeze, 1]) @ rotation(angle),
    'translation': np.array([[1, 0, moved[0]], [0, 1, moved[1]], [0, 0, 1]]),
  }
  for name, matrix in matrices.items():
    found = edm_augment.inverse_geometry(draw(**{name: a[name]}), SIDE)
    np.testing.assert_allclose(found, np.linalg.inv(matrix), atol=1e-6, err_msg=name)
  whole = matrices['translation'] @ matrices['anisotropy'] @ matrices['rotation'] @ matrices['scale']
  np.testing.assert_allclose(edm_augment.inverse_geometry(draw(**a), SIDE), np.linalg.inv(whole), atol=1e-6)


def test_colours_are_the_published_matrices():
  luma = np.outer(edm_augment.LUMA, edm_augment.LUMA)
  x, y, z = edm_augment.LUMA
  cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
  hue = math.cos(1.1) * np.eye(3) + math.sin(1.1) * cross + (1 - math.cos(1.1)) * luma  # Rodrigues
  steps = {  # name -> (draw, linear part, what is added)
    'brightness': (0.6, np.eye(3), 0.2 * 0.6),
    'contrast': (-0.9, 2 ** (0.5 * -0.9) * np.eye(3), 0),
    'luma_flip': (1, np.eye(3) - 2 * luma, 0),
    'hue': (1.1, hue, 0),
    'saturation': (1.3, luma + (np.eye(3) - luma) * 2**1.3, 0),
  }
  pixels, all_of_them = picture().astype(np.float64), picture().astype(np.float64)
  for name, (value, linear, added) in steps.items():
    expected = pixels @ linear.T + added
    np.testing.assert_allclose(edm_augment.apply(picture(), draw(**{name: value})), expected, atol=2e-6, err_msg=name)
    all_of_them = all_of_them @ linear.T + added
  every = draw(**{name: value for name, (value, _, _) in steps.items()})
  np.testing.assert_allclose(edm_augment.apply(picture(), every), all_of_them, atol=5e-6)
  # A turn of the hue by a third exchanges the channels; grey has neither hue nor saturation.
  third = edm_augment.apply(picture(), draw(hue=2 * math.pi / 3))
  np.testing.assert_allclose(third, np.roll(picture(), 1, axis=-1), atol=1e-6)
  grey = picture(1)
  np.testing.assert_allclose(edm_augment.apply(grey, draw(hue=1.0, saturation=2.0)), grey, atol=1e-6)
  np.testing.assert_allclose(edm_augment.apply(grey, draw(luma_flip=1, brightness=1.0)), -grey - 0.2, atol=1e-6)


@pytest.mark.parametrize('side', [4, 16, 64])
def test_resampling_by_nothing_and_by_whole_pixels_is_exact(side):
  """The filter's even shifts are orthonormal: up and down again is what there was, also at the border."""
  np.testing.assert_allclose(edm_augment.SYMLET @ edm_augment.SYMLET, 1, atol=1e-9)
  for shift in (2, 4, 6):
    np.testing.assert_allclose(edm_augment.SYMLET[:-shift] @ edm_augment.SYMLET[shift:], 0, atol=1e-9)
  x = picture(side=side)
  resampled = jax.jit(edm_augment.resampled)
  np.testing.assert_allclose(resampled(x, jnp.eye(3)), x, atol=5e-5)
  shifted = edm_augment.apply(x, draw(translation=(8 / side, -8 / side)))  # one pixel right, one up
  np.testing.assert_allclose(shifted[:-1, 1:], x[1:, :-1], atol=5e-5)
  np.testing.assert_allclose(shifted[:-1, 0], x[1:, 1], atol=5e-5)
  # An image that is not moved keeps its values to the last bit.
  np.testing.assert_array_equal(edm_augment.apply(x, draw(scale=0, rotation=0, anisotropy=(0, 0))), x)


def test_resampling_moves_a_smooth_picture_as_it_should():
  """Away from the border, against the moved picture itself; bilinear sampling at half a pixel is what is lost."""
  inner, side = np.s_[12:-12, 12:-12], 48
  x = waves(side).astype(np.float32)

  def error(expected, **values):
    return np.abs(np.asarray(edm_augment.apply(x, draw(**values))) - expected)[inner].max()

  assert error(waves(side, shift=(0.3, -0.4)), translation=(0.3 * 8 / side, -0.4 * 8 / side)) < 0.01
  assert error(waves(side, zoom=2**0.2), scale=1.0) < 0.02
  assert error(waves(side, turn=0.5), rotation=0.5) < 0.01
  assert error(waves(side, turn=math.pi), rotation=-math.pi) < 0.01
  assert error(waves(side), translation=(0.3 * 8 / side, 0.0)) > 0.05  # so that these limits tell anything
  # Far outside, the picture goes on mirrored, with no hole: a constant stays one.
  flat = np.full((SIDE, SIDE, 1), 0.7, np.float32)
  far = edm_augment.apply(flat, draw(scale=-6.0, rotation=0.7, translation=(5.0, -9.0)))
  np.testing.assert_allclose(far, flat, atol=1e-5)


def test_labels_tell_what_was_drawn_and_are_zero_for_an_image_as_it_is():
  told = edm_augment.labels(
    draw(x_flip=1, y_flip=0, quarter_turn=2, integer_translation=(1.0, -0.5), scale=0.7, rotation=0.4,
         anisotropy=(-1.2, 0.9), translation=(0.3, -0.8), brightness=0.6, contrast=-0.9, luma_flip=1, hue=1.1,
         saturation=1.3), SIDE)  # fmt: skip
  np.testing.assert_allclose(told, [
    1, 0, 1, 1, 1, -0.5, 0.7, math.cos(0.4) - 1, math.sin(0.4), -1.2 * math.cos(0.9), -1.2 * math.sin(0.9), 0.3, -0.8,
    0.6, -0.9, 1, math.cos(1.1) - 1, math.sin(1.1), 1.3], atol=1e-6)
  assert tuple(configs.TEACHER_AUGMENTATIONS) == edm_augment.TRANSFORMS
  # At rate 0 nothing happens but flips, which are told.
  out, told = AUGMENTED(IMAGES, KEYS[:6], rate=0.0)
  flipped = told[:, 0] == 1
  assert 0 < flipped.sum() < 6 and not np.any(told[:, 1:])
  np.testing.assert_array_equal(out, np.where(flipped[:, None, None, None], IMAGES[:, :, ::-1], IMAGES))
  edm = functools.partial(edm_augment.augmented, rate=0.1, transforms=configs.EDM_AUGMENTATIONS)
  assert jax.eval_shape(edm, IMAGES, KEYS[:6])[1].shape == (6, 9)
  with pytest.raises(ValueError, match='shear'):
    edm_augment.draw(KEYS[0], 0.1, ('shear',))


def test_each_transform_happens_at_the_rate_by_the_images_own_key():
  of = lambda transforms: jax.jit(jax.vmap(functools.partial(edm_augment.draw, rate=0.12, transforms=transforms)))(KEYS)
  drawn = of(edm_augment.TRANSFORMS)
  chances = {'x_flip': 0.5, 'y_flip': 0.06, 'luma_flip': 0.06, 'quarter_turn': 0.09}
  for name, values in drawn.items():
    happened = np.any(np.asarray(values) != 0, axis=1)
    assert happened.mean() == pytest.approx(chances.get(name, 0.12), abs=0.01), name
    if name in ('scale', 'translation', 'brightness', 'contrast', 'saturation'):
      np.testing.assert_allclose(np.asarray(values)[happened].std(0), 1, atol=0.06, err_msg=name)
    if name in ('rotation', 'hue'):
      np.testing.assert_allclose(np.asarray(values)[happened].std(0), math.pi / math.sqrt(3), rtol=0.05, err_msg=name)
  # Independently of each other; and leaving one out changes no other.
  both = np.all([np.asarray(drawn[name])[:, 0] != 0 for name in ('scale', 'rotation')], axis=0)
  assert both.mean() == pytest.approx(0.12**2, abs=0.005)
  np.testing.assert_array_equal(of(('rotation',))['rotation'], drawn['rotation'])
  # An image's own: whatever stands beside it.
  out, told = AUGMENTED(IMAGES, KEYS[:6], rate=0.9)
  again, told_again = AUGMENTED(IMAGES[::-1], KEYS[:6][::-1], rate=0.9)
  assert np.abs(out - IMAGES).max() > 1
  np.testing.assert_allclose(again[::-1], out, atol=1e-6)
  np.testing.assert_array_equal(told_again[::-1], told)
