"""Flags that several commands share."""

from absl import flags
from ml_collections import config_flags


class _WholeNumber(flags.IntegerParser):
  def convert(self, argument) -> int:
    try:
      return super().convert(argument)
    except ValueError:
      raise ValueError('must be a whole number, in digits alone') from None


class _Number(flags.FloatParser):
  def convert(self, argument) -> float:
    try:
      return super().convert(argument)
    except ValueError:
      raise ValueError('must be a number') from None


class _Flag(flags.BooleanParser):
  def parse(self, argument) -> bool:
    try:
      return super().parse(argument)
    except ValueError:
      raise ValueError('must be true or false') from None


# Of --config.KEY=VALUE, by the type of the key's default; validation.py knows its range.
for _type, _parser in ((int, _WholeNumber()), (float, _Number()), (bool, _Flag())):
  config_flags.register_flag_parser_for_type(_type, _parser)


def define_experiment(fv) -> None:
  """--config."""
  config_flags.DEFINE_config_file('config', None, 'Experiment file, such as experiments/mnist.py or '
                                  'experiments/mnist.py:long; --config.KEY=VALUE overrides a key.',
                                  lock_config=True, flag_values=fv)


def define_training(fv) -> None:
  """--config and what a run of its phases needs besides."""
  define_experiment(fv)
  flags.DEFINE_string('workdir', None, 'Work directory: made if need be, gone on from if it is there.', flag_values=fv)
  flags.DEFINE_integer('max_steps', None, 'Cap on the steps of every phase, for smoke runs.', lower_bound=1,
                       flag_values=fv)
  flags.mark_flags_as_required(['config', 'workdir'], flag_values=fv)
  define_processes(fv)


def define_processes(fv) -> None:
  """Flags for machines that nothing announces to JAX; Cloud TPU, GKE with TPUs, Slurm and Open MPI need none."""
  flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0, to train with several processes. '
                      'Not needed on Cloud TPU, GKE with TPUs, and under Slurm.', flag_values=fv)
  flags.DEFINE_integer('num_processes', None, 'How many processes there are, with --coordinator_address.',
                       lower_bound=1, flag_values=fv)
  flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0, with --coordinator_address.',
                       lower_bound=0, flag_values=fv)
