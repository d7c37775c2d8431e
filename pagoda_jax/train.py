"""The one training loop: teacher, distill and grow differ only in state and train step."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from pagoda_jax import (
  checkpoints,
  data,
  frozen_weights,
  grids,
  inversions,
  inverting,
  logs,
  models,
  sharding,
  starts,
  state,
  workdir,
)
from pagoda_jax import config as configs
from pagoda_jax.interrupts import Interrupted, StopRequest
from pagoda_jax.stages import distill, grow, teacher

MAX_SKIPPED_IN_A_ROW = 3


class Diverged(RuntimeError):
  """Loss or gradients stayed non-finite; the last checkpoint is good."""


@dataclasses.dataclass(frozen=True)
class Phase:
  """What the loop needs of one phase.

  Attributes:
    step: step(state, batch, frozen, rng) -> (state, metrics).
    init: init() -> (state at step 0, host or device arrays; what it starts from, in words).
    stream: what it trains on.
    frozen: parameters of frozen feature networks, and of the teacher that inverts inside the step, host arrays;
      {} without any.
  """

  networks: models.Networks
  step: Callable[..., Any]
  init: Callable[[], Any]
  stream: data.Stream
  frozen: dict = dataclasses.field(default_factory=dict)


def key_of(seed: int, name: str) -> jax.Array:
  """The phase's random key: of the experiment's seed and the phase's name alone."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) % 2**31)


def make_phase(config, folder, name: str) -> Phase:
  """Networks, step, initial state and data of a phase of stage teacher, distill or grow."""
  phase = config.phases[name]
  networks = models.build(config, name)
  seed = int(zlib.crc32(name.encode()) + config.seed) % 2**31
  init_key = key_of(config.seed, f'{name}/init')
  resolution = configs.phase_resolution(config, name)
  if phase.stage == 'teacher':
    stream = data.Stream(config.data, resolution, seed)
    init = functools.partial(init_teacher, config, folder, name, networks, init_key)
    return Phase(networks, teacher.make_train_step(networks, phase), init, stream)
  teacher_params = inverting.check_store(config, folder, phase.noise)
  frozen = frozen_weights.load(config, name)
  store = epath.Path(folder) / phase.noise
  if config.phases[phase.noise].store:
    noise = inversions.open_store(store, networks.sigma_max, phase.standardize_noise)
  else:
    noise = data.ToInvert(inversions.read_manifest(store)['count'], config.base_resolution)
    networks = dataclasses.replace(networks, invert=inverting.make_inverter(config, phase.noise))
    frozen = frozen | {'teacher': teacher_params}
  stream = data.Stream(config.data, resolution, seed, noise, phase.pairs_fraction)
  init = functools.partial(init_generator, config, folder, name, networks, frozen, init_key)
  make_step = distill.make_train_step if phase.stage == 'distill' else grow.make_train_step
  return Phase(networks, make_step(networks, phase), init, stream, frozen)


def init_teacher(config, folder, name: str, networks, key) -> tuple[state.TeacherState, str]:
  """The teacher's state at step 0: fresh parameters, or those at init_from; and which, in words."""
  phase = config.phases[name]
  if phase.init_from:
    params, where = starts.read_start(config, folder, name)
    return state.init_teacher(state.copy(params), phase), f'starts from {where}'
  return state.init_teacher(models.init_unet(networks.unet, key), phase), 'starts afresh'


def init_generator(config, folder, name: str, networks, frozen, key) -> tuple[state.GeneratorState, str]:
  """The generator's state at step 0: a copy of the teacher, or the generator before it, grown; said in words."""
  phase = config.phases[name]
  resolution = configs.phase_resolution(config, name)
  generator_key, discriminator_key = jax.random.split(key)
  params, where = starts.read_start(config, folder, name)
  fixed = {}
  if phase.stage == 'grow':
    fresh = models.init_unet(networks.unet, generator_key)
    start = configs.start_resolution(config, name)
    params, fixed, report = grow.grown_params(fresh, params, start, resolution)
    where = f'{where}, grown: {report}'
  discriminator = models.init_discriminator(networks, frozen, resolution, discriminator_key)
  discriminator, embedding = frozen_weights.with_class_embedding(config, name, discriminator)
  begun = state.init_generator(state.copy(params), state.copy(fixed), discriminator, phase)
  return begun, '\n'.join(filter(None, (f'starts from {where}', embedding)))


def run_phase(config, folder, name: str, max_steps: int | None = None) -> None:
  """Trains a phase to its end, from its newest checkpoint if it has one.

  Raises:
    Interrupted: it was asked to stop, and has saved.
    Diverged: three steps in a row were not finite.
    CheckpointError, NoiseStoreError: what it starts from cannot be used.
  """
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh), StopRequest() as stop:
    loop = _Loop(config, epath.Path(folder), name, workdir.target(config, name, max_steps), mesh)
    try:
      loop.run(stop)
    except checkpoints.CheckpointError:
      raise
    except Exception:
      loop.finish_save()
      raise
    finally:
      loop.batches.close()  # ends the worker processes, and gives back the memory shared with them


class _Loop:
  """One run of one phase."""

  def __init__(self, config, folder, name, steps, mesh):
    self.config, self.folder, self.name, self.steps, self.mesh = config, folder, name, steps, mesh
    self.phase_folder = folder / name
    self.phase = config.phases[name]
    self.saved = checkpoints.Checkpoints(self.phase_folder, config.checkpoint.keep, config.checkpoint.keep_every)
    self.parts = make_phase(config, folder, name)
    self.batches = self.parts.stream.batches(self.phase.batch_size, jax.process_index(), jax.process_count())
    self.rng = key_of(config.seed, name)
    self.frozen = sharding.place(self.parts.frozen, mesh)

  def restored_or_fresh(self):
    """(state on the mesh, step)."""
    step = self.saved.latest_step()
    if step is None:
      begun, said = self.parts.init()
      print(f'{self.name}: {said}', flush=True)
      return sharding.place(begun, self.mesh), 0
    target = sharding.abstract(jax.eval_shape(lambda: self.parts.init()[0]), self.mesh)
    restored, position = self.saved.restore(step, target)
    self.batches.set_state(position)
    print(f'{self.name}: goes on from step {step}', flush=True)
    return restored, step

  def run(self, stop):
    train_state, step = self.restored_or_fresh()
    shardings = sharding.tree_shardings(train_state, self.mesh)
    train_step = jax.jit(
      self.parts.step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(self.mesh))
    )
    log = logs.MetricLog(self.phase_folder, step, jax.process_index() == 0)
    progress = logs.Progress(self.name, self.steps, step)
    grid = grids.make(self.config, self.folder, self.name, self.mesh)
    pending = None  # the last step's metrics: read a step late, so that the device never waits for the host
    if step < self.steps:
      print(f'{self.name}: {models.count(train_state.params):,} trained parameters; compiling', flush=True)
    while step < self.steps:
      batch = sharding.place_batch(drop_keys(next(self.batches)), self.mesh)
      train_state, metrics = train_step(train_state, batch, self.frozen, self.rng)
      step += 1
      if pending is None:
        jax.block_until_ready(metrics)
        progress.restart_clock(step)
      else:
        self.report(step - 1, pending, log, progress)
      pending = metrics
      stopping = stop.wanted(step)
      if stopping or step == self.steps or step % self.config.checkpoint.every_steps == 0:
        self.check(step, metrics)
        self.saved.save(step, train_state, self.batches.get_state())
      if grid and not stopping and (step == self.steps or step % self.config.log.samples_every == 0):
        grid(self.phase_folder / 'samples' / f'step_{step:08d}.png', train_state)
      if stopping:
        break
    if pending is not None:
      self.report(step, pending, log, progress, force=True)
    self.saved.wait()
    self.saved.close()
    if step < self.steps:
      raise Interrupted(
        f'{self.name}: stopped after step {step} of {self.steps} and saved; start the same command again to go on',
        stop.exit_code,
      )

  def finish_save(self):
    """After an error: a save that is under way would be lost with the process."""
    try:
      self.saved.wait()
    except checkpoints.CheckpointError as error:
      logging.error('%s', error)

  def report(self, step, metrics, log, progress, force=False):
    """Progress at every step, numbers to the log every log.every_steps and at the end."""
    self.check(step, metrics)
    if skipped := int(metrics['skipped_in_a_row']):
      logging.warning('%s: step %d was not finite and was skipped (%d in a row)', self.name, step, skipped)
    due = force or step % self.config.log.every_steps == 0
    values = {key: float(value) for key, value in metrics.items()} if due else {'loss': float(metrics['loss'])}
    progress.update(step, self.phase.batch_size, {'loss': values['loss']}, force=force)
    if due:
      log.write(step, values | {'images_per_second': round(progress.images_per_second(), 2)})

  def check(self, step, metrics):
    skipped = int(metrics['skipped_in_a_row'])
    if skipped >= MAX_SKIPPED_IN_A_ROW:
      self.saved.wait()
      latest = self.saved.latest_step()
      kept = 'There is no checkpoint yet' if latest is None else f'The last checkpoint, of step {latest}, is good'
      raise Diverged(
        f'{self.name}: loss or gradients were not finite in steps {step - skipped + 1} to {step}; stopped. {kept}; '
        f'the same command goes on from step {latest or 0} with the same data and random numbers. Look for numbers '
        'that are not finite in what it reads; otherwise a lower learning rate or float32 precision may help, with '
        'the phase begun anew.'
      )


def drop_keys(batch: dict) -> dict[str, np.ndarray]:
  """The batch without what is only there to be logged: keys, but where pictures are inverted by them."""
  return batch if 'base_image' in batch else {key: value for key, value in batch.items() if key != 'key'}
