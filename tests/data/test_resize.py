"""Resizing against hand-written values; golden values are in test_goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pagoda_jax.data import haar, pictures, resize


def rows(*values):
  """A one-column, one-channel image."""
  return jnp.array(values)[:, None, None]


def test_pixel_centres():
  up = lambda centers: resize.resize(rows(0.0, 3.0), (4, 1), centers=centers)[:, 0, 0]
  np.testing.assert_allclose(up('half_pixel'), [0, 0.75, 2.25, 3])
  np.testing.assert_allclose(up('align_corners'), [0, 1, 2, 3], rtol=1e-6)
  np.testing.assert_allclose(up('legacy'), [0, 1.5, 3, 3])


def test_rows_of_every_matrix_sum_to_one():
  for method in resize.METHODS:
    for old, new in ((7, 3), (3, 7), (8, 4), (1, 5), (5, 1)):
      for antialias in {False, method in ('bilinear', 'bicubic')}:
        matrix = resize.resize_matrix(old, new, method, antialias)
        np.testing.assert_allclose(matrix.sum(1), np.ones(new), rtol=1e-6)


def test_keeps_dtype_and_leading_axes():
  images = jnp.ones((2, 3, 4, 6, 1), jnp.bfloat16)
  out = resize.resize(images, (8, 3))
  assert out.shape == (2, 3, 8, 3, 1) and out.dtype == jnp.bfloat16
  assert resize.resize(images, (4, 6)) is images


def test_gradient_is_the_transpose():
  matrix = resize.resize_matrix(5, 8, 'bicubic')
  cotangent = np.arange(8.0)
  gradient = jax.grad(lambda x: jnp.vdot(resize.resize(x, (8, 1), 'bicubic')[:, 0, 0], cotangent))(rows(*np.ones(5)))
  np.testing.assert_allclose(gradient[:, 0, 0], matrix.T @ cotangent, rtol=1e-5)


@pytest.mark.parametrize(
    'arguments',
    [('lanczos',), ('bilinear', False, 'corner'), ('nearest', True), ('bilinear', True, 'legacy')],
)
def test_unknown_combinations_are_refused(arguments):
  with pytest.raises(ValueError):
    resize.resize(rows(0.0, 1.0), (3, 1), *arguments)


def test_center_crop_halves_with_box_then_bicubic():
  pixels = np.random.default_rng(0).integers(0, 256, (75, 120, 3), np.uint8)
  image = Image.fromarray(pixels)
  out = np.asarray(resize.center_crop_adm(image, 16))
  # Short side 75 -> 37 -> 18 by BOX (long side 120 -> 60 -> 30); 18 -> 16 by BICUBIC takes 30 to 27.
  for size, kernel in (((60, 37), 'BOX'), ((30, 18), 'BOX'), ((27, 16), 'BICUBIC')):
    image = image.resize(size, Image.Resampling[kernel])
  np.testing.assert_array_equal(out, np.asarray(image)[:, 5:21])


def test_center_crop_enlarges_small_images():
  image = Image.fromarray(np.zeros((10, 20), np.uint8))
  assert resize.center_crop_adm(image, 16).size == (16, 16)


@pytest.mark.parametrize('side', [8, 40, 100, 256])
def test_eight_bit_pictures_are_resized_as_pillow_does_bit_for_bit(side):
  pixels = np.random.default_rng(side).integers(0, 256, (2, side, side + 3, 3), dtype=np.uint8)
  pixels[0, : side // 2] = np.where(pixels[0, : side // 2] < 128, 0, 255)  # overshoots
  expected = np.stack([np.asarray(Image.fromarray(x).resize((70, 70), Image.Resampling.BICUBIC)) for x in pixels])
  np.testing.assert_array_equal(resize.resize_as_pillow(pixels, 70), expected)


def test_the_haar_band_is_twice_the_mean_a_level_and_has_what_energy_the_other_bands_leave():
  known = np.array([[1.0, 3, 0, 0], [5, 7, 0, 2], [2, 2, 1, -1], [2, 2, -1, 1]])[..., None]
  np.testing.assert_array_equal(haar.band(known)[..., 0], [[8, 1], [4, 0]])
  np.testing.assert_array_equal(haar.band(known, 2)[..., 0], [[6.5]])  # 4 x the mean, 26 / 16
  np.testing.assert_array_equal(haar.band(haar.band(known)), haar.band(known, 2))
  # The other bands are those of the picture with the signs of every second row, column, or both turned.
  images = np.random.default_rng(0).standard_normal((2, 6, 8, 3))
  rows, columns = (-1.0) ** np.arange(6)[:, None, None], (-1.0) ** np.arange(8)[:, None]
  bands = [haar.band(images * signs) for signs in (1, rows, columns, rows * columns)]
  assert sum(np.sum(part**2) for part in bands) == pytest.approx(np.sum(images**2), rel=1e-12)
  # Of noise it is noise of the same law, which a generator takes (the release's `wavelet_input`).
  noise = haar.band(jax.random.normal(jax.random.key(0), (64, 16, 16, 3)))
  assert noise.shape == (64, 8, 8, 3) and float(jnp.std(noise)) == pytest.approx(1, abs=0.02)
  with pytest.raises(ValueError, match='6 x 8: cannot be halved 2 times'):
    haar.band(images, 2)


def test_a_picture_smaller_by_its_haar_band_is_the_box_average():
  """Rounded once, where Pillow rounds rows and columns apart, and each halving."""
  pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
  found = pictures.cuts(Image.fromarray(pixels), (32, 16, 8), 3, band_of=32)
  np.testing.assert_array_equal(found[32], pixels)
  for side in (16, 8):
    mean = pixels.reshape(side, 32 // side, side, 32 // side, 3).mean((1, 3))
    np.testing.assert_array_equal(found[side], np.floor(mean + 0.5))
    cut = pictures.picture(Image.fromarray(pixels), side, 3)
    assert np.abs(found[side].astype(int) - cut).max() <= np.log2(32 / side) and np.any(found[side] != cut)
  # Of a picture of another size what is cut at 32 px goes on, where 'cut' takes the original.
  large = Image.fromarray(np.random.default_rng(2).integers(0, 256, (50, 41, 3), dtype=np.uint8))
  whole = Image.fromarray(pictures.picture(large, 32, 3))
  np.testing.assert_array_equal(pictures.picture(large, 8, 3, band_of=32), pictures.picture(whole, 8, 3, band_of=32))
  assert np.abs(pictures.picture(large, 8, 3, band_of=32).astype(int) - pictures.picture(large, 8, 3)).max() > 2
  with pytest.raises(pictures.SourceError, match='x.png: a picture of 24 px has no Haar band of 16 px'):
    pictures.picture_of({'name': 'x.png', 'image': large}, 16, 3, band_of=24)
