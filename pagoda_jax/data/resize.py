"""Resizing: on device like torch's `interpolate` (and TensorFlow 1's), on the host with Pillow.

Every method is separable and linear, so it is two matrix products whose matrices are known at trace
time; matrix units do them well and the gradient is exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

METHODS = ('nearest', 'bilinear', 'bicubic', 'area')
PILLOW_BITS = 22  # of its fixed-point filters
CENTERS = ('half_pixel', 'align_corners', 'legacy')


def resize(
    images: jax.Array,
    size: int | tuple[int, int],
    method: str = 'bilinear',
    antialias: bool = False,
    centers: str = 'half_pixel',
) -> jax.Array:
  """`images` [..., H, W, C] at another size, in their own dtype and value range.

  Args:
    images: any number of channels; floating point.
    size: new side, or (height, width).
    method: 'nearest', 'bilinear', 'bicubic' or 'area' (mean over the pixels that fall in the new one).
      Bicubic uses a = -0.5 with antialias, as Pillow, and a = -0.75 without, as torch.
    antialias: widen the kernel by the factor of down-sampling (bilinear and bicubic only).
    centers: where pixels lie: 'half_pixel' (torch's align_corners=False), 'align_corners', or 'legacy'
      (TensorFlow 1: pixel i of the new image is at i * old / new); the latter two without antialias.

  Raises:
    ValueError: an unknown method or centers, or a combination that does not exist.
  """
  height, width = (size, size) if isinstance(size, int) else size
  for axis, side in ((-3, height), (-2, width)):
    if images.shape[axis] != side:
      matrix = resize_matrix(images.shape[axis], side, method, antialias, centers)
      images = _along(images, jnp.asarray(matrix, images.dtype), axis)
  return images


def resize_as_pillow(pixels: jax.Array, size: int) -> jax.Array:
  """8-bit pictures [..., H, W, C], uint8 or whole numbers, as Pillow's bicubic filter resizes them to a square.

  Rows first, then columns, each rounded to 8 bits; bit for bit: the filter is in fixed point, as Pillow's, and in parts
  of 8 bits, whose products with pixels and their sums every matrix unit has exactly.

  Returns:
    float32 [..., size, size, C], whole numbers from 0 to 255.
  """
  pixels = pixels.astype(jnp.float32)
  for axis in (-2, -3):
    if pixels.shape[axis] != size:
      parts = _fixed_point(pixels.shape[axis], size)
      sums = [_along(pixels, jnp.asarray(part, jnp.float32), axis).astype(jnp.int32) for part in parts]
      total = sum(part << (8 * place) for place, part in enumerate(sums))
      rounded = (total + (1 << (PILLOW_BITS - 1))) >> PILLOW_BITS
      pixels = jnp.clip(rounded, 0, 255).astype(jnp.float32)
  return pixels


@functools.cache
def _fixed_point(old: int, new: int) -> list[np.ndarray]:
  """Pillow's bicubic matrix times 2^PILLOW_BITS, as three matrices: whole numbers of 8 bits, the last with the sign."""
  position = (np.arange(new) + 0.5) * (old / new) - 0.5
  scaled = _antialiased_matrix(position, old, 'bicubic') * 2**PILLOW_BITS
  whole = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)
  return [whole & 255, whole >> 8 & 255, whole >> 16]


def _along(images, matrix, axis):
  subscripts = 'oi,...iwc->...owc' if axis == -3 else 'oi,...hic->...hoc'
  # At the default precision an accelerator would round the images to bfloat16.
  return jnp.einsum(subscripts, matrix, images, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def resize_matrix(
    old: int,
    new: int,
    method: str,
    antialias: bool = False,
    centers: str = 'half_pixel',
    scale: float | None = None,
) -> np.ndarray:
  """The matrix [new, old], float64, that `resize` applies along one axis; its rows sum to one.

  `scale`: new pixels for each old one, where that is not new / old (torch's scale_factor); between half-pixel centres,
  of the methods that interpolate.
  """
  if method not in METHODS or centers not in CENTERS:
    raise ValueError(f'unknown resize {method!r}, {centers!r}: choose from {METHODS} and {CENTERS}')
  if antialias and (method not in ('bilinear', 'bicubic') or centers != 'half_pixel'):
    raise ValueError(f'no antialiased {method!r} with {centers!r} centers')
  if method == 'area':
    return _area_matrix(old, new)
  if method == 'nearest':
    return np.eye(old)[np.arange(new) * old // new]
  position = _positions(old, new, centers, scale)
  return _antialiased_matrix(position, old, method) if antialias else _sampled_matrix(position, old, method)


def _positions(old, new, centers, scale=None):
  """Where the new pixels' centres lie, in old pixels; fractional indices [new].

  In float32 as in torch and TensorFlow: between steep neighbours their rounding shows.
  """
  index = np.arange(new, dtype=np.float32)
  if centers == 'align_corners':
    return index * np.float32((old - 1) / (new - 1) if new > 1 else 0)
  if centers == 'legacy':
    return index * np.float32(old / new)
  return (index + np.float32(0.5)) * np.float32(1 / scale if scale else old / new) - np.float32(0.5)


def _kernel(method, a):
  """(function, support) of a resampling kernel; the distance is in pixels."""
  if method == 'bilinear':
    return (lambda x: np.maximum(0, 1 - np.abs(x))), 1

  def cubic(x):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))

  return cubic, 2


def _sampled_matrix(position, old, method):
  """Each row interpolates at one position; what the kernel takes from outside, the border pixel gives."""
  if method == 'bilinear':
    position = np.maximum(position, 0)
  kernel, support = _kernel(method, a=-0.75)
  matrix = np.zeros((len(position), old))
  rows = np.arange(len(position))
  for offset in range(1 - support, support + 1):
    tap = np.floor(position).astype(int) + offset
    np.add.at(matrix, (rows, np.clip(tap, 0, old - 1)), kernel(position - tap))
  return matrix


def _antialiased_matrix(position, old, method):
  """Each row averages under the kernel, as wide as a new pixel; what lies outside is left out."""
  kernel, _ = _kernel(method, a=-0.5)
  scale = max(old / len(position), 1)
  weights = kernel((position[:, None] - np.arange(old)) / scale)
  return weights / weights.sum(1, keepdims=True)


def _area_matrix(old, new):
  """Means over the old pixels that a new one touches (torch's adaptive average pooling)."""
  index = np.arange(new)[:, None]
  start, end = index * old // new, -((-(index + 1) * old) // new)
  inside = (np.arange(old) >= start) & (np.arange(old) < end)
  return inside / inside.sum(1, keepdims=True)


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
  """The square of side `size` from the middle, as in guided-diffusion (ADM) and so in the FID references.

  BOX halvings while the short side is at least twice `size`, then BICUBIC to a short side of `size`,
  then the centre crop. Works for any mode that Pillow can resize.
  """
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  width, height = round(image.width * scale), round(image.height * scale)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))
