"""Sums over all places of pictures, in float32: of gradients of biases and of norms."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pagoda_jax.networks import attention, chips

try:
  from jax.experimental.pallas import triton
except ImportError:  # on its way out of JAX
  triton = None

TILE = (128, 64)  # most places and channels that one program of the kernel sums: 32 values a thread
SMALLEST = (8, 32)


def place_sums(
    terms: Callable[..., Sequence[jax.Array]], maps: Sequence[jax.Array], factors: Sequence[jax.Array] = ()
) -> list[jax.Array]:
  """Sums over all places of each of terms(*maps, *factors): [B, C] each.

  On NVIDIA GPUs by a Pallas kernel, where JAX has Triton's and places and channels are whole tiles. It reads the maps
  at the memory's speed, which XLA's sums of columns do not, and has XLA keep nothing in float32 between them and what
  else is made of the same maps.

  Args:
    terms: maps (of some places and channels) and factors that broadcast to them -> float32 of the maps' shape each.
    maps: [B, N, C] each.
    factors: [B, C] each.
  """
  _, places, channels = maps[0].shape
  of_channels = [factor[:, None] for factor in factors]
  rows, width = (math.gcd(count, most) for count, most in zip((places, channels), TILE))
  tiles = rows >= SMALLEST[0] and width >= SMALLEST[1] and maps[0].dtype == jnp.bfloat16
  if not (tiles and chips.chip() == 'nvidia' and _has_triton()):
    return [values.sum(1) for values in terms(*maps, *of_channels)]
  count = len(jax.eval_shape(terms, *maps, *of_channels))

  def kernel(*refs):
    for sums, values in zip(refs[-count:], terms(*(ref[...] for ref in refs[:-count]))):
      sums[...] = values.sum(0)

  def tiles_summed(*arrays):
    grid = len(arrays[0]), places // rows, channels // width
    tile = pl.BlockSpec((None, rows, width), lambda image, row, column: (image, row, column))
    factor = pl.BlockSpec((None, width), lambda image, row, column: (image, column))
    of_tile = pl.BlockSpec((None, None, width), lambda image, row, column: (image, row, column))
    shape = jax.ShapeDtypeStruct((*grid[:2], channels), jnp.float32)
    sums = pl.pallas_call(
      kernel, grid=grid, in_specs=[tile] * len(maps) + [factor] * len(factors), out_specs=[of_tile] * count,
      out_shape=[shape] * count, compiler_params=triton.CompilerParams(num_warps=8), name='place_sums')(*arrays)
    return [values.sum(1) for values in sums]

  return attention.over_devices(tiles_summed)(*maps, *factors)


def _has_triton() -> bool:
  """Whether JAX still has it, and this GPU, where there is one here, is an Ampere or newer."""
  return triton is not None and float(getattr(jax.devices()[0], 'compute_capability', 8)) >= 8
