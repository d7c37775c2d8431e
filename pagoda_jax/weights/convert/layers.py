"""Leaves of the layers that every network has."""

from collections.abc import Iterator

from pagoda_jax.weights.convert.mapping import Layout, Leaf


def layer_leaves(theirs: str, ours: str, shape: tuple[int, ...], layout: Layout, bias: bool = True) -> Iterator[Leaf]:
  """Weight of `shape` (theirs) and bias of its first size: a dense or convolution layer."""
  yield Leaf(f'{theirs}.weight', f'params/{ours}/kernel', shape, layout)
  if bias:
    yield Leaf(f'{theirs}.bias', f'params/{ours}/bias', shape[:1])


def norm_leaves(theirs: str, ours: str, width: int) -> Iterator[Leaf]:
  """Scale and bias of a layer or group norm."""
  yield Leaf(f'{theirs}.weight', f'params/{ours}/scale', (width,))
  yield Leaf(f'{theirs}.bias', f'params/{ours}/bias', (width,))


def batch_norm_leaves(theirs: str, ours: str, width: int) -> Iterator[Leaf]:
  """The four tensors of a batch norm, without its counter."""
  yield from norm_leaves(theirs, ours, width)
  for name in ('mean', 'var'):
    yield Leaf(f'{theirs}.running_{name}', f'batch_stats/{ours}/{name}', (width,))
