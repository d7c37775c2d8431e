"""Where numbers and pictures go: metrics.jsonl always, TensorBoard where clu's extras are installed."""

import json
import sys
import time

import numpy as np
from etils import epath
from PIL import Image

from pagoda_jax import distributed

try:  # clu's writers need tensorflow and tensorboard, which no one should install to train
  from clu import metric_writers
except ImportError:
  metric_writers = None


BUCKET_SECONDS = 30.0


class JsonLines:
  """A file of one JSON object a line, each of a step; only the first process writes.

  Args:
    path: the file; lines of steps after `step` are dropped: a crash has undone them, and a step stands there once.
    step: the step that the run goes on from.
  """

  def __init__(self, path, step: int):
    self._path, self._primary = epath.Path(path), distributed.is_primary()
    self._waiting, self._written = '', time.monotonic()
    # Buckets hold whole objects: there the file is written anew, now and then, instead of appended to.
    self._appends = '://' not in str(path)
    if self._primary and self._path.exists():
      kept = [line + '\n' for line in self._path.read_text().splitlines() if _step_of(line) <= step]
      if self._appends:
        partial = self._path.parent / (self._path.name + '.partial')
        partial.write_text(''.join(kept))
        partial.replace(self._path)
      else:
        self._waiting = ''.join(kept)

  def write(self, step: int, values: dict) -> None:
    """Adds a line."""
    if not self._primary:
      return
    line = json.dumps({'step': step} | values) + '\n'
    if self._appends:
      with self._path.open('a') as file:
        file.write(line)
      return
    self._waiting += line
    if time.monotonic() - self._written > BUCKET_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Writes what is not written yet."""
    if self._waiting:
      self._path.write_text(self._waiting)
      self._written = time.monotonic()


class MetricLog:
  """Numbers of steps: `folder`/metrics.jsonl always, TensorBoard where it is installed."""

  def __init__(self, folder: epath.Path, step: int):
    self._lines = JsonLines(epath.Path(folder) / 'metrics.jsonl', step)
    primary = metric_writers and distributed.is_primary()
    self._writer = metric_writers.create_default_writer(str(folder)) if primary else None

  def write(self, step: int, values: dict) -> None:
    self._lines.write(step, {'time': round(time.time(), 3)} | values)
    if self._writer:
      self._writer.write_scalars(step, {k: v for k, v in values.items() if isinstance(v, (int, float))})

  def flush(self) -> None:
    self._lines.flush()

  def close(self) -> None:
    self.flush()
    if self._writer:
      self._writer.close()


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return float('inf')  # a line that a crash cut off


class Progress:
  """One line a report of the first process: phase, step, losses, images/s, time left; on a terminal, in place."""

  def __init__(self, name: str, total: int, done: int = 0, unit: str = 'step', every_seconds: float = 5.0):
    self._name, self._total, self._unit, self._every = name, total, unit, every_seconds
    self._start = self._shown = time.monotonic()
    self._first, self._images = done, 0
    self._live = sys.stderr.isatty()

  def restart_clock(self, done: int) -> None:
    """Leaves the time so far (compilation) out of the rate."""
    self._start = self._shown = time.monotonic()
    self._first, self._images = done, 0

  def images_per_second(self) -> float:
    return self._images / max(time.monotonic() - self._start, 1e-9)

  def update(self, done: int, images: int, values: dict | None = None, force: bool = False) -> None:
    """Counts `images` more and shows the line if the last one is old enough."""
    self._images += images
    if not distributed.is_primary():
      return
    now = time.monotonic()
    if not force and now - self._shown < (1.0 if self._live else self._every):
      return
    self._shown = now
    left = (now - self._start) / max(done - self._first, 1) * (self._total - done)
    parts = [f'{self._name}  {self._unit} {done}/{self._total}']
    parts += [f'{key} {value:.4g}' for key, value in (values or {}).items()]
    parts += [f'{self.images_per_second():.0f} images/s', f'{duration(left)} left']
    self._print('  '.join(parts), end='\r' if self._live and not force else '\n')

  def _print(self, text, end):
    print(text + ('\x1b[K' if self._live else ''), end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """90061 -> '25:01:01', 75 -> '1:15'."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


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


def write_png(path, image: np.ndarray) -> None:
  """Writes [H, W, C] uint8 as a PNG, whole or not at all."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / (path.name + '.partial')
  with partial.open('wb') as file:
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, 'PNG')
  partial.replace(path)
