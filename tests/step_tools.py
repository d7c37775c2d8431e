"""What a train step is called with in tests: networks, a state at step 0, a batch."""

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax import config as configs
from pagoda_jax import models, sharding, state
from pagoda_jax.networks import generator

PHASES = ('teacher', 'distill', 'grow_16')
RNG = jax.random.key(0)
QUICK = {'xla_backend_optimization_level': 0}  # halves the time of tests that do little but compile


def jitted(step, placed, mesh, **options):
  """The step as the training loop compiles it for a state on the mesh, but with QUICK and `options` of XLA."""
  shardings = (sharding.tree_shardings(placed, mesh), sharding.replicated(mesh))
  return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=QUICK | options)


def batch_of(config, name, count=8, seed=0):
  """A batch of one of the tiny experiment's PHASES, NumPy."""
  resolution, base = configs.phase_resolution(config, name), config.base_resolution
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (2, count, resolution, resolution, 1), dtype=np.uint8)
  labels = rng.integers(0, 10, (2, count)).astype(np.int32)
  if name == 'teacher':
    return {'image': images[0], 'label': labels[0]}
  noise = (80 * rng.standard_normal((count, base, base, 1))).astype(np.float32)
  return {'image': images[0], 'label': labels[0], 'noise': noise, 'real_image': images[1], 'real_label': labels[1]}


def start_of(config, name, frozen=None):
  """(networks, state at step 0 as host arrays) of one of PHASES."""
  phase, networks = config.phases[name], models.build(config, name)
  params = jax.tree.map(_spread, models.init_unet(networks.unet, RNG))
  if name == 'teacher':
    return networks, jax.device_get(state.init_teacher(params, phase))
  fixed = {}
  if name == 'grow_16':
    params, fixed = generator.split_trainable(params, (8, 16))
  opponent = models.init_discriminator(networks, frozen or {}, configs.phase_resolution(config, name), RNG)
  return networks, jax.device_get(state.init_generator(params, fixed, opponent, phase))


def _spread(leaf):
  """Zero-initialised leaves would hide most of the network from these tests."""
  noise = np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(np.float32)
  return jnp.asarray(leaf + 0.05 * noise)
