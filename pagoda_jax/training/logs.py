"""Where numbers and pictures go: metrics.jsonl always, TensorBoard and Weights & Biases where they are installed."""

import contextlib
import io
import json
import time

from etils import epath

from pagoda_jax.runtime import buckets, distributed, lock
from pagoda_jax.runtime.files import naming, replacing
from pagoda_jax.training import writers

BUCKET_SECONDS = 30.0


class JsonLines:
  """A file of one JSON object a line, each of a step; only the first process writes.

  Args:
    path: the file; lines of steps after `step` are dropped: a crash has undone them, and a step stands there once.
      Lines that do not parse, such as a last one that a crash cut off, are dropped too, and counted aloud.
    step: the step that the run goes on from.
  """

  def __init__(self, path, step: int):
    self._path, self._primary = epath.Path(path), distributed.is_primary()
    self._waiting, self._written = '', time.monotonic()
    # Buckets hold whole objects: there the file is written anew, now and then, instead of appended to.
    self._appends = not buckets.is_in_bucket(path)
    if self._primary and self._path.exists():
      kept = contextlib.nullcontext(io.BytesIO()) if not self._appends else replacing(self._path)
      with kept as file:
        said = _copy(self._path, step, file)
        self._waiting = '' if self._appends else file.getvalue().decode()
      if said:
        distributed.say(f'{self._path}: {said}')

  def write(self, step: int, values: dict) -> None:
    """Adds a line.

    Raises:
      OSError: it cannot be written; names the file. What is there of it is dropped when the run goes on.
    """
    if not self._primary:
      return
    lock.confirm()
    line = json.dumps({'step': step} | values) + '\n'
    if self._appends:
      with naming(self._path), self._path.open('a') as file:
        file.write(line)
      return
    self._waiting += line
    if time.monotonic() - self._written > BUCKET_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Writes what is not written yet."""
    if self._waiting:
      with naming(self._path):
        self._path.write_text(self._waiting)
      self._written = time.monotonic()


class MetricLog:
  """Numbers and pictures of steps: `folder`/metrics.jsonl always, and what training/writers.py finds installed.

  Args:
    folder: of a phase.
    step: the step that the run goes on from.
    config: the experiment as JSON has it, which the writers show as text.
  """

  def __init__(self, folder: epath.Path, step: int, config: dict):
    self._lines = JsonLines(epath.Path(folder) / 'metrics.jsonl', step)
    self._writers = writers.Writers(folder, step, config) if distributed.is_primary() else None

  def write(self, step: int, values: dict) -> None:
    self._lines.write(step, {'time': round(time.time(), 3)} | values)
    if self._writers:
      self._writers.scalars(step, values)

  def image(self, step: int, name: str, image) -> None:
    """A picture [H, W, C] uint8 for the writers: a file is its caller's to write."""
    if self._writers:
      self._writers.image(step, name, image)

  def flush(self) -> None:
    self._lines.flush()

  def close(self) -> None:
    self.flush()
    if self._writers:
      self._writers.close()


def _copy(path, step: int, file) -> str:
  """Writes the lines of steps up to `step` to a file, one in memory at a time: which pictures each of a million steps
  saw is more than that holds. Returns what is wrong with the others, in words."""
  lines, bad, first = 0, 0, ''
  with path.open('rb') as source:
    for line in source:
      line, lines = line.rstrip(b'\r\n'), lines + 1
      found = _step_of(line)
      if found is None:
        bad, first = bad + 1, first or f'first line {lines}: {line[:60]!r}'
      elif found <= step:
        file.write(line + b'\n')
  return f'{bad} of {lines} lines do not parse and are left out, {first}' if bad else ''


def _step_of(line: bytes) -> int | None:
  """None for a line that is no JSON object with a step."""
  try:
    step = json.loads(line.decode())['step']
    return step if isinstance(step, int) else None
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
