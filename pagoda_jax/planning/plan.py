"""What every phase of an experiment costs, before any of it runs; nothing is allocated."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from pagoda_jax import config as configs
from pagoda_jax.data import stream as streams
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.planning import costs, programs
from pagoda_jax.runtime import sharding, topologies
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints

# How often gradients are summed over the devices. Both of a generator's losses sum theirs apart, as the ratio of
# their norms may be the adversarial weight; so do the discriminator's two passes.
_SUMS = {'teacher': {'params': 1}, 'distill': {'params': 2, 'discriminator': 2}}
_SUMS['grow'] = _SUMS['distill']


@dataclasses.dataclass(frozen=True)
class PhaseCosts:
  """Of one phase; bytes are of one device where not said otherwise.

  Attributes:
    trained: parameters that the phase trains.
    fixed: parameters that it only applies.
    state_bytes: of the whole state, as a checkpoint holds it; of `invert`, the teacher.
    arrays, split: arrays of the state; those of them that are split over 'fsdp'.
    state, frozen, gradients: what devices hold of them.
    activations: estimate.
    images: of a step: of all devices together, or for `invert` of those of one host.
    flops: of such a step.
    further_flops: those of them in loops, beyond the first turn.
    sent: bytes that a device sends in a step, by rule.
  """

  trained: int
  fixed: int
  state_bytes: int
  arrays: int
  split: int
  state: int
  frozen: int
  gradients: int
  activations: float
  images: int
  flops: float
  further_flops: float
  sent: float

  @property
  def memory(self) -> float:
    """Bytes of a device in all."""
    return self.state + self.frozen + self.gradients + self.activations


def phase_topology(config, name: str, topology):
  """The devices that the phase's step runs on together: `invert` runs on each host by itself."""
  return topology.one_host if config.phases[name].stage == 'invert' else topology


def phase_mesh(config, name: str, topology) -> tuple[int, int]:
  """Sizes of the axes ('data', 'fsdp') of the mesh of those devices."""
  devices = phase_topology(config, name, topology).count
  return (devices, 1) if config.phases[name].stage == 'invert' else sharding.axis_sizes(**config.mesh, count=devices)


def phase_program(config, name: str, topology) -> programs.Program:
  """The phase's program at the batch size that it runs with on the topology."""
  if config.phases[name].stage == 'invert':  # a host's batch is filled up to a multiple of its devices
    config = config.copy_and_resolve_references()
    devices = topology.one_host.count
    config.phases[name].batch_size = -(-config.phases[name].batch_size // devices) * devices
  return programs.make(config, name, phase_topology(config, name, topology).count)


def bytes_of(tree) -> int:
  """Bytes of a tree of ShapeDtypeStructs."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def on_device(tree, mesh, by_rule: bool = True) -> int:
  """Bytes that one device of a mesh (it may be abstract) holds of a tree (`sharding.place`)."""
  part = lambda x: jax.ShapeDtypeStruct(sharding.leaf_sharding(x.shape, mesh, by_rule).shard_shape(x.shape), x.dtype)
  return bytes_of(jax.tree.map(part, tree))


def phase_costs(config, name: str, topology) -> PhaseCosts:
  """Everything about a phase that its shapes and its traced step tell."""
  sizes = phase_mesh(config, name, topology)
  mesh = AbstractMesh(sizes, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  program = phase_program(config, name, topology)
  traced = program.trace()
  state, frozen = program.state, program.frozen
  if program.trains:
    trained = {'params': state.params, 'discriminator': getattr(state, 'discriminator', {}).get('params', {})}
    held = {'fixed': getattr(state, 'fixed', {}), 'frozen': frozen}
  else:
    trained, held = {}, {'params': state}
  sums = _SUMS.get(config.phases[name].stage, {})
  sent = sum(
    sent_by_rule(tree, mesh, sums.get(part, 0), config.precision, by_rule=part != 'frozen' or program.shard_frozen)
    for part, tree in (trained | held).items()
  )
  if not program.trains:  # each device of a host gets the whole noise
    sent += (mesh.size - 1) / mesh.size * 4 * program.batch['image'].size
  leaves = jax.tree.leaves(state)
  first_flops, further_flops = costs.first_and_further(traced)
  return PhaseCosts(
    trained=models.count(trained),
    fixed=models.count(held),
    state_bytes=bytes_of(state),
    arrays=len(leaves),
    split=sum(not sharding.leaf_sharding(leaf.shape, mesh).is_fully_replicated for leaf in leaves),
    state=on_device(state, mesh),
    frozen=on_device(frozen, mesh, program.shard_frozen),
    gradients=sum(sums.get(part, 0) * on_device(tree, mesh) for part, tree in trained.items()),
    activations=costs.peak_bytes(traced.jaxpr.jaxpr) / mesh.size,
    images=program.images,
    flops=first_flops + further_flops,
    further_flops=further_flops,
    sent=sent,
  )


def sent_by_rule(tree, mesh, sums: int, precision: str, by_rule: bool = True) -> float:
  """Bytes that each device sends for a tree in a step: see NOTES; all in the type of the computation."""
  sent, ring = 0.0, lambda n: (n - 1) / n
  data_ways, fsdp_ways = mesh.shape['data'], mesh.shape['fsdp']
  for leaf in jax.tree.leaves(tree):
    size = leaf.size * jnp.dtype(precision).itemsize
    if sharding.leaf_sharding(leaf.shape, mesh, by_rule).is_fully_replicated:
      sent += sums * 2 * ring(mesh.size) * size
    else:
      sent += ring(fsdp_ways) * size
      sent += sums * (ring(fsdp_ways) * size + 2 * ring(data_ways) * size / fsdp_ways)
  return sent


def recipe_at(config, side: int, attention: bool = True):
  """The experiment's teacher at another resolution: the same parameters, attention on the same levels."""
  recipe = config.copy_and_resolve_references()
  factor = side // config.base_resolution
  recipe.base_resolution = side
  with recipe.unlocked(), recipe.ignore_type():
    recipe.network.attention_resolutions = tuple(
      factor * resolution for resolution in config.network.attention_resolutions) if attention else ()
    recipe.network.mid_attention = attention and config.network.mid_attention
    teachers = [phase for phase in config.phases.values() if phase.stage == 'teacher']
    recipe.phases = {'teacher': teachers[0] if teachers else configs.teacher()}
  return recipe


def teacher_flops(config, side: int, attention: bool = True) -> float:
  """FLOPs per image of a teacher's train step at a resolution."""
  return image_flops(recipe_at(config, side, attention), 'teacher')


def image_flops(config, name: str) -> float:
  """FLOPs per image of a phase's step, without those that are done again to save memory."""
  plain = config.copy_and_resolve_references()
  with plain.unlocked(), plain.ignore_type():
    plain.update({'microbatch': 0, 'remat': ()})
  program = programs.make(plain, name)
  return costs.flops(program.trace()) / program.images


def images_of(config, name: str, pairs: int | None) -> int | None:
  """Images that a phase works through."""
  phase = config.phases[name]
  if phase.stage == 'invert':
    return pairs if phase.store else 0
  return phase.steps * phase.batch_size


def chip_hours(flops: float, chip: topologies.Chip, mfu: float) -> float:
  """Hours of one chip that reaches the share `mfu` of its peak."""
  return flops / (chip.peak * mfu) / 3600


def settled_pairs(config, num_images: int | None) -> tuple[int | None, list[str]]:
  """(pairs that `invert` makes, None where that is not known; what was assumed, in words).

  Classes are settled as for a run where the pictures are here.
  """
  notes = []
  try:
    streams.settle(config)
    images = num_images or streams.source_keys(config.data)[1].images
  except (SourceError, ImportError) as error:
    notes.append(f'The pictures are not here ({error}).')
    images = num_images
    if config.data.num_classes == -1:
      streams.set_classes(config, 0)
      notes.append('Taken without classes; --config.data.num_classes=N takes N.')
    if not images:
      notes.append('--num_images=N says how many there are.')
  return (len(streams.Keys(images, config.data.mirror)) if images else None), notes


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What XLA's compiler for the topology's devices says about a phase's step; bytes are of one device.

  Attributes:
    seconds: that it took.
    devices: how many, and of which kind.
    images: of a step.
    flops: of such a step; 0 where the compiler does not count them.
    memory: bytes by what they are for.
    sent: bytes that a device sends in a step, by the kind of collective.
    calls: on a GPU, how often a step runs what (`costs.kernel_calls`).
    misfit: why it cannot be compiled: it takes too much memory; '' where it can, else all others are 0.
  """

  seconds: float
  devices: tuple[int, str]
  images: int = 0
  flops: float = 0.0
  memory: dict[str, int] = dataclasses.field(default_factory=dict)
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  calls: dict[str, int] = dataclasses.field(default_factory=dict)
  misfit: str = ''


def compiled(config, name: str, topology, found: PhaseCosts) -> Compiled:
  """Compiles a phase's step for the devices of a topology, which need not be here."""
  devices = topologies.compile_devices(phase_topology(config, name, topology))
  mesh = sharding.make_mesh(*phase_mesh(config, name, topology), devices=devices)
  program = phase_program(config, name, topology)
  start, kind = time.monotonic(), (mesh.size, devices[0].device_kind)
  try:
    result = program.trace(mesh).lower().compile(topologies.compile_options(topology))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Compiled(time.monotonic() - start, kind, misfit=checkpoints.first_lines(error, 3))
  text = result.as_text()
  return Compiled(
    time.monotonic() - start,
    kind,
    program.images,
    # XLA counts one turn of a loop here too: the further ones are taken in the proportion of the traced step.
    flops=costs.counted_once(result) * mesh.size * found.flops / (found.flops - found.further_flops),
    memory=costs.memory_bytes(result),
    sent=costs.sent_bytes(text, mesh.size),
    calls=costs.kernel_calls(text) if topology.is_gpu else {},
  )
