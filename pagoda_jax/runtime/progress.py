"""How far a loop has come: one line on stderr, shown in place on a terminal."""

import sys
import time

from pagoda_jax.runtime import distributed, topologies


class Progress:
  """One line a report of the first process: phase, step, losses, images/s, time left; on a terminal, in place.

  Where `image_flops`, the FLOPs that an image takes, is set, and the peak of this machine's chips is known, the line
  tells MFU too.
  """

  image_flops = 0.0

  def __init__(self, name: str, total: int, done: int = 0, unit: str = 'step', every_seconds: float = 5.0):
    self._name, self._total, self._unit, self._every = name, total, unit, every_seconds
    self._start = self._shown = time.monotonic()
    self._first, self._images = done, 0
    self._live = sys.stderr.isatty()

  def restart_clock(self, done: int) -> None:
    """Leaves the time so far (compilation) out of the rate, and what was done in it, though it be counted later."""
    self._start = self._shown = time.monotonic()
    self._first, self._images = done, 0

  def images_per_second(self) -> float:
    return self._images / max(time.monotonic() - self._start, 1e-9)

  def rates(self) -> dict[str, float]:
    """'images_per_second', and where MFU can be told 'images_per_second_per_chip' and 'mfu'; {} before a rate is known.
    """
    if not (rate := self.images_per_second()):
      return {}
    found = {'images_per_second': round(rate, 2)}
    if self.image_flops and (chips := topologies.here()).chip.peak:
      found['images_per_second_per_chip'] = round(rate / chips.count, 3)
      found['mfu'] = round(topologies.utilisation(rate, self.image_flops, chips), 4)
    return found

  def update(self, done: int, images: int, values: dict | None = None, force: bool = False) -> None:
    """Counts `images` more and shows the line if the last one is old enough."""
    if done > self._first:  # else of the time before the clock's
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
    if rates := self.rates():
      parts.append(f'{rates["images_per_second"]:.0f} images/s')
    if 'mfu' in rates:
      parts.append(f'{rates["images_per_second_per_chip"]:.4g} images/s/chip  MFU {rates["mfu"]:.1%}')
    if rates or done == self._total:
      parts.append(f'{duration(left)} left')
    self._print('  '.join(parts), end='\r' if self._live and not force else '\n')

  def _print(self, text, end):
    print(text + ('\x1b[K' if self._live else ''), end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """90061 -> '25:01:01', 75 -> '1:15'."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'
