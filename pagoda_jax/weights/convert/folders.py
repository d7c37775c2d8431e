"""The folder that `pagoda convert` writes: a checkpoint that a phase can start from.

    variables/              Orbax: {'params': ..., other collections}, float32
    carried.safetensors     their tensors that have no place here, for the way back
    converted.json          format, options of our network, where the weights came from, checksums of the other
                            files; sealed

It appears whole or not at all: local folders by one rename, gs:// by writing converted.json last. Nothing of it is
used before it was compared with its checksums.
"""

import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

import pagoda_jax
from pagoda_jax.runtime import buckets, files, trees
from pagoda_jax.weights.convert import torch_files
from pagoda_jax.weights.convert.formats import Converted
from pagoda_jax.weights.convert.mapping import ConversionError

DESCRIPTION = 'converted.json'
CARRIED = 'carried.safetensors'
REMEDY = 'remove the folder and convert the published file again (`pagoda convert`)'


def is_converted(folder) -> bool:
  """Whether a folder is one of `write_converted`'s."""
  return (epath.Path(folder) / DESCRIPTION).exists()


def refuse_existing(folder) -> None:
  """For `write_converted`, and before minutes of work for it; raises ConversionError."""
  if epath.Path(folder).exists():
    raise ConversionError(f'{folder} exists already; remove it, or choose another --output')


def write_converted(folder, converted: Converted, source: dict) -> None:
  """Writes the folder.

  Args:
    folder: must not exist; local or gs://.
    converted: what to write.
    source: JSON values on where it came from; 'sha256' of the file is what later checks compare.

  Raises:
    ConversionError: the folder exists.
    OSError: it cannot be written; names it. Nothing is left of it.
  """
  folder = buckets.absolute(folder)
  refuse_existing(folder)
  remote = buckets.is_in_bucket(folder)
  target = folder if remote else folder.parent / f'.{folder.name}.{os.getpid()}.tmp'
  try:
    with files.naming(folder, instead_of=target):
      target.mkdir(parents=True)
      # Random-looking numbers do not compress, and trying takes their size again in memory.
      with _checkpointer(use_compression=False) as checkpointer:
        checkpointer.save(target / 'variables', converted.variables)
      if converted.carried:
        torch_files.write_safetensors(target / CARRIED, converted.carried)
      files.write_sealed(target / DESCRIPTION, _description(converted, source) | {'files': files.checksums(target)})
    if not remote:
      target.rename(folder)
  except BaseException:
    shutil.rmtree(target, ignore_errors=True) if not remote else target.rmtree(missing_ok=True)
    raise


def _description(converted: Converted, source: dict) -> dict:
  return {
    'format': converted.format,
    'options': converted.options,
    'leaves_asked': converted.leaves_asked,
    'parameters': sum(int(np.size(leaf)) for leaf in jax.tree.leaves(converted.variables['params'])),
    # Of the numbers, which are the same when a file is converted again; the bytes of Orbax's files are not.
    'variables_sha256': trees.hashed(converted.variables).hexdigest(),
    'source': source,
    'notes': converted.notes,
    'pagoda_jax': pagoda_jax.__version__,
  }


def read_description(folder) -> dict:
  """converted.json, with sequences as tuples.

  Raises:
    ConversionError: the folder is not one of `write_converted`'s, or converted.json is not as it was written.
  """
  path = epath.Path(folder) / DESCRIPTION
  try:
    return _tuples(files.read_sealed(path))
  except FileNotFoundError:
    raise ConversionError(f'{folder}: no {DESCRIPTION} there; make such a folder with `pagoda convert`') from None
  except (OSError, ValueError) as error:
    if buckets.is_away(path, error):
      raise
    raise ConversionError(f'{path}: damaged ({error}); {REMEDY}') from None


def _tuples(value):
  if isinstance(value, dict):
    return {name: _tuples(child) for name, child in value.items()}
  return tuple(_tuples(child) for child in value) if isinstance(value, list) else value


def load_converted(folder) -> tuple[dict, dict]:
  """(variables, options) of a converted network.

  Returns:
    variables: {'params': ..., other collections} as NumPy arrays in float32.
    options: arguments of our module.

  Raises:
    ConversionError: the folder is not one of `write_converted`'s, or is damaged.
  """
  converted = read_folder(folder)
  return converted.variables, converted.options


def read_folder(folder) -> Converted:
  """Everything that `write_converted` was given; errors as `load_converted`."""
  description, folder = read_description(folder), epath.Path(folder)
  try:
    wrong = files.damaged_files(folder, description['files'])
  except OSError as error:
    raise ConversionError(f'{folder}: cannot be read: {error}') from None
  if wrong:
    raise ConversionError(f'{folder}: damaged: {files.first_rows(wrong)}; {REMEDY}')
  return Converted(
    variables=_read_variables(folder / 'variables'),
    options=description['options'],
    format=description['format'],
    carried=torch_files.read(folder / CARRIED, strip=()).tensors if CARRIED in description['files'] else {},
    leaves_asked=description['leaves_asked'],
  )


def _checkpointer(**options) -> ocp.Checkpointer:
  """Orbax's for trees, by which a process writes and reads alone: by default it waits for all others of its run."""
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'of_{me}')
  return ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, **options), multiprocessing_options=alone)


def _read_variables(path: epath.Path) -> dict:
  path = buckets.absolute(path)
  try:
    with _checkpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
      restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      return checkpointer.restore(path, ocp.args.PyTreeRestore(item=tree, restore_args=restore_args))
  except Exception as error:  # tensorstore and Orbax raise many kinds
    lines = str(error).splitlines()[:8]
    raise ConversionError(f'{path}: damaged; {REMEDY}: ' + '\n'.join(lines)) from error
