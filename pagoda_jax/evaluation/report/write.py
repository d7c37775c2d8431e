"""Writing the page: of a run that is over, and, without ever failing it, of one that goes on."""

import functools
import json
import time
from collections.abc import Callable

from absl import logging
from etils import epath

from pagoda_jax.evaluation.report import page, read
from pagoda_jax.planning import plan
from pagoda_jax.runtime import distributed, lock
from pagoda_jax.runtime.files import replacing
from pagoda_jax.training import workdir

FILE = 'report.html'
SHARE = 0.02  # of a run's time that its page may take: a run of many steps reads long files for it
WORTH_COUNTING = 60.0  # seconds that a run trained, from which the seconds of counting FLOPs do not matter


def write(folder, against=None, output=None, count: bool = True) -> epath.Path:
  """Writes the page of a work directory.

  Args:
    against: another work directory, to be shown beside it.
    output: the file; None: report.html in the work directory.
    count: whether FLOPs are counted, which takes seconds a phase.

  Raises:
    WorkdirError: one of them is no work directory, or nothing tells of which experiment.
    OSError: it cannot be written.
  """
  runs = [read.read(each) for each in (folder, against) if each]
  return _write(runs, epath.Path(output or epath.Path(folder) / FILE), count, running=False)


class Page:
  """The page of a run that goes on: `refresh()` at checkpoints and grids, `finish()` in the end.

  A fault is a warning, the same one once. Of several processes the first one writes.
  """

  def __init__(self, folder):
    self._folder, self._not_before, self._warned = epath.Path(folder), 0.0, set()

  def refresh(self) -> None:
    """Writes the page anew, unless that would take more than a fiftieth of the run's time."""
    if distributed.is_primary() and time.monotonic() >= self._not_before:
      self._guarded(lambda runs: False, running=True)

  def finish(self) -> None:
    """Writes the page of the finished run; FLOPs are counted where the run took long enough for that."""
    distributed.from_primary('report', self._finish)

  def _finish(self):
    self._guarded(lambda runs: sum(phase.seconds for phase in runs[0].phases) > WORTH_COUNTING, running=False)

  def _guarded(self, worth: Callable[[list], bool], running: bool):
    lock.confirm()
    start = time.monotonic()
    try:
      runs = [read.read(self._folder)]
      _write(runs, self._folder / FILE, worth(runs), running)
    except Exception as error:  # a run is worth more than its page
      said = f'{self._folder / FILE}: not written: {error or type(error).__name__}'
      if said not in self._warned:
        self._warned.add(said)
        logging.warning('%s', said)
    took = time.monotonic() - start
    self._not_before = time.monotonic() + took / SHARE


def _write(runs, path, count, running) -> epath.Path:
  text = page.render(runs, functools.partial(image_flops, count=count), running)
  with replacing(path) as file:
    file.write(text)
  return path


def image_flops(run, name: str, count: bool = True) -> float | None:
  """FLOPs of an image in a phase's step; None where they are not known and not to be counted, or cannot be."""
  key = json.dumps(run.config, sort_keys=True), name
  if key not in _counted and count:
    try:
      _counted[key] = plan.image_flops(workdir.read_config(run.folder), name)
    except Exception as error:  # such as of a config of an earlier version
      _counted[key] = f'{name}: FLOPs cannot be counted ({type(error).__name__}: {str(error)[:200]})'
  found = _counted.get(key)
  if isinstance(found, str):
    run.notes.append(found)
    return None
  return found


_counted: dict = {}  # within one process: an experiment's phase costs what it costs
