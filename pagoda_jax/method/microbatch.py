"""A batch worked through in parts, one after the other: less memory for activations, the same result.

Part i holds images i, i + parts, i + 2 * parts, ... A batch whose first axis is split over devices stays where
it is: every part is spread over all of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def count_parts(batch_size: int, num_devices: int, most: int) -> int:
  """Parts of a global batch, so that a device works on at most `most` images at once; 0: on all of them.

  The fewest that divide a device's images: of 10 of which it shall take 4 at most, it takes 2 five times.
  """
  here = batch_size // num_devices
  if not 0 < most < here:
    return 1
  return next(parts for parts in range(-(-here // most), here + 1) if here % parts == 0)


def sum_and_grad(losses_of: Callable, parts: int) -> Callable:
  """The sum, over the parts of a batch, of the mean of losses that each belong to one image, and its gradient.

  Nothing is computed twice: each part's gradient is taken before the next part begins.

  Args:
    losses_of: losses_of(params, *batch) -> [b]; an image's loss depends on its own rows of the batch alone.
    parts: a divisor of the batch size.

  Returns:
    function(params, *batch) -> (sum, its gradient with respect to params); batch: trees of [B, ...].

  Raises:
    ValueError: by the function, where `parts` does not divide the batch.
  """
  mean = jax.value_and_grad(lambda params, *batch: jnp.mean(losses_of(params, *batch)))
  if parts == 1:
    return mean

  def function(params, *batch):
    def add(total, part):
      return jax.tree.map(jnp.add, total, mean(params, *part)), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, _split(batch, parts))[0]

  return function


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
  if wrong := [len(x) for x in jax.tree.leaves(batch) if len(x) % parts]:
    raise ValueError(f'a batch of {wrong[0]} cannot be worked through in {parts} equal parts')
  return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _joined(batch):
  """Undoes `_split`."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)
