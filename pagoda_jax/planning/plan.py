"""What every phase of an experiment costs, before any of it runs; nothing is allocated."""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from pagoda_jax import config as configs
from pagoda_jax.data import fitting
from pagoda_jax.data import stream as streams
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.method import microbatch as microbatches
from pagoda_jax.planning import costs, programs
from pagoda_jax.runtime import sharding, topologies
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints

# How often gradients are summed over the devices. Both of a generator's losses sum theirs apart, as the ratio of
# their norms may be the adversarial weight; so do the discriminator's two passes.
_SUMS = {'autoencoder': {'params': 1, 'discriminator': 1},
         **dict.fromkeys(('teacher', 'encode', 'guide'), {'params': 1}),
         'distill': {'params': 2, 'discriminator': 2, 'pairs_discriminator': 2}}
_SUMS['grow'] = _SUMS['distill']
# How often arrays that are split are gathered, others once: for a forward pass, which a generator's two losses share,
# and for every backward pass; once more for fresh fakes, by the generator just updated. The discriminator's arrays are
# normalised anew in each of its three passes.
_GATHERS = {'autoencoder': {'params': 2, 'discriminator': 4},
            **dict.fromkeys(('teacher', 'encode', 'guide'), {'params': 2}),
            'distill': {'params': 3, 'discriminator': 6, 'pairs_discriminator': 6}}
_GATHERS['grow'] = _GATHERS['distill']


@dataclasses.dataclass(frozen=True)
class PhaseCosts:
  """Of one phase; bytes are of one device where not said otherwise.

  Attributes:
    trained: parameters that the phase trains.
    fixed: parameters that it only applies.
    state_bytes: of the whole state, as a checkpoint holds it; of `invert`, the teacher.
    arrays, split: arrays of the state; those of them that are split over 'fsdp'.
    state, frozen, gradients: what devices hold of them.
    activations: estimate; with attention's logits, which no kernel keeps.
    images: of a step: of all devices together, or for `invert` of those of one host.
    flops: of such a step.
    further_flops: those of them in loops, beyond the first turn.
    products: those of them that are products of float32 factors, by matmul precision (costs.float32_products).
    sent: bytes that a device sends in a step, by rule.
    updated: bytes of HBM that optimisers and moving average read and write in a step: gradients once, what they
      update twice.
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
  images: int
  flops: float
  further_flops: float
  products: dict[str, float]
  sent: float
  updated: float

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


class Parted(NamedTuple):
  """Bytes of a tree: of what every device holds whole, and of what is split over 'fsdp', all of it."""

  whole: float = 0
  split: float = 0

  def on_device(self, fsdp: int) -> float:
    return self.whole + self.split / fsdp

  def sent(self, data: int, fsdp: int, sums: int, gathers: int) -> float:
    """What each device passes on in a ring: what is split is gathered so often, gradients are summed so often."""
    ring = lambda n: (n - 1) / n
    summed = 2 * ring(data * fsdp) * self.whole + (ring(fsdp) + 2 * ring(data) / fsdp) * self.split
    return gathers * ring(fsdp) * self.split + sums * summed


def parted(tree, fsdp: int, by_rule: bool = True, itemsize: int | None = None) -> Parted:
  """A tree of ShapeDtypeStructs as `sharding.place` splits it `fsdp` ways; `itemsize`: of other types than its own."""
  found = [0, 0]
  for leaf in jax.tree.leaves(tree):
    found[_is_split(leaf, fsdp, by_rule)] += leaf.size * (itemsize or leaf.dtype.itemsize)
  return Parted(*found)


def _is_split(leaf, fsdp: int, by_rule: bool = True) -> bool:
  mesh = AbstractMesh((1, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  return not sharding.leaf_sharding(leaf.shape, mesh, by_rule).is_fully_replicated


@dataclasses.dataclass(frozen=True)
class Counted:
  """What a phase's shapes and its traced step tell, whatever the mesh.

  Attributes:
    program: at the batch size of a step.
    trained, held: trees that the phase trains and only applies, by name.
    itemsize: of the computation's type.
    sums, gathers: how often which gradients are summed over the devices; how often which split arrays are gathered.
    flops, further_flops, products: as in PhaseCosts.
    image_bytes: most bytes of the step's own values, for each image that is worked on at once.
    own_losses: of the sums of 'params' those of losses that belong to one image each (microbatch.mean_and_grad).
  """

  program: programs.Program
  trained: dict
  held: dict
  itemsize: int
  sums: dict[str, int]
  gathers: dict[str, int]
  flops: float
  further_flops: float
  products: dict[str, float]
  image_bytes: float
  own_losses: int

  def split(self, fsdp: int) -> 'Split':
    """Its trees, split `fsdp` ways."""
    state, of_frozen = self.program.state, {'frozen': self.program.shard_frozen}
    travelling = self.trained | self.held
    return Split(
      self,
      fsdp,
      arrays=sum(_is_split(leaf, fsdp) for leaf in jax.tree.leaves(state)),
      state=parted(state, fsdp),
      frozen=parted(self.program.frozen, fsdp, self.program.shard_frozen),
      fixed=parted(self.held.get('fixed', {}), fsdp),
      trained={part: parted(tree, fsdp) for part, tree in self.trained.items()},
      sent={part: parted(tree, fsdp, of_frozen.get(part, True), self.itemsize) for part, tree in travelling.items()},
    )


class Split(NamedTuple):
  """A phase's trees split `fsdp` ways; `arrays`: how many of the state are; `sent`: in the computation's type."""

  counted: Counted
  fsdp: int
  arrays: int
  state: Parted
  frozen: Parted
  fixed: Parted
  trained: dict[str, Parted]
  sent: dict[str, Parted]

  def costs(self, data: int, microbatch: int) -> PhaseCosts:
    """On a mesh of data * fsdp devices, each of which works on at most `microbatch` images at once; 0: on its share."""
    counted, fsdp = self.counted, self.fsdp
    images = counted.program.images
    parts = microbatches.count_parts(images, data * fsdp, microbatch)
    # Each part of a batch sums the generator's or teacher's gradients, but those of images' own losses where parameters
    # are whole on a device; the discriminator sees whole batches.
    sums = dict(counted.sums)
    if 'params' in sums:
      once = counted.own_losses if fsdp == 1 else 0
      sums['params'] = once + (sums['params'] - once) * parts
    held = {part: tree.on_device(fsdp) for part, tree in self.trained.items()}
    state, fixed = self.state.on_device(fsdp), self.fixed.on_device(fsdp)
    return PhaseCosts(
      trained=models.count(counted.trained),
      fixed=models.count(counted.held),
      state_bytes=bytes_of(counted.program.state),
      arrays=len(jax.tree.leaves(counted.program.state)),
      split=self.arrays,
      state=state,
      frozen=self.frozen.on_device(fsdp),
      gradients=sum(counted.sums[part] * size for part, size in held.items() if part in counted.sums),
      activations=counted.image_bytes * images / (data * fsdp * parts),
      images=images,
      flops=counted.flops,
      further_flops=counted.further_flops,
      products=counted.products,
      sent=sum(tree.sent(data, fsdp, sums.get(part, 0), counted.gathers.get(part, 1))
               for part, tree in self.sent.items()),
      updated=sum(held.values()) + 2 * (state - fixed) if counted.program.trains else 0,
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
  sums, gathers = dict(_SUMS.get(phase.stage, {})), dict(_GATHERS.get(phase.stage, {}))
  if phase.get('fakes') == 'fresh':
    gathers['params'] += 1
  if phase.get('update') == 'separate':  # L_adv has a forward pass of its own, by the generator as it is then
    gathers['params'] += 1
  if trained.get('pairs_discriminator'):  # a further loss of the generator's
    sums['params'] += 1
    gathers['params'] += 1
  first_flops, further_flops = costs.first_and_further(traced)
  jaxpr = traced.jaxpr.jaxpr
  return Counted(
    program=program,
    trained=trained,
    held=held,
    itemsize=jnp.dtype(config.precision).itemsize,
    sums=sums,
    gathers=gathers,
    flops=first_flops + further_flops,
    further_flops=further_flops,
    products=costs.float32_products(jaxpr),
    image_bytes=costs.peak_bytes(jaxpr) * parts / program.images,
    own_losses=int(phase.stage != 'autoencoder'),
  )


def phase_costs(config, name: str, topology, counted: Counted | None = None) -> PhaseCosts:
  """What the phase costs on the topology with the config's mesh and microbatch; `counted`: `count` of the same."""
  data, fsdp = phase_mesh(config, name, topology)
  counted = counted or count(config, name, topology)
  return counted.split(fsdp).costs(data, configs.microbatch(config, name) if counted.program.trains else 0)


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
  mesh = sharding.make_mesh(*phase_mesh(config, name, topology), devices=devices)
  if topology.is_gpu:  # the compiler asks cuDNN itself about cuDNN's attention, and the CUDA plugin brings none
    config = _with_keys(config, attention='xla')
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
