"""The flags that say which generator a command is about, and the generator of them."""

from absl import flags

from pagoda_jax.cli import common
from pagoda_jax.use import generator

_OF_WORKDIR = ('phase', 'step', 'ema')
_OF_WEIGHTS = ('kind', 'levels')


def define(fv) -> None:
  """--workdir or --weights, and which network there."""
  common.define_folder(fv, 'workdir', 'Work directory of a run.', required=False)
  common.define_folder(fv, 'weights', 'Instead: a folder that `pagoda convert`, `export` or `publish` has made of a '
                       'teacher or generator.', required=False)
  flags.DEFINE_enum('kind', None, ['teacher', 'generator'], 'With --weights: what they are of, where the published '
                    'file is not known by its name.', flag_values=fv)
  flags.DEFINE_integer('levels', None, "With --weights: noise levels of a teacher's sampler; default: as exported, "
                       'else 18.', lower_bound=2, upper_bound=10_000, flag_values=fv)
  flags.DEFINE_string('phase', '', 'Phase to draw from; default: the last that has a checkpoint.', flag_values=fv)
  flags.DEFINE_string('step', '', "Step of the checkpoint, or 'best'; default: the newest.", flag_values=fv)
  flags.DEFINE_string('ema', '', "Of a teacher with several averages: which, such as std_0.1; default: the first.",
                      flag_values=fv)
  flags.DEFINE_string('text_encoder', '', 'Of a network of captions: what embeds prompts, as config.text.encoder has '
                      "it; default: the run's.", flag_values=fv)


def check(fv) -> None:
  """Refuses flags that are not of one network."""
  if (fv.workdir is None) == (fv.weights is None):
    raise ValueError('give --workdir=RUN or --weights=FOLDER' + (', not both' if fv.weights else ''))
  of_other = _OF_WORKDIR if fv.weights else _OF_WEIGHTS
  if given := [name for name in of_other if fv[name].present]:
    raise ValueError(f'--{given[0]}={fv[given[0]].value}: is of {"--workdir" if fv.weights else "--weights"}, and '
                     f'{"--weights" if fv.weights else "--workdir"} is given')


def opened(fv) -> generator.Generator:
  """The generator of the flags."""
  check(fv)
  if fv.weights:
    found = generator.of_weights(fv.weights, fv.kind or '', fv.levels)
  else:
    found = generator.of_phase(fv.workdir, fv.phase, fv.step, fv.ema)
  return generator.with_text_encoder(found, fv.text_encoder)
