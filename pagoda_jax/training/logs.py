"""Where numbers and pictures go: metrics.jsonl always, TensorBoard where clu's extras are installed."""

import json
import time

from etils import epath

from pagoda_jax.runtime import distributed, lock
from pagoda_jax.runtime.files import naming, replacing

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
        with replacing(self._path) as file:
          file.write(''.join(kept).encode())
      else:
        self._waiting = ''.join(kept)

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
