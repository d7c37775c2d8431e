"""Stored bytes to pixels and back: decoding, the crop and resize of guided-diffusion, encoding.

NumPy and Pillow only, so that worker processes start quickly.
"""

import io
from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pagoda_jax.data import haar

FORMATS = ('png', 'jpeg', 'raw')  # raw: the pixels' bytes
MAX_PIXELS = 2**26  # of a picture scaled to its short side, before the crop: 256 MiB of colours
DEEP_FORMATS = ('JPEG2000', 'PNG', 'PPM', 'TIFF')  # whose 16-bit greys Pillow gives as 0 (black) to 65535


class SourceError(ValueError):
  """A data set is missing, damaged or not what the config says; the message names where."""


def picture(image: Image.Image, resolution: int, channels: int, flip: bool = False, band_of: int = 0) -> np.ndarray:
  """A stored picture as [resolution, resolution, channels] uint8; `cuts` of one resolution."""
  return cuts(image, (resolution,), channels, flip, band_of)[resolution]


def cuts(image: Image.Image, resolutions: Collection[int], channels: int, flip: bool = False,
         band_of: int = 0) -> dict[int, np.ndarray]:
  """A picture at several resolutions, each [resolution, resolution, channels] uint8.

  Halved with BOX while the short side is at least twice the target, then BICUBIC, then centre crop, as
  guided-diffusion prepares ImageNet: each resolution from `image` and none from another one. Smaller pictures are
  enlarged, as there.

  band_of: a side at which the picture is cut so, to have its Haar LL band at the resolutions, halved a level so that it
  is a picture: means of squares of pixels, rounded once. 0: not so.

  Raises:
    SourceError: it is so long and thin that scaling it would take more than MAX_PIXELS; or a resolution times 2, 4, 8,
      ... is not band_of.
  """
  if band_of:
    whole = cuts(image, (band_of,), channels, flip)[band_of]
    return {resolution: _band(whole, resolution) for resolution in resolutions}
  if too_long := excess(image.size, max(resolutions)):
    raise SourceError(too_long)
  image, found = image.convert('L' if channels == 1 else 'RGB'), {}
  for resolution in sorted(resolutions, reverse=True):  # a smaller one goes on with the halvings of a larger one
    while min(image.size) >= 2 * resolution:
      image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    pixels = _centre(image, resolution).reshape(resolution, resolution, channels)
    found[resolution] = np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)
  return found


def _band(pixels, resolution):
  levels = (len(pixels) // resolution).bit_length() - 1
  if resolution << levels != len(pixels):
    raise SourceError(f'a picture of {len(pixels)} px has no Haar band of {resolution} px')
  return np.floor(haar.band(pixels.astype(np.float64), levels) / 2**levels + 0.5).astype(np.uint8)


def _centre(image, resolution):
  if min(image.size) != resolution:
    scale = resolution / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
  pixels = np.asarray(image)
  top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
  return pixels[top : top + resolution, left : left + resolution]


def cuts_of(record: dict[str, Any], resolutions: Collection[int], channels: int, flip: bool = False,
            band_of: int = 0) -> dict[int, np.ndarray]:
  """`cuts` of a source's record, whose name is in the error."""
  try:
    return cuts(record['image'], resolutions, channels, flip, band_of)
  except SourceError as error:
    raise SourceError(f'{record["name"]}: {error}') from None


def picture_of(record: dict[str, Any], resolution: int, channels: int, flip: bool = False,
               band_of: int = 0) -> np.ndarray:
  """`cuts_of` of one resolution."""
  return cuts_of(record, (resolution,), channels, flip, band_of)[resolution]


def excess(size: tuple[int, int], resolution: int) -> str | None:
  """Why a picture of `size` pixels is not to be scaled to a short side of `resolution`; None where it may be."""
  if not min(size):
    return f'{size[0]} x {size[1]} pixels'
  width, height = (round(side * resolution / min(size)) for side in size)
  if width * height <= MAX_PIXELS:
    return None
  return (f'{size[0]} x {size[1]} pixels, scaled to a short side of {resolution}: {width} x {height} = '
          f'{width * height} pixels, more than {MAX_PIXELS}')


def decode(content: bytes) -> Image.Image:
  """An encoded picture in 8 bits, as it is stored: orientation tags are not followed, as ImageNet's references do.

  Raises:
    SourceError: it is no picture, or one of unknown range.
    ValueError, OSError and others of Pillow's: it is damaged.
  """
  image = _opened(content)
  image.load()
  return _in_8_bits(image, _white(image))


def shown(content: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
  """An encoded picture in 8 bits, as a viewer shows it: upright by its orientation tag, transparency over white.

  formats: Pillow's names of those that are taken; None: all.

  Raises:
    As `decode`.
  """
  return _shown(_opened(content, formats))


def examine(content: bytes) -> tuple[int, int]:
  """Reads an encoded picture as `shown` does, at less cost; its (width, height) as they are stored.

  Raises:
    As `decode`.
  """
  image = _opened(content)
  size = image.size
  image.draft('RGB', (1, 1))  # JPEG: an eighth of the pixels; all of its bytes are read all the same
  _shown(image)
  return size


def _opened(content, formats=None):
  try:
    return Image.open(io.BytesIO(content), formats=formats)
  except UnidentifiedImageError:  # whose message is a memory address
    raise SourceError('no format that Pillow reads') from None


def _shown(image):
  image.load()
  white = _white(image)
  image = ImageOps.exif_transpose(image)
  if not white and image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return _in_8_bits(image, white)


def _white(image) -> int | None:
  """The value of white in greys of more than 8 bits, where black is 0; None for other pictures.

  Raises:
    SourceError: nothing says which value is white, or it is 0, which Pillow heeds in 8 bits only.
  """
  if not image.mode.startswith(('I', 'F')):
    return None
  tags = getattr(image, 'tag_v2', {})  # TIFF: a signed one comes as mode I, as one of 32 bits does
  deep = image.mode.startswith('I;16') or (image.mode == 'I' and image.format != 'TIFF')
  if not deep or image.format not in DEEP_FORMATS or tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
    bits = {'F': 'floating-point', 'I': '32-bit or signed'}.get(image.mode, '16-bit')
    raise SourceError(f'{bits} values in a {image.format}, of which it is not known what is white; save it as a PNG '
                      'of 8 or 16 bits')
  return 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1


def _in_8_bits(image, white):
  """As mode 1, L or RGB; Pillow's own conversion would clip greys of more bits at 255."""
  if white:  # rounded to the nearest: cut off, a picture would be half a level too dark
    levels = np.asarray(image).astype(np.int64).clip(0, white) * 255
    return Image.fromarray(((levels + white // 2) // white).astype(np.uint8))
  return image if image.mode in ('1', 'L', 'RGB') else image.convert('RGB')


def encode(pixels: np.ndarray, image_format: str, quality: int) -> bytes:
  """[H, W, C] uint8 (C 1 or 3) as bytes: 'png', 'jpeg' of a quality without chroma subsampling, 'raw' for `of_raw`."""
  if image_format == 'raw':
    return pixels.tobytes()
  options = {'quality': quality, 'subsampling': 0} if image_format == 'jpeg' else {}
  buffer = io.BytesIO()
  Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, image_format, **options)
  return buffer.getvalue()


def of_raw(content: bytes, side: int) -> Image.Image:
  """The square picture, grey or RGB, that `encode` made 'raw' bytes of.

  Raises:
    SourceError: they are too few or too many for the side.
  """
  mode = {side**2: 'L', 3 * side**2: 'RGB'}.get(len(content))
  if mode is None:
    raise SourceError(f'{len(content)} bytes, not the {side**2} or {3 * side**2} of raw pixels')
  return Image.frombytes(mode, (side, side), content)


def color_channels(image: Image.Image) -> int:
  """1 for grey pictures, 3 for others: what `picture` should be asked for so that nothing is lost."""
  return 1 if image.mode in ('1', 'L') else 3


def reason(error: Exception) -> str:
  """What a reader of files or pictures raised, in one line."""
  text = getattr(error, 'strerror', None) or str(error)
  return (text if isinstance(error, SourceError) else f'{type(error).__name__}: {text}').split('\n')[0]
