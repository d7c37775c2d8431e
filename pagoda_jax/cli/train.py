"""`pagoda train`: one phase of an experiment."""

from absl import flags

from pagoda_jax import pipeline
from pagoda_jax.cli import common


def define_flags(fv) -> None:
  common.define_training(fv)
  flags.DEFINE_string('phase', None, 'The phase to run.', flag_values=fv)
  flags.mark_flag_as_required('phase', flag_values=fv)


def run(fv, args) -> int:
  del args
  pipeline.run_experiment(fv.config, fv.workdir, (fv.phase,), fv.max_steps)
  return 0
