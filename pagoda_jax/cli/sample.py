"""`pagoda sample`: images from a trained phase or from converted weights, to .png or .npz."""

from absl import flags
from etils import epath

from pagoda_jax.cli import common
from pagoda_jax.stages import sampler
from pagoda_jax.use import sample

LARGEST_SEED = 2**32 - 1  # of larger ones, JAX's keys take the last 32 bits


def define_flags(fv) -> None:
  common.define_folder(fv, 'workdir', 'Work directory of a run.', required=False)
  common.define_folder(fv, 'weights', 'Instead: a folder that `pagoda convert` has made of a teacher or generator.',
                       required=False)
  flags.DEFINE_enum('kind', None, ['teacher', 'generator'], 'With --weights: what they are of, where the published '
                    'file is not known by its name.', flag_values=fv)
  flags.DEFINE_integer('levels', None, "With --weights: noise levels of a teacher's sampler; default: 18.",
                       lower_bound=2, upper_bound=10_000, flag_values=fv)
  flags.DEFINE_string('phase', '', 'Phase to draw from; default: the last that has a checkpoint.', flag_values=fv)
  flags.DEFINE_string('step', '', "Step of the checkpoint, or 'best'; default: the newest.", flag_values=fv)
  flags.DEFINE_string('ema', '', "Of a teacher with several averages: which, such as std_0.1; default: the first.",
                      flag_values=fv)
  flags.DEFINE_integer('num_images', 64, 'Number of images, at each strength of guidance.', lower_bound=1,
                       flag_values=fv)
  flags.DEFINE_string('labels', 'cycle', "Classes: 'cycle', 'random', or a list such as 3,5,7.", flag_values=fv)
  flags.DEFINE_string('guidance', '', 'Strength of guidance, such as 3 (1: none); of several, such as 1,2,4,8, each '
                      'row of the grid shows one noise and label at all of them.', flag_values=fv)
  flags.DEFINE_integer('seed', 0, 'Seed: the same seed gives the same images.', lower_bound=0,
                       upper_bound=LARGEST_SEED, flag_values=fv)
  flags.DEFINE_integer('batch_size', sampler.CHUNK, 'Images a call.', lower_bound=1, flag_values=fv)
  common.define_file(fv, 'out', 'samples.png', 'File to write: .png (a grid) or .npz (arr_0, arr_1).')


def run(fv, args) -> int:
  del args
  if epath.Path(fv.out).suffix not in sample.FORMATS:
    raise ValueError(f'--out={fv.out}: must end in {" or ".join(sample.FORMATS)}')
  if (fv.workdir is None) == (fv.weights is None):
    raise ValueError('give --workdir=RUN or --weights=FOLDER' + (', not both' if fv.weights else ''))
  of_other = ('phase', 'step', 'ema') if fv.weights else ('kind', 'levels')
  if given := [name for name in of_other if fv[name].present]:
    raise ValueError(f'--{given[0]}={fv[given[0]].value}: is of {"--workdir" if fv.weights else "--weights"}, and '
                     f'{"--weights" if fv.weights else "--workdir"} is given')
  omegas = sample.parse_guidance(fv.guidance)
  how = fv.num_images, fv.labels, fv.seed, fv.batch_size, omegas
  if fv.weights:
    images, labels, kind = sample.draw_weights(fv.weights, fv.kind or '', fv.levels, *how)
    what = f'{kind} of {fv.weights}'
  else:
    images, labels, phase, step = sample.draw(fv.workdir, fv.phase, fv.step, *how, fv.ema)
    what = f'phase {phase}, step {step}'
  sample.write(fv.out, images, labels, omegas)
  strength = f', guidance {fv.guidance}' if omegas else ''
  print(f'{fv.out}: {len(images)} images of {images.shape[1]} px, {what}{strength}')
  return 0
