"""A tree's bytes on a mesh: what a device holds of it, updates of it, and sends of it."""

import collections
import itertools
import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from pagoda_jax.runtime import sharding


def bytes_of(tree) -> int:
  """Bytes of a tree of ShapeDtypeStructs."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Parted(NamedTuple):
  """Bytes of a tree's arrays on a mesh {axis: size}, by the axes over which an update splits them.

  The arrays themselves are split over 'fsdp' alone, where it is among these.
  """

  mesh: dict[str, int]
  sizes: dict[tuple[str, ...], int]

  def _sum(self, share) -> float:
    """Of share(axes) of each size."""
    return sum(share(axes) * size for axes, size in self.sizes.items())

  def _ways(self, axes) -> int:
    return math.prod(self.mesh[axis] for axis in axes)

  @property
  def held(self) -> float:
    """By a device."""
    return self._sum(lambda axes: 1 / self._ways({'fsdp'}.intersection(axes)))

  @property
  def updated(self) -> float:
    """By a device."""
    return self._sum(lambda axes: 1 / self._ways(axes))

  @property
  def gathered(self) -> float:
    """Sent by a device, in a ring, to have what is split over 'fsdp' whole."""
    return self._sum(lambda axes: _ring(self._ways({'fsdp'}.intersection(axes))))

  @property
  def renewed(self) -> float:
    """The same of what the devices along 'zero1' have updated."""
    return self._sum(lambda axes: _ring(self._ways({'zero1'}.intersection(axes)))
                     / self._ways({'fsdp'}.intersection(axes)))

  def summed(self, axes: tuple[str, ...]) -> float:
    """The same to sum gradients, of which each device then has its share along these axes."""

    def of(split):
      ways = self._ways(set(axes).intersection(split))
      return _ring(ways) + 2 * _ring(self._ways(self.mesh) // ways) / ways

    return self._sum(of)


def _ring(devices: int) -> float:
  """Share of an array that each device passes on."""
  return (devices - 1) / devices


def parted(tree, mesh: dict[str, int], by_rule: bool = True, itemsize: int | None = None) -> Parted:
  """A tree of ShapeDtypeStructs on a mesh {axis: size}; `by_rule` as in `sharding.place`.

  `itemsize`: bytes of a number, where it is sent in another type.
  """
  sizes = collections.Counter()
  for leaf in jax.tree.leaves(tree):
    spec = sharding.leaf_spec(leaf.shape, mesh, ('fsdp', 'zero1') if by_rule else ())
    axes = itertools.chain(*((names,) if isinstance(names, str) else names or () for names in spec))
    sizes[tuple(sorted(axes))] += leaf.size * (itemsize or leaf.dtype.itemsize)
  return Parted(mesh, dict(sizes))


def held_bytes(tree, mesh: dict[str, int], by_rule: bool = True) -> tuple[int, int]:
  """(bytes that a device holds of a tree, how many of its arrays are split), as `sharding.place` splits it."""
  abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
  places = jax.tree.leaves(sharding.tree_shardings(tree, abstract, by_rule))
  held = sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf, place in zip(jax.tree.leaves(tree), places))
  return held, sum(not place.is_fully_replicated for place in places)
