"""Sums over all places of pictures, in float32, in the form that suits the chip: of norms and of their gradients."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pagoda_jax.networks import attention, chips

if jax.__version_info__ < (0, 12):
  from jax.experimental.pallas import triton
else:  # JAX has announced that it will leave it out; these versions have not been tried
  triton = None

TILE = (128, 64)  # most places and channels that one program of the kernel sums
ROWS = 16  # places of them at once: with 4 warps 8 values a thread, 16 bytes of a map
SMALLEST = (8, 32)  # tiles of fewer are left to XLA
AMPERE = 8.0  # compute capability of the first GPUs that XLA compiles Triton for


def place_sums(
    terms: Callable[..., Sequence[jax.Array]], maps: Sequence[jax.Array], factors: Sequence[jax.Array] = ()
) -> list[jax.Array]:
  """Sums over all places of each of terms(*maps, *factors): float32 [B, C] each.

  On NVIDIA GPUs by a Pallas kernel, where the maps are bfloat16, JAX has Triton's form of them, and places and channels
  are whole tiles. What the terms have in common with other uses of the maps is computed again there: XLA keeps it in
  memory, as float32, where it makes the sums itself.

  Args:
    terms: maps (of some places and channels) and factors that broadcast to them -> float32 of the maps' shape each.
    maps: [B, N, C] each.
    factors: float32 [B, C] each.
  """
  _, places, channels = maps[0].shape
  of_channels = [factor[:, None] for factor in factors]
  rows, width = (math.gcd(count, most) for count, most in zip((places, channels), TILE))
  tiled = rows >= SMALLEST[0] and width >= SMALLEST[1]
  if not (tiled and maps[0].dtype == jnp.bfloat16 and chips.chip() == 'nvidia' and _has_triton()):
    return [values.sum(1) for values in terms(*maps, *of_channels)]
  count, at_once = len(jax.eval_shape(terms, *maps, *of_channels)), math.gcd(rows, ROWS)

  def kernel(*refs):
    of_maps, of_factors, sums = refs[:len(maps)], [ref[...] for ref in refs[len(maps):-count]], refs[-count:]

    def added(index, totals):
      some = pl.ds(index * at_once, at_once)
      values = terms(*(ref[some, :] for ref in of_maps), *of_factors)
      return [total + value for total, value in zip(totals, values)]

    totals = jax.lax.fori_loop(0, rows // at_once, added, [jnp.zeros((at_once, width), jnp.float32)] * count)
    for ref, total in zip(sums, totals):
      ref[...] = total.sum(0)

  def by_tiles(*arrays):
    grid = len(arrays[0]), places // rows, channels // width
    tile = pl.BlockSpec((None, rows, width), lambda image, row, column: (image, row, column))
    factor = pl.BlockSpec((None, width), lambda image, row, column: (image, column))
    sums = pl.BlockSpec((None, None, width), lambda image, row, column: (image, row, column))
    shape = jax.ShapeDtypeStruct((*grid[:2], channels), jnp.float32)
    of_tiles = pl.pallas_call(
      kernel, grid=grid, in_specs=[tile] * len(maps) + [factor] * len(factors), out_specs=[sums] * count,
      out_shape=[shape] * count, compiler_params=triton.CompilerParams(num_warps=4), name='place_sums')(*arrays)
    return [each.sum(1) for each in of_tiles]

  return attention.over_devices(by_tiles)(*maps, *factors)


def _has_triton() -> bool:
  """Whether JAX has it, and the GPU, where there is one here, is new enough for it."""
  return triton is not None and float(getattr(jax.devices()[0], 'compute_capability', AMPERE)) >= AMPERE
