"""What a train step is called with in tests: networks, a state at step 0, a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.extend import core

from pagoda_jax import config as configs
from pagoda_jax.config import ladder
from pagoda_jax.method import perception
from pagoda_jax.networks import growth
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import models, state
from pagoda_jax.training import loop

PLAIN = ('teacher', 'distill', 'grow_16')
# 'guided:' of the experiment's variant, with EDM2's form of the networks
PHASES = (*PLAIN, 'guided:guide', 'guided:distill')
# How those that two processes take a step of are placed; in CI distillation's.
ACROSS_PROCESSES = {'distill': {'fsdp': 2, 'zero1': 2}, 'teacher': {'zero1': 8}, 'guided:guide': {'fsdp': 2}}
RNG = jax.random.key(0)
CONFIG = tiny.get_config()
GUIDED = tiny.get_config('guided')
GUIDED.network.form = 'edm2'
# Growth's step is distillation's: there with the paper's loss, here with R3GAN's.
CONFIG.phases.grow_16.adversarial.update({'loss': 'relativistic', 'r1': 1.0, 'r2': 0.5})
# In the place of the published feature networks (perception.BACKBONES).
TINY_BACKBONES = {
  configs.BACKBONES[0]: {
    'architecture': 'efficientnet_lite', 'stem': 4, 'repeats': (1,) * 7, 'widths': (4, 4, 6, 6, 8, 8, 8),
    'expansions': (1, *(2,) * 6), 'kernels': (3,) * 7,
  },
  configs.BACKBONES[1]: {
    'architecture': 'deit', 'width': 16, 'depth': 4, 'head_channels': 8, 'mlp_width': 16, 'patch': 16, 'grid': 8,
    'distilled': True,
  },
  perception.DINO_NAME: {
    'architecture': 'deit', 'width': 16, 'depth': 4, 'head_channels': 8, 'mlp_width': 16, 'patch': 16, 'grid': 4,
    'distilled': False,
  },
}  # fmt: skip
# In place of CLIP ViT-L/14's picture tower, whose width of embeddings it keeps.
TINY_CLIP = {'patch': 8, 'grid': 2, 'width': 64, 'layers': 1, 'heads': 1, 'mlp_width': 16, 'projection': 768}


def jitted(step, placed, mesh, **options):
  """The step as the training loop compiles it for a state on the mesh, but with `options` of XLA."""
  shardings = (sharding.tree_shardings(placed, mesh), sharding.replicated(mesh))
  return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def of(name):
  """(config, name there) of one of PHASES."""
  return (GUIDED, name.removeprefix('guided:')) if name.startswith('guided:') else (CONFIG, name)


def batch_of(config, name, count=8, seed=0):
  """A batch of a phase of the tiny experiment, NumPy."""
  resolution, base = configs.phase_resolution(config, name), config.base_resolution
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (2, count, resolution, resolution, 1), dtype=np.uint8)
  labels = rng.integers(0, 10, (2, count)).astype(np.int32)
  if config.phases[name].stage not in configs.GENERATOR_STAGES:
    return {'image': images[0], 'label': labels[0]}
  more = {}
  if configs.has_guidance(config):
    more['omega'] = rng.uniform(1, 4, count).astype(np.float32)
    if resolution > base:
      more['real_base_image'] = rng.integers(0, 256, (count, base, base, 1), dtype=np.uint8)
  noise = (80 * rng.standard_normal((count, base, base, 1))).astype(np.float32)
  pair = {'image': images[0], 'label': labels[0], 'noise': noise}
  return pair | {'real_image': images[1], 'real_label': labels[1]} | more


def start_of(config, name, frozen=None):
  """(networks, state at step 0 as host arrays) of a phase of the tiny experiment."""
  phase, networks = config.phases[name], models.build(config, name)
  params = params_of(networks.unet)
  if phase.stage not in configs.GENERATOR_STAGES:
    return networks, jax.device_get(state.init_teacher(params, phase))
  fixed = {}
  if name == 'grow_16':
    params, fixed = growth.split_trainable(params, ladder.thawed_blocks(config, name))
  opponent = models.init_discriminator(networks, frozen or {}, configs.phase_resolution(config, name), RNG)
  of_pairs = state.copy(opponent) if phase.reconstruction_adversarial.weight else None
  return networks, jax.device_get(state.init_generator(params, fixed, opponent, phase, of_pairs))


def params_of(unet):
  """Parameters of a U-Net, none of which is zero."""
  return jax.tree_util.tree_map_with_path(_lively, models.init_unet(unet, RNG))


def _lively(path, leaf):
  """EDM2's gains, which begin at zero, would let hardly anything of the network be seen."""
  return _spread(leaf + 1 if path[-1].key.endswith('gain') else leaf)


def _spread(leaf):
  """Zero-initialised leaves would hide most of the network from these tests."""
  noise = np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(np.float32)
  return jnp.asarray(leaf + 0.05 * noise)


@functools.cache
def setup(name):
  """(train step, state at step 0 as host arrays) of one of PHASES."""
  config, phase = of(name)
  return loop.make_step(config, phase)[1], start_of(config, phase)[1]


@functools.cache
def frozen_of(name):
  """The networks that one of PHASES is given: host arrays."""
  config, phase = of(name)
  if config.phases[phase].stage == 'guide':
    return jax.device_get({'teacher': params_of(models.make_teacher(config, phase))})
  if config.phases[phase].get('guide'):
    return jax.device_get({'guide': params_of(models.make_unet(config, config.phases[phase].guide))})
  return {}


def run_step(name, devices, batch=None, **axes):
  """(state, metrics) after one step of a phase on so many devices, as host arrays; computed once for batch_of's."""
  run = _stepped if batch is None else _stepped.__wrapped__
  return run(name, devices, tuple(axes.items()), sharding.SHARDED_FROM, batch)


@functools.cache
def _stepped(name, devices, axes, sharded_from, batch):
  step, mesh = _compiled(name, devices, axes, sharded_from), _mesh(devices, axes)
  with jax.set_mesh(mesh):
    placed = sharding.place(setup(name)[1], mesh)
    batch = batch or batch_of(*of(name))
    rows = sharding.local_rows(len(batch['image']), mesh)
    batch = sharding.place_batch({key: value[rows] for key, value in batch.items()}, mesh)
    out, metrics = step(placed, batch, sharding.place(frozen_of(name), mesh), jax.device_get(RNG))
    return jax.device_get(jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))((out, metrics)))


@functools.cache
def _compiled(name, devices, axes, sharded_from):
  """A jitted step, kept: tracing it again takes as long as reading it back from the cache."""
  del sharded_from  # which the shardings depend on
  step, start = setup(name)
  mesh = _mesh(devices, axes)
  return jitted(step, sharding.place(start, mesh), mesh)


def _mesh(devices, axes):
  return sharding.make_mesh(**dict(axes), devices=jax.devices()[:devices])


# What adds terms up in the type of its operand. Products sum in float32 whatever their type; the windows of the
# max pools do not overlap, and so their gradient adds nothing up.
SUMS = {'reduce_sum', 'reduce_window_sum', 'reduce_window', 'cumsum', 'scatter-add', 'psum'}


def sums_in_bfloat16(jaxpr) -> list[str]:
  """The sums of more than two bfloat16 terms in a program; up-sampling's gradient sums two by two."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in SUMS and eqn.invars[0].aval.dtype == jnp.bfloat16:
      operand, result = eqn.invars[0].aval, eqn.outvars[0].aval
      if eqn.primitive.name != 'reduce_sum' or operand.size > 2 * result.size:
        found.append(f'{eqn.primitive} of {operand.str_short()} in {eqn.source_info.name_stack}')
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)):
      if hasattr(value, 'jaxpr') or hasattr(value, 'eqns'):
        found += sums_in_bfloat16(getattr(value, 'jaxpr', value))
  return found
