"""Gradients of losses that each belong to one image: summed over devices once a step, however the batch is divided."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from pagoda_jax.method import microbatch
from pagoda_jax.runtime import sharding


def mean_and_grad(losses_of: Callable, parts: int) -> Callable:
  """jax.value_and_grad of the mean of losses that each belong to one image, a batch worked through in parts.

  Where the mesh that is set does not split parameters, each device works through its own images alone, and gradients
  are summed over devices once; of those that devices along 'zero1' share, each is left with its own.

  Args:
    losses_of, parts: as microbatch.sum_and_grad takes them.

  Returns:
    function(params, *batch) -> (mean loss, its gradient with respect to params); batch: trees of [B, ...].
  """
  summed = microbatch.sum_and_grad(losses_of, parts)

  def mean(params, *batch):
    mesh, count = sharding.own_mesh(), len(jax.tree.leaves(batch)[0])
    # A mesh of other axes is the caller's own: nobody here knows what it splits.
    apart = mesh is not None and mesh.size > 1 and mesh.shape['fsdp'] == 1 and count % (mesh.size * parts) == 0
    if not apart or parts == mesh.shape['zero1'] == 1:  # the last: XLA sums once by itself
      return _divided(summed(params, *batch), parts)
    splits = jax.tree.map(lambda leaf: sharding.leaf_spec(leaf.shape, mesh.shape, ('zero1',)), params)

    def over_devices(*args):
      loss, grads = summed(*args)
      totals = jax.lax.psum(loss, sharding.AXES), jax.tree.map(_share_of_sum, grads, splits)
      return _divided(totals, mesh.size * parts)

    specs = PartitionSpec(), *[PartitionSpec(sharding.AXES)] * len(batch)
    return jax.shard_map(
      over_devices, in_specs=specs, out_specs=(PartitionSpec(), splits), check_vma=False)(params, *batch)

  return mean


def _share_of_sum(grad, split):
  """Of a sum over all devices what is this device's by `split`, within shard_map."""
  if 'zero1' not in split:
    return jax.lax.psum(grad, sharding.AXES)
  share = jax.lax.psum_scatter(grad, 'zero1', scatter_dimension=split.index('zero1'), tiled=True)
  return jax.lax.psum(share, ('data', 'fsdp'))


def _divided(tree, count):
  return tree if count == 1 else jax.tree.map(lambda x: x / count, tree)
