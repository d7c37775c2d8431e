"""Picture files of any kind as arrays of a generator's size, and edits beside what they were made of."""

import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from pagoda_jax.data import pictures
from pagoda_jax.runtime.files import open_regular
from pagoda_jax.use.edit import EditError

LARGEST_FILE = 2**28  # bytes
LARGEST = 2**26  # pixels


def read(path) -> Image.Image:
  """A picture file as a viewer shows it, in 8 bits: upright, over white; of an animation the first frame.

  Raises:
    EditError: it is no picture, too large a one, or damaged.
    OSError: it cannot be opened.
  """
  with open_regular(os.fspath(path)) as file:
    content = file.read(LARGEST_FILE + 1)
  if len(content) > LARGEST_FILE:
    raise EditError(f'{path}: more than {LARGEST_FILE >> 20} MiB')
  return of_bytes(content, path)


def of_bytes(content: bytes, name, formats: tuple[str, ...] | None = None) -> Image.Image:
  """`read` of a file's content; `name` is for its errors, `formats` are Pillow's names of those that are taken."""
  try:
    with Image.open(io.BytesIO(content), formats=formats) as image:
      width, height = image.size  # known before anything is decoded
    if width * height > LARGEST:
      raise EditError(f'{name}: {width} x {height} pixels; at most {LARGEST} are taken')
    return pictures.shown(content, formats)
  except EditError:
    raise
  except UnidentifiedImageError:  # whose message is a memory address
    raise EditError(f'{name}: no picture: no format that Pillow reads') from None
  except Exception as error:  # Pillow raises many kinds
    raise EditError(f'{name}: no picture that can be read ({pictures.reason(error)})') from None


def square(image: Image.Image, side: int, channels: int) -> np.ndarray:
  """uint8 [side, side, channels] as training pictures are cut: short side to `side`, then the middle.

  Raises:
    EditError: it is too long and thin.
  """
  try:
    return pictures.picture(image, side, channels)
  except pictures.SourceError as error:
    raise EditError(str(error)) from None


def small(image: Image.Image, side: int, channels: int) -> np.ndarray:
  """uint8 [r, r, channels], the middle of a picture of fewer pixels than `side`, none of them resampled.

  Raises:
    EditError: it is no smaller.
  """
  if min(image.size) >= side:
    raise EditError(f'{image.size[0]} x {image.size[1]} pixels: no smaller than what the generator makes, {side} px')
  return square(image, min(image.size), channels)


def mask(image: Image.Image, size: tuple[int, int], side: int) -> np.ndarray:
  """bool [side, side], where a mask picture of `size` pixels is white; any white in a pixel makes it so.

  Raises:
    EditError: it is of another size than the picture.
  """
  if image.size != size:
    raise EditError(f'mask of {image.size[0]} x {image.size[1]} pixels, picture of {size[0]} x {size[1]}: they must '
                    'be of one size')
  white = Image.fromarray(np.uint8(255) * (np.asarray(image.convert('L')) > 127))
  return square(white, side, 1)[..., 0] > 0


def beside(before: list[np.ndarray], after: list[np.ndarray], side: int) -> np.ndarray:
  """uint8 [N * side, 2 * side, C]: a picture, enlarged to `side` in whole pixels where it can be, and what came of it,
  a row each."""
  channels = max(image.shape[-1] for image in (*before, *after))

  def tile(image):
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture = picture.convert('L' if channels == 1 else 'RGB').resize((side, side), Image.Resampling.NEAREST)
    return np.asarray(picture).reshape(side, side, channels)

  return np.concatenate([np.concatenate([tile(a), tile(b)], axis=1) for a, b in zip(before, after)])
