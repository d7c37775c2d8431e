"""The device mesh, the one rule that shards every tree, and placing batches on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Arrays below this many elements are replicated: gathering them costs more than holding them.
SHARDED_FROM = 2**16


def axis_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
  """Sizes of the axes ('data', 'fsdp') over `count` devices; -1 takes the devices that the other axis leaves."""
  data = count // fsdp if data == -1 else data
  return data, count // data if fsdp == -1 else fsdp


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
  """Mesh of axes ('data', 'fsdp') as `axis_sizes` has them.

  Auto axis types: with JAX's default explicit ones, an FSDP-sharded Linen layer raises ShardingTypeError.
  """
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(data, fsdp, len(devices))
  return jax.make_mesh(sizes, ('data', 'fsdp'), (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def split_as_batch(array: jax.Array) -> jax.Array:
  """Within a program: the array, its first axis over all devices of `make_mesh`'s mesh; as it is where none is set.

  Where parameters are split, XLA is else free to split what a network makes of numbers drawn inside the step as the
  parameters are, by channels: every device then holds, and sends, maps of the whole batch.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not {'data', 'fsdp'} <= set(mesh.axis_names) or mesh.manual_axes or len(array) % mesh.size:
    return array
  return jax.lax.with_sharding_constraint(array, PartitionSpec(('data', 'fsdp')))


def leaf_sharding(shape: tuple[int, ...], mesh: Mesh, by_rule: bool = True) -> NamedSharding:
  """Shards the largest divisible dimension over 'fsdp'; small or indivisible arrays are replicated.

  `by_rule` False, of frozen networks where `config.shard_frozen` is: replicates all.
  """
  ways = mesh.shape['fsdp']
  if by_rule and ways > 1 and np.prod(shape, dtype=np.int64) >= SHARDED_FROM:
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if divisible:
      largest = max(divisible, key=lambda axis: shape[axis])
      return NamedSharding(mesh, PartitionSpec(*(('fsdp' if axis == largest else None) for axis in range(len(shape)))))
  return replicated(mesh)


def tree_shardings(tree, mesh: Mesh):
  """`leaf_sharding` of every leaf of a tree of arrays or ShapeDtypeStructs."""
  return jax.tree.map(lambda leaf: leaf_sharding(leaf.shape, mesh), tree)


def abstract(tree, mesh: Mesh, by_rule: bool = True):
  """The tree as ShapeDtypeStructs that carry their `leaf_sharding`: the target of a restore."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding(leaf.shape, mesh, by_rule)), tree
  )


def place(tree, mesh: Mesh, by_rule: bool = True):
  """Puts a tree of host arrays (equal on every host) on the mesh, every leaf as its `leaf_sharding` says."""

  def put(leaf):
    leaf = np.asarray(leaf)
    where = leaf_sharding(leaf.shape, mesh, by_rule)
    # device_put would first compare the whole array between the hosts.
    return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

  return jax.tree.map(put, tree)


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
  whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(place_batch(rows, mesh))
  return np.asarray(whole)


def place_global(batch, mesh: Mesh):
  """Shards a batch (NumPy) that every host holds whole over all devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)
