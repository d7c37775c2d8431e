"""Adam on the noise of an edit's candidates, on any mesh."""

import functools
import itertools

import jax
import numpy as np

from pagoda_jax.method import inverse_problems
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import sampler

REPORT = 25  # steps between two looks at how far it is
SETTLED = 2e-3  # less than this share of the objective won since the last look: nothing more is to come


class Descent:
  """Adam on a batch of candidates, spread over the generator's mesh; compiled once for each shape."""

  def __init__(self, generator, measure, target, labels, which, w, size, options, omega, texts):
    self._options, self._count, mesh = options, len(w), generator.mesh
    missing = size - len(w)
    pad = lambda x: np.concatenate([x, x[:1].repeat(missing, 0)]) if missing else x
    mask = np.broadcast_to(measure.mask, (len(target), *measure.mask.shape[1:]))[which]
    batch = [pad(x) for x in (np.asarray(w, np.float32), labels, target[which], np.asarray(mask, np.float32))]
    strengths = strengths_of(generator, omega, len(batch[0]))
    w, self._labels, self._target, mask = sharding.place_global(batch, mesh)
    self._omegas = None if strengths is None else sharding.place_global(np.asarray(strengths), mesh)
    self._text = texts and sharding.place_global({key: pad(rows[which]) for key, rows in texts['text'].items()}, mesh)
    self._measure = inverse_problems.Measurement(*sharding.place(measure[:2], mesh), mask)
    self._mesh, self._params = mesh, generator.params
    self._fit = inverse_problems.begin(w)
    self._numbers = np.float32([options.learning_rate, options.error, options.prior])
    self._descend = generator.program('descend', functools.partial(_make_descend, generator))

  def run(self, report) -> tuple[int, bool]:
    """(steps, whether the objective settled)."""
    before = None
    for done in itertools.count(REPORT, REPORT):
      with jax.set_mesh(self._mesh):
        self._fit = self._descend(self._params, self._fit, self._measure, self._target, self._labels, self._omegas,
                                  self._text, self._numbers)
      now = float(np.mean(self.best))
      if report is not None:
        report(done, now)
      if before is not None and before - now <= SETTLED * abs(before):
        return done, True
      if done >= self._options.steps:
        return done, False
      before = now

  @property
  def best(self) -> np.ndarray:
    return np.asarray(self._fit.best)[: self._count]

  @property
  def best_w(self) -> np.ndarray:
    return np.asarray(self._fit.best_w)[: self._count]


def strengths_of(generator, omega: float | None, count: int) -> np.ndarray | None:
  """float32 [count] that images are drawn with; of None the nearest to no guidance. None: the generator takes none."""
  strengths, law = generator.strengths(omega, count), generator.networks.law
  return np.full(count, law.nearest(1.0), np.float32) if strengths is None and law is not None else strengths


def _make_descend(generator):
  draw, sigma_max = sampler.make_draw(generator.config, generator.name), generator.networks.sigma_max

  def descend(params, fit, measure, target, labels, omegas, text, numbers):
    generate = lambda w: draw(params, sigma_max * w, labels, omegas, text)
    return inverse_problems.descend(generate, measure, target, fit, REPORT, *numbers)

  return jax.jit(descend)
