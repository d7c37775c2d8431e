"""A run with EDM2's network and guidance: teacher, estimator, inversion, one-step generator, growth; its weights."""

import shutil

import jax
import numpy as np
import pytest
from etils import epath
from runs import CONFIG, digest, pagoda

from pagoda_jax.networks import growth
from pagoda_jax.training import checkpoints
from pagoda_jax.weights.convert import folders

FLAGS = (f'{CONFIG}:guided', '--config.network.form=edm2', '--config.phases.teacher.uncertainty=True',
         '--config.phases.teacher.ema_std=(0.05,0.1)')
FOURIER = (('embedding', 'fourier'), ('logvar', 'fourier'))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('edm2')
  assert pagoda('run', *FLAGS, f'--workdir={folder}') == 0
  return folder


def trained(folder, phase):
  """(parameters that are trained, the others), as the newest checkpoint has them."""
  state, _ = checkpoints.read_state(folder / phase)
  return state['params'], state.get('fixed', {})


def size(kernel):
  return np.sqrt(np.mean(np.square(kernel, dtype=np.float64), axis=tuple(range(kernel.ndim - 1))))


def test_every_stage_keeps_weights_at_their_size_and_a_teacher_goes_on_bit_by_bit(run, tmp_path, capsys):
  teacher, _ = trained(run, 'teacher')
  for phase in ('teacher', 'guide', 'distill', 'grow_16'):
    params, fixed = trained(run, phase)
    for path, leaf in jax.tree.leaves_with_path(params):
      names = [entry.key for entry in path]
      others = names[0] in ('omega_embed', 'estimate') or names[0].startswith('dec_16')  # of other layers
      if names[-1] == 'kernel' and not others:
        np.testing.assert_allclose(size(leaf), 1, atol=1e-3, err_msg=f'{phase} {names}')
    for first, last in FOURIER:
      jax.tree.map(np.testing.assert_array_equal, growth.merge(params, fixed)[first][last], teacher[first][last])
  # A grown level's own kernels count: they begin at zero, or at 1/sqrt(fan in), and are not made larger.
  assert size(trained(run, 'grow_16')[0]['dec_16_block0']['conv_0']['kernel']).max() < 0.5
  # Every stage's state is as before; the teacher's update is not.
  mine = shutil.copytree(run / 'teacher', tmp_path / 'run' / 'teacher').parent
  shutil.rmtree(mine / 'teacher' / 'checkpoints' / '4')
  assert pagoda('train', *FLAGS, f'--workdir={mine}', '--phase=teacher') == 0
  assert 'goes on from step 2' in capsys.readouterr().out and digest(mine, 'teacher') == digest(run, 'teacher')


def test_its_weights_go_out_and_come_back_and_draw(run, tmp_path, capsys):
  """Also an average that was not kept: what is never trained is the same in it."""
  for source, name in ((run / 'teacher', 'newest'), (None, 'post_hoc')):
    folder, file = tmp_path / name, tmp_path / f'{name}.safetensors'
    if source is None:
      assert pagoda('ema', f'--workdir={run}', '--std=0.08', f'--output={folder}') == 0
      source = folder
    assert pagoda('convert', f'--input={source}', f'--output={file}', '--to=torch') == 0
    again = tmp_path / f'{name}_again'
    assert pagoda('convert', f'--input={file}', f'--output={again}') == 0
    params = folders.load_converted(again)[0]['params']
    for first, last in FOURIER:
      jax.tree.map(np.testing.assert_array_equal, params[first][last], trained(run, 'teacher')[0][first][last])
    assert pagoda('sample', f'--weights={again}', '--kind=teacher', '--levels=2', '--num_images=2',
                  f'--out={tmp_path / name}.npz') == 0
    assert np.load(tmp_path / f'{name}.npz')['arr_0'].shape == (2, 8, 8, 1)
  expected = checkpoints.read_generator(epath.Path(run) / 'teacher')[0]
  found = folders.load_converted(tmp_path / 'newest_again')[0]['params']
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  capsys.readouterr()
  assert pagoda('convert', f'--input={run / "grow_16"}', f'--output={tmp_path / "g.safetensors"}', '--to=torch') != 0
  assert "no published code computes a grown network of form 'edm2'" in ''.join(capsys.readouterr())
