"""`pagoda edit`: a picture reconstructed, enlarged, restyled, inpainted, deblurred, coloured; two interpolated."""

import sys

import numpy as np
from absl import flags
from etils import epath

from pagoda_jax.cli import common, generators
from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.use import descent, edit, picture_files, sample

# word -> (pictures it takes, the flag that it needs besides)
WORDS = {'reconstruct': (1, ''), 'super_resolve': (1, ''), 'restyle': (1, 'label'), 'inpaint': (1, 'mask'),
         'deblur': (1, 'blur'), 'colorize': (1, ''), 'interpolate': (2, '')}
_BY = ('reconstruct', 'super_resolve', 'restyle', 'interpolate')  # which the teacher's inversion can do
_OF = {'mask': ('inpaint',), 'blur': ('deblur',), 'from_label': ('restyle', 'interpolate'),
       'from_prompt': ('restyle', 'interpolate'), 'by': _BY, 'frames': ('interpolate',)}
_OF_ADAM = ('steps', 'tries', 'learning_rate', 'error', 'prior', 'seed')


def define_flags(fv) -> None:
  generators.define(fv)
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=fv)
  whole = lambda name, default, low, high, help: flags.DEFINE_integer(
    name, default, help, lower_bound=low, upper_bound=high, flag_values=fv)
  number = lambda name, default, low, high, help: flags.DEFINE_float(
    name, default, help, lower_bound=low, upper_bound=high, flag_values=fv)
  whole('label', None, 0, None, "The picture's class, or the one to restyle to; default: of few classes the best.")
  whole('from_label', None, 0, None, "restyle: the picture's own class; interpolate: the first picture's, where the "
        'second is of --label. Default: the best.')
  text('prompt', None, 'Of a network of captions: what the picture shows, or what to restyle it to.')
  text('from_prompt', None, "restyle: what the picture shows; interpolate: the first picture, where the second is of "
       '--prompt.')
  text('mask', None, 'inpaint: a picture file, white where to paint; of the size of the picture.')
  number('blur', None, 0.0, None, 'deblur: standard deviation of the blur, in pixels of the image made.')
  flags.DEFINE_enum('by', 'adam', ['adam', 'inversion'], 'How noise is found: by Adam, or by the inversion of the '
                    f"work directory's teacher ({', '.join(_BY)}).", flag_values=fv)
  number('guidance', None, 0, 100, 'Strength of guidance.')
  whole('steps', edit.DEFAULTS.steps, 1, 100_000, f'Of Adam at most, in whole rounds of {descent.REPORT}; it ends when '
        'nothing more is to be won.')
  whole('tries', edit.DEFAULTS.tries, 1, 64, 'Beginnings for each label, of which the best is taken.')
  number('learning_rate', edit.DEFAULTS.learning_rate, 1e-6, 10, 'Of noise of unit standard deviation.')
  number('error', edit.DEFAULTS.error, 1e-4, 10, 'How exactly the picture is to be met: standard deviation of a value, '
         'white minus black being 2.')
  number('prior', edit.DEFAULTS.prior, 0, 1e6, 'Weight of the prior of the noise.')
  whole('seed', 0, 0, 2**32 - 1, 'Of the beginnings.')
  whole('frames', 30, 2, 10_000, 'interpolate: how many.')
  common.define_file(fv, 'out', None, 'File to write, .png, beside it NAME_beside.png with the picture and the image; '
                     'interpolate: .webp or .png. Default: the edit, such as inpaint.png.')


def run(fv, args) -> int:
  """`pagoda edit WORD PICTURE ...`."""
  word, *paths = args or ['']
  if word not in WORDS:
    raise ValueError(f'pagoda edit {word}: use one of {", ".join(WORDS)}')
  count, needed = WORDS[word]
  if len(paths) != count:
    raise ValueError(f'pagoda edit {word}: takes {count} picture file{"s" * (count > 1)}, and {len(paths)} '
                     f'{"is" if len(paths) == 1 else "are"} given')
  for name, of in _OF.items():
    if fv[name].present and word not in of:
      raise ValueError(f'--{name}={fv[name].value}: is of {", ".join(of)}')
  if fv.by == 'inversion' and (given := [name for name in _OF_ADAM if fv[name].present]):
    raise ValueError(f'--{given[0]}={fv[given[0]].value}: is of Adam, and --by=inversion is given')
  if fv.prompt is not None and (fv.label is not None or fv.from_label is not None):
    raise ValueError(f'--prompt={fv.prompt} and a label: a network takes one of them')
  for name, other in (('from_label', 'label'), ('from_prompt', 'prompt')):
    if fv[name].value is not None and fv[other].value is None:
      raise ValueError(f'--{name}={fv[name].value}: needs --{other} beside it')
  if needed and fv[needed].value in (None, '') and (needed != 'label' or fv.prompt is None):
    raise ValueError(f'pagoda edit {word}: needs --{needed}')
  suffixes = ('.webp', '.png') if word == 'interpolate' else ('.png',)
  out = epath.Path(fv.out or f'{word}{suffixes[0]}')
  if out.suffix not in suffixes:
    raise ValueError(f'--out={out}: must end in {" or ".join(suffixes)}')
  if place := common.unwritable(str(out)):  # of the default, of which no flag is checked
    raise ValueError(f'--out={out}: {place} is a folder that cannot be written to')
  pictures = [picture_files.read(path) for path in paths]  # before anything large is read
  mask = picture_files.read(fv.mask) if fv.mask else None
  generator = generators.opened(fv)
  if generator.takes_text:
    for name in ('prompt', *(['from_prompt'] if word == 'restyle' else [])):
      if fv[name].value is None:
        raise ValueError(f'pagoda edit {word}: {generator.where} draws what captions say: needs --{name}')
  options = edit.Options(fv.steps, fv.tries, fv.learning_rate, fv.error, fv.prior, fv.seed)
  how = {'options': options, 'report': _report(fv.steps), 'omega': fv.guidance, 'prompts': fv.prompt}
  side, channels = generator.resolution, generator.channels
  if word == 'interpolate':
    ends = [picture_files.square(picture, side, channels) for picture in pictures]
    labels = fv.label if fv.from_label is None or fv.label is None else [fv.from_label, fv.label]
    how['prompts'] = fv.prompt if fv.from_prompt is None or fv.prompt is None else [fv.from_prompt, fv.prompt]
    frames = edit.interpolate(generator, *ends, labels, fv.frames, by=fv.by, **how)
    _write_frames(out, frames)
    print(f'{out}: {len(frames)} frames of {side} px, {generator.where}')
    return 0
  (picture,) = pictures
  if word == 'super_resolve':
    before = picture_files.small(picture, side, channels)
  else:
    before = picture_files.square(picture, side, 1 if word == 'colorize' else channels)
  batch, by = before[None], {'by': fv.by} if word in _BY else {}
  if word == 'restyle':
    how['prompts'] = fv.from_prompt
    found = edit.restyle(generator, batch, fv.label, fv.from_label, prompt=fv.prompt, **how, **by)
  elif word == 'inpaint':
    hole = picture_files.mask(mask, picture.size, side)
    found = edit.inpaint(generator, batch, hole[None], fv.label, **how)
    before = np.where(hole[..., None], np.uint8(127), before)
  elif word == 'deblur':
    found = edit.deblur(generator, batch, fv.blur, fv.label, **how)
  else:
    found = getattr(edit, word)(generator, batch, fv.label, **how, **by)
  write_png(out, found.images[0])
  write_png(out.parent / f'{out.stem}_beside.png', picture_files.beside([before], [found.images[0]], max(side, 64)))
  label = f', label {found.labels[0]}' if generator.num_classes else ''
  ended = f'{found.steps} steps, {"settled" if found.settled else "not settled"}' if found.steps else 'by inversion'
  print(f'{out}: {side} px{label}, {generator.where}; {ended}; what is known of the picture met to '
        f'{found.misfit[0]:.1f} grey levels (rms)')
  return 0


def _write_frames(out, frames) -> None:
  if out.suffix == '.webp':  # there and back
    there_and_back = np.concatenate([frames, frames[-2:0:-1]])
    sample.write_webp(out, np.stack([image_grid(frame[None], smallest_side=64) for frame in there_and_back]))
  else:
    write_png(out, image_grid(frames, min(len(frames), 10)))


def _report(steps: int):
  """A line of how far it is, in place on a terminal; of the whole rounds that are done."""
  steps = -(-steps // descent.REPORT) * descent.REPORT
  end = '\r' if sys.stderr.isatty() else '\n'
  return lambda step, value: print(f'step {step}/{steps}  objective {value:.4g}\x1b[K' if end == '\r' else
                                   f'step {step}/{steps}  objective {value:.4g}', end=end, file=sys.stderr, flush=True)
