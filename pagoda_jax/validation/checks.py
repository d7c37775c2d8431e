"""One check of one key, and what is said of it."""

import difflib

from ml_collections import ConfigDict

from pagoda_jax.config import ConfigError


def check(condition, key, value, must):
  if not condition:
    raise ConfigError(f'{key} = {_shown(value)}: {must}')


def choose(key, value, choices):
  check(value in choices, key, value, f'must be one of {", ".join(map(str, choices))}')


def _shown(value) -> str:
  """A value in one line of bounded length."""
  line = ' '.join(repr(value).split())
  return line if len(line) <= 200 else f'{line[:200]}...'


def check_keys(config, table, path):
  """That a group has exactly the keys of a table of config/, and each a value in its range."""
  for key in config:
    if key not in table:
      close = difflib.get_close_matches(str(key), list(table), n=1)
      hint = f'; did you mean {close[0]}?' if close else ''
      raise ConfigError(f'{path}.{key}: no such key{hint} (there are {", ".join(table)})')
  for key, entry in table.items():
    name = f'{path}.{key}'
    if key not in config:
      raise ConfigError(f'{name}: is missing (there must be {", ".join(table)})')
    if isinstance(entry, dict):
      check(isinstance(config[key], ConfigDict), name, config[key], f'must be a group of keys: {", ".join(entry)}')
      check_keys(config[key], entry, name)
    else:
      _, allowed = entry
      check(allowed.holds(config[key]), name, config[key], f'must be {allowed.must}')
