"""What a work directory tells about its run; what cannot be read is noted, and the rest is shown."""

import array
import contextlib
import dataclasses
import json
import re
import statistics

import numpy as np
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import noise_store
from pagoda_jax.runtime.files import file_digest, read_sealed, seal
from pagoda_jax.training import checkpoints, claims

PAUSE_SECONDS = 60.0  # a step's line that came so much later than usual came after a break
BEYOND_ALL_USE = 2**53  # a step that a float cannot tell from the next


@dataclasses.dataclass
class Phase:
  """One phase.

  Attributes:
    target: steps that it is to take; of `invert` the pairs made, 0 where that is not known.
    done: steps taken, or pairs.
    saved: step of the newest checkpoint; 0 without any.
    curves: name -> (steps, values), as metrics.jsonl has them; values may not be finite.
    seconds, paused: of training between the first and the last line; of breaks in between.
    grids: (step, path) of its sample grids, in order.
    figures: what evaluation.json holds.
    evaluations: (file name, result) of `pagoda evaluate`, by step.
    manifest: of a noise store.
    digests: what -> SHA-256.
  """

  name: str
  stage: str
  resolution: int
  batch_size: int
  target: int
  done: int = 0
  saved: int = 0
  curves: dict = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  paused: float = 0.0
  grids: list = dataclasses.field(default_factory=list)
  figures: dict = dataclasses.field(default_factory=dict)
  evaluations: list = dataclasses.field(default_factory=list)
  manifest: dict = dataclasses.field(default_factory=dict)
  digests: dict = dataclasses.field(default_factory=dict)

  @property
  def images(self) -> int:
    """That it has worked through."""
    if self.stage != 'invert':
      return self.done * self.batch_size
    # Those that nothing is stored of are worked through in the steps of other phases, and count there.
    return self.done if not self.manifest or 'std' in self.manifest else 0

  @property
  def finished(self) -> bool:
    return bool(self.manifest) if self.stage == 'invert' else 0 < self.target <= self.saved

  @property
  def state(self) -> str:
    """How far it has come, in words."""
    if self.finished:
      return 'finished'
    if not self.done:
      return 'not begun'
    if self.stage == 'invert':
      return f'{self.done:,} pairs'
    return f'step {self.done:,} of {self.target:,}'

  def last(self, name: str) -> float | None:
    """The last value of a curve that is finite."""
    values = self.curves[name][1] if name in self.curves else np.empty(0)
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


@dataclasses.dataclass
class Run:
  """A work directory; `notes`: what could not be read of it."""

  folder: epath.Path
  config: dict
  phases: list[Phase]
  notes: list[str]


def read(folder) -> Run:
  """Reads a work directory.

  Raises:
    WorkdirError: there is no phase there, or none whose config.json is as it was written.
  """
  folder, notes = epath.Path(folder), []
  config = _config(folder, notes)
  phases = [_phase(folder / name, config, notes) for name in config['order']]
  return Run(folder, config, phases, notes)


def _config(folder, notes) -> dict:
  places = claims.phase_folders(folder)
  if not places:
    raise claims.WorkdirError(f'{folder}: no phase of any experiment there; start one with `pagoda run`')
  refused = None
  for place in places:
    try:
      return claims.fullest(claims.read(place)['config'], places)
    except claims.WorkdirError as error:
      refused = error
      notes.append(f'{place.name}/{claims.FILE}: missing or damaged, and not believed')
  raise refused


def _phase(folder, config, notes) -> Phase:
  name, settings = folder.name, config['phases'][folder.name]
  stage = settings['stage']
  side = int(settings.get('resolution') or config['base_resolution']) * spaces.factor(config)
  phase = Phase(name, stage, side, settings['batch_size'], settings.get('steps', 0))
  with _noting(folder / claims.FILE, folder, notes):
    claim = claims.read(folder)
    phase.digests[f'config ({claims.FILE}, its seal)'] = seal(claim)
    phase.digests['pictures'] = claim['identity'].get('config.data_sha256', '–')
  path = folder / 'metrics.jsonl'
  with _noting(path, folder, notes):
    phase.curves, wrong = read_curves(path)
    if wrong:
      notes.append(f'{name}/metrics.jsonl: {wrong} lines do not parse and are left out')
    phase.seconds, phase.paused = _durations(*phase.curves.pop('time', (np.empty(0), np.empty(0))))
  logged = [int(steps[-1]) for steps, _ in phase.curves.values() if len(steps)]
  phase.done = max(logged, default=0)
  if stage == 'invert':
    with _noting(folder / noise_store.MANIFEST, folder, notes):
      phase.manifest = noise_store.read_manifest(folder)
      phase.done = phase.target = phase.manifest['count']
      phase.digests |= {key: value for key, value in phase.manifest['origin'].items() if key.endswith('sha256')}
    return phase
  with _noting(folder / 'checkpoints', folder, notes):
    phase.saved = max(checkpoints.finished_steps(folder), default=0)
    if phase.saved:
      path = folder / 'checkpoints' / str(phase.saved) / 'checksums.json'
      phase.digests[f'checkpoint of step {phase.saved} ({path.name})'] = file_digest(path)
  phase.done = max(phase.done, phase.saved)
  with _noting(folder / 'samples', folder, notes):
    found = [(re.fullmatch(r'step_(\d+)\.png', path.name), path) for path in (folder / 'samples').iterdir()]
    phase.grids = sorted(((int(match[1]), path) for match, path in found if match), key=lambda pair: pair[0])
  with _noting(folder / 'evaluation.json', folder, notes):
    phase.figures = read_sealed(folder / 'evaluation.json')
  with _noting(folder / 'evaluate', folder, notes):
    for path in sorted((folder / 'evaluate').iterdir(), key=lambda path: path.name):
      if path.name.endswith('.json'):
        with _noting(path, folder, notes):
          phase.evaluations.append((path.name, read_sealed(path)))
    phase.evaluations.sort(key=lambda pair: (pair[1].get('samples') or {}).get('step') or 0)
  return phase


@contextlib.contextmanager
def _noting(path, folder, notes):
  """What cannot be read in the block is noted; what is not there yet is no fault."""
  try:
    yield
  except (FileNotFoundError, NotADirectoryError):
    pass
  except Exception as error:  # a report shows what there is, whatever lies there
    said = (str(error) or type(error).__name__).removeprefix(f'{path}: ')
    notes.append(f'{path.relative_to(folder.parent)}: {said[:300]}')


def read_curves(path) -> tuple[dict, int]:
  """(name -> (steps, values) of metrics.jsonl, how many lines do not parse); a later line of a step counts.

  Sixteen bytes a number are held, whatever a line's JSON is.
  """
  found, wrong = {}, 0
  with epath.Path(path).open('rb') as file:
    for line in file:
      try:
        values = json.loads(line)
        step = values['step']
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < BEYOND_ALL_USE:
          raise ValueError
      except (ValueError, KeyError, TypeError, RecursionError):
        wrong += bool(line.strip())
        continue
      for name, value in values.items():
        if name == 'step' or isinstance(value, bool) or not isinstance(value, (int, float)):
          continue
        steps, column = found.setdefault(name, (array.array('d'), array.array('d')))
        with contextlib.suppress(OverflowError):  # an integer beyond all floats
          column.append(value)
          steps.append(step)
  return {name: _in_order(np.array(steps), np.array(column)) for name, (steps, column) in found.items()}, wrong


def _in_order(steps, values):
  order = np.argsort(steps, kind='stable')
  steps, values = steps[order], values[order]
  last = np.append(steps[1:] != steps[:-1], True)[: len(steps)]
  return steps[last], values[last]


def _durations(steps, times) -> tuple[float, float]:
  """(seconds worked, seconds of breaks) between the first line and the last one."""
  gaps = np.diff(times[np.isfinite(times)])
  gaps = gaps[gaps > 0]
  if not len(gaps):
    return 0.0, 0.0
  usual = statistics.median(gaps.tolist())
  breaks = gaps > max(PAUSE_SECONDS, 20 * usual)
  # Some work was done in a break's gap too.
  return float(gaps[~breaks].sum() + usual * breaks.sum()), float(gaps[breaks].sum() - usual * breaks.sum())


def differences(config: dict) -> list[tuple[str, object, object]]:
  """(key, value, default) of each key of an experiment that is not its default; a phase's by its stage."""
  found = []
  _compare(config, _defaults(configs.experiment.table()), '', found)
  for name in config['order']:
    settings = config['phases'][name]
    table = _defaults(configs.PHASES[settings['stage']].table()) if settings['stage'] in configs.PHASES else {}
    _compare(settings, table, f'phases.{name}.', found)
  return found


def _defaults(table: dict) -> dict:
  return {key: _defaults(entry) if isinstance(entry, dict) else entry[0] for key, entry in table.items()}


def _compare(values, defaults, path, found):
  for key, value in values.items():
    if path + key in ('phases', 'order') or (path and key == 'stage'):
      continue
    default = defaults.get(key, 'no such key now')
    if isinstance(value, dict):
      _compare(value, default if isinstance(default, dict) else {}, f'{path}{key}.', found)
    elif _plain(value) != _plain(default):
      found.append((path + key, value, default))


def _plain(value):
  return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def flat(values, path='') -> dict:
  """Dotted key -> value of nested dicts."""
  if not isinstance(values, dict):
    return {path: values}
  return {key: value for name, child in values.items()
          for key, value in flat(child, f'{path}.{name}' if path else str(name)).items()}
