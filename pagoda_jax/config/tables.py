"""What makes constructors of config groups out of tables {key: (default, range)}."""

import functools

from ml_collections import ConfigDict


def keys(table):
  """Makes of a function that returns {key: (default, range)} the constructor of such a group of keys.

  In place of a pair, {...} is a group within the group. The constructor takes what differs from the defaults;
  its attribute `table` is the function.
  """

  @functools.wraps(table)
  def make(**overrides) -> ConfigDict:
    config = _defaults(make.table()).lock()
    with config.ignore_type():  # an int where the default is a float, a list for a tuple: validate() judges
      config.update(overrides)
    return config

  del make.__wrapped__  # so that help() shows (**overrides)
  make.table = functools.cache(table)
  return make


def _defaults(table) -> ConfigDict:
  return ConfigDict(
    {key: _defaults(entry) if isinstance(entry, dict) else entry[0] for key, entry in table.items()}, sort_keys=False
  )


def group(make, **defaults) -> dict:
  """The table of another constructor, to stand within a table; with some defaults changed."""
  table = make.table()
  return table | {key: (default, table[key][1]) for key, default in defaults.items()}
