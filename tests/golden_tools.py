"""Reading the golden files: arrays, their json, the deterministic weight rule, the comparison."""

import functools
import json
import os
import pathlib
import zlib

import jax
import numpy as np

FOLDER = pathlib.Path(os.environ.get('PAGODA_GOLDENS', pathlib.Path(__file__).parent / 'goldens'))


def exists(name: str) -> bool:
  """Whether the folder holds the golden file: another one may hold some of them only."""
  return (FOLDER / f'{name}.npz').exists()


@functools.cache
def load(name: str):
  """(arrays, json) of the golden file `name`.npz."""
  arrays = np.load(FOLDER / f'{name}.npz')
  return arrays, json.loads(str(arrays['json']))


def rule_tensor(prefix: str, name: str, shape, gain: float = 1.0) -> np.ndarray:
  """The tensor that the weight rule (goldens/README, section 1) gives to a parameter."""
  rng = np.random.default_rng(zlib.crc32((prefix + name).encode()))
  z = rng.standard_normal(tuple(shape)).astype(np.float32)
  if len(shape) >= 2:
    return z * np.float32(gain / np.sqrt(np.prod(shape[1:])))
  z = np.float32(0.1) * z
  if name.endswith('running_var'):
    return np.float32(1) + np.abs(z)
  if name.endswith('weight'):
    return np.float32(1) + z
  return z  # biases and running means


def rule_state_dict(params, prefix: str, gain: float = 1.0, kept=()) -> dict[str, np.ndarray]:
  """State dict of the rule for json's list of [name, shape], without the `kept` buffers."""
  return {name: rule_tensor(prefix, name, shape, gain) for name, shape in params if name not in kept}


def assert_close(actual, reference, tolerance: float, what: str = ''):
  """max|actual - reference| <= tolerance * rms(reference), the goldens' measure."""
  actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
  assert actual.shape == reference.shape, f'{what}: shape {actual.shape}, expected {reference.shape}'
  error = np.max(np.abs(actual - reference)) / np.sqrt(np.mean(reference**2))
  assert error <= tolerance, f'{what}: max error {error:.2e} of rms, tolerance {tolerance:.0e}'


def nhwc(x) -> np.ndarray:
  """NCHW -> NHWC over the last three axes."""
  return np.moveaxis(np.asarray(x), -3, -1)


def nchw(x) -> np.ndarray:
  """NHWC -> NCHW over the last three axes."""
  return np.moveaxis(np.asarray(x), -1, -3)


def in_float32(check):
  """The check without the reduced-precision products that accelerators use by default."""
  def checked():
    with jax.default_matmul_precision('highest'):
      check()

  return checked
