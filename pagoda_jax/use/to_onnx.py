"""An exported folder's generator as ONNX too: `bash launch/onnx.sh FOLDER` runs this in an environment of its own.

jax2onnx wants an older orbax-checkpoint than this package does, so nothing is imported here but jax, flax, jax2onnx,
onnxruntime, the networks and the mathematics. It adds to the folder

    generator.onnx   noise [B, R, R, C], label int32 [B](, omega [B]) -> images [B, S, S, C] in [-1, 1], float32
    onnx.json        its checksum, and that of the config.json that it was made from; sealed
    load_onnx.py     how to draw with them; needs only numpy and onnxruntime
"""

import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.method import diffusion
from pagoda_jax.networks.unet import UNet
from pagoda_jax.use import exported_loader
from pagoda_jax.use.onnx_loader import digest, seal

COUNTS = (1, 3)  # of images that are compared


def generator(config, params):
  """generate(noise, label[, omega]) -> float32 images of what an exported folder holds."""
  tree = {}
  for path, leaf in params.items():
    *parents, last = path.split('/')
    functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = leaf
  unet = UNet(**config['options'] | {'attention_form': 'xla', 'dtype': jnp.float32})
  apply = lambda params, x, c_noise, cond: unet.apply({'params': params}, x, c_noise, cond)
  sigma_max, sigma_data = config['diffusion']['sigma_max'], config['diffusion']['sigma_data']

  def generate(noise, label, omega=None):
    cond = {'label': label} if omega is None else {'label': label, 'omega': omega}
    return diffusion.one_step(apply, tree, noise, cond, sigma_max, sigma_data)

  return generate


def arguments(config, count: int) -> list[np.ndarray]:
  """Noise, labels and perhaps strengths of `count` images to try a generator with."""
  rng = np.random.default_rng(count)
  noise = np.float32(config['diffusion']['sigma_max']) * rng.standard_normal((count, *config['noise_shape']), 'float32')
  labels = np.arange(count, dtype=np.int32) % max(config['num_classes'], 1)
  return [noise, labels] + ([np.full(count, config['default_omega'], np.float32)] if config['guidance'] else [])


def grey_levels(images) -> np.ndarray:
  return np.clip(np.round((np.asarray(images) + 1) * 127.5), 0, 255)


def rate(function, given, count: int, seconds: float = 5.0) -> float:
  """Images a second of calls that draw `count`, the first of which is not counted."""
  function(given)
  start, calls = time.perf_counter(), 0
  while time.perf_counter() - start < seconds:
    function(given)
    calls += 1
  return calls * count / (time.perf_counter() - start)


def main(folder) -> None:
  """Converts, compares, and only then puts the files into the folder."""
  import jax2onnx
  import onnxruntime

  logging.getLogger('onnx_ir').setLevel(logging.ERROR)  # it warns of each shape that it leaves out

  folder = pathlib.Path(folder)
  config, params, program = exported_loader.read(folder)
  if config['kind'] != 'generator':
    raise ValueError(f'{folder}: holds a teacher; only one-step generators become ONNX')
  generate = generator(config, params)
  names = ['noise', 'label', 'omega'][: len(arguments(config, 1))]
  batch, *_ = jax.export.symbolic_shape('B')
  inputs = [jax.ShapeDtypeStruct((batch, *each.shape[1:]), each.dtype) for each in arguments(config, 1)]
  partial = folder / f'generator.onnx.{os.getpid()}.partial'
  try:
    with jax.default_matmul_precision('highest'):
      jax2onnx.to_onnx(generate, inputs, model_name='generator', input_names=names, output_names=['images'],
                       return_mode='file', output_path=str(partial), export_mode='web')
    session = onnxruntime.InferenceSession(str(partial), providers=['CPUExecutionProvider'])
    draw = lambda given: session.run(['images'], dict(zip(names, given)))[0]
    worst = max(np.abs(grey_levels(draw(given)) - grey_levels(jax.jit(generate)(*given))).max()
                for given in (arguments(config, count) for count in COUNTS))
    if worst > 1:
      raise ValueError(f'{folder}: the ONNX model draws other images: {worst:g} grey levels apart, 1 is allowed')
    description = {'file': 'generator.onnx', 'bytes': partial.stat().st_size, 'sha256': digest(partial.read_bytes()),
                   'config_sha256': digest((folder / 'config.json').read_bytes()), 'inputs': names,
                   'noise_shape': config['noise_shape'], 'sigma_max': config['diffusion']['sigma_max'],
                   'default_omega': config['default_omega'], 'num_classes': config['num_classes']}
    described = json.dumps(description | {'seal': seal(description)}, indent=2)
    shutil.copyfile(pathlib.Path(__file__).parent / 'onnx_loader.py', folder / 'load_onnx.py')
    partial.replace(folder / 'generator.onnx')
    (folder / 'onnx.json').write_text(described + '\n')
  finally:
    partial.unlink(missing_ok=True)
  print(f'{folder}/generator.onnx: {description["bytes"]:,} bytes; at most {worst:g} grey levels from ours')
  if '--speed' in sys.argv:
    for count in (1, 16):
      given = arguments(config, count)
      ours = rate(lambda given: np.asarray(program(params, *given)), given, count)
      print(f'  {count} images a call: ONNX {rate(draw, given, count):.1f}, StableHLO {ours:.1f} images/s')


if __name__ == '__main__':
  main(sys.argv[1])
