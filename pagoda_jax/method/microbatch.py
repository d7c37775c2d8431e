"""A batch worked through in parts, one after the other: less memory for activations, the same result.

Part i holds images i, i + parts, i + 2 * parts, ... A batch whose first axis is split over devices stays where
it is: every part is spread over all of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def count_parts(batch_size: int, num_devices: int, most: int) -> int:
  """Parts of a global batch, so that a device works on at most `most` images at once; 0: on all of them."""
  here = batch_size // num_devices
  return here // most if 0 < most < here else 1


def mean_and_grad(losses_of: Callable, parts: int) -> Callable:
  """jax.value_and_grad of the mean of losses that each belong to one image.

  Nothing is computed twice: each part's gradient is taken before the next part begins. Where the mesh that is set does
  not split parameters, each device works through its own images alone, and gradients are summed over devices once.

  Args:
    losses_of: losses_of(params, *batch) -> [b]; an image's loss depends on its own rows of the batch alone.
    parts: a divisor of the batch size.

  Returns:
    function(params, *batch) -> (mean loss, its gradient with respect to params); batch: trees of [B, ...].
  """
  whole = jax.value_and_grad(lambda params, *batch: jnp.mean(losses_of(params, *batch)))
  if parts == 1:
    return whole

  def function(params, *batch):
    def add(total, part):
      return jax.tree.map(jnp.add, total, whole(params, *part)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, _split(batch, parts))
    return jax.tree.map(lambda x: x / parts, total)

  def on_devices(params, *batch):
    mesh, count = jax.sharding.get_abstract_mesh(), len(jax.tree.leaves(batch)[0])
    # A mesh of other axes is the caller's own: nobody here knows what it splits.
    ours = mesh.axis_names == ('data', 'fsdp') and not mesh.manual_axes
    if not ours or mesh.size == 1 or mesh.shape['fsdp'] > 1 or count % (mesh.size * parts):
      return function(params, *batch)
    means = lambda *args: jax.lax.pmean(function(*args), mesh.axis_names)
    specs = PartitionSpec(), *[PartitionSpec(mesh.axis_names)] * len(batch)
    return jax.shard_map(means, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(params, *batch)

  return on_devices


def mapped(function: Callable, parts: int) -> Callable:
  """The same function of a batch, computed part by part.

  For what a loss sees whole (batch statistics): a backward pass computes each part again, from its inputs, and sums
  its gradients over the devices.

  Args:
    function: function(*batch) -> tree of [b, ...]; an image's result depends on its own rows of the batch alone.
    parts: a divisor of the batch size.
  """
  if parts == 1:
    return function
  again = jax.checkpoint(function, prevent_cse=False)  # a loop's body needs no barrier against common subexpressions

  def over_parts(*batch):
    return _joined(jax.lax.map(lambda part: again(*part), _split(batch, parts)))

  return over_parts


def _split(batch, parts):
  """Trees of [B, ...] as [parts, B / parts, ...]."""
  return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _joined(batch):
  """Undoes `_split`."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)
