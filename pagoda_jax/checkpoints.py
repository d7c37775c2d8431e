"""Orbax checkpoints: save, restore on any mesh, hand over from phase to phase.

A checkpoint holds the state and the data position, written together and published by one rename, so
that a kill at any moment leaves the one before. Only this file knows Orbax.
"""

import contextlib
import hashlib
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

FOLDER = 'checkpoints'


class CheckpointError(ValueError):
  """A checkpoint is missing, damaged or of other shapes; the message says where and what to do."""


class Checkpoints:
  """The checkpoints of one phase.

  Args:
    phase_folder: the phase's folder in the work directory.
    keep: how many of the latest to keep.
    keep_every: also keep those of steps that this divides; 0 keeps none besides.
  """

  def __init__(self, phase_folder, keep: int = 3, keep_every: int = 0, read_only: bool = False):
    self.folder = epath.Path(phase_folder).absolute() / FOLDER
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      keep_period=keep_every or None,
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      enable_async_checkpointing=True,
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=('state', 'data'))

  def latest_step(self) -> int | None:
    """Step of the newest finished checkpoint; None without one."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, data_position: dict) -> None:
    """Starts saving in the background; a failure of the save before is raised here.

    Raises:
      CheckpointError: a save failed (a full disk, say); earlier checkpoints are as they were.
    """
    if step == self.latest_step():
      return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position))
    self._guard(lambda: self._manager.save(step, args=args, force=True))

  def wait(self) -> None:
    """Returns when every save so far is on disk; raises CheckpointError where one failed."""
    self._guard(self._manager.wait_until_finished)

  def _guard(self, action):
    try:
      action()
    except Exception as error:  # tensorstore raises many kinds for a full or failing disk
      latest = max(finished_steps(self.folder.parent), default=None)
      raise CheckpointError(
        f'{self.folder}: saving failed: {first_lines(error)}\n'
        f'The checkpoints before it are intact (latest: {latest}). Free some disk space and start the same '
        'command again; it goes on from there.'
      ) from error

  def restore(self, step: int, abstract_state):
    """(state, data position) of a step, onto the shardings of `abstract_state`.

    Raises:
      CheckpointError: it is missing, damaged or of another structure.
    """
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
    try:
      restored = self._manager.restore(step, args=args)
    except Exception as error:
      raise CheckpointError(f'{self.folder / str(step)}: cannot be restored: {first_lines(error)}') from error
    return restored['state'], restored['data']

  def close(self) -> None:
    """Waits for saves that are under way."""
    self._manager.close()


def finished_steps(phase_folder) -> list[int]:
  """Steps of the checkpoints that are whole by Orbax's own marks, ascending."""
  folder = epath.Path(phase_folder).absolute() / FOLDER
  return sorted(s.step for s in ocp.step.standard_name_format().find_all(folder)) if folder.exists() else []


def read_generator(phase_folder, step: int | None = None) -> tuple[dict, int]:
  """(parameters for evaluation, step): the EMA, joined with what the phase does not train."""
  state, step = read_state(phase_folder, step, ('ema', 'fixed'))
  return {**state.get('fixed', {}), **state['ema']}, step


def read_data_position(phase_folder, step: int) -> dict:
  """The data position saved with a checkpoint."""
  path = epath.Path(phase_folder).absolute() / FOLDER / str(step) / 'data' / 'metadata'
  return json.loads(path.read_text())


def first_lines(error: Exception, count: int = 12) -> str:
  """The beginning of an error's text: Orbax prints whole trees."""
  lines = str(error).splitlines()
  return '\n'.join(lines[:count] + (['...'] if len(lines) > count else []))


def read_state(phase_folder, step: int | None = None, parts: tuple[str, ...] = ()) -> tuple[dict, int]:
  """(state as nested dicts of NumPy arrays, step) of a phase, for looking at and for handing over.

  Args:
    phase_folder: the phase's folder in the work directory.
    step: None takes the newest.
    parts: fields of the state to read, such as ('ema', 'fixed'); () reads all.

  Raises:
    CheckpointError: there is none, or it cannot be read.
  """
  folder = epath.Path(phase_folder).absolute() / FOLDER
  steps = finished_steps(phase_folder)
  if not steps:
    raise CheckpointError(f'{folder}: no finished checkpoint there')
  step = max(steps) if step is None else step
  if step not in steps:
    raise CheckpointError(f'{folder}: no checkpoint of step {step}; there are {", ".join(map(str, steps))}')
  path = folder / str(step) / 'state'
  try:
    with _without_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
      tree = {part: tree[part] for part in parts or tree if part in tree}
      restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      state = checkpointer.restore(
        path, ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)
      )
  except Exception as error:
    raise CheckpointError(
      f'{path}: cannot be read, it is damaged or half-written: {first_lines(error)}\n'
      f'Delete {path.parent} to fall back on the checkpoint before it.'
    ) from error
  return state, step


@contextlib.contextmanager
def _without_warnings():
  """Reading one item of a checkpoint, Orbax warns of marks that only whole checkpoints have."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def flat_leaves(tree) -> dict:
  """'/'-joined path -> leaf of a tree of nested dicts and lists, in sorted order."""

  def as_dict(node):
    if isinstance(node, (list, tuple)):
      return {f'{i:04d}': as_dict(child) for i, child in enumerate(node)}
    return {str(key): as_dict(child) for key, child in node.items()} if isinstance(node, dict) else node

  flat = traverse_util.flatten_dict(as_dict(tree), sep='/')
  return {path: flat[path] for path in sorted(flat) if flat[path] is not None}


def digest(tree, data_position: dict | None = None) -> str:
  """SHA-256 over every leaf's path, shape, dtype and bytes, and the data position."""
  sha = hashlib.sha256()
  for path, leaf in flat_leaves(tree).items():
    leaf = np.asarray(leaf)
    sha.update(f'{path} {leaf.shape} {leaf.dtype}\n'.encode())
    sha.update(np.ascontiguousarray(leaf).tobytes())
  sha.update(json.dumps(data_position or {}, sort_keys=True).encode())
  return sha.hexdigest()
