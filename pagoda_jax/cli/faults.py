"""What a command says of an error in one line, and which errors keep their traceback instead."""

import asyncio.log
import errno
import keyword
import os
import pathlib
import re
import sys
import traceback

from absl import flags, logging

_PACKAGE = str(pathlib.Path(__file__).parents[1]) + os.sep
_LIBRARIES = (f'{os.sep}site-packages{os.sep}', f'{os.sep}dist-packages{os.sep}')
_EXPERIMENT = 'config_config'  # under this name config_flags loads the file of --config
_ROOM = 'free some space there and start the same command again'
REMEDIES = {errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM}


def is_for_the_user(error: BaseException) -> bool:
  """Whether one line says what is wrong: in this package's words, of a file or disk, or of a value.

  Libraries raise ValueErrors too, NumPy of arrays that do not fit: those tell of a mistake in the program.
  """
  if _is_ours(error) or isinstance(error, (OSError, KeyboardInterrupt)) or _is_of_a_bucket(error):
    return True
  if type(error) is not ValueError:
    return isinstance(error, ValueError) and not type(error).__module__.startswith('numpy')
  raised = traceback.extract_tb(error.__traceback__)[-1]
  library = any(part in raised.filename for part in _LIBRARIES) and not raised.filename.startswith(_PACKAGE)
  return raised.line.startswith('raise ') and not library  # what C code raises comes out of another line


def _is_of_a_bucket(error) -> bool:
  """Whether Google Cloud Storage has answered so; OSErrors among them name an object as its interface does."""
  *through, last = [frame.filename for frame in traceback.extract_tb(error.__traceback__)] or ['']
  of_package = lambda name, files: any(f'{os.sep}{name}{os.sep}' in file for file in files)
  return of_package('gcsfs', [last]) or (of_package('aiohttp', [last]) and of_package('gcsfs', through))  # it is away


def _is_ours(error) -> bool:
  return type(error).__module__.startswith('pagoda_jax')


def text(error: BaseException) -> str:
  """What is wrong, and where."""
  if isinstance(error, KeyboardInterrupt):
    return 'stopped by Ctrl-C'
  if _is_of_a_bucket(error):
    return (f'Google Cloud Storage: {_short(str(error))}: {type(error).__name__}. Is there such a bucket, and may this '
            'machine read and write it (its service account, or `gcloud auth application-default login`)?')
  if isinstance(error, OSError) and error.strerror:
    place, remedy = error.filename2 or error.filename or _unnamed(error), REMEDIES.get(error.errno)
    return (f'{place}: ' if place else '') + error.strerror + (f'; {remedy}' if remedy else '')
  if isinstance(error, KeyError) and error.args:
    return _short(str(error.args[0]))
  return _short(str(error))


def _short(message: str) -> str:
  """ConfigDict's message of an unknown key shows all that the config holds; its last line names the nearest key."""
  return re.sub(r'Other fields present: .*?(?=Did you mean|$)', '', message, flags=re.DOTALL).rstrip()


def _unnamed(error) -> str:
  """Where an OSError that names no file comes from, if from what was printed."""
  raised = traceback.extract_tb(error.__traceback__)[-1:]
  return 'standard output' if raised and raised[0].line.startswith(('print(', 'sys.stdout')) else ''


def is_closed_output(error) -> bool:
  """Whether who read what is printed has closed it, as `head` and a pager that is quit do."""
  return isinstance(error, BrokenPipeError) and not error.filename and _unnamed(error) == 'standard output'


def drop_lost_output() -> None:
  """After an error: what was printed and cannot be written would have Python fail once more at its end."""
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_once() -> None:
  """Leaves out what libraries print of an error besides raising it: a dozen screens where a save meets a full disk."""
  logging.get_absl_logger().addFilter(_not_orbax)
  asyncio.log.logger.addFilter(_retrieved)
  sys.unraisablehook = _not_tensorstore


def _not_orbax(record) -> bool:
  """Orbax logs the traceback of what it raises, in each of its threads."""
  return not (record.exc_info and f'{os.sep}orbax{os.sep}' in record.pathname)


def _retrieved(record) -> bool:
  """Orbax waits for the first of its writes that fails, and asyncio logs that nobody asked for the others."""
  return 'exception was never retrieved' not in record.getMessage()


def _not_tensorstore(unraisable) -> None:
  """The writes of a save that has failed end later, and tensorstore has nobody left to tell."""
  if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == 'Event loop is closed'):
    sys.__unraisablehook__(unraisable)


def of_command_line(error: BaseException, args: list[str]) -> str:
  """What is wrong with a command line, or with the experiment file that it names; '' for the program's own errors."""
  path, chain = _experiment(args), [error]
  while cause := chain[-1].__cause__ or chain[-1].__context__:
    chain.append(cause)
  for each in chain:  # config_flags and absl wrap what an experiment file raises
    here = [(frame, line) for frame, line in traceback.walk_tb(each.__traceback__)
            if frame.f_globals.get('__name__') == _EXPERIMENT]
    if here:
      if _is_ours(each) and traceback.extract_tb(each.__traceback__)[-1].filename == here[-1][0].f_code.co_filename:
        return text(each)  # the file itself has found what is wrong, with its variant say
      return f'{here[-1][0].f_code.co_filename}, line {here[-1][1]}: {type(each).__name__}: {text(each)}'
    if isinstance(each, SyntaxError) and each.filename != '<unknown>':  # that of an override's path: _no_path
      line = f', line {each.lineno}' if each.lineno else ''
      return f'{each.filename or path}{line}: {type(each).__name__}: {each.msg}'
    if isinstance(each, AttributeError) and each.name == 'get_config':
      return f'{path}: there is no function get_config in it'
  if path and not os.path.isfile(path):
    return f'--config={path}: {"is a folder" if os.path.isdir(path) else "there is no such file"}'
  if said := _no_path(args) or _no_key(error, args):
    return said
  if group := re.match(r'flag (--config\S*?)=.* as a ConfigDict', str(error), re.DOTALL):
    return f'{group[1]}: is a group of keys; give each by itself, {group[1]}.KEY=VALUE'
  expected = (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError)
  return ' '.join(text(error).split()) if isinstance(error, expected) else ''


def _no_path(args) -> str:
  """Of an override whose path no flag can follow, which config_flags reads as Python's attributes; else ''."""
  from ml_collections import ConfigDict  # not before each command

  for flag in (arg.partition('=')[0] for arg in args):
    if not (path := re.match('--?config[.](.*)', flag)):
      continue
    *groups, last = path[1].split('.')
    for part in (*groups, last):
      if not part.isidentifier() or keyword.iskeyword(part):
        return (f'{flag}: no flag reaches {part!r}: keys are words of letters, digits and _ with dots between, and a '
                'tuple is given whole; change it in the experiment file')
    if part := next((part for part in groups if hasattr(ConfigDict(), part)), ''):
      return (f'{flag}: no flag reaches {part!r}, as every group of keys has a method of that name; change it in the '
              'experiment file')
  return ''


def _no_key(error, args) -> str:
  """Of an override of a key that the config has not, of which config_flags says the key's name alone; else ''."""
  inner = error.args[0] if isinstance(error, AttributeError) and error.args else error  # what absl wraps
  found = isinstance(inner, KeyError) and re.match(r"'(\w+)'|.*>\.(\w+) does not exist", str(inner.args[0]))
  key = found and (found[1] or found[2])
  flag = next((name for name in (arg.partition('=')[0] for arg in args)
               if re.match('--?config[.]', name) and key in name.split('.')), '')
  near = flag and re.search(r'Did you mean "(\w+)"', str(inner.args[0]))
  return f'{flag}: no such key {key}{f"; did you mean {near[1]}?" if near else ""}' if flag else ''


def _experiment(args) -> str:
  """The path in --config=PATH:VARIANT; '' without one."""
  given = re.search(r'(?:^|\n)--?config[=\n]([^:\n]*)', '\n'.join(args))
  return given[1] if given else ''
