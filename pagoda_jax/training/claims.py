"""config.json in a phase's folder, sealed: which experiment the phase belongs to.

Earlier versions wrote it without a seal. Such a file is compared with the config that a run is started with, never
believed: `pagoda run` then writes it anew, sealed. Who knows no config (`sample`, `inspect`, `init_from`) refuses it.
"""

import os

from etils import epath

from pagoda_jax.runtime import buckets
from pagoda_jax.runtime.files import SEAL, NotSealedError, read_json, read_sealed, read_to_compare, write_sealed

FILE = 'config.json'
_KEYS = {'phase', 'identity', 'config'}


class WorkdirError(ValueError):
  """The work directory belongs to another experiment, is damaged, or lacks what a phase starts from."""


def write(phase_folder, phase: str, identity: dict, config: dict) -> None:
  """Writes config.json: what decides what the phase computes, flat, and the whole experiment."""
  path = epath.Path(phase_folder) / FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  write_sealed(path, {'phase': phase, 'identity': identity, 'config': config})


def phase_folders(folder) -> list[epath.Path]:
  """The folders of a work directory's phases, that whose config.json was written last first.

  Other things that lie there have a file of that name too, such as what `pagoda export` makes and text encoders.
  """
  paths = [path for path in epath.Path(folder).glob(f'*/{FILE}') if not of_something_else(path)]
  return [path.parent for path in sorted(paths, key=lambda path: path.stat().mtime, reverse=True)]


def of_something_else(path) -> bool:
  """Whether a config.json tells of other things than a phase."""
  try:
    keys = read_json(path).keys() - {SEAL}
  except (OSError, ValueError):
    return False  # damaged: it may be a phase's
  return bool(keys) and not keys & _KEYS


def at_its_place(phase_folder) -> epath.Path:
  """A phase's folder by its own name in its work directory, where it is given as '.' or by a link; others as they are.

  Raises:
    WorkdirError: as `read`.
  """
  path = epath.Path(phase_folder)
  if buckets.is_in_bucket(path) or not (path / FILE).exists():
    return path
  own = path.absolute()
  return own if own.name == read(path)['phase'] else epath.Path(os.path.realpath(own))


def fullest(config: dict, folders: list[epath.Path]) -> dict:
  """The experiment `config` of one of the phases' folders, or of another that goes on where it ends.

  One that has all its phases, and others that are there besides, came later, whatever the files' times say: a copy of a
  work directory has those of the copying.
  """
  names = {folder.name for folder in folders}
  for folder in folders:
    try:
      other = read(folder)['config']
    except WorkdirError:  # named where the phase is read
      continue
    if {*config['order']} < {*other['order']} and names & ({*other['order']} - {*config['order']}):
      config = other
  return config


def read(phase_folder) -> dict:
  """What `write` wrote.

  Raises:
    WorkdirError: it is missing, damaged, without a seal, or no phase's.
  """
  return _read(phase_folder, read_sealed)


def read_identity(phase_folder) -> dict:
  """What decides what the phase computes, to be compared: of a config.json without a seal too; errors as `read`'s."""
  return _read(phase_folder, _identity)


def _identity(path):
  identity = read_to_compare(path)[0].get('identity')
  if not isinstance(identity, dict):
    raise ValueError('no identity in it')
  return identity


def _read(phase_folder, reader):
  path = epath.Path(phase_folder) / FILE
  if of_something_else(path):  # whether sealed, as an exported generator's is, or not
    raise WorkdirError(f'{path}: is of no phase of a run, but of something else, such as what `pagoda export` makes')
  try:
    return reader(path)
  except NotSealedError as error:
    raise WorkdirError(f'{path}: {error}; the same `pagoda run` as before compares it and seals it') from None
  except (OSError, ValueError) as error:
    if buckets.is_away(path, error):
      raise
    raise WorkdirError(
      f'{path}: missing or damaged ({error}), so that nothing tells which experiment phase {path.parent.name} belongs '
      'to. Put a whole one back; or, if you know, delete it and start `pagoda run` with that experiment, which writes '
      'it anew'
    ) from None
