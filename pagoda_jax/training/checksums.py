"""SHA-256 of every file of a checkpoint: written before the checkpoint counts, compared before it is used.

A flipped byte in an array's file can be read without an error, so nothing less tells that a checkpoint
is as it was written.
"""

import concurrent.futures
import hashlib
import json

from etils import epath

from pagoda_jax.runtime.files import file_digest, write_json

FILE = 'checksums.json'
# Orbax writes these when a checkpoint is published, after the checksums. No number is read from them: they must be
# there, and that is all.
WRITTEN_LAST = ('_CHECKPOINT_METADATA', 'commit_success.txt')
THREADS = 4  # more would compete with the pictures' decoding while a checkpoint is saved


def write(folder) -> None:
  """Writes checksums.json over the files of a checkpoint that is whole but for WRITTEN_LAST."""
  folder = epath.Path(folder)
  paths = {path: file for path, file in _files(folder) if path not in (FILE, *WRITTEN_LAST)}
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    digests = pool.map(file_digest, paths.values())
    files = {path: {'bytes': paths[path].stat().length, 'sha256': sha} for path, sha in zip(paths, digests)}
  write_json(folder / FILE, {'files': files, 'sha256': _digest(files)})


def _files(folder, prefix=''):
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path, f'{prefix}{path.name}/')
    else:
      yield prefix + path.name, path


def _digest(files) -> str:
  return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def damage(folder) -> list[str]:
  """What is wrong with a checkpoint, a text for each file; [] where it is as it was written.

  Raises:
    OSError: a file is there but cannot be read; this says nothing about the checkpoint.
  """
  folder = epath.Path(folder)
  try:
    content = json.loads((folder / FILE).read_bytes())
    files = content['files']
    if _digest(files) != content['sha256']:
      return [f'{FILE}: its bytes have changed']
  except FileNotFoundError:
    return [f'{FILE}: missing']
  except (ValueError, KeyError, TypeError):
    return [f'{FILE}: damaged, no checksums can be read from it']
  lost = [f'{name}: missing' for name in WRITTEN_LAST if not (folder / name).exists()]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    return lost + [text for text in pool.map(lambda path: _damage(folder / path, path, files[path]), files) if text]


def _damage(file, path, expected) -> str:
  try:
    size = file.stat().length
    if size != expected['bytes']:
      return f'{path}: {size} bytes instead of {expected["bytes"]}'
    return '' if file_digest(file) == expected['sha256'] else f'{path}: its bytes have changed (SHA-256)'
  except (FileNotFoundError, NotADirectoryError):
    return f'{path}: missing'
