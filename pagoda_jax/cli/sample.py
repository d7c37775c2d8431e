"""`pagoda sample`: images from a trained phase, to .png or .npz."""

from absl import flags
from etils import epath

from pagoda_jax.cli import common
from pagoda_jax.stages import sampler
from pagoda_jax.use import sample

LARGEST_SEED = 2**32 - 1  # of larger ones, JAX's keys take the last 32 bits


def define_flags(fv) -> None:
  common.define_folder(fv, 'workdir', 'Work directory of a run.')
  flags.DEFINE_string('phase', '', 'Phase to draw from; default: the last that has a checkpoint.', flag_values=fv)
  flags.DEFINE_string('step', '', "Step of the checkpoint, or 'best'; default: the newest.", flag_values=fv)
  flags.DEFINE_string('ema', '', "Of a teacher with several averages: which, such as std_0.1; default: the first.",
                      flag_values=fv)
  flags.DEFINE_integer('num_images', 64, 'Number of images.', lower_bound=1, flag_values=fv)
  flags.DEFINE_string('labels', 'cycle', "Classes: 'cycle', 'random', or a list such as 3,5,7.", flag_values=fv)
  flags.DEFINE_integer('seed', 0, 'Seed: the same seed gives the same images.', lower_bound=0,
                       upper_bound=LARGEST_SEED, flag_values=fv)
  flags.DEFINE_integer('batch_size', sampler.CHUNK, 'Images a call.', lower_bound=1, flag_values=fv)
  common.define_file(fv, 'out', 'samples.png', 'File to write: .png (a grid) or .npz (arr_0, arr_1).')


def run(fv, args) -> int:
  del args
  if epath.Path(fv.out).suffix not in sample.FORMATS:
    raise ValueError(f'--out={fv.out}: must end in {" or ".join(sample.FORMATS)}')
  images, labels, phase, step = sample.draw(
    fv.workdir, fv.phase, fv.step, fv.num_images, fv.labels, fv.seed, fv.batch_size, fv.ema)
  sample.write(fv.out, images, labels)
  print(f'{fv.out}: {len(images)} images of {images.shape[1]} px, phase {phase}, step {step}')
  return 0
