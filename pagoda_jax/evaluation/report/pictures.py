"""Pictures of a run within the page: cut, small enough, and never more of them than the page can carry."""

import base64
import dataclasses
import functools
import io

import numpy as np
from PIL import Image

from pagoda_jax.training import grids

PAGE_BYTES = 16 * 2**20  # of all pictures, as they stand in the page
GRIDS = 24  # of a phase
LARGEST = 1280  # pixels of a side; a larger picture is made smaller
SMALL = 200_000  # bytes: a larger PNG becomes a WebP
LARGEST_FILE = 150_000_000  # pixels


@dataclasses.dataclass(frozen=True)
class Grid:
  """A sample grid: what was drawn from the prior, and held-out pictures over their reconstructions, each as data: URI.

  `strip` is the first row of the samples, a picture a class where classes are few.
  """

  samples: str
  reconstructions: str
  strip: str
  side: int  # pixels of an image
  columns: int

  @property
  def bytes(self) -> int:
    return len(self.samples) + len(self.reconstructions)


def read(path, config, resolution: int) -> Grid:
  """A phase's grid.

  Raises:
    ValueError, OSError: it is no picture, not whole, or too large.
  """
  status = path.stat()
  return _read(path, status.mtime, status.length, grids.columns(config), config.log.samples, resolution)


@functools.lru_cache(maxsize=256)  # a run that goes on writes its page again and again
def _read(path, changed, length, columns, samples, resolution) -> Grid:
  image = array_of(path)
  # As training/grids.py lays it out; of an image in larger pixels one pixel stands for all that are alike.
  factor = max(1, -(-32 // resolution))
  side = resolution * factor
  height = -(-samples // columns) * side
  if image.shape[1] != columns * side or image.shape[0] < height:
    return Grid(encoded(image), '', '', 0, 0)
  upper, lower = image[:height], image[height + grids.GAP :]
  reduced = lambda part: part[::factor, ::factor]
  return Grid(encoded(reduced(upper)), encoded(reduced(lower)) if len(lower) else '', encoded(reduced(upper[:side])),
              resolution, columns)


def array_of(path) -> np.ndarray:
  """uint8 [H, W] or [H, W, 3] of a picture file; errors as `read`'s."""
  with Image.open(io.BytesIO(path.read_bytes())) as file:
    if file.width * file.height > LARGEST_FILE:
      raise ValueError(f'{file.width} x {file.height} pixels are too many to be shown')
    return np.asarray(file.convert('L' if file.mode == 'L' else 'RGB'))


def encoded(image: np.ndarray) -> str:
  """uint8 [H, W] or [H, W, 3] as a data: URI: PNG where that is small, else WebP of at most LARGEST pixels a side."""
  picture = Image.fromarray(image)
  buffer = io.BytesIO()
  if max(picture.size) <= LARGEST:
    picture.save(buffer, 'PNG', optimize=True)
    if buffer.tell() <= SMALL:
      return _uri('png', buffer)
  picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.convert('RGB').save(buffer, 'WEBP', quality=85)
  return _uri('webp', buffer)


def _uri(kind, buffer) -> str:
  return f'data:image/{kind};base64,' + base64.b64encode(buffer.getvalue()).decode()


def chosen(found: list, config, phase, share: int, notes: list[str]) -> list[tuple[int, Grid]]:
  """(step, grid) of at most GRIDS of a phase's, spread over its steps, the last one always, within `share` bytes."""
  shown, left = [], share
  places = np.unique(np.linspace(0, len(found) - 1, min(GRIDS, len(found))).round().astype(int)) if found else []
  if len(places) > 2:  # one is read to know how many there is room for
    with_last = _noted(found[-1], config, phase, notes)
    room = max(2, int(share // max(with_last.bytes, 1))) if with_last else len(places)
    places = places[np.unique(np.linspace(0, len(places) - 1, min(room, len(places))).round().astype(int))]
  for place in reversed(list(places)):
    grid = _noted(found[place], config, phase, notes)
    if grid is None or (shown and grid.bytes > left):
      continue
    left -= grid.bytes
    shown.insert(0, (found[place][0], grid))
  return shown


def _noted(entry, config, phase, notes) -> Grid | None:
  try:
    return read(entry[1], config, phase.resolution)
  except Exception as error:  # whatever lies there: Pillow's plugins raise many kinds
    said = f'{phase.name}/samples/{entry[1].name}: cannot be shown ({str(error)[:200]})'
    if said not in notes:
      notes.append(said)
    return None
