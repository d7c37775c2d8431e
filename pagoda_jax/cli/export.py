"""`pagoda export`: a generator as a program that needs only jax and flatbuffers."""

from pagoda_jax.cli import common, generators
from pagoda_jax.use import exported


def define_flags(fv) -> None:
  generators.define(fv)
  common.define_output(fv, 'Folder to make.')


def run(fv, args) -> int:
  """`pagoda export`."""
  del args
  generator = generators.opened(fv)
  config = exported.write(generator, fv.output)
  print(f'{fv.output}: {generator.where}: {config["parameters"]:,} parameters')
  for name, file in config['files'].items():
    print(f'  {name:<20} {common.number(file["bytes"])}B')
  print(f'draw with jax and flatbuffers alone: python {fv.output}/{exported.LOADER} 0 1; '
        f'for ONNX: bash launch/onnx.sh {fv.output}')
  return 0
