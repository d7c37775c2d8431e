"""`pagoda plan`: what each phase of an experiment costs, before it runs."""

import math

import jax
import jax.numpy as jnp
from absl import flags

from pagoda_jax import config as configs
from pagoda_jax import validation
from pagoda_jax.cli import common
from pagoda_jax.config import ladder, spaces
from pagoda_jax.data import noise_store
from pagoda_jax.planning import lanes, plan, times
from pagoda_jax.planning.plan import PhaseCosts
from pagoda_jax.runtime import topologies
from pagoda_jax.stages import models

NOTES = """\
FLOPs: XLA's count of the traced step before it optimises, a loop's body as often as it runs, with what microbatch and
remat do again (a run's MFU is without). Activations: an estimate, the most that products, convolutions and sums take
and make at once, all between fused; a compiler reorders and pads. Copies: parameters in the computation's type. Sends:
by rule, what each device passes on in a ring: arrays split over fsdp are gathered, gradients summed, and parameters of
which each device along zero1 has updated a share are gathered. --aot asks the compiler about all of these; the one for
GPUs counts no FLOPs and, with no GPU to try algorithms on, takes cuBLAS for all products and leaves out what cuDNN
needs of memory while it works. Time: one after the other, arithmetic at --mfu of the bfloat16 peak (what float32
products take beyond bfloat16's at the full peak), at the published speed of HBM what each pass through a network takes
for its parameters, however few its images, and optimisers and moving average, sends at that of the links. Recommended,
with FLOPs and activations of config.microbatch: on each number of chips the largest microbatch in
{fits:.0%} of the memory, then the smallest fsdp, then the zero1 that takes the least time; of these the most chips that
take {dearer:g} times the fewest chip-hours at most. Lanes: channels are padded to their multiples; useful is what both
paddings of a convolution leave."""


def define_flags(fv) -> None:
  common.define_experiment(fv)
  flags.DEFINE_string('topology', '', f'{topologies.CHOICES}; default: the devices of this machine.', flag_values=fv)
  flags.DEFINE_bool('aot', False, "Compiles each phase's step for the topology, without its devices: "
                    'minutes a phase. For TPUs with the tpu extra, for GPUs with the CUDA plugin.', flag_values=fv)
  reached = '; '.join(f'{platform} {alone:g}, with a discriminator {opposed:g}'
                      for platform, (alone, opposed) in times.MFU.items())
  common.define_number(fv, 'mfu', None, "Share of the chips' bfloat16 peak that the arithmetic of a step is taken to "
                       f'reach by itself; default: {reached}.', 1e-6, 1)
  flags.DEFINE_integer('num_images', None, "Training images; default: the source's.", lower_bound=1, flag_values=fv)
  flags.DEFINE_integer('target', None, 'Resolution that the last line compares with, of latents where networks see '
                       'these; default: config.data.resolution.', lower_bound=1, flag_values=fv)
  flags.DEFINE_list('phases', [], 'Phases to plan, such as distill,grow_16; default: all.', flag_values=fv)
  flags.mark_flag_as_required('config', flag_values=fv)


def run(fv, args) -> int:
  del args
  config, target = fv.config, fv.target or fv.config.data.resolution
  if fv.topology:
    topology = topologies.parse(fv.topology)
    jax.config.update('jax_platforms', 'cpu')  # whatever this machine has, it is not what is asked about
  else:
    topology = topologies.here()
  if fv.mfu is not None and not topology.chip.peak:
    raise configs.ConfigError(f'--mfu={fv.mfu:g}: is a share of a peak, and that of {topology} is not known; name a '
                              '--topology, such as v5e-8')
  if fv.aot:
    topologies.compile_devices(topology)  # says at once where nothing can be compiled
  validation.validate(config, topology.count)
  for name in fv.phases:
    if name not in config.order:
      raise configs.ConfigError(f'--phases={name}: must be one of {", ".join(config.order)}')
  if target % config.base_resolution:
    raise configs.ConfigError(f'--target={target}: must be a multiple of {config.base_resolution}, the teacher\'s')
  pairs, assumed = plan.settled_pairs(config, fv.num_images)
  chip = topology.chip
  facts = f', each {_flop(chip.peak)}/s in bfloat16 and {_bytes(chip.memory)}' if chip.peak else ''
  notes = NOTES.format(fits=times.FITS, dearer=times.DEARER)
  print('\n'.join([f'Planned for {topology}{facts}.', notes, *assumed]), flush=True)
  total, seconds, teacher = 0.0, 0.0, None
  chosen = [name for name in config.order if not fv.phases or name in fv.phases]
  for name in chosen:
    counted = plan.count(config, name, topology)
    found = plan.phase_costs(config, name, topology, counted)
    images = plan.images_of(config, name, pairs)
    total += (images or 0) * found.flops / found.images
    if config.phases[name].stage == 'teacher' and not config.remat:  # else some are counted twice
      teacher = teacher or found.flops / found.images
    print('\n' + '\n'.join(phase_lines(config, name, topology, found, pairs)), flush=True)
    if chip.peak:
      spent = phase_seconds(config, name, topology, found, images, fv.mfu)
      seconds += spent or 0
      print('\n'.join(time_lines(config, name, topology, counted, found, images, spent, fv.mfu)), flush=True)
    if fv.aot:
      print('\n'.join(compiled_lines(plan.compiled(config, name, topology, found), topology)), flush=True)
  print(f'\n{", ".join(chosen)}: {work_text(total, seconds, topology)}')
  if any(config.phases[name].stage != 'autoencoder' for name in chosen):
    print('\n'.join(headline(config, target, teacher)))
  return 0


def phase_lines(config, name: str, topology, found: PhaseCosts, pairs: int | None) -> list[str]:
  """The phase as a paragraph."""
  phase, side = config.phases[name], configs.phase_resolution(config, name)
  mesh = plan.phase_mesh(config, name, topology)
  if phase.stage == 'invert':
    each = f' on each of {topology.hosts} hosts' if topology.hosts > 1 else ''
    steps = f'{-(-pairs // (found.images * topology.hosts)):,} steps of ' if pairs else 'steps of '
    work = f'{steps}{found.images} images{each}' + (f', {pairs:,} pairs' if pairs else ', pairs not known')
    record = side**2 * spaces.image_channels(config) * jnp.dtype(phase.dtype).itemsize
    record += noise_store.OMEGA_TYPE.itemsize if configs.has_guidance(config) else 0
    left = _row('noise store', _bytes(record * pairs) if pairs else f'{_bytes(record)} a pair')
    if not phase.store:
      work, left = 'held-out pictures only', _row('noise store', 'none: the phases that read it invert in their steps')
  else:
    work = f'{phase.steps:,} steps of {found.images} images'
    keep = config.checkpoint
    kept = keep.keep + (phase.steps // keep.keep_every if keep.keep_every else 0) + bool(keep.best)
    left = _row('checkpoint', f'{_bytes(found.state_bytes)}, {kept} of them at most')
  placed = 'all arrays whole on every device'
  if found.split:
    placed = (f'{found.split} of {found.arrays} arrays split, by fsdp all of them that are large, by zero1 moments and '
              f'averages: {_bytes(found.state)} of {_bytes(found.state_bytes)} on each device')
  limit = topology.chip.memory
  of_limit = f' of {_bytes(limit)}{": TOO MUCH" if found.memory > limit else ""}' if limit else ''
  parts = {'state': found.state, 'frozen networks': found.frozen, 'gradients': found.gradients,
           'copies': found.copies, 'activations': found.activations}
  return [
    f'{name} (stage {phase.stage}, {spaces.side_in_words(config, side)}): {work}',
    _row('parameters', f'{found.trained:,} trained, {found.fixed:,} only applied'),
    _row('sharding', f'mesh {mesh_text(mesh)}: batch {math.prod(mesh.values())} ways; state: {placed}'),
    _row('FLOPs', f'{_flop(found.flops / found.images)} per image, {_flop(found.flops)} per step'),
    _row('memory', f'about {_bytes(found.memory)}{of_limit} per device: {_listed(parts)}'),
    _row('sends', f'about {_bytes(found.sent)} per device and step' if found.sent else 'nothing'),
    left,
  ] + lane_lines(config, name, topology)


def lane_lines(config, name: str, topology) -> list[str]:
  """What widths of its U-Net leave empty; of growth, those of the levels that it adds: the others are as they are."""
  most, phase = topology.chip.lanes, config.phases[name]
  above = ladder.start_resolution(config, name) if phase.stage == 'grow' else 0
  if phase.stage == 'autoencoder':
    return []
  wasteful = lanes.wasteful(models.make_unet(config, name), most, above)
  listed = lambda numbers: ' or '.join(map(str, numbers))
  levels = [f'{level.name} {level.useful:.0%} ({", ".join(map(str, level.widths))}; right: {listed(level.right)})'
            for level in wasteful]
  return [_row('lanes', f'{most}; useful on levels that waste some: {", ".join(levels)}')
          ] if levels else []


def phase_seconds(config, name: str, topology, found: PhaseCosts, images: int | None,
                  mfu: float | None) -> float | None:
  """Seconds of a phase of so many images; None where these are not known."""
  together = plan.phase_topology(config, name, topology)
  sets = topology.count // together.count
  return images and images / found.images / sets * times.step_time(found, together, mfu).total


def time_lines(config, name: str, topology, counted, found: PhaseCosts, images: int | None, seconds: float | None,
               mfu: float | None) -> list[str]:
  """What a step's time goes to, how long the phase takes, and where it is best run."""
  together = plan.phase_topology(config, name, topology)
  step = times.step_time(found, together, mfu)
  reached = topologies.utilisation(found.images / step.total, found.flops / found.images, together)
  parts = ', '.join(f'{part} {_time(value)}' for part, value in step._asdict().items() if value)
  hidden = f'; {_time(step.hidden)} where collectives run beside the arithmetic' if step.collectives else ''
  flops = (images or 0) * found.flops / found.images
  lines = [
    _row('time', f'{_time(step.total)} a step (images a chip: {found.images / together.count:g}): {parts}; bound '
         f'by {step.bound}, MFU {reached:.3g}{hidden}'),
    _row('in all', work_text(flops, seconds, topology) if images is not None else 'not known'),
  ]
  if not counted.program.trains:
    return [*lines, _row('recommended', 'any number of chips: hosts work apart, at equal chip-hours')]
  best = times.recommended(counted, topology, mfu)
  if not best:
    return [*lines, _row('recommended', f'nothing: it fits on no number of {topology.chip_name}')]
  count, steps = best.topology.count, config.phases[name].steps
  text = (f'{count} chips, {mesh_text(best.mesh)}, microbatch={best.microbatch} '
          f'({found.images // count} images a chip): {_bytes(best.memory)} per device, '
          f'{_time(best.time.total)} a step, {hours_text(steps * best.time.total, best.topology)}')
  return [*lines, _row('recommended', text)]


def compiled_lines(found: plan.Compiled, topology) -> list[str]:
  """What XLA's compiler says."""
  if found.misfit:
    return [_row('compiled', f'does not fit: {found.misfit}')]
  (count, kind), memory = found.devices, sum(found.memory.values())
  kernels = ', '.join(f'{what} {calls:,}' for what, calls in found.calls.items())
  # A compiler for TPUs refuses what is too much, the one for GPUs does not.
  excess = f' of {_bytes(topology.chip.memory)}: TOO MUCH' if memory > (topology.chip.memory or memory) else ''
  return [
    _row('compiled', f'in {found.seconds:.0f} s for {count} x {kind}'),
    *([_row('  FLOPs', f'{_flop(found.flops / found.images)} per image, {_flop(found.flops)} per step')]
      if found.flops else []),
    _row('  memory', f'{_bytes(memory)}{excess} per device: {_listed(found.memory)}'),
    *([_row('  kernels', f'a step: {kernels}')] if kernels else []),
    _row('  sends', f'{_bytes(sum(found.sent.values()))} per device and step: {_listed(found.sent) or "nothing"}'),
  ]


def mesh_text(mesh: dict[str, int]) -> str:
  """The mesh, but for axes of one device besides 'data' and 'fsdp'."""
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items() if size > 1 or axis != 'zero1')


def headline(config, target: int, known: float | None = None) -> list[str]:
  """What the method saves: the teacher where it is trained against the same network at the target resolution.

  `known`: `teacher_flops` at the base resolution, where it has been counted already.
  """
  base = config.base_resolution
  here, there, larger = (spaces.side_in_words(config, side) for side in (base, target, 8 * base))
  if target == base:
    return [f'teacher at {here}: the target is the same; --target={8 * base} compares with {larger}']
  plain = plan.teacher_flops(config, target, attention=False) / plan.teacher_flops(config, base, attention=False)
  whole = plan.teacher_flops(config, target) / (known or plan.teacher_flops(config, base))
  return [f'the same network without attention, whose cost grows with the fourth power of the side: {plain:.1f}x',
          f'teacher at {here}: {whole:.1f}x fewer FLOPs per image than at {there}']


def work_text(flops: float, seconds: float, topology) -> str:
  """Operations, and the time that they take where the chip's peak is known."""
  return f'{_flop(flops)}, {hours_text(seconds, topology)}' if topology.chip.peak else _flop(flops)


def hours_text(seconds: float, topology) -> str:
  """Time on a topology."""
  hours = seconds / 3600
  return f'{hours * topology.count:.3g} chip-hours: {hours:.3g} hours on {topology.count}'


def _row(title: str, text: str) -> str:
  return f'  {title:<11} {text}'


def _listed(sizes: dict) -> str:
  return ', '.join(f'{what} {_bytes(size)}' for what, size in sizes.items() if size)


def _time(seconds: float) -> str:
  return f'{seconds:.3g} s' if seconds >= 1 else f'{1e3 * seconds:.3g} ms'


def _bytes(size: float) -> str:
  return common.number(size) + 'B'


def _flop(count: float) -> str:
  return common.number(count) + 'FLOP'
