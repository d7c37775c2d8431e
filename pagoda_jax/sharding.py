"""The device mesh, the one rule that shards every tree, and placing batches on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Arrays below this many elements are replicated: gathering them costs more than holding them.
SHARDED_FROM = 2**16


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
  """Mesh of axes ('data', 'fsdp'); -1 takes the devices that the other axis leaves.

  Auto axis types: with JAX's default explicit ones, an FSDP-sharded Linen layer raises ShardingTypeError.
  """
  devices = jax.devices() if devices is None else devices
  data = len(devices) // fsdp if data == -1 else data
  fsdp = len(devices) // data if fsdp == -1 else fsdp
  return jax.make_mesh((data, fsdp), ('data', 'fsdp'), (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def leaf_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Shards the largest divisible dimension over 'fsdp'; small or indivisible arrays are replicated."""
  ways = mesh.shape['fsdp']
  if ways > 1 and np.prod(shape, dtype=np.int64) >= SHARDED_FROM:
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if divisible:
      largest = max(divisible, key=lambda axis: shape[axis])
      return NamedSharding(mesh, PartitionSpec(*(('fsdp' if axis == largest else None) for axis in range(len(shape)))))
  return replicated(mesh)


def tree_shardings(tree, mesh: Mesh):
  """`leaf_sharding` of every leaf of a tree of arrays or ShapeDtypeStructs."""
  return jax.tree.map(lambda leaf: leaf_sharding(leaf.shape, mesh), tree)


def abstract(tree, mesh: Mesh):
  """The tree as ShapeDtypeStructs that carry their shardings: the target of a restore."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding(leaf.shape, mesh)), tree
  )


def place(tree, mesh: Mesh, by_rule: bool = True):
  """Puts a tree of host arrays (equal on every host) on the mesh: by the rule, or whole on every device."""
  sharding_of = leaf_sharding if by_rule else lambda shape, mesh: replicated(mesh)
  return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), sharding_of(np.shape(leaf), mesh)), tree)


def place_batch(batch, mesh: Mesh):
  """Joins every host's part of a batch (NumPy, first axis) into global arrays."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def place_global(batch, mesh: Mesh):
  """Shards a batch (NumPy) that every host holds whole over all devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


def is_primary() -> bool:
  """Whether this process writes logs, pictures and manifests."""
  return jax.process_index() == 0
