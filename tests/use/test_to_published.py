"""A trained phase leaves under the published code's names, and comes back the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags
from flax import traverse_util

from pagoda_jax.cli import convert
from pagoda_jax.runtime.files import write_sealed
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints, workdir
from pagoda_jax.training.claims import WorkdirError
from pagoda_jax.use import to_published
from pagoda_jax.weights.convert import formats
from pagoda_jax.weights.convert.mapping import ConversionError


def trained_phase(folder, form, name):
  """(phase folder, parameters) of a work directory with one checkpoint of made-up numbers."""
  config = tiny.get_config()
  config.network.form = form
  unet = models.make_unet(config, name)
  batch = jnp.zeros((1, unet.resolution, unet.resolution, unet.image_channels))
  shapes = jax.eval_shape(unet.init, jax.random.key(0), batch, jnp.zeros(1), {'label': jnp.zeros(1, jnp.int32)})
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes['params'])
  # A growth phase keeps what it does not train apart.
  fixed = {block: params[block] for block in params if block.startswith('enc') and name == 'grow_16'}
  ema = {block: params[block] for block in params if block not in fixed}
  workdir.claim(folder, config, name)
  saver = checkpoints.Checkpoints(folder / name)
  saver.save(4, {'ema': ema, 'fixed': fixed, 'step': np.array(4)}, {})
  saver.close()
  return folder / name, params


@pytest.mark.parametrize('form, name, format', [
  ('edm', 'teacher', 'edm'), ('ddpmpp', 'teacher', 'edm'), ('guided', 'teacher', 'pagoda'),
  ('guided', 'grow_16', 'pagoda'),
])  # fmt: skip
def test_phase_to_file_and_back(form, name, format, tmp_path, capsys):
  phase, params = trained_phase(tmp_path / 'run', form, name)
  fv = flags.FlagValues()
  convert.define_flags(fv)
  fv(['pagoda', f'--input={phase}', f'--output={tmp_path}/out.safetensors', '--to=torch'])
  assert convert.run(fv, []) == 0
  out = capsys.readouterr().out
  assert f'phase {name} at step 4' in out and f'names of format {format}' in out
  asked = {'resolution': 8, 'grown_num_blocks': 1} if format == 'pagoda' else {}
  back = formats.read_converted(tmp_path / 'out.safetensors', **asked)
  assert back.format == format
  expected, actual = (traverse_util.flatten_dict(tree, sep='/') for tree in (params, back.variables['params']))
  assert actual.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(actual[path], value)


def test_what_no_published_code_computes(tmp_path):
  phase, _ = trained_phase(tmp_path, 'edm', 'grow_16')
  with pytest.raises(ConversionError, match="no published code computes a grown network of form 'edm'"):
    to_published.read_phase(phase)
  with pytest.raises(ConversionError, match='--attention_order=legacy: is of networks of form guided'):
    to_published.read_phase(trained_phase(tmp_path / 'run', 'edm', 'teacher')[0], attention_order='legacy')
  with pytest.raises(ConversionError, match='neither a converted folder nor a phase'):
    to_published.read_phase(tmp_path / 'invert')
  write_sealed(tmp_path / 'exported' / 'config.json', {'format': 'pagoda_jax generator, version 1'})
  with pytest.raises(WorkdirError, match='exported/config.json: is of no phase of a run, but of something else'):
    to_published.read_phase(tmp_path / 'exported')
