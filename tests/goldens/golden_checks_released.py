"""Golden checks of `pagoda convert` on a generator's file as the original training code leaves it (pagoda_released)."""

import hashlib
import pathlib
import tempfile
import zipfile

import golden_tools
import jax
import numpy as np

from pagoda_jax import main
from pagoda_jax.method import diffusion
from pagoda_jax.networks.unet import UNet
from pagoda_jax.weights.convert import folders


def cases():
  """Yields (id, check)."""
  if golden_tools.exists('pagoda_released'):
    for config in golden_tools.load('pagoda_released')[1]['configs']:
      yield f'released-{config}', golden_tools.in_float32(lambda config=config: check_released(config))


def write_file(folder, arrays, entry, config) -> pathlib.Path:
  """The file that torch.save wrote: its own pickle, with the storages' numbers made again by the rule."""
  path, digest = pathlib.Path(folder) / entry['file'], hashlib.sha256()
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(f'{entry["root"]}/data.pkl', arrays[f'{config}/data_pkl'].tobytes())
    for key in sorted(entry['storages'], key=int):
      storage = entry['storages'][key]
      tensors = [golden_tools.rule_tensor(entry['prefix'], name, shape).ravel() for name, shape in storage['names']]
      content = np.concatenate(tensors).astype(storage['dtype']).tobytes()
      digest.update(content)
      archive.writestr(f'{entry["root"]}/data/{key}', content)
    for name, content in entry['others'].items():
      archive.writestr(f'{entry["root"]}/{name}', content.encode('latin1'))
  assert digest.hexdigest() == entry['sha256_of_storages']
  return path


def check_released(config):
  """`pagoda convert` reads the file, and the generator in its folder draws the original's images."""
  arrays, meta = golden_tools.load('pagoda_released')
  entry = meta['configs'][config]
  with tempfile.TemporaryDirectory() as folder:
    path, output = write_file(folder, arrays, entry, config), f'{folder}/converted'
    heads = f'--channels_per_head={entry["kwargs"]["num_head_channels"]}'
    assert main.main(['convert', f'--input={path}', f'--output={output}', heads]) == 0
    variables, options = folders.load_converted(output)
    notes = folders.read_description(output)['notes']
  assert f'{entry["half"]} tensors of float16 made float32' in notes
  net = UNet(**options)
  z = 80 * np.random.default_rng(entry['z_seed']).standard_normal(entry['z_shape'])
  z = z.astype(np.float32)
  np.testing.assert_array_equal(z.ravel()[:8], arrays[f'{config}/z_head'])
  sigmas = meta['sigma_max'], meta['sigma_data']

  def generate(variables, z, y):
    raw = lambda params, *args: net.apply({'params': params}, *args)
    return diffusion.one_step(raw, variables['params'], z, {'label': y}, *sigmas)

  generate = jax.jit(generate)
  images = golden_tools.nchw(generate(variables, golden_tools.nhwc(z), arrays[f'{config}/y'].astype(np.int32)))
  side = entry['kwargs']['output_size']
  assert images.shape == (len(z), 3, side, side)
  step, cell = entry['slice_step'], entry['cell']
  cells = images.reshape(len(z), 3, side // cell, cell, side // cell, cell).astype(np.float64)
  rms = np.sqrt(np.mean(images**2))
  for name, ours in {
      'slice': images[:, :, ::step, ::step],
      'corner': images[0, :, :48, :48],
      'end': images[-1, :, -32:, -32:],
      'cell_mean': cells.mean((3, 5)),  # every pixel is in one of them
      'stats': [images.mean(), images.std(), np.abs(images).max(), images.min(), images.max()],
  }.items():
    error = np.max(np.abs(ours - arrays[f'{config}/{name}'])) / rms
    assert error <= 1e-3, f'{name}: max error {error:.1e} of rms'
