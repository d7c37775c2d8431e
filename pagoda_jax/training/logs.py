"""Where numbers and pictures go: metrics.jsonl always, TensorBoard and Weights & Biases where they are installed."""

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
      lines = self._path.read_bytes().splitlines()
      steps = [_step_of(line) for line in lines]
      if bad := [number for number, found in enumerate(steps, 1) if found is None]:
        distributed.say(f'{self._path}: {len(bad)} of {len(lines)} lines do not parse and are left out, first line '
                        f'{bad[0]}: {lines[bad[0] - 1][:60]!r}')
      kept = ''.join(f'{line.decode()}\n' for line, found in zip(lines, steps) if found is not None and found <= step)
      if self._appends:
        with replacing(self._path) as file:
          file.write(kept.encode())
      else:
        self._waiting = kept

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


def _step_of(line: bytes) -> int | None:
  """None for a line that is no JSON object with a step."""
  try:
    step = json.loads(line.decode())['step']
    return step if isinstance(step, int) else None
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
