"""Orbax checkpoints: save, restore on any mesh, hand over from phase to phase.

A checkpoint holds the state and the data position. It is written under another name with the checksums of its files,
and published by one rename, so that a kill at any moment leaves the one before. Beside the checkpoints, newest.json
names the newest: one that was deleted is missed, by its phase and by who reads the newest. Only this file knows Orbax.
"""

import contextlib
import dataclasses
import errno
import json
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from pagoda_jax.runtime import buckets, distributed, lock, trees
from pagoda_jax.runtime.files import first_lines, first_rows, naming, read_sealed, write_sealed
from pagoda_jax.training import checksums

FOLDER = 'checkpoints'
NEWEST = 'newest.json'
DAMAGED = 'damaged-'  # prefix of those set aside; Orbax takes folders named by a number only
# An array that every device holds is cut up, and each device writes a part of at least so many bytes. Cutting takes a
# program for each shape and holds up training: small arrays, to which Orbax by default does it too, are written whole.
SLICE_BYTES = 2**20


class CheckpointError(ValueError):
  """A checkpoint is missing, damaged or of other shapes; the message says where and what to do."""


class Checkpoints:
  """The checkpoints of one phase, for the loop that writes them; `newest_good_step` is to be called before.

  Args:
    phase_folder: the phase's folder in the work directory.
    keep, keep_every: how many of the latest to keep, and those of steps that the second divides; 0 keeps none besides.
    best, best_mode: also keep the one whose metric of this name is the least ('min') or greatest ('max'); '': none.
    limit: seconds that a save may take, where they are more than the 1200 that Orbax gives it.
  """

  def __init__(self, phase_folder, keep: int = 3, keep_every: int = 0, best: str = '', best_mode: str = 'min',
               limit: int = 0):
    self.folder = _folder(phase_folder)
    self._best, self._saving = best, None
    self._metrics = metrics(phase_folder, best) if best else {}
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if keep_every:
      policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    if best:
      policies.append(_KeepBest(self._metrics, best_mode))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,
      # Orbax calls it on the first host, when every host has written its part and before the checkpoint is published.
      async_options=ocp.AsyncOptions(max(limit, 1200), post_finalization_callback=self._seal),
    )
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
      (jax.Array, types.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)),
      (np.ndarray, types.NumpyHandler()),
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers={
      'state': ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
      'data': ocp.JsonCheckpointHandler(),
      'metrics_mean': ocp.JsonCheckpointHandler(),
    })

  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, saved or being saved; None without one."""
    return self._manager.latest_step()

  def save(self, step: int, state, data_position: dict, metric: float = math.nan) -> None:
    """Starts saving in the background; a failure of the save before is raised here.

    Args:
      step, state, data_position: what to save.
      metric: value of the metric `best`; one that is not finite makes no checkpoint the best.

    Raises:
      CheckpointError: a save failed (a full disk, say); earlier checkpoints are as they were.
      JaxRuntimeError, ValueError: JAX's own: the state could not be computed, or another process has gone.
    """
    if step == self.latest_step():
      return
    lock.confirm()
    items = {'state': ocp.args.PyTreeSave(state), 'data': ocp.args.JsonSave(data_position)}
    if math.isfinite(metric):
      items['metrics_mean'] = ocp.args.JsonSave({self._best: metric})
      self._metrics[step] = metric
    self.wait()  # before the step being saved is another
    self._saving = step
    self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items), force=True))

  def _seal(self):
    """Writes the checksums of the checkpoint being saved, and its step to newest.json."""
    lock.confirm()  # this process may have been suspended in the middle of the save
    names = ocp.step.standard_name_format()
    checksums.write(ocp.step.find_step_path(self.folder, names, step=self._saving, include_uncommitted=True))
    write_sealed(self.folder / NEWEST, {'step': self._saving})

  def wait(self) -> None:
    """Returns when every save so far is on disk; raises CheckpointError where one failed."""
    self._guard(self._manager.wait_until_finished)

  def _guard(self, action):
    try:
      with naming(self.folder):
        action()
    except Exception as error:  # tensorstore raises many kinds for a full or failing disk
      if distributed.is_of_jax(error):
        raise  # no fault of the disk: what is saved could not be computed, or another process has gone
      why = isinstance(error, OSError) and error.strerror or first_lines(error)
      latest = 'not known'
      with contextlib.suppress(Exception):  # a bucket that is away, of which this would be said instead
        latest = max(finished_steps(self.folder.parent), default=None)
      raise CheckpointError(
        f'{self.folder}: saving failed: {why}; the checkpoints before it are intact (latest: {latest}). '
        f'{self._remedy(error)} start the same command again; it goes on from there.'
      ) from error

  def _remedy(self, error) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return 'Free some disk space and'
    if isinstance(error, TimeoutError):
      return 'If it is merely slow, give config.barrier_timeout more seconds and'
    away = 'See that the bucket can be reached and written to,'
    return f'{away if buckets.is_in_bucket(self.folder) else "Mend that"} and'

  def restore(self, step: int, abstract_state):
    """(state, data position) of a step, onto the shardings of `abstract_state`.

    Raises:
      CheckpointError: it is missing, damaged or of another structure.
    """
    try:
      asked = self._without_later_fields(step, abstract_state)
      onto = ocp.checkpoint_utils.construct_restore_args(asked)
      args = ocp.args.Composite(state=ocp.args.PyTreeRestore(asked, restore_args=onto), data=ocp.args.JsonRestore())
      restored = self._manager.restore(step, args=args)
    except Exception as error:
      if distributed.is_of_jax(error):
        raise  # no fault of the checkpoint: another process has gone, or the device has no room
      raise CheckpointError(f'{self.folder / str(step)}: cannot be restored: {first_lines(error)}') from error
    state = restored['state'] if asked is abstract_state else abstract_state.replace(**restored['state'])
    return state, restored['data']

  def _without_later_fields(self, step, abstract_state):
    """What to ask of a checkpoint that an earlier version wrote: its state had not all fields, which are empty now."""
    if not dataclasses.is_dataclass(abstract_state):
      return abstract_state
    with _without_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
      saved = checkpointer.metadata(self.folder / str(step) / 'state').item_metadata.tree
    fields = {field.name: getattr(abstract_state, field.name) for field in dataclasses.fields(abstract_state)}
    known = {name: value for name, value in fields.items() if name in saved or jax.tree.leaves(value)}
    return abstract_state if known.keys() == fields.keys() else known

  def close(self) -> None:
    """Waits for saves that are under way."""
    self._manager.close()


class _KeepBest:
  """Orbax's preservation policy that keeps the best checkpoint, of a dict step -> metric that grows."""

  def __init__(self, values, mode):
    self._values, self._mode = values, mode

  def should_preserve(self, checkpoints, *, context):
    del context
    best = best_of({c.step: self._values[c.step] for c in checkpoints if c.step in self._values}, self._mode)
    return [c.step == best for c in checkpoints]


def best_of(values: dict[int, float], mode: str) -> int | None:
  """The step of the least (mode 'min') or greatest ('max') value; the latest of equals; None without any."""
  sign = -1 if mode == 'max' else 1
  return min(values, key=lambda step: (sign * values[step], -step), default=None)


def metrics(phase_folder, name: str) -> dict[int, float]:
  """Step -> value of the metric that was saved with each checkpoint; those saved without it are left out."""
  values = {}
  for step in finished_steps(phase_folder):
    path = _folder(phase_folder) / str(step) / 'metrics_mean' / 'metadata'
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one is named where it is used
      values[step] = float(json.loads(path.read_text())[name])
  return values


def _folder(phase_folder) -> epath.Path:
  return buckets.absolute(phase_folder) / FOLDER


def finished_steps(phase_folder) -> list[int]:
  """Steps of the checkpoints that are whole by Orbax's own marks, ascending."""
  folder = _folder(phase_folder)
  return sorted(s.step for s in ocp.step.standard_name_format().find_all(folder)) if folder.exists() else []


def damage(phase_folder, step: int) -> str:
  """What is wrong with the files of a checkpoint, in words; '' where they are as they were written.

  Raises:
    CheckpointError: a file cannot be read at the moment.
  """
  path = _folder(phase_folder) / str(step)
  try:
    rows = checksums.damage(path)
  except OSError as error:
    raise CheckpointError(f'{path}: cannot be read: {error}. It may be whole, and is left where it is; mend what keeps '
                          'it from being read and start the same command again.') from error
  return first_rows(rows)


def lost(phase_folder) -> str:
  """What newest.json tells to be missing: the newest checkpoint, or itself; '' where the newest is the newest.

  A checkpoint is no loss whose save was killed, or is under way, between newest.json and the rename.
  """
  folder = _folder(phase_folder)
  newest, wrong = _newest(folder)  # first: a run that saves meanwhile writes it before the checkpoint appears
  steps = finished_steps(phase_folder)
  if wrong:
    missed = f'newer than that of step {steps[-1]}' if steps else 'there'
    return f'{folder / NEWEST}: {wrong}; whether there were checkpoints {missed} is not known'
  if newest is None or newest <= max(steps, default=-1) or _is_unpublished(folder, newest):
    return ''
  return f'{folder / str(newest)} has gone: it was the newest checkpoint'


def newest_step(phase_folder) -> int | None:
  """Step of the newest checkpoint, for whoever reads what the phase has made; None: it has made none.

  Raises:
    CheckpointError: the newest has gone, or whether it has is not known: an older one would silently change what
      is computed with it.
  """
  if text := lost(phase_folder):
    name, others = epath.Path(phase_folder).name, ', '.join(map(str, finished_steps(phase_folder))) or 'none'
    raise CheckpointError(
      f'{text} (there: {others}). Put it back, or run phase {name} again (`pagoda run`, or `pagoda train '
      f'--phase={name}`): it goes on from the newest that is there.'
    )
  return max(finished_steps(phase_folder), default=None)


def newest_good_step(phase_folder) -> int | None:
  """The step that a phase goes on from: of the newest checkpoint that is as it was written; None: from none.

  A damaged one is named and renamed to damaged-STEP, never deleted; one that has gone is named. One process
  calls it, before any makes `Checkpoints` of the folder.

  Raises:
    CheckpointError: there were checkpoints and none is whole; or one cannot be read at the moment.
  """
  folder, name = _folder(phase_folder), epath.Path(phase_folder).name
  if not folder.exists():
    return None
  steps, missing, good = finished_steps(phase_folder), lost(phase_folder), None
  earlier, found = [f'{path} was damaged' for path in set_aside(phase_folder)], [missing] if missing else []
  for step in reversed(steps):
    if not (wrong := damage(phase_folder, step)):
      good = step
      break
    found.append(f'{folder / str(step)} is damaged: {wrong}; set aside as {_set_aside(folder / str(step))}')
  if good is None and (earlier or found):
    raise CheckpointError('\n'.join([
      f'{folder}: there were checkpoints, and none of them is whole:', *earlier, *found,
      f'Put a whole one back, or delete {folder} to begin phase {name} from its start.',
    ]))  # fmt: skip
  for line in found:
    distributed.say(f'{name}: {line}')
  if good is None:
    (folder / NEWEST).unlink(missing_ok=True)
  else:
    write_sealed(folder / NEWEST, {'step': good})
  return good


def _newest(folder) -> tuple[int | None, str]:
  """(step in newest.json, what is wrong with that file); (None, '') before the first checkpoint."""
  path = folder / NEWEST
  try:
    return read_sealed(path)['step'], ''
  except FileNotFoundError:
    return None, 'missing' if finished_steps(folder.parent) else ''
  except (OSError, ValueError) as error:
    return None, f'damaged ({error})'


def _is_unpublished(folder, step: int) -> bool:
  """Whether a checkpoint is there under the temporary name that it has while it is written."""
  return any(path.name.split('.')[0] == str(step) for path in folder.iterdir())


def set_aside(phase_folder) -> list[epath.Path]:
  """The damaged checkpoints that `newest_good_step` has renamed."""
  return sorted(_folder(phase_folder).glob(f'{DAMAGED}*'))


def _set_aside(path) -> str:
  """Renames a checkpoint to a name that Orbax does not take for one; returns the name."""
  taken = {other.name for other in path.parent.iterdir()}
  names = (f'{DAMAGED}{path.name}{suffix}' for suffix in ('', *(f'-{i}' for i in range(2, 1000))))
  name = next(name for name in names if name not in taken)
  path.rename(path.parent / name)
  return name


def read_generator(phase_folder, step: int | None = None, other_ema: str = '') -> tuple[dict, int]:
  """(parameters for evaluation, step): the EMA, joined with what the phase does not train.

  Args:
    phase_folder, step: as in `read_state`.
    other_ema: which average of a teacher that has several, but the first; '': the first.
  """
  state, step = read_state(phase_folder, step, ('other_emas' if other_ema else 'ema', 'fixed'))
  if not other_ema:
    return {**state.get('fixed', {}), **state['ema']}, step
  if other_ema not in state.get('other_emas', {}):
    there = ', '.join(state.get('other_emas', {})) or 'none'
    where = _folder(phase_folder) / str(step)
    raise CheckpointError(f'{where}: no average {other_ema} beside the first; there: {there}')
  return state['other_emas'][other_ema], step


def read_data_position(phase_folder, step: int) -> dict:
  """The data position saved with a checkpoint."""
  return json.loads((_folder(phase_folder) / str(step) / 'data' / 'metadata').read_text())


def read_state(phase_folder, step: int | None = None, parts: tuple[str, ...] = ()) -> tuple[dict, int]:
  """(state as nested dicts of NumPy arrays, step) of a phase; of several processes none comes back from it alone.

  Args:
    phase_folder: the phase's folder in the work directory.
    step: None takes the newest.
    parts: fields of the state to read, such as ('ema', 'fixed'); () reads all.

  Raises:
    CheckpointError: there is none, it is damaged, or the newest has gone, as `newest_step`.
  """
  folder = _folder(phase_folder)
  if step is None:
    step = distributed.from_primary(f'{folder}: newest', lambda: newest_step(phase_folder))
  steps = finished_steps(phase_folder)
  if not steps:
    raise CheckpointError(f'{folder}: no finished checkpoint there')
  if step not in steps:
    raise CheckpointError(f'{folder}: no checkpoint of step {step}; there are {", ".join(map(str, steps))}')
  if wrong := distributed.from_primary(f'{folder / str(step)}: whole', lambda: damage(phase_folder, step)):
    _refuse_removed(phase_folder, step)
    raise CheckpointError(
      f'{folder / str(step)}: damaged: {wrong}\n'
      f'Run phase {folder.parent.name} again (`pagoda run`, or `pagoda train --phase={folder.parent.name}`): it sets a '
      'damaged newest checkpoint aside, goes on from the one before it and so makes it again.'
    )
  path = folder / str(step) / 'state'
  try:
    with _without_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
      tree = {part: tree[part] for part in parts or tree if part in tree}
      restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      state = checkpointer.restore(path, ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True))
  except Exception as error:
    if distributed.is_of_jax(error):
      raise  # as in `restore`
    _refuse_removed(phase_folder, step)
    raise CheckpointError(f'{path}: cannot be read: {first_lines(error)}') from error
  return state, step


def _refuse_removed(phase_folder, step: int) -> None:
  """Says of a checkpoint that was listed whether it has gone since: a run that goes on makes room for its new ones."""
  if step not in (steps := finished_steps(phase_folder)):
    raise CheckpointError(f'{_folder(phase_folder) / str(step)}: removed while it was read, as a run there keeps its '
                          f'latest alone; there are {", ".join(map(str, steps)) or "none"}. Start it again')


@contextlib.contextmanager
def _without_warnings():
  """Reading one item of a checkpoint, Orbax warns of marks that only whole checkpoints have."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def digest(tree, data_position: dict | None = None) -> str:
  """SHA-256 over every leaf's path, shape, dtype and bytes, and the data position."""
  sha = trees.hashed(tree)
  sha.update(json.dumps(data_position or {}, sort_keys=True).encode())
  return sha.hexdigest()
