"""The engine of every conversion: a list of `Leaf`s says which tensor of theirs is which of ours.

A format (edm.py, pagoda.py, ...) describes a network as a list of leaves, derived from the same
options that build our module. Both directions and the table of what does not fit follow from it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import traverse_util

StateDict = Mapping[str, np.ndarray]


class ConversionError(ValueError):
  """The state dict is not of the expected architecture; the message holds a table of every misfit."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """A lossless change of array layout: `to_ours` and `to_theirs` undo each other exactly."""

  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
# torch Linear [out, in] <-> Linen Dense [in, out].
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
# torch Conv2d [out, in, h, w] <-> Linen Conv [h, w, in, out]; grouped and depthwise ones as well.
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# 1x1 convolutions that are Dense layers here.
POINTWISE_2D = Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
POINTWISE_1D = Layout(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])


def permuted(layout: Layout, order: np.ndarray, axis: int = 0) -> Layout:
  """`layout` after taking `order` along `axis` of their tensor: ours[i] = theirs[order[i]]."""
  inverse = np.argsort(order)
  return Layout(
      lambda x: layout.to_ours(np.take(x, order, axis)),
      lambda x: np.take(layout.to_theirs(x), inverse, axis),
  )


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One tensor: `theirs` is a state-dict name, `ours` a '/'-joined path, `shape` theirs.

  `more` names further tensors of theirs, of the same shape: `layout` is of all of them one after the other along their
  first axis, which are one of ours.
  """

  theirs: str
  ours: str
  shape: tuple[int, ...]
  layout: Layout = SAME
  more: tuple[str, ...] = ()

  @property
  def names(self) -> tuple[str, ...]:
    return (self.theirs, *self.more)


def to_ours(state_dict: StateDict, leaves: Sequence[Leaf], carried: Callable[[str], bool] = lambda name: False):
  """Converts a PyTorch state dict to our variables.

  Args:
    state_dict: name -> array.
    leaves: the tensors of the network.
    carried: says of a name whether it is a buffer without a place in our network (a resampling
      filter, a batch counter), to be carried along so that the way back is lossless.

  Returns:
    (tree, carried tensors): nested dict in our layouts; dict of name -> array.

  Raises:
    ConversionError: a tensor is missing, unexpected or of another shape; all of them are listed.
  """
  rows = []
  flat, known = {}, set()
  for leaf in leaves:
    known.update(leaf.names)
    misfits = []
    for name in leaf.names:
      if name not in state_dict:
        misfits.append(('missing', name, '-', f'{leaf.shape} {leaf.ours}'))
      elif tuple(np.shape(state_dict[name])) != tuple(leaf.shape):
        misfits.append(('other shape', name, str(tuple(np.shape(state_dict[name]))), f'{leaf.shape} {leaf.ours}'))
    rows += misfits
    if not misfits:
      theirs = [np.asarray(state_dict[name]) for name in leaf.names]
      flat[tuple(leaf.ours.split('/'))] = _in_order(leaf.layout.to_ours(
        np.concatenate(theirs) if leaf.more else theirs[0]))
  extras = {}
  for name, value in state_dict.items():
    if name in known:
      continue
    if carried(name):
      extras[name] = np.asarray(value)
    else:
      rows.append(('unexpected', name, str(tuple(np.shape(value))), '-'))
  if rows:
    raise ConversionError(misfit_table(rows))
  return traverse_util.unflatten_dict(flat), extras


def to_theirs(tree: Mapping, leaves: Sequence[Leaf], extras: StateDict | None = None) -> dict[str, np.ndarray]:
  """The inverse of `to_ours`: our variables as a PyTorch state dict, bit for bit.

  Raises:
    ConversionError: a leaf of ours is missing, left over or of another shape.
  """
  flat = {'/'.join(path): value for path, value in traverse_util.flatten_dict(tree).items()}
  rows, out = [], {}
  for leaf in leaves:
    value = flat.pop(leaf.ours, None)
    if value is None:
      rows.append(('missing', leaf.theirs, str(leaf.shape), leaf.ours))
      continue
    value = _in_order(leaf.layout.to_theirs(np.asarray(value)))
    shape = (len(leaf.names) * leaf.shape[0], *leaf.shape[1:]) if leaf.more else tuple(leaf.shape)
    if value.shape != shape:
      rows.append(('other shape', leaf.theirs, str(shape), f'{value.shape} {leaf.ours}'))
    else:
      out.update(zip(leaf.names, np.split(value, len(leaf.names)) if leaf.more else [value]))
  rows += [('unexpected', '-', '-', f'{np.shape(value)} {path}') for path, value in flat.items()]
  if rows:
    raise ConversionError(misfit_table(rows))
  return out | dict(extras or {})


def _in_order(value: np.ndarray) -> np.ndarray:
  """In C order, and of the sides that it has: np.ascontiguousarray gives a scalar one."""
  return np.asarray(value, order='C')


def misfit_table(rows: Sequence[tuple[str, str, str, str]], limit: int = 40) -> str:
  """A readable table of (what, name, theirs, ours); long ones are cut with a count of the rest."""
  shown = [('what', 'name', 'theirs', 'ours'), *rows[:limit]]
  widths = [max(len(row[i]) for row in shown) for i in range(4)]
  lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]
  if len(rows) > limit:
    lines.append(f'... and {len(rows) - limit} more')
  return 'the weights do not fit the network:\n' + '\n'.join(lines)
