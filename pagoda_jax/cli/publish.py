"""`pagoda publish`: a folder for a model hub."""

from absl import flags

from pagoda_jax.cli import common, generators
from pagoda_jax.use import publish, sample


def define_flags(fv) -> None:
  generators.define(fv)
  common.define_output(fv, 'Folder to make.')
  flags.DEFINE_string('title', '', 'Of the model card; default: the name of the folder.', flag_values=fv)
  flags.DEFINE_string('licence', 'other', 'Of the weights, as the hub names it, such as apache-2.0.', flag_values=fv)
  flags.DEFINE_string('prompts', '', 'Of a network of captions: what the samples are of, as `pagoda sample` takes it.',
                      flag_values=fv)
  flags.DEFINE_string('data', '', 'In words, what it was trained on and under which licence; default: what the run '
                      'knows of its data.', flag_values=fv)


def run(fv, args) -> int:
  """`pagoda publish`."""
  del args
  generator = generators.opened(fv)
  config = publish.write(generator, fv.output, fv.workdir, fv.title, fv.licence, fv.data,
                         sample.parse_prompts(fv.prompts) if fv.prompts else ())
  print(f'{fv.output}: {generator.where}: {config["parameters"]:,} parameters, model card README.md')
  for gap in publish.gaps(fv.output):
    print(f'  still to be said in README.md: {gap}')
  return 0
