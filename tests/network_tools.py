"""Variables for networks under test, without a jitted init (which dominates small tests)."""

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pagoda_jax.runtime import sharding


def random_variables(module, *args, seed=0, gain=1.0, **kwargs):
  """Variables for `module.init(rng, *args, **kwargs)`: unit-gain kernels, norms near the identity."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
  rng = np.random.default_rng(seed)
  return traverse_util.path_aware_map(lambda path, leaf: _random_leaf(rng, path, leaf.shape, gain), shapes)


def _random_leaf(rng, path, shape, gain):
  z = rng.standard_normal(shape).astype(np.float32)
  if path[-1] == 'var':
    return 1 + 0.1 * np.abs(z)
  if path[-1] == 'scale' or path[-1].startswith('weight'):
    return 1 + 0.1 * np.abs(z)
  if path[0] == 'spectral':
    return z / np.linalg.norm(z)
  if len(shape) < 2 or path[-1] in ('positions', 'embedding'):
    return 0.1 * z
  return z * np.float32(gain / np.sqrt(np.prod(shape[:-1])))


def relative_error(actual, reference):
  """rms(actual - reference) / rms(reference) over all leaves of two trees, the worst of them."""
  errors = jax.tree.map(
      lambda a, b: float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)), actual, reference
  )
  return max(jax.tree.leaves(errors))


# Kind and platform of devices that are not here.
V5E, H100, CPU = ('TPU v5 lite', 'tpu'), ('NVIDIA H100 80GB HBM3', 'gpu'), ('cpu', 'cpu')


def on(device, count=1):
  """Programs traced within are for so many devices, which are not here."""
  kind, platform = device
  mesh = AbstractMesh((count, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3,
                      abstract_device=AbstractDevice(kind, 1, platform))
  return jax.sharding.use_abstract_mesh(mesh)
