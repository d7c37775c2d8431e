"""`pagoda plan`: what every phase of an experiment costs, before any of it runs; nothing is allocated."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import AbstractMesh, AxisType
from ml_collections import config_flags

from pagoda_jax import checkpoints, costs, data, models, programs, sharding, topologies, validation
from pagoda_jax import config as configs
from pagoda_jax.pictures import SourceError

NOTES = """\
FLOPs: XLA's count of the traced step before it optimises, a loop's body as often as it runs. Activations: an estimate,
the most that the step's own values take at once as it is written; a compiler fuses some away and pads others. Sends:
by rule, what each device passes on in a ring: arrays split over fsdp are gathered once, gradients summed. --aot asks
the compiler about all of these."""

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
  further_flops = costs.further_turns(traced.jaxpr.jaxpr)
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
    flops=costs.counted_once(traced.lower()) + further_flops,
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
    recipe.update({'microbatch': 0, 'remat': ()})  # which compute things twice
  return recipe


def teacher_flops(config, side: int, attention: bool = True) -> float:
  """FLOPs per image of a teacher's train step at a resolution."""
  recipe = recipe_at(config, side, attention)
  return costs.flops(programs.make(recipe, 'teacher').trace()) / recipe.phases.teacher.batch_size


def headline(config, target: int, known: float | None = None) -> list[str]:
  """What the method saves: the teacher where it is trained against the same network at the target resolution.

  `known`: `teacher_flops` at the base resolution, where it has been counted already.
  """
  base = config.base_resolution
  if target == base:
    return [f'teacher at {base} px: the target is {base} px too; --target={8 * base} compares with {8 * base} px']
  plain = teacher_flops(config, target, attention=False) / teacher_flops(config, base, attention=False)
  whole = teacher_flops(config, target) / (known or teacher_flops(config, base))
  return [f'the same network without attention, whose cost grows with the fourth power of the side: {plain:.1f}x',
          f'teacher at {base} px: {whole:.1f}x fewer FLOPs per image than at {target} px']


def compiled_lines(config, name: str, topology, found: PhaseCosts) -> list[str]:
  """What XLA's compiler for the topology's devices says about a phase's step."""
  devices = topologies.compile_devices(phase_topology(config, name, topology))
  mesh = sharding.make_mesh(*phase_mesh(config, name, topology), devices=devices)
  program = phase_program(config, name, topology)
  start = time.monotonic()
  try:
    compiled = program.trace(mesh).lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return [_row('compiled', f'does not fit: {checkpoints.first_lines(error, 3)}')]
  memory, seconds = compiled.memory_analysis(), time.monotonic() - start
  parts = {
    'arguments': memory.argument_size_in_bytes,
    'results': memory.output_size_in_bytes - memory.alias_size_in_bytes,  # those that do not replace an argument
    'temporary': memory.temp_size_in_bytes,
    'program': memory.generated_code_size_in_bytes,
  }
  # XLA counts one turn of a loop here too: the further ones are taken in the proportion of the traced step.
  flops = costs.counted_once(compiled) * mesh.size * found.flops / (found.flops - found.further_flops)
  sent = costs.sent_bytes(compiled.as_text(), mesh.size)
  return [
    _row('compiled', f'in {seconds:.0f} s for {mesh.size} x {devices[0].device_kind}'),
    _row('  FLOPs', f'{_flop(flops / program.images)} per image, {_flop(flops)} per step'),
    _row('  memory', f'{_bytes(sum(parts.values()))} per device: {_listed(parts)}'),
    _row('  sends', f'{_bytes(sum(sent.values()))} per device and step: {_listed(sent) or "nothing"}'),
  ]


def phase_lines(config, name: str, topology, found: PhaseCosts, pairs: int | None, mfu: float) -> list[str]:
  """The phase as a paragraph."""
  phase, side = config.phases[name], configs.phase_resolution(config, name)
  data_ways, fsdp_ways = phase_mesh(config, name, topology)
  if phase.stage == 'invert':
    each = f' on each of {topology.hosts} hosts' if topology.hosts > 1 else ''
    steps = f'{-(-pairs // (found.images * topology.hosts)):,} steps of ' if pairs else 'steps of '
    work = f'{steps}{found.images} images{each}' + (f', {pairs:,} pairs' if pairs else ', pairs not known')
    record = side**2 * config.data.channels * jnp.dtype(phase.dtype).itemsize
    left = _row('noise store', _bytes(record * pairs) if pairs else f'{_bytes(record)} a pair')
    if not phase.store:
      work, left = 'held-out pictures only', _row('noise store', 'none: the phases that read it invert in their steps')
  else:
    work = f'{phase.steps:,} steps of {found.images} images'
    keep = config.checkpoint
    kept = keep.keep + (phase.steps // keep.keep_every if keep.keep_every else 0)
    left = _row('checkpoint', f'{_bytes(found.state_bytes)}, {kept} of them at most')
  placed = 'all arrays whole on every device'
  if found.split:
    share = (found.state_bytes - found.state) / (1 - 1 / fsdp_ways) / found.state_bytes
    placed = (f'{found.split} of {found.arrays} arrays ({share:.1%} of the bytes) split {fsdp_ways} ways along their '
              'largest divisible dimension, the others whole on every device')
  limit = topology.chip.memory
  of_limit = f' of {_bytes(limit)}{": TOO MUCH" if found.memory > limit else ""}' if limit else ''
  parts = {'state': found.state, 'frozen networks': found.frozen, 'gradients': found.gradients,
           'activations': found.activations}
  images = images_of(config, name, pairs)
  return [
    f'{name} (stage {phase.stage}, {side} px): {work}',
    _row('parameters', f'{found.trained:,} trained, {found.fixed:,} only applied'),
    _row('sharding', f'mesh data={data_ways} fsdp={fsdp_ways}: batch {data_ways * fsdp_ways} ways; state: {placed}'),
    _row('FLOPs', f'{_flop(found.flops / found.images)} per image, {_flop(found.flops)} per step'),
    _row('memory', f'about {_bytes(found.memory)}{of_limit} per device: {_listed(parts)}'),
    _row('sends', f'about {_bytes(found.sent)} per device and step' if found.sent else 'nothing'),
    left,
    _row('in all', work_text(images * found.flops / found.images, topology, mfu) if images else 'not known'),
  ]


def images_of(config, name: str, pairs: int | None) -> int | None:
  """Images that a phase works through."""
  phase = config.phases[name]
  if phase.stage == 'invert':
    return pairs if phase.store else 0
  return phase.steps * phase.batch_size


def work_text(flops: float, topology, mfu: float) -> str:
  """Operations, and the time that they take where the chip's peak is known."""
  if not topology.chip.peak:
    return _flop(flops)
  hours, chips = chip_hours(flops, topology.chip, mfu), topology.count
  return f'{_flop(flops)}, {hours:.3g} chip-hours at an MFU of {mfu:g}: {hours / chips:.3g} hours on {chips}'


def chip_hours(flops: float, chip: topologies.Chip, mfu: float) -> float:
  """Hours of one chip that reaches the share `mfu` of its peak."""
  return flops / (chip.peak * mfu) / 3600


def settled_pairs(config, num_images: int | None) -> tuple[int | None, list[str]]:
  """(pairs that `invert` makes, None where that is not known; what was assumed, in words).

  Classes are settled as for a run where the pictures are here.
  """
  notes = []
  try:
    data.settle(config)
    images = num_images or data.source_keys(config.data)[1].images
  except (SourceError, ImportError) as error:
    notes.append(f'The pictures are not here ({error}).')
    images = num_images
    if config.data.num_classes == -1:
      data.set_classes(config, 0)
      notes.append('Planned without classes; --config.data.num_classes=N plans with N.')
    if not images:
      notes.append('--num_images=N says how many there are.')
  return (len(data.Keys(images, config.data.mirror)) if images else None), notes


def _row(title: str, text: str) -> str:
  return f'  {title:<11} {text}'


def _listed(sizes: dict) -> str:
  return ', '.join(f'{what} {_bytes(size)}' for what, size in sizes.items() if size)


def _bytes(size: float) -> str:
  return _number(size) + 'B'


def _flop(count: float) -> str:
  return _number(count) + 'FLOP'


def _number(value: float) -> str:
  """Three digits, a space and a decimal prefix."""
  power = min(max(int(math.log10(max(value, 1) * 1.0005) // 3), 0), 6)
  return f'{value / 1000**power:.3g} {["", "k", "M", "G", "T", "P", "E"][power]}'


def define_flags(fv) -> None:
  """Flags of `pagoda plan`."""
  config_flags.DEFINE_config_file('config', None, 'Experiment file; --config.KEY=VALUE overrides a key.',
                                  lock_config=True, flag_values=fv)
  flags.DEFINE_string('topology', '', f'{topologies.CHOICES}; default: the devices of this machine.', flag_values=fv)
  flags.DEFINE_bool('aot', False, "Compiles each phase's step for the topology (TPUs, cpu:N), without its devices: "
                    'minutes a phase. For TPUs with the tpu extra.', flag_values=fv)
  flags.DEFINE_float('mfu', 0.4, "Share of the chips' bfloat16 peak that the run is taken to reach.", lower_bound=1e-6,
                     upper_bound=1, flag_values=fv)
  flags.DEFINE_integer('num_images', None, "Training images; default: the source's.", lower_bound=1, flag_values=fv)
  flags.DEFINE_integer('target', None, 'Resolution that the last line compares with; default: config.data.resolution.',
                       lower_bound=1, flag_values=fv)
  flags.DEFINE_list('phases', [], 'Phases to plan, such as distill,grow_16; default: all.', flag_values=fv)
  flags.mark_flag_as_required('config', flag_values=fv)


def run(fv, args) -> int:
  """`pagoda plan`."""
  del args
  config, target = fv.config, fv.target or fv.config.data.resolution
  if fv.topology:
    topology = topologies.parse(fv.topology)
    jax.config.update('jax_platforms', 'cpu')  # whatever this machine has, it is not what is asked about
  else:
    topology = topologies.here()
  if fv.aot:
    topologies.compile_devices(topology)  # says at once where nothing can be compiled
  validation.validate(config, topology.count)
  for name in fv.phases:
    if name not in config.order:
      raise configs.ConfigError(f'--phases={name}: must be one of {", ".join(config.order)}')
  if target % config.base_resolution:
    raise configs.ConfigError(f'--target={target}: must be a multiple of {config.base_resolution}, the teacher\'s')
  pairs, assumed = settled_pairs(config, fv.num_images)
  chip = topology.chip
  facts = f', each {_flop(chip.peak)}/s in bfloat16 and {_bytes(chip.memory)}' if chip.peak else ''
  print('\n'.join([f'Planned for {topology}{facts}.', NOTES, *assumed]), flush=True)
  total, teacher = 0.0, None
  chosen = [name for name in config.order if not fv.phases or name in fv.phases]
  for name in chosen:
    found = phase_costs(config, name, topology)
    total += (images_of(config, name, pairs) or 0) * found.flops / found.images
    if config.phases[name].stage == 'teacher':
      teacher = teacher or found.flops / found.images
    print('\n' + '\n'.join(phase_lines(config, name, topology, found, pairs, fv.mfu)), flush=True)
    if fv.aot:
      print('\n'.join(compiled_lines(config, name, topology, found)), flush=True)
  print(f'\n{", ".join(chosen)}: {work_text(total, topology, fv.mfu)}')
  print('\n'.join(headline(config, target, teacher)))
  return 0
