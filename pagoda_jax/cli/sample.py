"""`pagoda sample`: images from a trained phase or from weights, to .png, .npz, .webp or a folder."""

import numpy as np
from absl import flags
from etils import epath

from pagoda_jax.cli import common, generators
from pagoda_jax.data.images import image_grid
from pagoda_jax.stages import sampler
from pagoda_jax.use import sample
from pagoda_jax.use.generator import LARGEST_SEED


def define_flags(fv) -> None:
  generators.define(fv)
  flags.DEFINE_integer('num_images', None, 'Number of images, at each strength of guidance; default: 64, or as many as '
                       'there are prompts.', lower_bound=1, flag_values=fv)
  flags.DEFINE_string('labels', 'cycle', "Classes: 'cycle', 'random', or a list such as 3,5,7.", flag_values=fv)
  flags.DEFINE_string('prompts', '', "Of a network of captions: 'a red flag;a smiling cat', or a file that ends in "
                      '.txt, one a line (UTF-8).', flag_values=fv)
  flags.DEFINE_string('guidance', '', 'Strength of guidance, such as 3 (1: none); of several, such as 1,2,4,8, each '
                      'row of the grid shows one noise and label at all of them.', flag_values=fv)
  flags.DEFINE_float('truncate', 1.0, 'What the noise is multiplied by: below 1, images are nearer to the average one '
                     'and less varied.', lower_bound=0, upper_bound=10, flag_values=fv)
  flags.DEFINE_integer('seed', 0, 'Seed: the same seed gives the same images.', lower_bound=0,
                       upper_bound=LARGEST_SEED, flag_values=fv)
  flags.DEFINE_integer('batch_size', sampler.CHUNK, 'Images a call.', lower_bound=1, flag_values=fv)
  flags.DEFINE_boolean('captions', None, 'With a .png: label or prompt and strength of guidance below each image; '
                       'default: where there are prompts.', flag_values=fv)
  flags.DEFINE_integer('frames', 15, 'With a .webp: frames from one noise to the next.', lower_bound=1,
                       upper_bound=1000, flag_values=fv)
  common.define_place(fv, 'out', 'samples.png', 'What to write: a .png (a grid), a .npz (arr_0, arr_1), a .webp (the '
                      "grid's images wander through noise and back), or, without suffix, a folder of .png files.")


def run(fv, args) -> int:
  del args
  suffix = epath.Path(fv.out).suffix
  if suffix and suffix not in sample.FORMATS:
    raise ValueError(f'--out={fv.out}: must end in {" or ".join(sample.FORMATS)}, or in nothing for a folder of .png')
  for name, needed in (('captions', '.png'), ('frames', '.webp')):
    if fv[name].present and suffix != needed:
      raise ValueError(f'--{name}: is of a {needed}, and --out={fv.out} is none')
  if not suffix:
    sample.check_empty(fv.out)
  omegas = sample.parse_guidance(fv.guidance)
  if suffix == '.webp' and len(omegas) > 1:
    raise ValueError(f'--guidance={fv.guidance}: an animation takes one strength')
  if fv.prompts and fv['labels'].present:
    raise ValueError(f'--labels={fv.labels} and --prompts: give one of them')
  prompts = sample.parse_prompts(fv.prompts) if fv['prompts'].present else ()
  generator = generators.opened(fv)
  count = fv.num_images or len(prompts) or 64
  how = count, fv.labels, fv.seed, fv.batch_size
  if suffix == '.webp':
    sample.check_webp(generator.resolution, count)
    frames, _ = sample.wander(generator, *how, *(omegas or (None,)), fv.truncate, fv.frames, prompts)
    sample.write_webp(fv.out, np.stack([image_grid(images) for images in frames]))
    said = f'{len(frames)} frames of {count} images'
  else:
    images, labels = sample.draw(generator, *how, omegas, fv.truncate, prompts)
    captioned = bool(prompts) if fv.captions is None else fv.captions
    sample.write(fv.out, images, labels, omegas, captioned, prompts)
    said = f'{len(images)} images'
  strength = f', guidance {fv.guidance}' if omegas else ''
  truncated = f', noise times {fv.truncate:g}' if fv.truncate != 1 else ''
  print(f'{fv.out}: {said} of {generator.resolution} px, {generator.where}{strength}{truncated}')
  return 0
