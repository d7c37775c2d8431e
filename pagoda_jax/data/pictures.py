"""Stored bytes to pixels and back: decoding, the crop and resize of guided-diffusion, encoding.

NumPy and Pillow only, so that worker processes start quickly.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ('png', 'jpeg')


class SourceError(ValueError):
  """A data set is missing, damaged or not what the config says; the message names where."""


def picture(image: Image.Image, resolution: int, channels: int, flip: bool = False) -> np.ndarray:
  """A stored picture as [resolution, resolution, channels] uint8.

  Halved with BOX while the short side is at least twice the target, then BICUBIC, then centre crop,
  as guided-diffusion prepares ImageNet. All resolutions of one picture come from the same pixels.
  """
  image = image.convert('L' if channels == 1 else 'RGB')
  while min(image.size) >= 2 * resolution:
    image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
  if min(image.size) != resolution:
    scale = resolution / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
  pixels = np.asarray(image)
  top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
  pixels = pixels[top : top + resolution, left : left + resolution].reshape(resolution, resolution, channels)
  return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def decode(content: bytes) -> Image.Image:
  """An encoded picture, as its pixels are stored: orientation tags are not followed, as ImageNet's references do.

  Raises:
    ValueError, OSError and others of Pillow's: it is damaged.
  """
  try:
    image = Image.open(io.BytesIO(content))
  except UnidentifiedImageError:  # whose message is a memory address
    raise ValueError('no format that Pillow reads') from None
  image.load()
  return image


def shown(image: Image.Image) -> Image.Image:
  """A picture as a viewer shows it: upright by its orientation tag, transparency over white, 16 bits as 8."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I'):  # 16-bit grey, which Pillow's own conversion would clip to white
    return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
  return image


def encode(pixels: np.ndarray, image_format: str, quality: int) -> bytes:
  """[H, W, C] uint8 (C 1 or 3) as a file's bytes: 'png', or 'jpeg' of a quality without chroma subsampling."""
  options = {'quality': quality, 'subsampling': 0} if image_format == 'jpeg' else {}
  buffer = io.BytesIO()
  Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, image_format, **options)
  return buffer.getvalue()


def color_channels(image: Image.Image) -> int:
  """1 for grey pictures, 3 for others: what `picture` should be asked for so that nothing is lost."""
  return 1 if image.mode in ('1', 'L') else 3


def fault(path) -> str | None:
  """Why a file cannot be read as a picture; None where it can."""
  try:
    with Image.open(path) as image:
      image.draft('RGB', (1, 1))  # JPEG: an eighth of the pixels; all of its bytes are read all the same
      image.load()
  except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
    return f'{type(error).__name__}: {error}'.split('\n')[0]
  return None
