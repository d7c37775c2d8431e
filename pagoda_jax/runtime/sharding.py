"""The device mesh, the one rule that shards every tree, and placing batches on it."""

import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# Of a batch; the third also splits parameters with all that belongs to them, the second what only an update reads.
AXES = ('data', 'zero1', 'fsdp')
# Arrays below this many elements are replicated: gathering them costs more than holding them.
SHARDED_FROM = 2**16
# Fields of a phase's state that its update alone reads: they are split over 'zero1' too.
OF_UPDATE = ('opt_state', 'discriminator_opt_state', 'pairs_discriminator_opt_state', 'ema', 'other_emas')


def axis_sizes(count: int, data: int = -1, fsdp: int = 1, zero1: int = 1) -> dict[str, int]:
  """{axis of AXES: its size} over `count` devices; -1, of one of them, takes the devices that the others leave."""
  given = {'data': data, 'zero1': zero1, 'fsdp': fsdp}
  rest = count // abs(math.prod(given.values()))
  return {name: rest if size == -1 else size for name, size in given.items()}


def make_mesh(data: int = -1, fsdp: int = 1, zero1: int = 1, devices=None) -> Mesh:
  """Mesh of AXES, of sizes as `axis_sizes` has them.

  Auto axis types: with JAX's default explicit ones, an FSDP-sharded Linen layer raises ShardingTypeError.

  Raises:
    ValueError: the sizes do not take all devices; of too few JAX would leave the others idle.
  """
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(len(devices), data, fsdp, zero1)
  if (taken := math.prod(sizes.values())) != len(devices):
    raise ValueError(f'a mesh of {sizes} takes {taken} devices, and there are {len(devices)}: must be all of them; '
                     'give others as `devices`')
  return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def own_mesh() -> AbstractMesh | None:
  """Within a program: the mesh that is set, where it is one of `make_mesh`'s; None of another, or none."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if mesh.axis_names == AXES and not mesh.manual_axes else None


def split_as_batch(array: jax.Array) -> jax.Array:
  """Within a program: the array, its first axis over all devices of `make_mesh`'s mesh; as it is where none is set.

  Where parameters are split, XLA is else free to split what a network makes of numbers drawn inside the step as the
  parameters are, by channels: every device then holds, and sends, maps of the whole batch.
  """
  mesh = own_mesh()
  if mesh is None or len(array) % mesh.size:
    return array
  return jax.lax.with_sharding_constraint(array, PartitionSpec(AXES))


def split_as_update(tree):
  """Within a program: gradients, or what becomes of them, split as an optimiser's moments are over 'zero1'.

  Each device then updates its share alone. As they are where that axis has one device.
  """
  return _constrained(tree, ('fsdp', 'zero1'))


def split_as_parameters(tree):
  """Within a program: gradients split as their parameters are, where `split_as_update` would split them further.

  XLA else takes what an update asks for back into the network, and moves maps of it where it should sum gradients.
  """
  return _constrained(tree, ('fsdp',))


def _constrained(tree, axes):
  mesh = own_mesh()
  if mesh is None or mesh.shape['zero1'] == 1:
    return tree
  return jax.tree.map(
    lambda leaf: jax.lax.with_sharding_constraint(leaf, leaf_spec(leaf.shape, mesh.shape, axes)), tree)


def leaf_spec(shape: tuple[int, ...], sizes: Mapping[str, int], axes: tuple[str, ...]) -> PartitionSpec:
  """Splits an array over the axes, one after the other, each along the dimension that is then the largest divisible.

  `sizes`: {axis: size} of the mesh. Small arrays stay whole, and those without such a dimension.
  """
  left, split = list(shape), [()] * len(shape)
  for name in axes if math.prod(shape) >= SHARDED_FROM else ():
    ways = sizes[name]
    divisible = [place for place, size in enumerate(left) if size % ways == 0]
    if ways > 1 and divisible:
      largest = max(divisible, key=left.__getitem__)
      left[largest] //= ways
      split[largest] += (name,)
  return PartitionSpec(*(names or None for names in split)) if any(split) else PartitionSpec()


def tree_shardings(tree, mesh: Mesh, by_rule: bool = True):
  """The sharding of every leaf of a tree of arrays or ShapeDtypeStructs, by `leaf_spec`.

  All are split over 'fsdp', and those of a state's OF_UPDATE over 'zero1'. `by_rule` False, of frozen networks where
  `config.shard_frozen` is: replicates all.
  """

  def of(path, leaf):
    of_update = bool(path) and getattr(path[0], 'name', None) in OF_UPDATE
    axes = (('fsdp', 'zero1') if of_update else ('fsdp',)) if by_rule else ()
    return NamedSharding(mesh, leaf_spec(leaf.shape, mesh.shape, axes))

  return jax.tree_util.tree_map_with_path(of, tree)


def abstract(tree, mesh: Mesh, by_rule: bool = True):
  """The tree as ShapeDtypeStructs that carry their `tree_shardings`: the target of a restore."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    tree, tree_shardings(tree, mesh, by_rule))


def place(tree, mesh: Mesh, by_rule: bool = True):
  """Puts a tree of host arrays (equal on every host) on the mesh, every leaf as `tree_shardings` says."""

  def put(leaf, where):
    # device_put would first compare the whole array between the hosts.
    return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

  tree = jax.tree.map(np.asarray, tree)
  return jax.tree.map(put, tree, tree_shardings(tree, mesh, by_rule))


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """Which rows of a batch this host's devices hold, ascending: what it reads, and gives to `place_batch`."""
  parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts.values()]))


def place_batch(batch, mesh: Mesh):
  """Joins every host's `local_rows` of a batch (NumPy, first axis) into global arrays."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def gathered(rows: np.ndarray, mesh: Mesh) -> np.ndarray:
  """The whole of an array (NumPy) of which every host holds its `local_rows`."""
  return np.asarray(_whole(mesh)(place_batch(rows, mesh)))


@functools.cache  # of a function made anew, each step would wait for a program of its own
def _whole(mesh: Mesh):
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def place_global(batch, mesh: Mesh):
  """Shards a batch (NumPy) that every host holds whole over all devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)
