"""`pagoda bench step`, `sample`, `invert`: how fast this machine runs a program of a phase, against its chips' peak."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pagoda_jax import config as configs
from pagoda_jax.bench import shares, synthetic
from pagoda_jax.config import spaces
from pagoda_jax.data import stream as streams
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.planning import costs, plan, programs
from pagoda_jax.runtime import sharding, topologies
from pagoda_jax.training import loop

PROFILED = 3  # runs in the profile
INPUT_SECONDS = 10.0  # for which batches are read at most, but for two


def measure(config, name: str, program: programs.Program, mesh, image_flops: float, *, repeats: int, warm_up: int,
            peak: float | None = None, profile: str | None = None) -> dict[str, Any]:
  """What `pagoda bench step`, `sample` and `invert` find out about a program, on random pictures and weights.

  Args:
    config, name: experiment and phase.
    program: the phase's step, or its sampling.
    mesh: where it runs.
    image_flops: FLOPs that an image takes (`plan.image_flops`).
    repeats: runs that the median is taken of; at least 1.
    warm_up: runs before them.
    peak: FLOP/s of one device; None takes the published bfloat16 peak, where the chip is known.
    profile: folder for an XProf trace of PROFILED further runs; None leaves none.

  Returns:
    A dict of JSON types; None stands where something cannot be known here. seconds: {median, lowest, highest and
    quartiles} of a run; flops_per_second: of all devices; memory: bytes of a device by what they are for, by the
    compiler; peak_memory: bytes of a device at most since the process began, as the device counts them; parts:
    {part of the program: seconds of a run that a device spends on its operations}; operations: their sum.
  """
  whole, devices = sharding.replicated(mesh), mesh.devices.size
  chip = topologies.chip_name(mesh.devices.flat[0].device_kind)
  peak = peak or topologies.Topology(chip, devices).chip.peak
  with jax.set_mesh(mesh):
    compiled, compilation = _compiled(program, mesh)
    state = sharding.place(synthetic.state(config, name, program), mesh)
    batch = sharding.place_batch(synthetic.batch(config, program), mesh)
    frozen = sharding.place(synthetic.weights(program.frozen, seed=2), mesh, program.shard_frozen)
    rng = jax.jit(lambda: jax.random.key(config.seed), out_shardings=whole)()

    def run():
      nonlocal state
      if not program.trains:
        return compiled(state, batch, frozen, rng)
      state, metrics = compiled(state, batch, frozen, rng)  # the state is donated
      return metrics

    seconds = run_seconds(run, repeats, warm_up)
    with contextlib.ExitStack() as stack:
      folder = profile or stack.enter_context(tempfile.TemporaryDirectory())
      trace = shares.traced(lambda: jax.block_until_ready([run() for _ in range(PROFILED)]), folder)
      parts = shares.seconds_by_part(
        jax.profiler.ProfileData.from_file(str(trace)), shares.parts_of_instructions(compiled.as_text()))
  parts = {part: total / PROFILED / devices for part, total in parts.items()}
  rate = program.images / float(np.median(seconds))
  statistics = [(device.memory_stats() or {}).get('peak_bytes_in_use') for device in mesh.local_devices]
  return {
    'phase': name,
    'stage': config.phases[name].stage,
    'resolution': configs.phase_resolution(config, name) * spaces.factor(config),
    'precision': config.precision,
    'chip': chip,
    'devices': devices,
    'images': program.images,
    'warm_up': warm_up,
    'repeats': repeats,
    'seconds': spread(seconds),
    'images_per_second': rate,
    'images_per_second_per_chip': rate / devices,
    'flops_per_image': image_flops,
    'flops_per_second': image_flops * rate,
    'peak_flops_per_second': peak,
    'mfu': image_flops * rate / (peak * devices) if peak else None,
    **compilation,
    'memory': costs.memory_bytes(compiled),
    'peak_memory': max(statistics) if all(statistics) else None,
    'parts': parts,
    'operations': sum(parts.values()),
    'profile': profile,
  }


def _compiled(program, mesh):
  """(the compiled program, what it took to have it)."""
  hits = []
  note_hit = lambda event, **_: hits.append(event) if event == '/jax/compilation_cache/cache_hits' else None
  jax.monitoring.register_event_listener(note_hit)
  start = time.perf_counter()
  lowered = program.trace(mesh).lower()
  middle = time.perf_counter()
  # Else the cache may give a program compiled from other code, the same but for the names of its operations.
  before = jax.config.jax_compilation_cache_include_metadata_in_key
  jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
  compiled = lowered.compile()
  end = time.perf_counter()
  jax.config.update('jax_compilation_cache_include_metadata_in_key', before)
  jax.monitoring.unregister_event_listener(note_hit)
  return compiled, {'trace_seconds': middle - start, 'compile_seconds': end - middle, 'compiled_before': bool(hits)}


def run_seconds(run: Callable[[], Any], repeats: int, warm_up: int) -> np.ndarray:
  """Seconds between the ends of `repeats` runs, after `warm_up` others.

  The next run is always issued before the end of one is waited for, as in the training loop: the host's work is
  hidden where it can be.
  """
  ends, pending = [], run()
  for _ in range(warm_up + repeats):
    issued = run()
    jax.block_until_ready(pending)
    ends.append(time.perf_counter())
    pending = issued
  jax.block_until_ready(pending)
  ends.append(time.perf_counter())
  return np.diff(ends)[-repeats:]


def spread(values: np.ndarray) -> dict[str, float]:
  """{name: value} of the median, the extremes and the quartiles."""
  points = {'median': 50, 'lowest': 0, 'quartile_1': 25, 'quartile_3': 75, 'highest': 100}
  return {name: float(np.percentile(values, point)) for name, point in points.items()}


class _AnyNoise:
  """Stands where a store of noise would, of any number of pairs: the same for each."""

  def __init__(self, count: int, shape: tuple[int, ...], guided: bool):
    self._count = count
    self._pair = {'noise': np.zeros(shape, np.float32)} | ({'omega': np.float32(1)} if guided else {})

  def __len__(self) -> int:
    return self._count

  def pair(self, key: int) -> dict[str, np.ndarray]:
    del key
    return self._pair


def input_seconds(config, name: str, mesh, repeats: int) -> float | None:
  """Median seconds in which this host reads a batch of a phase and puts it on its devices; None without pictures.

  A store's noise is not read: an array in memory stands in its place.
  """
  phase, base = config.phases[name], config.base_resolution
  side, noise, real_base = configs.phase_resolution(config, name), None, 0
  try:
    count = len(streams.source_keys(config.data)[1])
  except (SourceError, ImportError):
    return None
  if phase.get('noise'):
    stored = config.phases[phase.noise].store and not configs.learns_from_teacher(phase)
    shape, guided = (base, base, spaces.image_channels(config)), configs.has_guidance(config)
    noise = _AnyNoise(count, shape, guided) if stored else streams.ToInvert(count, base)
    real_base = base if phase.get('guide') and side > base else 0
  batches = streams.Stream(config.data, side, config.seed, noise, real_base=real_base,
                           text=configs.has_text(config), drawn=streams.sampling(config),
                           reals=phase.stage != 'encode').batches(
    phase.batch_size, sharding.local_rows(phase.batch_size, mesh))
  seconds, begun = [], time.perf_counter()
  while len(seconds) <= repeats and (len(seconds) < 3 or time.perf_counter() - begun < INPUT_SECONDS):
    start = time.perf_counter()
    jax.block_until_ready(sharding.place_batch(loop.drop_keys(next(batches)), mesh))
    seconds.append(time.perf_counter() - start)
  batches.close()
  return float(np.median(seconds[1:]))  # the first one waits for workers to start


def bench_step(config, name: str, **options) -> dict[str, Any]:
  """`measure` of the train step of a phase of stage teacher, distill or grow, and `input_seconds`."""
  topology, mesh = topologies.here(), sharding.make_mesh(**config.mesh)
  program, image_flops = plan.phase_program(config, name, topology), plan.image_flops(config, name)
  found = measure(config, name, program, mesh, image_flops, **options)
  return found | {'input_seconds': input_seconds(config, name, mesh, options['repeats'])}


def bench_invert(config, name: str, **options) -> dict[str, Any]:
  """`measure` of the inversion of a batch by a phase of stage `invert`, and `input_seconds`."""
  program = plan.phase_program(config, name, topologies.here())
  mesh = sharding.make_mesh(devices=jax.local_devices())
  found = measure(config, name, program, mesh, plan.image_flops(config, name), **options)
  config = config.copy_and_resolve_references()
  config.phases[name].batch_size = program.images
  return found | {'input_seconds': input_seconds(config, name, mesh, options['repeats'])}


def bench_sample(config, name: str, batch_size: int, **options) -> dict[str, Any]:
  """`measure` of the drawing of images by a phase of stage teacher, distill or grow, as `pagoda sample` does it."""
  mesh = sharding.make_mesh()
  program = programs.sampling(config, name, -(-batch_size // mesh.size) * mesh.size)
  return measure(config, name, program, mesh, plan.drawn_flops(config, name, program.images), **options)
