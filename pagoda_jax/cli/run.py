"""`pagoda run`: all phases of an experiment, then the summary."""

import time

from absl import flags
from etils import epath

from pagoda_jax import pipeline
from pagoda_jax.cli import common
from pagoda_jax.evaluation import small_data
from pagoda_jax.runtime import distributed
from pagoda_jax.runtime.progress import duration


def define_flags(fv) -> None:
  common.define_training(fv)
  flags.DEFINE_list('phases', [], 'Phases to run, such as distill,grow_16; default: all.', flag_values=fv)


def run(fv, args) -> int:
  del args
  start = time.monotonic()

  def finish():
    small_data.write_ladder(fv.config, fv.workdir, epath.Path(fv.workdir) / 'ladder.png')
    if fv.config.evaluation.samples:
      distributed.say(small_data.summary(fv.config, fv.workdir))

  small_data.check_installed(fv.config)
  pipeline.run_experiment(fv.config, fv.workdir, tuple(fv.phases), fv.max_steps, finish)
  distributed.say(f'finished in {duration(time.monotonic() - start)}; sample grids: {fv.workdir}/*/samples/*.png')
  return 0
