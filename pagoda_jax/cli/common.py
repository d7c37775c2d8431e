"""Flags that several commands share, what is refused of them before a command begins, and how numbers are written."""

import ast
import math
import os
import stat

from absl import flags
from ml_collections import config_flags

from pagoda_jax.runtime import buckets


class _WholeNumber(flags.IntegerParser):
  def convert(self, argument) -> int:
    try:
      return super().convert(argument)
    except ValueError:
      raise ValueError('must be a whole number, in digits alone') from None


class _Number(flags.FloatParser):
  def convert(self, argument) -> float:
    try:
      return super().convert(argument)
    except ValueError:
      raise ValueError('must be a number') from None


class _Finite(flags.FloatParser):
  """NaN lies within all bounds, as absl compares."""

  def convert(self, argument) -> float:
    value = super().convert(argument)
    if not math.isfinite(value):
      raise ValueError('must be finite')
    return value


class _Flag(flags.BooleanParser):
  def parse(self, argument) -> bool:
    try:
      return super().parse(argument)
    except ValueError:
      raise ValueError('must be true or false') from None


class _Text(flags.ArgumentParser):
  def parse(self, argument) -> str | None:
    # Of the key `update`, config_flags takes the method of that name of every ConfigDict for the default.
    return None if callable(argument) else super().parse(argument)


class _Tuple(flags.ArgumentParser):
  """Values with commas between; words need no quotes. config_flags' own joins the values of a flag given twice, where
  the last of others counts."""

  def parse(self, argument) -> tuple:
    value = _literal(argument, lambda text: tuple(_literal(word) for word in text.split(','))) if argument else ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _literal(text, otherwise=lambda word: word):
  """What a text means in Python; `otherwise` of it where it means nothing."""
  try:
    return ast.literal_eval(text.strip()) if isinstance(text, str) else text
  except (ValueError, SyntaxError):
    return otherwise(text.strip())


# Of --config.KEY=VALUE, by the type of the key's default; validation knows its range.
for _type, _parser in ((int, _WholeNumber()), (float, _Number()), (bool, _Flag()), (str, _Text()), (tuple, _Tuple())):
  config_flags.register_flag_parser_for_type(_type, _parser)


def define_experiment(fv) -> None:
  """--config."""
  config_flags.DEFINE_config_file('config', None, 'Experiment file, such as experiments/mnist.py or '
                                  'experiments/folder.py:base=16,target=64; --config.KEY=VALUE overrides a key.',
                                  lock_config=True, flag_values=fv)


def check_experiment(config) -> None:
  """Refuses what is no experiment; raises OSError where the file of --config could not be opened."""
  try:
    _ = config.order  # a file that could not be opened raises only when something is read
  except AttributeError:
    raise ValueError('--config: its get_config() must return what config.experiment() makes, not '
                     f'{type(config).__name__}') from None


def define_number(fv, name: str, default: float | None, help: str, low: float | None = None,
                  high: float | None = None) -> None:
  """A flag that is a finite number, in [low, high] where they are given."""
  flags.DEFINE(_Finite(low, high), name, default, help, flag_values=fv)


def define_folder(fv, name: str, help: str, required: bool = True) -> None:
  """A flag that names a folder, there or to be made; local or gs://."""
  flags.DEFINE_string(name, None, help, flag_values=fv)
  if required:
    flags.mark_flag_as_required(name, flag_values=fv)
  flags.register_validator(name, lambda path: _check_place(path, stat.S_ISDIR, 'a folder'), flag_values=fv)


def define_file(fv, name: str, default: str | None, help: str) -> None:
  """A flag that names a file to write; local or gs://."""
  flags.DEFINE_string(name, default, help, flag_values=fv)
  flags.register_validator(
    name, lambda path: _check_place(path, stat.S_ISREG, 'a file') and _check_writable(path), flag_values=fv)


def define_place(fv, name: str, default: str | None, help: str) -> None:
  """A flag that names a file to write where it has a suffix, and a folder to write to where it has none."""
  flags.DEFINE_string(name, default, help, flag_values=fv)
  is_file = lambda path: bool(path) and bool(os.path.splitext(path)[1])
  flags.register_validator(name, lambda path: _check_place(path, *(
    (stat.S_ISREG, 'a file') if is_file(path) else (stat.S_ISDIR, 'a folder'))) and _check_writable(path),
    flag_values=fv)


def define_output(fv, help: str) -> None:
  """--output, that names what to make, local or gs://. What is there already is refused by whoever makes it."""
  flags.DEFINE_string('output', None, help, required=True, flag_values=fv)
  flags.register_validator('output', lambda path: _check_place(path, lambda mode: True, 'what to make') and (
    path is None or os.path.exists(path) or _check_writable(path)), flag_values=fv)


def _check_place(path: str | None, fits, kind: str) -> bool:
  """Refuses what cannot be `kind`: before minutes of work, and not after."""
  if path is None:
    return True
  if buckets.is_in_bucket(path):
    try:
      buckets.check(path)
    except buckets.BucketError as error:
      raise flags.ValidationError(str(error)) from None
    return True
  if not path:
    raise flags.ValidationError(f'is empty; must name {kind}')
  try:
    if not fits(os.stat(path).st_mode):
      raise flags.ValidationError(f'is there and is not {kind}')
  except FileNotFoundError:
    pass  # made when there is something to write
  except OSError as error:  # such as a name that is too long, or a file where a folder must be
    raise flags.ValidationError(error.strerror) from None
  return True


def _check_writable(path: str | None) -> bool:
  """Refuses a file or folder that could not be made where it is to be: files are written beside it, then renamed."""
  if path is not None and (place := unwritable(path)):
    raise flags.ValidationError(f'{place} is a folder that cannot be written to')
  return True


def unwritable(path: str) -> str:
  """The folder that keeps a file or folder from being made; '' where none does."""
  if buckets.is_in_bucket(path):
    return ''
  place = os.path.abspath(path)
  while not os.path.isdir(place):
    place = os.path.dirname(place)
  return '' if os.access(place, os.W_OK | os.X_OK) else place


def define_training(fv) -> None:
  """--config and what a run of its phases needs besides."""
  define_experiment(fv)
  define_folder(fv, 'workdir', 'Work directory: made if need be, gone on from if it is there.')
  flags.DEFINE_integer('max_steps', None, 'Cap on the steps of every phase, for smoke runs.', lower_bound=1,
                       flag_values=fv)
  flags.mark_flag_as_required('config', flag_values=fv)
  define_processes(fv)


def define_processes(fv) -> None:
  """Flags for machines that nothing announces to JAX; Cloud TPU, GKE with TPUs, Slurm and Open MPI need none."""
  flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0, to train with several processes. '
                      'Not needed on Cloud TPU, GKE with TPUs, and under Slurm.', flag_values=fv)
  flags.DEFINE_integer('num_processes', None, 'How many processes there are, with --coordinator_address.',
                       lower_bound=1, flag_values=fv)
  flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0, with --coordinator_address.',
                       lower_bound=0, flag_values=fv)


def number(value: float) -> str:
  """Three digits, a space and a decimal prefix."""
  power = min(max(int(math.log10(max(value, 1) * 1.0005) // 3), 0), 6)
  return f'{value / 1000**power:.3g} {["", "k", "M", "G", "T", "P", "E"][power]}'
