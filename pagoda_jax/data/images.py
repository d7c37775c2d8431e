"""Images as arrays: uint8 to [-1, 1] and back, grids of them, PNG files."""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pagoda_jax.runtime import lock
from pagoda_jax.runtime.files import replacing


def normalize(images: jax.Array) -> jax.Array:
  """uint8 0..255 -> float32 [-1, 1], on the device; floats (latents, images already scaled) pass as float32.

  Raises:
    ValueError: images of another type, which would pass as they are.
  """
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f'images are {images.dtype}; must be uint8, 0 to 255, or floats in [-1, 1]')
  return images.astype(jnp.float32)


def quantized(images: jax.Array) -> jax.Array:
  """`to_uint8` on the device."""
  return jnp.clip(jnp.round((images.astype(jnp.float32) + 1) * 127.5), 0, 255).astype(jnp.uint8)


def to_uint8(images) -> np.ndarray:
  """[-1, 1] floats -> 0..255, rounded to nearest."""
  return np.clip(np.round((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def image_grid(images: np.ndarray, columns: int = 0, smallest_side: int = 32) -> np.ndarray:
  """Tiles [N, H, W, C] uint8 images (C 1 or 3) to one [H', W', C]; tiny images are shown in larger pixels."""
  count, height, width, channels = images.shape
  columns = columns or int(np.ceil(np.sqrt(count)))
  rows = -(-count // columns)
  padded = np.zeros((rows * columns, height, width, channels), np.uint8)
  padded[:count] = images
  grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
  grid = grid.reshape(rows * height, columns * width, channels)
  factor = max(1, -(-smallest_side // height))
  return grid.repeat(factor, 0).repeat(factor, 1)


def grid_of_both(above: np.ndarray, below: np.ndarray, columns: int) -> np.ndarray:
  """`image_grid` of two arrays of as many images: each of `above` has its own of `below` under it."""
  spare = [(0, -len(above) % columns), (0, 0), (0, 0), (0, 0)]
  rows = [np.pad(images, spare).reshape(-1, columns, *images.shape[1:]) for images in (above, below)]
  return image_grid(np.stack(rows, 1).reshape(-1, *above.shape[1:]), columns)


def write_png(path, image: np.ndarray) -> None:
  """Writes [H, W, C] uint8 as a PNG, whole or not at all."""
  lock.confirm()
  buffer = io.BytesIO()  # writing to a file, Pillow tells of a full disk as of an error in its encoder
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, 'PNG')
  with replacing(path) as file:
    file.write(buffer.getvalue())
