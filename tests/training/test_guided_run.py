"""A run with guidance and EDM2's network: every phase, what each leaves, going on, its weights, what is drawn of it."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import step_tools
import tiny
from etils import epath
from PIL import Image
from runs import CONFIG, digest, pagoda

from pagoda_jax.data import noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.evaluation import small_data
from pagoda_jax.networks import growth
from pagoda_jax.runtime import randomness
from pagoda_jax.runtime.files import read_sealed, write_sealed
from pagoda_jax.runtime.interrupts import StopRequest
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints, inverting, loop, workdir
from pagoda_jax.weights.convert import folders

FLAGS = [f'{CONFIG}:guided', '--config.network.form=edm2', '--config.phases.teacher.uncertainty=True',
         '--config.phases.teacher.ema_std=(0.05,0.1)', '--config.evaluation.samples=20',
         '--config.evaluation.guidance=(1.0,2.0,4.0)']
FOURIER = (('embedding', 'fourier'), ('logvar', 'fourier'))


def get_config():
  """The experiment of the flags."""
  config = tiny.get_config('guided')
  config.network.form, config.phases.teacher.uncertainty = 'edm2', True
  config.phases.teacher.ema_std = (0.05, 0.1)
  return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('guided')
  assert pagoda('run', *FLAGS, f'--workdir={folder}') == 0
  return folder


@pytest.fixture
def mine(run, tmp_path):
  return pathlib.Path(shutil.copytree(run, tmp_path / 'run'))


def test_a_run_goes_on_bit_by_bit_and_measures_what_guidance_does(run, mine, capsys):
  phases = ('teacher', 'guide', 'distill', 'grow_16')
  for phase in phases:
    shutil.rmtree(mine / phase / 'checkpoints' / '4')
  # Later phases were made from a teacher of step 4: what goes on must not see it at step 2.
  assert pagoda('train', *FLAGS, f'--workdir={mine}', '--phase=teacher') == 0
  assert pagoda('run', *FLAGS, f'--workdir={mine}') == 0
  said = capsys.readouterr().out
  for phase in phases:
    assert f'{phase}: goes on from step 2' in said and digest(mine, phase) == digest(run, phase)
  rows = said[said.index('omega   samples'):].splitlines()
  assert [row.split()[:3] for row in rows[1:5]] == [
    ['teacher', '8', '1'], ['teacher', '8', '2'], ['teacher', '8', '4'], ['teacher', '8', 'held']]
  found = json.loads((run / 'distill' / 'evaluation.json').read_text())['guided']
  assert set(found) == {'1', '2', '4', 'held out'} and set(found['1']) == {'accuracy', 'spread', 'recall'}
  assert not (run / 'guide' / 'samples').exists()  # it draws none
  assert pagoda('inspect', f'--workdir={run}', '--phase=guide') == 0
  assert 'guide (guide): whole checkpoints at steps 2, 4' in capsys.readouterr().out


def test_the_store_holds_the_strength_that_each_picture_was_inverted_with(run, tmp_path, same_any_size):
  config = get_config()
  store = noise_store.open_store(run / 'invert', 80.0, standardize=False)
  expected = models.law_of(config).of_pictures(
    randomness.key_for(config.seed, randomness.GUIDANCE), np.arange(len(store)))
  pairs = [store.pair(key) for key in range(0, 4500, 300)]
  np.testing.assert_array_equal([pair['omega'] for pair in pairs], np.asarray(expected)[::300])
  # In batches of another size, and of noise that depends on it.
  shutil.copytree(run / 'teacher', tmp_path / 'teacher')
  with StopRequest() as stop:
    inverting.run_phase(config, tmp_path, 'invert', stop, max_steps=1)
  store = noise_store.open_store(tmp_path / 'invert', 80.0, standardize=False)
  teacher = inverting.check_store(config, tmp_path, 'invert')
  batch = next(streams.Stream(config.data, 16, 3, store).batches(8))
  invert = jax.jit(inverting.make_inverter(config, 'invert'))
  load = streams.LoadPicture(*streams.source_keys(config.data), 8, 1)
  records = [load(key) for key in batch['key']]
  small = {part: np.stack([record[part] for record in records]) for part in ('image', 'label', 'key')}
  found = np.asarray(invert(teacher, small))
  np.testing.assert_allclose(found, batch['noise'], rtol=0, atol=1e-6 * np.abs(found).max())
  # And the noise depends on it, where a teacher has learnt anything.
  taught = step_tools.params_of(models.make_teacher(config, 'invert'))
  one, four = (np.asarray(invert(taught, small | {'omega': np.full(8, omega, np.float32)})) for omega in (1, 4))
  assert np.abs(one - four).max() > 1e-2 * np.abs(one).max()


def test_a_step_that_inverts_itself_gives_the_pairs_the_same_strengths(run, tmp_path):
  config = get_config()
  config.phases.invert.store = False
  for name in ('teacher', 'guide', 'distill'):
    shutil.copytree(run / name, tmp_path / name)
  with StopRequest() as stop:
    inverting.run_phase(config, tmp_path, 'invert', stop)
  parts = loop.make_phase(config, tmp_path, 'grow_16')
  batch = loop.drop_keys(next(parts.stream.batches(8)))
  assert 'omega' not in batch and batch['base_image'].shape == batch['real_base_image'].shape == (8, 8, 8, 1)
  stored = noise_store.open_store(run / 'invert', 80.0, standardize=False)
  found = np.asarray(inverting.make_omega_of_keys(config)(batch['key']))
  np.testing.assert_array_equal(found, [stored.pair(key)['omega'] for key in batch['key']])
  assert set(parts.frozen) == {'teacher', 'guide'}
  after, metrics = jax.jit(parts.step)(parts.init()[0], batch, parts.frozen, jax.random.key(0))
  assert np.isfinite(metrics['loss']) and after.skipped == 0


def drawn(folder, out, *flags):
  assert pagoda('sample', f'--workdir={folder}', '--num_images=6', f'--out={out}', *flags) == 0
  return np.load(out)


def test_one_evaluation_draws_any_strength_and_several_stand_side_by_side(run, tmp_path, capsys, caplog, monkeypatch):
  config, out = get_config(), tmp_path / 'x.npz'
  # Four steps have taught them nothing of it.
  taught = lambda folder, *_: (step_tools.params_of(models.make_unet(config, folder.name)), 4)
  monkeypatch.setattr(checkpoints, 'read_generator', taught)
  for phase in ('teacher', 'distill', 'grow_16'):
    one = {omega: drawn(run, out, f'--phase={phase}', f'--guidance={omega}') for omega in (1, 3)}
    assert set(one[3]['omega']) == {3} and np.any(one[1]['arr_0'] != one[3]['arr_0'])
    both = drawn(run, out, f'--phase={phase}', '--guidance=1,3')
    assert both['arr_1'].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and both['omega'].tolist() == [1, 3] * 6
    for place, omega in enumerate((1, 3)):
      np.testing.assert_array_equal(both['arr_0'][place::2], one[omega]['arr_0'])
    # Without the flag there is none.
    plain = drawn(run, out, f'--phase={phase}')
    assert 'omega' not in plain
    difference = np.abs(plain['arr_0'].astype(int) - one[1]['arr_0'])
    assert difference.max() <= (1 if phase == 'teacher' else 0)  # two evaluations round otherwise
  assert caplog.text == ''
  png = tmp_path / 'x.png'
  assert pagoda('sample', f'--workdir={run}', '--num_images=6', '--phase=distill', f'--out={png}',
                '--guidance=0.5,1,2,8') == 0
  assert Image.open(png).size == (4 * 32, 6 * 32)  # four strengths wide
  assert 'distill was trained with strengths of 1 to 4; what it makes at 0.5, 8 is a guess' in caplog.text
  assert '24 images of 8 px, phase distill, step 4, guidance 0.5,1,2,8' in capsys.readouterr().out


@pytest.mark.parametrize('flag, said', [
  ('--guidance=x', '--guidance=x: must be a number, or several'),
  ('--guidance=1,nan', 'nan must be a number in [0, 100]'),
  ('--guidance=-1', '-1 must be a number in [0, 100]'),
  ('--phase=guide', '--phase=guide: must be one of teacher, distill, grow_16'),
])
def test_what_cannot_be_drawn_is_refused(run, tmp_path, capsys, flag, said):
  assert pagoda('sample', f'--workdir={run}', f'--out={tmp_path / "x.npz"}', flag) == 1
  assert said in capsys.readouterr().err and not (tmp_path / 'x.npz').exists()


def trained(folder, phase):
  """(parameters that are trained, the others), as the newest checkpoint has them."""
  state, _ = checkpoints.read_state(folder / phase)
  return state['params'], state.get('fixed', {})


def size(kernel):
  return np.sqrt(np.mean(np.square(kernel, dtype=np.float64), axis=tuple(range(kernel.ndim - 1))))


def test_every_stage_keeps_weights_at_their_size(run):
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


def test_networks_without_guidance_refuse_it(finished, tmp_path, capsys):
  for phase, said in (('distill', "was trained without guidance (config.guidance.law = 'none')"),
                      ('teacher', 'trained with label_dropout = 0')):
    assert pagoda('sample', f'--workdir={finished}', f'--phase={phase}', '--guidance=2',
                  f'--out={tmp_path / "x.npz"}') == 1
    assert said in capsys.readouterr().err


def test_a_run_goes_on_with_no_other_law_and_from_before_guidance(mine, finished, capsys):
  for name in ('invert', 'guide', 'distill'):
    changed = get_config()
    changed.guidance.high = 5.0
    with pytest.raises(workdir.WorkdirError, match='config.guidance.high: there 4.0, here 5.0'):
      workdir.check_claim(mine, changed, name)
  workdir.check_claim(mine, changed, 'teacher')  # which knows of no strength
  with pytest.raises(workdir.WorkdirError, match="config.guidance.law: there 'absent', here 'uniform'"):
    workdir.check_claim(finished, changed, 'distill')
  # A config.json from before guidance has neither the group nor the key `guide`.
  identity = workdir.identity(tiny.get_config(), 'grow_16')
  assert not [key for key in identity if '.guidance.' in key]
  before = {key: value for key, value in identity.items() if not key.endswith('.guide')}
  assert len(before) == len(identity) - 2 and workdir._differences(before, identity) == []


def test_a_run_from_before_guidance_is_drawn_from_as_ever(copied, tmp_path):
  out = tmp_path / 'x.npz'
  expected = {phase: drawn(copied, out, f'--phase={phase}')['arr_0'] for phase in ('teacher', 'grow_16')}
  for path in copied.glob('*/config.json'):
    values = read_sealed(path)
    del values['config']['guidance'], values['config']['evaluation']['guidance']
    for phase in values['config']['phases'].values():
      phase.pop('guide', None)
    write_sealed(path, values)
  for phase, images in expected.items():
    np.testing.assert_array_equal(drawn(copied, out, f'--phase={phase}')['arr_0'], images)


def test_spread_is_the_mean_distance_to_the_mean_of_the_class():
  images = np.zeros((4, 2, 2, 1), np.uint8)
  images[0], images[1] = 255, 0  # each 0.5 in four pixels from their mean
  assert small_data.spread(images, np.array([0, 0, 1, 1])) == pytest.approx((1 + 1 + 0 + 0) / 4)
