"""Curves as inline SVG: at most 1,000 points each, however long the run."""

import dataclasses
import math

import numpy as np

from pagoda_jax.evaluation.report.markup import Markup, element, join, number

POINTS = 1000  # of a curve
SMOOTHED = 200  # points of a running mean
LOG_FROM = 30  # ratio of largest to least from which positive values are shown on a logarithmic axis
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24


@dataclasses.dataclass
class Curve:
  """Steps and values; `kind`: its place among a panel's colours; `other`: of the run that is compared with."""

  label: str
  steps: np.ndarray
  values: np.ndarray
  kind: int = 0
  other: bool = False


def thinned(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
  """At most `points` of a curve: of each of points / 2 stretches the least and the greatest value, so that no spike is
  lost; where a stretch has numbers that are not finite, one of them takes a place."""
  if len(steps) <= points:
    return steps, values
  chosen = []
  for part in np.array_split(np.arange(len(steps)), points // 2):
    here = values[part]
    fine = np.isfinite(here)
    if not fine.all():
      chosen.append(part[np.argmin(fine)])
      if fine.any():
        chosen.append(part[np.nanargmax(np.where(fine, here, np.nan))])
    else:
      chosen += [part[np.argmin(here)], part[np.argmax(here)]]
  chosen = np.unique(chosen)
  return steps[chosen], values[chosen]


def running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """A centred mean over a twenty-fifth of the points, of the finite ones; nothing where there are too few."""
  fine = np.isfinite(values)
  steps, values = steps[fine], values[fine]
  half = len(values) // 50
  if half < 2:
    return steps[:0], values[:0]
  at = np.unique(np.linspace(0, len(values) - 1, SMOOTHED).astype(int))
  # The same number to both sides, so that the ends are not pulled inwards.
  reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
  # Each by itself: in differences of running sums all that follows a spike would be lost beside it.
  with np.errstate(over='ignore'):
    means = np.array([values[place - far : place + far + 1].mean() for place, far in zip(at, reach)])
  return steps[at], means


def panel(title: str, curves: list[Curve], about: str = '') -> Markup:
  """A figure of curves on common axes, with a line of figures below."""
  values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
  steps = np.concatenate([curve.steps for curve in curves])
  if not len(values):
    return element('figure', element('figcaption', element('b', title)), element('p', 'No finite value.'),
                   class_='panel')
  low, high = float(values.min()), float(values.max())
  log = low > 0 and high / low > LOG_FROM
  first, last = float(steps.min()), float(steps.max())
  place = _Place(first, last if last > first else first + 1, low, high, log)
  parts = [*_axes(place), *(part for curve in curves for part in _lines(place, curve))]
  label = f'{about}{title}: ' + '; '.join(_words(curve) for curve in curves)
  svg = element('svg', *parts, viewBox=f'0 0 {WIDTH} {HEIGHT}', role='img', aria_label=label, class_='plot',
                data_x=f'{place.first:.17g},{place.last:.17g}', data_y=f'{place.low:.17g},{place.high:.17g}',
                data_log='1' if log else '')
  said = [element('li', element('i', class_=_classes(curve), aria_hidden='true'), ' ', _words(curve))
          for curve in curves]
  scale = element('small', ' logarithmic') if log else ''
  return element('figure', element('figcaption', element('b', title), scale), svg, element('ul', *said, class_='key'),
                 class_='panel')


class _Place:
  """Where a value lies in the drawing."""

  def __init__(self, first, last, low, high, log):
    self.log = log
    if log:
      low, high = math.log10(low), math.log10(high)
    if low == high == 0:
      high = 1.0
    margin = (high / 2 - low / 2) * 0.1 or abs(low) * 0.05
    self.first, self.last = first, last
    self.low, self.high = max(low - margin, -1.7e308), min(high + margin, 1.7e308)

  def x(self, steps):
    return LEFT + (steps - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

  def y(self, values):
    values = np.log10(values) if self.log else values
    # Halves: two floats may lie further apart than floats reach.
    return HEIGHT - BOTTOM - (values / 2 - self.low / 2) / (self.high / 2 - self.low / 2) * (HEIGHT - TOP - BOTTOM)


def _lines(place, curve):
  steps, values = thinned(curve.steps, curve.values)
  smooth = running_mean(curve.steps, curve.values)
  for part in _pieces(steps, values):
    yield element('polyline', points=_points(place, steps[part], values[part]),
                  class_=_classes(curve) + (' raw' if len(smooth[0]) else ''), data_label=curve.label)
  if len(smooth[0]) and np.isfinite(smooth[1]).all():
    yield element('polyline', points=_points(place, *smooth), class_=f'{_classes(curve)} mean')


def _pieces(steps, values):
  """Stretches of finite values: a line that is broken where numbers were not finite."""
  fine = np.isfinite(values)
  edges = np.flatnonzero(np.diff(np.concatenate([[False], fine, [False]]).astype(int)))
  return [slice(begin, end) for begin, end in zip(edges[::2], edges[1::2])]


def _points(place, steps, values) -> str:
  xs, ys = place.x(steps), place.y(values)
  if len(xs) == 1:  # a point is a short line
    xs, ys = np.array([xs[0] - 1, xs[0] + 1]), ys.repeat(2)
  # Finer than is seen: page.js tells steps and values by them.
  return ' '.join(f'{x:.4f},{y:.4f}' for x, y in zip(xs, ys))


def _classes(curve) -> str:
  return f'curve k{curve.kind}' + (' other' if curve.other else '')


def _words(curve) -> str:
  fine = np.isfinite(curve.values)
  if not fine.any():
    return f'{curve.label}: no finite value'
  values, steps = curve.values[fine], curve.steps[fine]
  least, most = np.argmin(values), np.argmax(values)
  lost = f', {(~fine).sum()} not finite' if not fine.all() else ''
  if values[least] == values[most]:
    return f'{curve.label}: {number(float(values[-1]))} throughout{lost}'
  return (f'{curve.label}: last {number(float(values[-1]))}, least {number(float(values[least]))} (step '
          f'{int(steps[least]):,}), most {number(float(values[most]))} (step {int(steps[most]):,}){lost}')


def _axes(place):
  for step in ticks(place.first, place.last, 4):
    x = round(float(place.x(step)), 1)
    yield element('line', x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_='grid')
    yield element('text', short(step), x=x, y=HEIGHT - 8, text_anchor='end' if x > WIDTH - 30 else 'middle')
  if place.log:
    powers = ticks(place.low, place.high, 4)
    marks = [10.0**power for power in powers if power == int(power)]
    if len(marks) < 2:
      marks = [m * 10.0**p for p in range(math.floor(place.low), math.ceil(place.high) + 1) for m in (1, 3)
               if place.low <= math.log10(m * 10.0**p) <= place.high] if place.low > -300 else marks
  else:
    marks = ticks(place.low, place.high, 4)
  for value in marks:
    y = round(float(place.y(np.float64(value))), 1)
    yield element('line', x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_='grid')
    yield element('text', short(value), x=LEFT - 5, y=y + 3.5, text_anchor='end')


def ticks(low: float, high: float, count: int) -> list[float]:
  """About `count` round numbers from low to high."""
  span = high - low
  if not span > 0 or not math.isfinite(span):
    return [low, high]
  size = 10.0 ** math.floor(math.log10(span / count))
  size *= next((m for m in (1, 2, 5, 10) if span / (size * m) <= count), 10)
  first = math.ceil(low / size)
  return [index * size for index in range(first, math.floor(high / size) + 1)][: 4 * count]


def short(value: float) -> str:
  """A number on an axis: 12000 -> '12k'."""
  for power, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= power and abs(value) < 1e13:
      return f'{value / power:.4g}{unit}'
  return f'{value + 0.0:.3g}'


def nothing() -> Markup:
  """Where no curve has a point."""
  return join(element('p', 'No metrics yet.', class_='quiet'))
