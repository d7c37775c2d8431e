"""The one training loop: teacher, encode, guide, distill and grow differ only in state and train step."""

import contextlib
import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.data import noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.method import microbatch
from pagoda_jax.runtime import distributed, randomness, sharding
from pagoda_jax.runtime.interrupts import Interrupted
from pagoda_jax.runtime.progress import Progress
from pagoda_jax.stages import autoencoder, distill, encode, grow, guide, models, sampler, state, teacher
from pagoda_jax.training import autoencoding, checkpoints, first_state, grids, inverting, logs, starts, workdir
from pagoda_jax.weights import frozen_weights

MAX_SKIPPED_IN_A_ROW = 3


class Diverged(RuntimeError):
  """Loss or gradients stayed non-finite, or the state is; the last checkpoint is good."""


@dataclasses.dataclass(frozen=True)
class Phase:
  """What the loop needs of one phase.

  Attributes:
    step: step(state, batch, frozen, rng) -> (state, metrics).
    init: init() -> (state at step 0, host or device arrays; what it starts from, in words).
    stream: what it trains on.
    frozen: parameters of frozen feature networks, of a teacher that inverts or draws inside the step, and of the
      estimator of omega, and with captions the embeddings of the empty one, host arrays; {} without any.
  """

  networks: models.Networks
  step: Callable[..., Any]
  init: Callable[[], Any]
  stream: streams.Stream
  frozen: dict = dataclasses.field(default_factory=dict)


def make_step(config, name: str, num_devices: int = 1) -> tuple[models.Networks, Callable[..., Any]]:
  """(networks, step(state, batch, frozen, rng) -> (state, metrics)) of a phase that trains."""
  phase, networks = config.phases[name], models.build(config, name)
  if phase.get('noise') and not config.phases[phase.noise].store:
    networks = dataclasses.replace(networks, invert=inverting.make_inverter(config, phase.noise),
                                   omega_of_keys=inverting.make_omega_of_keys(config))
  if configs.learns_from_teacher(phase):
    levels = config.phases[phase.noise].num_levels
    networks = dataclasses.replace(networks, draw=sampler.make_teachers_draw(config, name, levels))
  if phase.stage == 'guide':
    networks = dataclasses.replace(networks, draw=sampler.make_teachers_draw(config, name, phase.sample_levels))
  parts = microbatch.count_parts(phase.batch_size, num_devices, configs.microbatch(config, name))
  make = {'autoencoder': autoencoder, 'teacher': teacher, 'encode': encode, 'guide': guide, 'distill': distill,
          'grow': grow}[phase.stage].make_train_step
  return networks, models.at_matmul_precision(phase.matmul_precision, make(networks, phase, parts))


def make_phase(config, folder, name: str, num_devices: int = 1) -> Phase:
  """Networks, step, initial state and data of a phase that trains."""
  phase = config.phases[name]
  networks, step = make_step(config, name, num_devices)
  seed = int(zlib.crc32(name.encode()) + config.seed) % 2**31
  init_key = randomness.key_for(config.seed, f'{name}/init')
  resolution, text = configs.phase_resolution(config, name), configs.has_text(config)
  captions, drawn = inverting.null_text(config), streams.sampling(config)
  if phase.stage == 'teacher':
    stream = streams.Stream(config.data, resolution, seed, text=text, drawn=drawn)
    init = functools.partial(first_state.init_teacher, config, folder, name, networks, init_key)
    return Phase(networks, step, init, stream, captions)
  if phase.stage == 'autoencoder':
    frozen = frozen_weights.load(config, name)
    init = functools.partial(first_state.init_autoencoder, config, name, networks, frozen, init_key)
    return Phase(networks, step, init, streams.Stream(config.data, resolution, seed), frozen)
  if phase.stage == 'guide':
    params, where = starts.read_start(config, folder, name)
    init = functools.partial(first_state.init_as_teacher, networks, phase, params, f'the encoder of {where}', init_key)
    stream = streams.Stream(config.data, resolution, seed, text=text, drawn=drawn)
    return Phase(networks, step, init, stream, {'teacher': params} | captions)
  params_of_noise = inverting.check_store(config, folder, phase.noise)
  frozen = frozen_weights.load(config, name) | captions
  store = epath.Path(folder) / phase.noise
  if config.phases[phase.noise].store and not configs.learns_from_teacher(phase):
    noise = noise_store.open_store(store, networks.sigma_max, phase.get('standardize_noise', False))
  else:
    noise = streams.ToInvert(noise_store.read_manifest(store)['count'], config.base_resolution)
    frozen = frozen | {'teacher': params_of_noise}
  if phase.stage == 'encode':
    params, where = starts.read_start(config, folder, name)
    init = functools.partial(first_state.init_as_teacher, networks, phase, params, where, init_key)
    stream = streams.Stream(config.data, resolution, seed, noise, phase.pairs_fraction, text=text, drawn=drawn,
                            reals=False)
    return Phase(networks, step, init, stream, frozen)
  if phase.guide:
    frozen = frozen | {'guide': checkpoints.read_generator(epath.Path(folder) / phase.guide)[0]}
  real_base = config.base_resolution if phase.guide and resolution > config.base_resolution else 0
  stream = streams.Stream(config.data, resolution, seed, noise, phase.pairs_fraction, real_base, text, drawn)
  init = functools.partial(first_state.init_generator, config, folder, name, networks, frozen, init_key)
  return Phase(networks, step, init, stream, frozen)


def run_phase(config, folder, name: str, stop, max_steps: int | None = None, image_flops=lambda: 0.0,
              refresh=lambda: None) -> None:
  """Trains a phase to its end, from its newest checkpoint if it has one.

  Args:
    config, folder, name: experiment, work directory, phase.
    stop: the interrupts.StopRequest of the run.
    max_steps: caps the phase's steps, for smoke runs.
    image_flops: image_flops() -> FLOPs that an image takes, for MFU, or 0 where none is to be told; asked after the
      first step.
    refresh: called at every grid and checkpoint.

  Raises:
    Interrupted: it was asked to stop, and has saved.
    Diverged: three steps in a row were not finite, or the state is not.
    CheckpointError, NoiseStoreError: what it starts from cannot be used.
  """
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    loop = _Loop(config, epath.Path(folder), name, workdir.target(config, name, max_steps), mesh)
    try:
      loop.run(stop, image_flops, refresh)
    except checkpoints.CheckpointError:
      raise
    except Exception:
      loop.finish_save()
      raise
    finally:
      loop.exits.close()


class _Loop:
  """One run of one phase."""

  def __init__(self, config, folder, name, steps, mesh):
    self.config, self.folder, self.name, self.steps, self.mesh = config, folder, name, steps, mesh
    self.phase_folder = folder / name
    self.phase = config.phases[name]
    self.order = config.order.index(name)
    self.epoch = len(streams.source_keys(config.data)[1])  # images, mirror images among them
    # Before Orbax looks: it may set damaged ones aside.
    self.done = distributed.from_primary(
      f'{name}: newest checkpoint', functools.partial(checkpoints.newest_good_step, self.phase_folder))
    kept = config.checkpoint
    self.saved = checkpoints.Checkpoints(
      self.phase_folder, kept.keep, kept.keep_every, kept.best, kept.best_mode, config.barrier_timeout)
    self.since_save = []  # config.checkpoint.best, step by step
    self.parts = make_phase(config, folder, name, mesh.size)
    self.batches = self.parts.stream.batches(
      self.phase.batch_size, sharding.local_rows(self.phase.batch_size, mesh))
    self.exits = contextlib.ExitStack()  # of the phase, whichever way it ends
    self.exits.callback(self.batches.close)  # worker processes, and the memory shared with them
    self.rng = jax.jit(lambda: randomness.key_for(config.seed, name), out_shardings=sharding.replicated(mesh))()
    self.frozen = sharding.place(self.parts.frozen, mesh, config.shard_frozen)
    self.finite_leaves = jax.jit(state.finite_leaves, out_shardings=sharding.replicated(mesh))

  def restored_or_fresh(self):
    """(state on the mesh, step)."""
    step = self.done
    if step is None:
      begun, said = self.parts.init()
      distributed.say(f'{self.name}: {said}')
      return sharding.place(begun, self.mesh), 0
    # By shapes alone: to make the first state again would read gigabytes at full size.
    shapes = first_state.shapes(self.config, self.name, self.parts.networks, self.parts.frozen)
    restored, position = self.saved.restore(step, sharding.abstract(shapes, self.mesh))
    self.batches.set_state(position)
    seen = self.seen(step)
    distributed.say(f'{self.name}: goes on from step {step}: {step * self.phase.batch_size:,} images seen '
                    f'({seen["kimg"]:g} kimg, {seen["epochs"]:g} epochs), {self.learning_rates(restored)}')
    return restored, step

  def seen(self, step) -> dict[str, float]:
    """Thousands of images, and passes over the training pictures, by a step."""
    images = step * self.phase.batch_size
    return {'kimg': images / 1000, 'epochs': round(images / self.epoch, 4)}

  def learning_rates(self, train_state) -> str:
    """Those of the next step, in words."""
    taken = int(train_state.step) - int(train_state.skipped_total)  # a skipped step moves no schedule
    found = {'learning rate': 'optimizer', "discriminator's": 'discriminator_optimizer'}
    return ', '.join(f'{words} {float(state.learning_rate(self.phase[key], self.phase.steps)(taken)):.4g}'
                     for words, key in found.items() if key in self.phase)

  def not_finite(self, train_state) -> str:
    """The leaves of a state that hold numbers which are not finite, in words; '' where there are none."""
    finite = self.finite_leaves(train_state)
    wrong = [jax.tree_util.keystr(path) for path, fine in jax.tree_util.tree_leaves_with_path(finite) if not fine]
    return ', '.join(wrong[:5]) + (f' and {len(wrong) - 5} more' if len(wrong) > 5 else '')

  def check_start(self, train_state, step):
    """Refuses to begin from a state that is not finite."""
    if wrong := self.not_finite(train_state):
      where = f'its checkpoint of step {step}' if self.done is not None else 'what it starts from'
      raise Diverged(f'{self.name}: {where} holds numbers that are not finite, in {wrong}; begin again from weights '
                     f'that are whole: delete {self.phase_folder}, and the earlier phase where one made them')

  def check_before_saving(self, train_state, step):
    """A state that is not finite is not saved: older checkpoints, which are good, would make room for it."""
    if wrong := self.not_finite(train_state):
      raise Diverged(f'{self.name}: by step {step} the state holds numbers that are not finite, in {wrong}, and is not '
                     f'saved; stopped. {self.standing()} A lower learning rate or float32 precision may help, with the '
                     'phase begun anew.')

  def standing(self) -> str:
    """What the same command goes on from, in words."""
    self.saved.wait()
    latest = self.saved.latest_step()
    kept = 'There is no checkpoint yet' if latest is None else f'The last checkpoint, of step {latest}, is good'
    return f'{kept}; the same command goes on from step {latest or 0} with the same data and random numbers.'

  def run(self, stop, image_flops, refresh):
    train_state, step = self.restored_or_fresh()
    self.check_start(train_state, step)
    shardings = sharding.tree_shardings(train_state, self.mesh)
    train_step = jax.jit(
      self.parts.step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(self.mesh))
    )
    log = self.exits.enter_context(contextlib.closing(
      logs.MetricLog(self.phase_folder, step, json.loads(workdir.as_json(self.config)))))
    batch_log = logs.JsonLines(self.phase_folder / 'batches.jsonl', step)
    progress = Progress(self.name, self.steps, step)
    make_grid = functools.partial(grids.make, self.config, self.folder, self.name)
    if self.phase.stage == 'autoencoder':
      make_grid = functools.partial(autoencoding.make_grid, self.config)
    grid = make_grid(self.mesh)
    first = step + 1
    pending = None  # the last step's metrics: read a step late, so that the device never waits for the host
    if step < self.steps:
      if distributed.is_primary():
        (self.phase_folder / 'evaluation.json').unlink(missing_ok=True)  # of steps that are undone or passed
      distributed.say(f'{self.name}: {models.count(train_state.params):,} trained parameters; compiling')
    stopping = False
    distributed.beat(self.order, step)
    while step < self.steps and not stopping:
      batch = next(self.batches)
      keys = batch['key']
      batch = sharding.place_batch(drop_keys(batch), self.mesh)
      train_state, metrics = train_step(train_state, batch, self.frozen, self.rng)
      step += 1
      if step == first:
        jax.block_until_ready(metrics)
        progress.image_flops = image_flops()
        progress.restart_clock(step)
      elif pending is not None:
        self.report(step - 1, pending, log, progress)
      pending = metrics
      distributed.beat(self.order, step)
      if self.config.log.batches:
        batch_log.write(step, {'keys': sharding.gathered(keys, self.mesh).tolist()})
      stopping = stop.wanted(self.name, step)
      saving = stopping or step == self.steps or step % self.config.checkpoint.every_steps == 0
      if saving:  # what belongs to a step is written before its checkpoint: a run that goes on from there has it all
        self.report(step, metrics, log, progress, force=stopping or step == self.steps)
        log.flush()
        batch_log.flush()
        pending = None
      drawing = grid and (step == self.steps or not stopping and step % self.config.log.samples_every == 0)

      def draw(step=step, train_state=train_state):
        image = grid(self.phase_folder / 'samples' / f'step_{step:08d}.png', train_state)
        log.image(step, 'samples', image)

      if drawing and not stopping:
        draw()
      if saving:
        self.check_before_saving(train_state, step)
        self.saved.save(step, train_state, self.batches.get_state(), self.mean_since_save())
      if drawing and stopping:  # of a phase that ends here, which no later run will draw; what is trained comes first
        self.saved.wait()
        draw()
      if saving or drawing:
        refresh()
    distributed.rest()
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
    except Exception as error:  # JAX's own too, where another process has gone: none may stand for the first
      logging.error('%s', error)

  def report(self, step, metrics, log, progress, force=False):
    """Progress at every step, numbers to the log every log.every_steps and at the end."""
    self.check(step, metrics)
    if skipped := int(metrics['skipped_in_a_row']):
      logging.warning('%s: step %d was not finite and was skipped (%d in a row)', self.name, step, skipped)
    due = force or step % self.config.log.every_steps == 0
    values = {key: float(value) for key, value in metrics.items()} if due else {'loss': float(metrics['loss'])}
    seen = self.seen(step)
    progress.update(step, self.phase.batch_size, {'loss': values['loss']} | seen, force=force)
    if self.config.checkpoint.best:
      self.since_save.append(float(metrics[self.config.checkpoint.best]))
    if due:
      log.write(step, seen | values | progress.rates())

  def mean_since_save(self) -> float:
    """Mean of config.checkpoint.best over the steps since the last save; nan without any that was finite."""
    finite = [value for value in self.since_save if np.isfinite(value)]
    self.since_save = []
    return sum(finite) / len(finite) if finite else float('nan')

  def check(self, step, metrics):
    skipped = int(metrics['skipped_in_a_row'])
    if skipped >= MAX_SKIPPED_IN_A_ROW:
      raise Diverged(
        f'{self.name}: loss or gradients were not finite in steps {step - skipped + 1} to {step}; stopped. '
        f'{self.standing()} Look for numbers that are not finite in what it reads; otherwise a lower learning rate or '
        'float32 precision may help, with the phase begun anew.'
      )


def drop_keys(batch: dict) -> dict[str, np.ndarray]:
  """The batch without what is only there to be logged: keys, but where pictures are inverted by them."""
  return batch if 'base_image' in batch else {key: value for key, value in batch.items() if key != 'key'}
