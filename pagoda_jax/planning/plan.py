"""What every phase of an experiment costs, before any of it runs; nothing is allocated."""

import dataclasses
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pagoda_jax import config as configs
from pagoda_jax.data import fitting
from pagoda_jax.data import stream as streams
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.method import microbatch as microbatches
from pagoda_jax.planning import costs, memory, passes, programs, sends
from pagoda_jax.planning.parts import Parted, bytes_of, held_bytes, parted
from pagoda_jax.runtime import files, sharding, topologies
from pagoda_jax.stages import models

# Of what a step's values take in the order that it is written in: XLA works on a generator's two losses and on the
# discriminator's turn side by side, as none needs another's. Seen, of all but arguments: 1.3 GB of a v5e where distill
# would take 0.9 in order, 40 GB of an H100 (without kernels for attention) where 22.
SIDE_BY_SIDE = 2


@dataclasses.dataclass(frozen=True)
class PhaseCosts:
  """Of one phase; bytes are of one device where not said otherwise.

  Attributes:
    trained: parameters that the phase trains.
    fixed: parameters that it only applies.
    state_bytes: of the whole state, as a checkpoint holds it; of `invert`, the teacher.
    arrays, split: arrays of the state; those of them that are split over devices.
    state, frozen, gradients: what devices hold of them.
    activations: an estimate (memory.peak_bytes); attention's logits only where the chip's kernel does not take them.
    copies: of parameters, in the computation's type where that is not theirs.
    opposed: whether a discriminator is trained too.
    images: of a step: of all devices together, or for `invert` of those of one host.
    flops: of such a step.
    further_flops: those of them in loops, beyond the first turn.
    products: those of them that are products of float32 factors, by matmul precision (costs.float32_products).
    passes: bytes of HBM that a step's passes through networks take beyond what their images do (passes.BYTES).
    sent: bytes that a device sends in a step, by rule.
    updated: bytes of HBM that optimisers and moving average read and write in a step: gradients once, what they
      update twice; of parameters that devices along 'zero1' share, their part is read, and the whole written.
  """

  trained: int
  fixed: int
  state_bytes: int
  arrays: int
  split: int
  state: float
  frozen: float
  gradients: float
  activations: float
  copies: float
  opposed: bool
  images: int
  flops: float
  further_flops: float
  products: dict[str, float]
  passes: float
  sent: float
  updated: float

  @property
  def memory(self) -> float:
    """Bytes of a device in all."""
    return self.state + self.frozen + self.gradients + self.activations + self.copies


def phase_topology(config, name: str, topology):
  """The devices that the phase's step runs on together: `invert` runs on each host by itself."""
  return topology.one_host if config.phases[name].stage == 'invert' else topology


def phase_mesh(config, name: str, topology) -> dict[str, int]:
  """{axis: size} of the mesh of those devices."""
  devices = phase_topology(config, name, topology).count
  return sharding.axis_sizes(devices, **({} if config.phases[name].stage == 'invert' else config.mesh))


def phase_program(config, name: str, topology) -> programs.Program:
  """The phase's program at the batch size that it runs with on the topology."""
  if config.phases[name].stage == 'invert':  # a host's batch is filled up to a multiple of its devices
    config = config.copy_and_resolve_references()
    devices = topology.one_host.count
    config.phases[name].batch_size = -(-config.phases[name].batch_size // devices) * devices
  return programs.make(config, name, phase_topology(config, name, topology).count)


@dataclasses.dataclass(frozen=True)
class Counted:
  """What a phase's shapes and its traced step tell, whatever the mesh.

  Attributes:
    program: at the batch size of a step.
    trained, held: trees that the phase trains and only applies, by name.
    itemsize: of the computation's type.
    sends: how often it sends what.
    passed: parameters, as often as a turn passes through them.
    flops, further_flops, products: as in PhaseCosts.
    image_bytes: most bytes of the step's own values in their order, for each image that is worked on at once.
  """

  program: programs.Program
  trained: dict
  held: dict
  itemsize: int
  sends: sends.Sends
  passed: int
  flops: float
  further_flops: float
  products: dict[str, float]
  image_bytes: float

  @property
  def opposed(self) -> bool:
    return bool(self.trained.get('discriminator'))

  def on(self, mesh: dict[str, int]) -> 'Placed':
    """Its trees on a mesh {axis: size}."""
    of_frozen = {'frozen': self.program.shard_frozen}
    state, arrays = held_bytes(self.program.state, mesh)
    return Placed(
      self,
      mesh,
      arrays=arrays,
      state=state,
      frozen=held_bytes(self.program.frozen, mesh, self.program.shard_frozen)[0],
      fixed=held_bytes(self.held.get('fixed', {}), mesh)[0],
      trained={part: parted(tree, mesh) for part, tree in self.trained.items()},
      sent={part: parted(tree, mesh, of_frozen.get(part, True), self.itemsize)
            for part, tree in (self.trained | self.held).items()},
      copied=sum(parted(self._of_other_type(tree), mesh, of_frozen.get(part, True), self.itemsize).held
                 for part, tree in (self.trained | self.held).items()),
    )

  def _of_other_type(self, tree) -> list:
    """The arrays that are made to the computation's type."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype.itemsize != self.itemsize]


class Placed(NamedTuple):
  """A phase's trees on a mesh {axis: size}.

  Attributes:
    arrays: how many of the state are split.
    state, frozen, fixed: bytes that a device holds.
    trained, sent: in float32; in the computation's type, with what is only applied.
    copied: bytes, in the computation's type, of what a device holds in another.
  """

  counted: Counted
  mesh: dict[str, int]
  arrays: int
  state: int
  frozen: int
  fixed: int
  trained: dict[str, Parted]
  sent: dict[str, Parted]
  copied: float

  def costs(self, microbatch: int) -> PhaseCosts:
    """Where each device works on at most `microbatch` images at once; 0: on its whole share."""
    counted, devices = self.counted, math.prod(self.mesh.values())
    images = counted.program.images
    parts = microbatches.count_parts(images, devices, microbatch)
    held = {part: tree.held for part, tree in self.trained.items()}
    updated = sum(2 * tree.updated + tree.held for tree in self.trained.values())  # gradients, old and new parameters
    return PhaseCosts(
      trained=models.count(counted.trained),
      fixed=models.count(counted.held),
      state_bytes=bytes_of(counted.program.state),
      arrays=len(jax.tree.leaves(counted.program.state)),
      split=self.arrays,
      state=self.state,
      frozen=self.frozen,
      # A part of a batch makes its gradients beside those of the parts before it.
      gradients=sum(counted.sends.sums[part] * size for part, size in held.items() if part in counted.sends.sums)
      + (held['params'] if parts > 1 else 0),
      activations=(SIDE_BY_SIDE if counted.opposed else 1) * counted.image_bytes * images / (devices * parts),
      copies=self.copied,
      opposed=counted.opposed,
      images=images,
      flops=counted.flops,
      further_flops=counted.further_flops,
      products=counted.products,
      passes=parts * passes.BYTES * counted.passed,
      sent=counted.sends.bytes(self.trained, self.sent, parts),
      updated=updated + 2 * (self.state - self.fixed - sum(held.values())) if counted.program.trains else 0,
    )


def count(config, name: str, topology) -> Counted:
  """Traces the phase's step at the batch size that it runs with on the topology."""
  # Of attention's forms the one whose FLOPs are counted, and which no chip is needed for.
  program = phase_program(_with_keys(config, attention='xla'), name, topology)
  traced, state, parts = program.trace(), program.state, 1
  trained, held = {}, {'params': state}
  if program.trains:
    opponents = {part: getattr(state, part, {}).get('params', {}) for part in ('discriminator', 'pairs_discriminator')}
    trained = {'params': state.params} | opponents
    held = {'fixed': getattr(state, 'fixed', {}), 'frozen': program.frozen}
    parts = microbatches.count_parts(program.images, topology.count, configs.microbatch(config, name))
  phase = config.phases[name]
  fresh = phase.get('fakes') == 'fresh'
  sent = sends.of_phase(phase, bool(trained.get('pairs_discriminator')), fresh)
  evaluated = passes.evaluations(config, name)
  passed = evaluated['teacher'] * models.count(state) if not program.trains else passes.parameters(
    trained, held, sent.sums['params'], fresh, evaluated)
  first_flops, further_flops = costs.first_and_further(traced)
  jaxpr, chip = traced.jaxpr.jaxpr, topology.platform if config.attention != 'xla' else ''
  most = memory.peak_bytes(jaxpr, [leaf.shape for leaf in jax.tree.leaves((state, program.frozen))], chip)
  return Counted(
    program=program,
    trained=trained,
    held=held,
    itemsize=jnp.dtype(config.precision).itemsize,
    sends=sent,
    passed=passed,
    flops=first_flops + further_flops,
    further_flops=further_flops,
    products=costs.float32_products(jaxpr),
    image_bytes=most * parts / program.images,
  )


def phase_costs(config, name: str, topology, counted: Counted | None = None) -> PhaseCosts:
  """What the phase costs on the topology with the config's mesh and microbatch; `counted`: `count` of the same."""
  counted = counted or count(config, name, topology)
  placed = counted.on(phase_mesh(config, name, topology))
  return placed.costs(configs.microbatch(config, name) if counted.program.trains else 0)


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
  plain = _with_keys(config, remat=(), attention='xla')  # a kernel's FLOPs are not counted
  if 'microbatch' in plain.phases[name]:
    plain.phases[name].microbatch = 0
  program = programs.make(plain, name)
  return costs.flops(program.trace()) / program.images


def drawn_flops(config, name: str, count: int) -> float:
  """FLOPs per image of drawing so many of a phase."""
  return costs.flops(programs.sampling(_with_keys(config, attention='xla'), name, count).trace()) / count


def _with_keys(config, **values):
  changed = config.copy_and_resolve_references()
  with changed.unlocked(), changed.ignore_type():
    changed.update(values)
  return changed


def images_of(config, name: str, pairs: int | None) -> int | None:
  """Images that a phase works through."""
  phase = config.phases[name]
  if phase.stage == 'invert':
    return pairs if phase.store else 0
  return phase.steps * phase.batch_size


def settled_pairs(config, num_images: int | None) -> tuple[int | None, list[str]]:
  """(pairs that `invert` makes, None where that is not known; what was assumed, in words).

  Classes are settled as for a run where the pictures are here.
  """
  notes = []
  try:
    fitting.settle(config)
    images = num_images or streams.source_keys(config.data)[1].images
  except (SourceError, ImportError) as error:
    notes.append(f'The pictures are not here ({error}).')
    images = num_images
    if config.data.num_classes == -1:
      fitting.set_classes(config, 0)
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
    flops: of such a step, but for those of attention's own kernels; 0 where the compiler does not count them.
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
  mesh = sharding.make_mesh(**phase_mesh(config, name, topology), devices=devices)
  if topology.is_gpu:  # the compiler asks cuDNN itself about cuDNN's attention, and the CUDA plugin brings none
    config = _with_keys(config, attention='xla')
  program = phase_program(config, name, topology)
  start, kind = time.monotonic(), (mesh.size, devices[0].device_kind)
  try:
    result = program.trace(mesh).lower().compile(topologies.compile_options(topology))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Compiled(time.monotonic() - start, kind, misfit=files.first_lines(error, 3))
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
