"""SHA-256 of every file of a checkpoint: written before the checkpoint counts, compared before it is used.

A flipped byte in an array's file can be read without an error, so nothing less tells that a checkpoint
is as it was written.
"""

from etils import epath

from pagoda_jax.runtime import files

FILE = 'checksums.json'
# Orbax writes these when a checkpoint is published, after the checksums. No number is read from them: they must be
# there, and that is all.
WRITTEN_LAST = ('_CHECKPOINT_METADATA', 'commit_success.txt')


def write(folder) -> None:
  """Writes checksums.json over the files of a checkpoint that is whole but for WRITTEN_LAST."""
  found = files.checksums(folder, without=(FILE, *WRITTEN_LAST))
  files.write_json(epath.Path(folder) / FILE, {'files': found, 'sha256': files.seal(found)})


def damage(folder) -> list[str]:
  """What is wrong with a checkpoint, a text for each file; [] where it is as it was written.

  Raises:
    OSError: a file is there but cannot be read; this says nothing about the checkpoint.
  """
  folder = epath.Path(folder)
  try:
    content = files.read_json(folder / FILE)
    expected = content['files']
    if files.seal(expected) != content['sha256']:
      return [f'{FILE}: its bytes have changed']
  except FileNotFoundError:
    return [f'{FILE}: missing']
  except (ValueError, KeyError):
    return [f'{FILE}: damaged, no checksums can be read from it']
  lost = [f'{name}: missing' for name in WRITTEN_LAST if not (folder / name).exists()]
  return lost + files.damaged_files(folder, expected)
