"""An exported folder's generator as ONNX too: `bash launch/onnx.sh FOLDER` runs this in an environment of its own.

jax2onnx wants an older orbax-checkpoint than this package does, so nothing is imported here but jax, flax, jax2onnx,
onnxruntime, the networks and the mathematics. It adds to the folder

    generator.onnx   noise [B, R, R, C], label int32 [B](, omega [B]) -> images [B, S, S, C] in [-1, 1], float32; of a
                     network of captions text [B, L, W], text_mask bool [B, L] and text_pooled [B, P] in place of labels
    onnx.json        its checksum, and that of the config.json that it was made from; sealed
    load_onnx.py     how to draw with them; needs only numpy and onnxruntime
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.method import ddpm, diffusion
from pagoda_jax.networks.autoencoder import AutoencoderKL
from pagoda_jax.networks.unet import UNet
from pagoda_jax.use import exported_loader
from pagoda_jax.use.onnx_loader import digest, seal

COUNTS = (1, 3)  # of images that are compared
TEXT = ('text', 'text_mask', 'text_pooled')


def generator(config, params):
  """generate(*arrays as `arguments` names them) -> float32 images of what an exported folder holds."""
  tree = {}
  for path, leaf in params.items():
    *parents, last = path.split('/')
    functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = leaf
  unet = UNet(**config['options'] | {'attention_form': 'xla', 'dtype': jnp.float32})
  decode = decoder(config['autoencoder'], tree.pop('autoencoder')) if 'autoencoder' in config else lambda images: images
  apply = lambda params, x, c_noise, cond: unet.apply({'params': params}, x, c_noise, cond)
  sigma_max, sigma_data = config['diffusion']['sigma_max'], config['diffusion']['sigma_data']
  # Of one noise level: as numbers, where a search in a table would be converted.
  known = ddpm.coefficients(sigma_max, unet.ddpm_levels) if unet.ddpm_levels else None
  of_sigma = (lambda sigma: known) if known else None

  def generate(*given):
    cond = dict(zip(names(config), given))
    return decode(diffusion.one_step(apply, tree, cond.pop('noise'), cond, sigma_max, sigma_data, of_sigma))

  return generate


def decoder(options, variables):
  """decode(latents [B, h, w, c] of unit variance) -> float32 images, of a generator in latent space."""
  fields = {field.name: options[field.name] for field in dataclasses.fields(AutoencoderKL) if field.name in options}
  module = AutoencoderKL(**fields | {'widths': tuple(options['widths']), 'dtype': jnp.float32})
  scaling, shift = options['scaling_factor'], options['shift_factor']
  return lambda latents: module.apply(variables, latents / scaling + shift, method='decode')


def names(config) -> list[str]:
  """Of the model's inputs, in the order of the program's; a network of captions reads no labels."""
  text = TEXT if config.get('text') else ()
  return ['noise', *(() if text else ['label']), *(['omega'] if config['guidance'] else []), *text]


def arguments(config, count: int) -> dict[str, np.ndarray]:
  """Inputs of `count` images to try a generator with, by name; texts are of L tokens down to none."""
  rng = np.random.default_rng(count)
  normal = lambda *shape: rng.standard_normal((count, *shape), 'float32')
  given = {'noise': np.float32(config['diffusion']['sigma_max']) * normal(*config['noise_shape']),
           'label': np.arange(count, dtype=np.int32) % max(config['num_classes'], 1),
           'omega': np.full(count, config['default_omega'] or 1, np.float32)}
  if text := config.get('text'):
    tokens = text['length'] - np.arange(count) * text['length'] // max(count - 1, 1)
    mask = np.arange(text['length']) < tokens[:, None]
    given |= {'text': np.where(mask[..., None], normal(text['length'], text['width']), 0).astype(np.float32),
              'text_mask': mask, 'text_pooled': normal(text['pooled_width'])}
  return {name: given[name] for name in names(config)}


def of_program(given) -> list[np.ndarray]:
  """The same as the exported program takes them: with labels, if only those of no class."""
  return [given['noise'], given.get('label', np.full(len(given['noise']), -1, np.int32)),
          *(given[name] for name in ('omega', *TEXT) if name in given)]


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
  warnings.filterwarnings('ignore', 'Explicitly requested dtype float64')  # a 0 that it traces so; none is in the model

  folder = pathlib.Path(folder)
  config, params, program = exported_loader.read(folder)
  if config['kind'] != 'generator':
    raise ValueError(f'{folder}: holds a teacher; only one-step generators become ONNX')
  generate, tried = generator(config, params), arguments(config, 1)
  batch, *_ = jax.export.symbolic_shape('B')
  inputs = [jax.ShapeDtypeStruct((batch, *each.shape[1:]), each.dtype) for each in tried.values()]
  partial = folder / f'generator.onnx.{os.getpid()}.partial'
  try:
    with jax.default_matmul_precision('highest'):
      jax2onnx.to_onnx(generate, inputs, model_name='generator', input_names=[*tried], output_names=['images'],
                       return_mode='file', output_path=str(partial), export_mode='web')
    session = onnxruntime.InferenceSession(str(partial), providers=['CPUExecutionProvider'])
    draw = lambda given: session.run(['images'], given)[0]
    # The program is who to agree with, where it computes in float32 too.
    ours = lambda given: program(params, *of_program(given)) if config['precision'] == 'float32' else (
      jax.jit(generate)(*given.values()))
    worst = max(np.abs(grey_levels(draw(given)) - grey_levels(ours(given))).max()
                for given in (arguments(config, count) for count in COUNTS))
    if worst > 1:
      raise ValueError(f'{folder}: the ONNX model draws other images: {worst:g} grey levels apart, 1 is allowed')
    description = {'file': 'generator.onnx', 'bytes': partial.stat().st_size, 'sha256': digest(partial.read_bytes()),
                   'config_sha256': digest((folder / 'config.json').read_bytes()), 'inputs': [*tried],
                   'noise_shape': config['noise_shape'], 'sigma_max': config['diffusion']['sigma_max'],
                   'default_omega': config['default_omega'], 'num_classes': config['num_classes'],
                   'text': config.get('text')}
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
      theirs = rate(lambda given: np.asarray(program(params, *of_program(given))), given, count)
      print(f'  {count} images a call: ONNX {rate(draw, given, count):.1f}, StableHLO {theirs:.1f} images/s')


if __name__ == '__main__':
  main(sys.argv[1])
