"""An experiment's phases in order; what is finished is skipped."""

import time
from collections.abc import Callable
from concurrent import futures

import jax
from absl import logging
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax import validation
from pagoda_jax.data import fitting
from pagoda_jax.evaluation.report import write as report
from pagoda_jax.planning import plan
from pagoda_jax.runtime import distributed, lock, topologies
from pagoda_jax.runtime.interrupts import Interrupted, StopRequest
from pagoda_jax.runtime.progress import duration
from pagoda_jax.training import autoencoding, checkpoints, inverting, loop, starts, workdir
from pagoda_jax.weights import autoencoders, frozen_weights, text_encoders


def run_experiment(config, folder, phases=(), max_steps: int | None = None, finish: Callable[[], None] | None = None
                   ) -> None:
  """Runs phases in their order, each from where it stands; a finished one is skipped.

  Args:
    config: an experiment.
    folder: the work directory.
    phases: names of the phases to run; () runs all.
    max_steps: caps every phase, for smoke runs.
    finish: called after the last phase, while no other run can work on the folder.

  Raises:
    ConfigError: the config cannot be run, or names no such phase.
    MissingWeightsError, WrongDigestError: a published file that a phase needs is not there or not whole.
    StartError, ConversionError: what lies at a phase's init_from cannot start it.
    TextEncoderError: the embeddings of captions are of another encoder.
    AutoencoderError: the autoencoder of latent space is not there, damaged or another one.
    SourceError: the pictures are missing or damaged, or do not fit the config.
    WorkdirError: the work directory belongs to another experiment, or lacks what a phase starts from.
    LockError: another run works on the work directory.
    HostsError: processes do not fit together, or one of them did not come.
    Interrupted: a phase was asked to stop, and has saved.
  """
  validation.validate(config, jax.device_count())
  workdir.check_apart(folder, config)
  autoencoders.settle(config)
  fitting.settle(config)
  validation.validate(config, jax.device_count())  # once more, now that the number of classes is known
  for name in phases:
    if name not in config.order:
      raise configs.ConfigError(f'phase {name!r}: must be one of {", ".join(config.order)}')
  chosen = [name for name in config.order if not phases or name in phases]
  for name in config.order:  # before anything is written: one folder of another experiment stops the run
    if name in chosen or (epath.Path(folder) / name / 'config.json').exists():
      workdir.check_claim(folder, config, name)
  workdir.check_same_everywhere(config, chosen, max_steps)
  frozen_weights.check_present(config, chosen)
  starts.check_outside(config, folder, chosen)
  if configs.has_text(config):
    text_encoders.check(config)
  page = report.Page(folder)
  with lock.hold(folder):
    distributed.from_primary('inputs of phases', lambda: workdir.check_ahead(folder, config, chosen, max_steps))
    with StopRequest() as stop:
      for name in chosen:
        if stop.wanted_before(name):
          raise Interrupted(f'stopped before {name}; start the same command again to go on', stop.exit_code)
        run_phase(config, folder, name, stop, max_steps, page.refresh)
      if stop.wanted_before('what ends the run'):  # asked for too late for the last phase
        raise Interrupted('stopped after the last phase; start the same command again to go on', stop.exit_code)
    if finish:
      finish()
    page.finish()


def run_phase(config, folder, name: str, stop: StopRequest, max_steps: int | None = None,
              refresh: Callable[[], None] = lambda: None) -> None:
  """Runs one phase to its end, unless it is there already; `refresh` is called when there is more to report."""

  def begin():
    lock.confirm()
    workdir.claim(folder, config, name)
    workdir.check_inputs(folder, config, name)
    done = workdir.progress(folder, config, name)
    if done >= target and config.phases[name].stage in configs.TRAINED_STAGES:
      # A damaged one is made again before another phase reads it.
      done = checkpoints.newest_good_step(epath.Path(folder) / name) or 0
    return done

  target = workdir.target(config, name, max_steps)
  # One process looks: on a network file system another may not see yet what was just written.
  done = distributed.from_primary(f'begin {name}', begin)
  leaves_weights = config.phases[name].stage == 'autoencoder'
  if done >= target:
    if leaves_weights:  # which a run that ended here has not written yet
      autoencoding.leave_weights(config, folder, name)
    distributed.say(f'{name}: finished already ({done} of {target})')
    return
  start = time.monotonic()
  if config.phases[name].stage == 'invert':
    inverting.run_phase(config, folder, name, stop, max_steps)
  else:
    with futures.ThreadPoolExecutor(1) as counting:  # beside the compilation of the first step
      image_flops = counting.submit(image_flops_for_mfu, config, name)
      loop.run_phase(config, folder, name, stop, max_steps, image_flops.result, refresh)
  if leaves_weights:
    autoencoding.leave_weights(config, folder, name)
  refresh()
  distributed.say(f'{name}: finished in {duration(time.monotonic() - start)}')


def image_flops_for_mfu(config, name: str) -> float:
  """FLOPs per image of a phase that trains; 0 where they are of no use, or, with a warning, cannot be counted."""
  if not topologies.here().chip.peak:
    return 0.0
  try:
    return plan.image_flops(config, name)
  except Exception as error:  # such as a kernel that only the chip has: that no figure can be told stops no run
    logging.warning('%s: MFU is not told. %s', name, error)
    return 0.0
