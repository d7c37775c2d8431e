"""EDM's augmentation of training pictures, each transform told to the network by labels (Karras et al. 2022, F.2).

An image goes through the transforms below in this order, each by its chance. The labels of what was drawn, all zero
for an image as it is, are an input of the network (`UNet.augment_dim`), which so learns what is augmentation and what
is data: with zeros, as in sampling, its images are not augmented.

  transform            parameters                           labels
  x_flip               a in {0, 1}; always drawn            a
  y_flip               a in {0, 1}                          a
  quarter_turn         a in {0, 1, 2, 3}                    a in {1, 2}, a in {2, 3}
  integer_translation  t, whole pixels, to 1/8 of a side    t / (side / 8)
  scale                a ~ N(0, 1); by 2^(0.2 a)            a
  rotation             a ~ U(-pi, pi)                       cos a - 1, sin a
  anisotropy           a ~ N(0, 1), r ~ U(-pi, pi) or 0;    a cos r, a sin r
                       by 2^(0.2 a) along r (from the right upwards), 2^(-0.2 a) across
  translation          a ~ N(0, 1)^2; by a / 8 of a side    a
  brightness           a ~ N(0, 1); adds 0.2 a              a
  contrast             a ~ N(0, 1); by 2^(0.5 a)            a
  luma_flip            a in {0, 1}; mirrors the luma axis   a
  hue                  a ~ U(-pi, pi); about the luma axis  cos a - 1, sin a
  saturation           a ~ N(0, 1); by 2^a                  a

EDM trains with the geometric ones but quarter_turn and integer_translation: 9 labels. What is drawn for an image
depends on its key alone. Beyond its borders an image goes on mirrored. Flips, quarter turns and whole pixels move
values as they are; all other geometry is one resampling, at twice the resolution between two wavelet filters.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# name -> how many numbers a draw has and how many labels, in the order of application.
_DRAWS = {
  'x_flip': 1, 'y_flip': 1, 'quarter_turn': 1, 'integer_translation': 2, 'scale': 1, 'rotation': 1, 'anisotropy': 2,
  'translation': 2, 'brightness': 1, 'contrast': 1, 'luma_flip': 1, 'hue': 1, 'saturation': 1,
}
TRANSFORMS = tuple(_DRAWS)
_RESAMPLED = ('scale', 'rotation', 'anisotropy', 'translation')
_COLOUR = ('brightness', 'contrast', 'luma_flip', 'hue', 'saturation')
TRANSLATION = 1 / 8  # of a side: most whole pixels, and the deviation of fractional ones
SCALE, ANISOTROPY = 0.2, 0.2  # deviations of log2 of the factors
ROTATED_AXES = 0.5  # share of anisotropic scalings that are along another direction than the picture's axes
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.5, 1.0
LUMA = np.full(3, 1 / math.sqrt(3))  # the grey axis of RGB

# The Symlet of six vanishing moments (Daubechies 1992, table 6.3), low-pass, sum sqrt(2): its even shifts are
# orthonormal, so that up-sampling and then down-sampling by it gives back what there was.
SYMLET = np.array([
  0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
  0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
  0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
# What the filter moves slow waves by, as it is not quite symmetric, in pixels of the doubled image.
_DELAY = float(SYMLET @ np.arange(len(SYMLET)) / SYMLET.sum() - (len(SYMLET) - 1) / 2)
_MARGIN = len(SYMLET)  # of the doubled image beyond the border, as it is needed around the grid that is sampled


def draw(key: jax.Array, rate: float, transforms: tuple[str, ...]) -> dict[str, jax.Array]:
  """The parameters of one image's transforms: name -> [n] float32, zeros where a transform is left out.

  Args:
    key: the image's.
    rate: chance of each transform.
    transforms: which of TRANSFORMS; leaving one out does not change what the others draw.

  Raises:
    ValueError: there is no such transform.
  """
  if unknown := sorted(set(transforms) - set(TRANSFORMS)):
    raise ValueError(f'unknown augmentation {unknown}; choose from {TRANSFORMS}')
  drawn = {}
  for number, name in enumerate(TRANSFORMS):
    if name not in transforms:
      continue
    chance, value, other = jax.random.split(jax.random.fold_in(key, number), 3)
    count = _DRAWS[name]
    if name in ('x_flip', 'y_flip', 'luma_flip'):
      values = jax.random.bernoulli(value, shape=(1,)).astype(jnp.float32)
    elif name == 'quarter_turn':
      values = jax.random.randint(value, (1,), 0, 4).astype(jnp.float32)
    elif name == 'integer_translation':
      values = jax.random.uniform(value, (2,), minval=-1.0, maxval=1.0)
    elif name in ('rotation', 'hue'):
      values = jax.random.uniform(value, (1,), minval=-math.pi, maxval=math.pi)
    else:
      values = jax.random.normal(value, (count,))
    if name == 'anisotropy':
      angle = jax.random.uniform(other, minval=-math.pi, maxval=math.pi)
      rotated = jax.random.bernoulli(jax.random.fold_in(other, 1), ROTATED_AXES)
      values = values.at[1].set(jnp.where(rotated, angle, 0))
    happens = True if name == 'x_flip' else jax.random.bernoulli(chance, rate)
    drawn[name] = jnp.where(happens, values, 0)
  return drawn


def labels(drawn: dict[str, jax.Array], side: int) -> jax.Array:
  """[n] float32: what the network is told of one image's draw; `side` of the image in pixels."""
  told = []
  for name in TRANSFORMS:
    if name not in drawn:
      continue
    a = drawn[name]
    if name == 'quarter_turn':
      a = jnp.stack([(a[0] == 1) | (a[0] == 2), (a[0] == 2) | (a[0] == 3)])
    elif name == 'integer_translation':
      a = _whole_pixels(a, side) / (side * TRANSLATION)
    elif name in ('rotation', 'hue'):
      a = jnp.stack([jnp.cos(a[0]) - 1, jnp.sin(a[0])])
    elif name == 'anisotropy':
      a = a[0] * jnp.stack([jnp.cos(a[1]), jnp.sin(a[1])])
    told.append(a.astype(jnp.float32))
  return jnp.concatenate(told)


def apply(image: jax.Array, drawn: dict[str, jax.Array]) -> jax.Array:
  """One image [S, S, C], of about [-1, 1], transformed by what was drawn; values are not clipped.

  Colour transforms are for one channel, which is taken for grey, or three.
  """
  side = image.shape[0]
  if 'x_flip' in drawn:
    image = jnp.where(drawn['x_flip'] == 1, image[:, ::-1], image)
  if 'y_flip' in drawn:
    image = jnp.where(drawn['y_flip'] == 1, image[::-1], image)
  if 'quarter_turn' in drawn:
    turns = [image, jnp.rot90(image), jnp.rot90(image, 2), jnp.rot90(image, 3)]
    image = jnp.stack(turns)[drawn['quarter_turn'][0].astype(jnp.int32)]
  if 'integer_translation' in drawn:
    x, y = _whole_pixels(drawn['integer_translation'], side).astype(jnp.int32)
    place = jnp.arange(side)
    image = image[_mirrored(place - y, side)][:, _mirrored(place - x, side)]
  if set(drawn) & set(_RESAMPLED):
    moves = jnp.concatenate([drawn[name] for name in _RESAMPLED if name in drawn])
    # An image that is not to be moved keeps its values to the last bit.
    image = jnp.where(jnp.any(moves != 0), resampled(image, inverse_geometry(drawn, side)), image)
  if set(drawn) & set(_COLOUR):
    matrix = colour(drawn)
    rgb = jnp.broadcast_to(image, (*image.shape[:2], 3))
    moved = jnp.einsum('ij,hwj->hwi', matrix[:3, :3], rgb, precision='highest') + matrix[:3, 3]
    image = moved if image.shape[2] == 3 else moved.mean(axis=-1, keepdims=True)
  return image


def augmented(images: jax.Array, keys: jax.Array, rate: float, transforms: tuple[str, ...]):
  """(images [B, S, S, C] transformed, labels [B, n]) of images [B, S, S, C] and one key for each, [B]."""

  def one(image, key):
    drawn = draw(key, rate, transforms)
    return apply(image, drawn), labels(drawn, image.shape[0])

  return jax.vmap(one)(images, keys)


def inverse_geometry(drawn: dict[str, jax.Array], side: int) -> jax.Array:
  """[3, 3] float32: from a place (x, y, 1) in the transformed image to where it came from; pixels from the centre."""
  matrix = jnp.eye(3)
  if 'scale' in drawn:
    factor = 2 ** (-SCALE * drawn['scale'][0])
    matrix = _product(matrix, _scaling(factor, factor))
  if 'rotation' in drawn:
    matrix = _product(matrix, _rotation(drawn['rotation'][0]))
  if 'anisotropy' in drawn:
    amount, angle = drawn['anisotropy']
    factor = 2 ** (-ANISOTROPY * amount)
    # The sign of the angle is that of the code that the published weights were trained by.
    matrix = _product(matrix, _rotation(-angle), _scaling(factor, 1 / factor), _rotation(angle))
  if 'translation' in drawn:
    x, y = side * TRANSLATION * drawn['translation']
    matrix = _product(matrix, jnp.eye(3).at[:2, 2].set(-jnp.stack([x, y])))
  return matrix


def colour(drawn: dict[str, jax.Array]) -> jax.Array:
  """[4, 4] float32: from (r, g, b, 1) to the transformed colour."""
  matrix = jnp.eye(4)
  of_luma = jnp.asarray(np.pad(np.outer(LUMA, LUMA), (0, 1)), jnp.float32)
  linear = jnp.diag(jnp.array([1.0, 1.0, 1.0, 0.0]))
  whole = jnp.eye(4)
  if 'brightness' in drawn:
    matrix = _product(whole.at[:3, 3].set(BRIGHTNESS * drawn['brightness'][0]), matrix)
  if 'contrast' in drawn:
    matrix = _product(whole + linear * (2 ** (CONTRAST * drawn['contrast'][0]) - 1), matrix)
  if 'luma_flip' in drawn:
    matrix = _product(whole - 2 * of_luma * drawn['luma_flip'][0], matrix)
  if 'hue' in drawn:
    matrix = _product(_about_luma(drawn['hue'][0], of_luma, linear), matrix)
  if 'saturation' in drawn:
    factor = 2 ** (SATURATION * drawn['saturation'][0])
    matrix = _product(whole + (linear - of_luma) * (factor - 1), matrix)
  return matrix


def resampled(image: jax.Array, inverse: jax.Array) -> jax.Array:
  """The image [S, S, C] whose value at a place p is that of `image` at inverse @ p (`inverse_geometry`)."""
  side = image.shape[0]
  up, down = _doubling(side)
  both = lambda matrix, x: jnp.einsum('ih,jw,hwc->ijc', matrix, matrix, x, precision='highest')
  doubled = both(up, image)
  # Places of the doubled output, and _MARGIN around it for the filter, in pixels from the centre.
  place = jnp.asarray((np.arange(-_MARGIN, 2 * side + _MARGIN) - _DELAY + 0.5) / 2 - side / 2, jnp.float32)
  x = inverse[0, 0] * place[None, :] + inverse[0, 1] * place[:, None] + inverse[0, 2]
  y = inverse[1, 0] * place[None, :] + inverse[1, 1] * place[:, None] + inverse[1, 2]
  rows, columns = (_folded(2 * (v + side / 2) - 0.5, side) + _DELAY + _MARGIN for v in (y, x))
  return both(down, _bilinear(doubled, rows, columns))


def _doubling(side: int) -> tuple[np.ndarray, np.ndarray]:
  """(up [2S + 2 margin, S], down [S, 2S + 2 margin]): matrices of one axis, with mirrored borders in `up`."""
  reach = _MARGIN + len(SYMLET)
  padded = _mirrored(np.arange(-reach, side + reach), side)
  up, down = np.zeros((2 * side + 2 * _MARGIN, side)), np.zeros((side, 2 * side + 2 * _MARGIN))
  first = len(SYMLET) // 2 - 1  # the filter's middle is between this tap and the next, as a pixel's is between its two
  for pixel, source in enumerate(padded):
    for tap, value in enumerate(SYMLET):
      row = 2 * (pixel - reach) - first + tap
      if -_MARGIN <= row < 2 * side + _MARGIN:
        up[row + _MARGIN, source] += math.sqrt(2) * value
  for pixel in range(side):
    for tap, value in enumerate(SYMLET):
      down[pixel, 2 * pixel - first + tap + _MARGIN] += value / math.sqrt(2)
  return up.astype(np.float32), down.astype(np.float32)


def _folded(place, side: int):
  """Places in the doubled image, mirrored to where it is known: its own pixels and the margin around them."""
  low, period = 0.5, 2 * (2 * side - 2)  # about the middles of the first and last pixel
  mirrored = low + jnp.abs((place - low + period / 2) % period - period / 2) if period else jnp.full_like(place, low)
  known = (place >= -_MARGIN - _DELAY) & (place <= 2 * side - 1 + _MARGIN - _DELAY)
  return jnp.where(known, place, mirrored)


def _bilinear(image, rows, columns):
  """[h, w, C] values of an image [H, W, C] at fractional indices [h, w]."""
  height, width, _ = image.shape
  top, left = jnp.clip(jnp.floor(rows), 0, height - 2), jnp.clip(jnp.floor(columns), 0, width - 2)
  down, right = (rows - top)[..., None], (columns - left)[..., None]
  top, left = top.astype(jnp.int32), left.astype(jnp.int32)
  above = image[top, left] * (1 - right) + image[top, left + 1] * right
  below = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
  return above * (1 - down) + below * down


def _mirrored(index, side: int):
  """Whole indices beyond 0..side-1, mirrored about the first and last pixel."""
  period = 2 * (side - 1)
  return abs((index + side - 1) % period - (side - 1)) if period else 0 * index


def _whole_pixels(a, side):
  return jnp.round(a * side * TRANSLATION)


def _product(*matrices):
  """Their product in float32: at the chip's default precision a place would be wrong by pixels."""
  whole = matrices[0]
  for matrix in matrices[1:]:
    whole = jnp.matmul(whole, matrix, precision='highest')
  return whole


def _scaling(x, y):
  return jnp.diag(jnp.stack([x, y, jnp.ones_like(x)]))


def _rotation(angle):
  """The rotation that takes (1, 0) to (cos, sin)."""
  cosine, sine, zero, one = jnp.cos(angle), jnp.sin(angle), jnp.zeros(()), jnp.ones(())
  return jnp.stack([cosine, -sine, zero, sine, cosine, zero, zero, zero, one]).reshape(3, 3)


def _about_luma(angle, of_luma, linear):
  """Rodrigues' rotation about the luma axis."""
  x, y, z = LUMA
  cross = jnp.asarray(np.pad([[0, -z, y], [z, 0, -x], [-y, x, 0]], (0, 1)), jnp.float32)
  turned = jnp.cos(angle) * (linear - of_luma) + jnp.sin(angle) * cross + of_luma
  return turned + jnp.diag(jnp.array([0.0, 0.0, 0.0, 1.0]))
