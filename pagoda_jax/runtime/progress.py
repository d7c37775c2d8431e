"""How far a loop has come: one line on stderr, shown in place on a terminal."""

import sys
import time

from pagoda_jax.runtime import distributed


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
