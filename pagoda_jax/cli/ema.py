"""`pagoda ema`: an average of a teacher's weights that was not kept, from those in its checkpoints."""

from absl import flags
from etils import epath

from pagoda_jax.cli import common
from pagoda_jax.use import post_hoc
from pagoda_jax.weights.convert import folders


def define_flags(fv) -> None:
  common.define_folder(fv, 'workdir', 'Work directory of a run.')
  flags.DEFINE_string('phase', 'teacher', 'Phase of stage teacher that was trained with ema_std.', flag_values=fv)
  flags.DEFINE_float('std', None, 'Relative standard deviation of the average: 0.05 is short, 0.2 long.',
                     required=True, flag_values=fv)
  flags.DEFINE_integer('step', None, 'Where it ends; default: at the newest checkpoint.', lower_bound=1, flag_values=fv)
  common.define_output(fv, 'Folder to make, for init_from.')


def run(fv, args) -> int:
  """`pagoda ema`."""
  del args
  folders.refuse_existing(fv.output)
  converted, source = post_hoc.average(epath.Path(fv.workdir) / fv.phase, fv.std, fv.step)
  folders.write_converted(fv.output, converted, source)
  print(f'{fv.output}: {converted.notes[0]}')
  return 0
