"""Finding published weights by name: where they lie, whether they are whole, what they may be used for.

Nothing is downloaded: many training machines have no network, and a licence is for a person to accept.
A missing file's error says what to download from where and where to put it.
"""

import difflib
import json
import os

from absl import logging
from etils import epath

from pagoda_jax.runtime import buckets
from pagoda_jax.runtime.files import file_digest, user_cache
from pagoda_jax.weights import published
from pagoda_jax.weights.published import Published

ENVIRONMENT = 'PAGODA_WEIGHTS'


class MissingWeightsError(FileNotFoundError):
  """A published file is not there; the message says where it comes from and where to put it."""


class WrongDigestError(ValueError):
  """A file is not the published one, or has changed since it was first used."""


def entry(name: str) -> Published:
  """The registry's entry of that name; raises ValueError with the nearest names."""
  known = {published_file.name: published_file for published_file in published.REGISTRY}
  if name not in known:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
    raise ValueError(f'no published file is called {name!r}; did you mean {", ".join(near)}? (pagoda weights list)')
  return known[name]


def folders(weights_dir=None) -> list[epath.Path]:
  """Where weights are looked for: `weights_dir`, $PAGODA_WEIGHTS, the user's cache."""
  named = (weights_dir, os.environ.get(ENVIRONMENT), f'{user_cache()}/pagoda_jax/weights')
  return list(dict.fromkeys(epath.Path(folder).expanduser() for folder in named if folder))


def find(name: str, weights_dir=None) -> epath.Path:
  """Path of a published file that is there and whole; warns of a non-commercial licence.

  Args:
    name: as in the registry (`pagoda weights list`).
    weights_dir: looked in first; local or gs://.

  Raises:
    ValueError: no such name.
    MissingWeightsError: the file is in none of the folders.
    WrongDigestError: the file is truncated, not the published one or has changed.
  """
  wanted = entry(name)
  path = located(wanted, weights_dir)
  if path is None:
    raise MissingWeightsError(how_to_get(wanted, weights_dir))
  verify(wanted, path)
  if wanted.non_commercial:
    logging.warning('%s: %s. See %s', wanted.name, wanted.licence, wanted.page)
  return path


def located(wanted: Published, weights_dir=None) -> epath.Path | None:
  """Where a published file lies, whole or not; None where it is not there."""
  paths = (folder / wanted.file_name for folder in folders(weights_dir))
  # Not a pipe, which would keep its readers waiting; etils takes one for a file.
  return next((path for path in paths if (path.exists() if buckets.is_in_bucket(path) else os.path.isfile(path))), None)


def how_to_get(wanted: Published, weights_dir=None) -> str:
  """What to download from where, and where to put it."""
  places = folders(weights_dir)
  lines = [
    f'{wanted.name} is not there: {wanted.what}.',
    f'  download  {wanted.url or f"{wanted.page} (pick it out there, and name it as below)"}',
    f'  put it at {places[0] / wanted.file_name}',
    f'  licence   {wanted.licence} ({wanted.page})',
    f'Looked in {", ".join(map(str, places))}; choose with --weights_dir or ${ENVIRONMENT}.',
  ]
  return '\n'.join(lines)


def verify(wanted: Published, path: epath.Path, again: bool = False) -> str:
  """SHA-256 of the file, after comparing it with the published or the first recorded one.

  The digest is kept in `<file>.sha256.json` beside the file with its size and time of change, so that
  it is computed once; `again` computes it anyway.

  Raises:
    WrongDigestError: another size or digest.
  """
  stat = path.stat()
  if wanted.size and stat.length != wanted.size:
    _raise_wrong(wanted, path, f'it has {stat.length:,} bytes of {wanted.size:,}')
  record_path = path.parent / f'{path.name}.sha256.json'
  record = _read_record(record_path)
  stamp = {'bytes': stat.length, 'changed': stat.mtime}
  fresh = {key: record.get(key) for key in stamp} == stamp
  digest = record['sha256'] if fresh and not again else file_digest(path)
  if not digest.startswith(wanted.sha256):
    _raise_wrong(wanted, path, f'its SHA-256 is {digest}, published is {wanted.sha256}')
  if not wanted.sha256 and record.get('sha256', digest) != digest:
    _raise_wrong(wanted, path, f'its SHA-256 was {record["sha256"]} at first use, and is {digest} now')
  if not fresh:
    _write_record(record_path, stamp | {'sha256': digest})
  return digest


def recorded_digest(path) -> str:
  """SHA-256 of a file as it was computed before, where its size and time of change are as they were then."""
  path = epath.Path(path)
  stat, record_path = path.stat(), path.parent / f'{path.name}.sha256.json'
  stamp, record = {'bytes': stat.length, 'changed': stat.mtime}, _read_record(record_path)
  if {key: record.get(key) for key in stamp} == stamp:
    return record['sha256']
  digest = file_digest(path)
  _write_record(record_path, stamp | {'sha256': digest})
  return digest


def _raise_wrong(wanted: Published, path: epath.Path, why: str):
  raise WrongDigestError(
    f'{path} is not {wanted.name} as published: {why}. Download it again from {wanted.url or wanted.page}'
    + ('' if wanted.sha256 else f'; if the change is meant, delete {path.name}.sha256.json beside it')
  )


def _read_record(path: epath.Path) -> dict:
  try:
    record = json.loads(path.read_text())
    return record if isinstance(record.get('sha256'), str) else {}
  except (OSError, ValueError, AttributeError):  # none yet, or half-written: computed again
    return {}


def _write_record(path: epath.Path, record: dict) -> None:
  try:
    path.write_text(json.dumps(record) + '\n')
  except OSError as error:  # a shared read-only folder
    logging.info('%s: not written (%s); the digest will be computed again', path, error)
