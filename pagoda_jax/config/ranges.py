"""What a config's key may be: experiments.py and phases.py give each key one of these ranges beside its default.

A range knows whether a value lies in it, and says in words what does: an error message ends with them. Intervals are
written as in mathematics, '[0, 1)' holds 0 and not 1. Their ends are finite, so NaN and infinity lie in none.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
  """The values that a key may have."""

  must: str  # what follows 'must be'
  holds: Callable[[Any], bool]  # of any object whatever; never raises


def integer(interval: str, *, also: int | None = None, multiple_of: int = 1) -> Range:
  """A whole number of the interval, or `also`, which then means something of its own (0: none, -1: the rest)."""
  inside = _within(interval)
  words = [f'a whole number in {interval}', f'a multiple of {multiple_of}' * (multiple_of > 1),
           '' if also is None else f'or {also}']
  return Range(', '.join(filter(None, words)), lambda value: isinstance(value, int) and not isinstance(value, bool)
               and (value == also or inside(value) and value % multiple_of == 0))


def number(interval: str) -> Range:
  """A whole or broken number of the interval."""
  inside = _within(interval)
  return Range(f'a number in {interval}', lambda value: isinstance(value, (int, float))
               and not isinstance(value, bool) and inside(value))


def one_of(*choices) -> Range:
  """One of the values listed; True is not 1."""
  return Range(f'one of {_listed(choices)}', lambda value: _is_among(value, choices))


def some_of(*choices, at_least: int = 0) -> Range:
  """A tuple of some of the values listed, each at most once."""
  few = 'at least one of ' if at_least else 'some of '
  return Range(f'a tuple of {few}{_listed(choices)}; none of them twice', lambda value: isinstance(value, (tuple, list))
               and len(value) >= at_least and all(_is_among(item, choices) for item in value)
               and len(set(value)) == len(value))


def each(item: Range, least: int = 0, most: int = 100) -> Range:
  """A tuple of so many values, all of them in the range `item`."""
  return Range(f'a tuple of {least} to {most} values, each {item.must}', lambda value: isinstance(value, (tuple, list))
               and least <= len(value) <= most and all(map(item.holds, value)))


def row(**items: Range) -> Range:
  """A tuple of one value for each name, in their order."""
  described = '; '.join(f'{name}: {item.must}' for name, item in items.items())
  return Range(f'({", ".join(items)}) with {described}', lambda value: isinstance(value, (tuple, list))
               and len(value) == len(items) and all(item.holds(v) for item, v in zip(items.values(), value)))


flag = Range('True or False', lambda value: isinstance(value, bool))
text = Range('text of at most 4096 characters, none of them NUL',
             lambda value: isinstance(value, str) and len(value) <= 4096 and '\0' not in value)


def _within(interval):
  low, high = map(float, interval[1:-1].split(','))
  above = {'[': operator.ge, '(': operator.gt}[interval[0]]
  below = {']': operator.le, ')': operator.lt}[interval[-1]]
  return lambda value: above(value, low) and below(value, high)


def _is_among(value, choices):
  return any(type(value) is type(choice) and value == choice for choice in choices)


def _listed(choices):
  return ', '.join(str(choice) or "''" for choice in choices)


# Ranges that several keys share. Upper ends are beyond all sense, so that a slip is told from a wish.
STEPS = integer('[1, 1_000_000_000]')
BATCH = integer('[1, 1_000_000]')
MICROBATCH = integer('[0, 1_000_000]', also=-1)  # of a phase; -1: config.microbatch
SIDE = integer('[1, 8192]')  # pixels
WIDTH = integer('[1, 16_384]')  # channels
BLOCKS = integer('[0, 64]')
WEIGHT = number('[0, 1e6]')  # of a loss
OMEGA = number('[0, 100]')  # strength of guidance
DEVICES = integer('[1, 1_000_000]', also=-1)
THAWED = Range("a resolution or a block's name", lambda value: SIDE.holds(value) or bool(value) and text.holds(value))
# Of float32 products: 'default' is the chip's (bfloat16 factors on TPU, TF32 on GPU), 'highest' is float32.
MATMUL_PRECISION = one_of('default', 'high', 'highest')
