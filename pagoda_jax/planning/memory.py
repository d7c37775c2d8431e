"""How much memory the values of a program take at once, as far as that is known before a compiler has fused it."""

import collections
import dataclasses
import math

from jax.extend.core import Literal

from pagoda_jax.networks import attention
from pagoda_jax.planning.costs import inner_programs

# Operations whose body is part of the program around them.
_CALLS = {'jit', 'closed_call', 'core_call', 'custom_jvp_call', 'custom_vjp_call', 'checkpoint'}
# Those that read and write whole arrays, as do all with a body of their own. Others, but for the results of sums, can
# be computed where they are used.
_WHOLE = {'conv_general_dilated', 'cumsum', 'dot_general', 'fft', 'gather', 'scatter', 'scatter-add', 'sort', 'top_k'}
_SUMS = {'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'reduce_window_sum', 'argmax', 'argmin'}


@dataclasses.dataclass(eq=False, slots=True)
class _Value:
  """One that the program makes. Attributes: its size; whether it is of attention's that the chip has a kernel for."""

  bytes: int
  in_kernel: bool


@dataclasses.dataclass(slots=True)
class _Operation:
  name: str
  takes: list[_Value]
  gives: list[_Value]
  bodies: list
  in_kernel: bool


def peak_bytes(jaxpr, parameters=(), chip: str = '') -> int:
  """Most bytes that a program's own values take at once.

  What products, convolutions, loops and sums make is kept, from there to its last use, and what products, convolutions
  and loops take; all between is computed wherever it is used, from what is kept. A compiler does with less (it
  reorders) or more (it pads to a chip's tiles, and algorithms want memory to work in).

  Args:
    jaxpr: of the program, whose arguments are not counted.
    parameters: shapes of parameters, of which a step makes copies and gradients however many images it works on:
      values of such shapes, their axes in any order, are not counted.
    chip: one of `networks.chips.chip`; attention for which it has a kernel keeps no logits. '': none has.
  """
  return _peak(jaxpr, {tuple(sorted(shape)) for shape in parameters}, chip)


def _peak(jaxpr, ignored, chip) -> int:
  operations, values = [], {}
  _flatten(jaxpr, values, operations, ignored, chip, False)
  results = _known(jaxpr.outvars, values)
  kept = _kept(operations) | set(results)
  last = _last_uses(operations, kept) | dict.fromkeys(results, len(operations))
  ends, live, most = collections.Counter(), 0, 0
  for place, operation in enumerate(operations):
    within = max((_peak(body, ignored, chip) for body in operation.bodies), default=0)
    made = [value for value in operation.gives if value in kept]
    for value in made:
      ends[last.get(value, place)] += value.bytes
    total = sum(value.bytes for value in made)
    most = max(most, live + max(within, total))
    live += total - ends.pop(place, 0)
  return most


def _flatten(jaxpr, values, operations, ignored, chip, in_kernel) -> None:
  """Adds the operations of a program to a list, those of its calls in their place; `values`: {variable: value}."""
  for eqn in jaxpr.eqns:
    inside = in_kernel or attention.in_kernel(str(eqn.source_info.name_stack), chip)
    bodies = inner_programs(eqn)
    if eqn.primitive.name in _CALLS and bodies:
      body, *_ = bodies
      given = {var: values[arg] for var, arg in zip(body.invars, eqn.invars) if _is_known(arg, values)}
      _flatten(body, given, operations, ignored, chip, inside)
      values.update((var, given[result]) for var, result in zip(eqn.outvars, body.outvars) if _is_known(result, given))
    else:
      gives = [_Value(0 if tuple(sorted(var.aval.shape)) in ignored else _bytes(var), inside) for var in eqn.outvars]
      operations.append(_Operation(eqn.primitive.name, _known(eqn.invars, values), gives, bodies, inside))
      values.update(zip(eqn.outvars, gives))


def _is_known(var, values) -> bool:
  return not isinstance(var, Literal) and var in values


def _known(variables, values) -> list[_Value]:
  """Their values, but for constants' and arguments'."""
  return [values[var] for var in variables if _is_known(var, values)]


def _kept(operations) -> set[_Value]:
  kept = set()
  for operation in operations:
    kept.update(value for value in operation.takes if value.in_kernel != operation.in_kernel)
    if not operation.in_kernel:
      whole = operation.name in _WHOLE or operation.bodies
      kept.update(operation.takes if whole else ())
      kept.update(operation.gives if whole or operation.name in _SUMS else ())
  return kept


def _last_uses(operations, kept) -> dict[_Value, int]:
  """{kept value: place of the last operation that reads it}, for its own use or to compute anew what is not kept."""
  needs, last = {}, {}
  for place, operation in enumerate(operations):
    read = frozenset().union(*(needs[value] for value in operation.takes))
    last.update(dict.fromkeys(read, place))
    needs.update((value, frozenset([value]) if value in kept else read) for value in operation.gives)
  return last


def _bytes(var) -> int:
  return math.prod(var.aval.shape) * getattr(var.aval.dtype, 'itemsize', 8)
