"""`pagoda_jax.load`: a generator in three lines, from wherever it lies, drawing what `pagoda sample` draws."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import step_tools
import tiny
from absl import logging
from runs import ROOT, pagoda
from test_sample_weights import random_folder
from test_to_published import trained_phase

import pagoda_jax
from pagoda_jax.runtime import files, sharding
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints, starts, workdir
from pagoda_jax.use import exported, exported_loader, publish, to_published
from pagoda_jax.use.generator import Generator


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A work directory with a grown generator of made-up numbers."""
  return trained_phase(tmp_path_factory.mktemp('run') / 'run', 'guided', 'grow_16')[0].parent


def sampled(tmp_path, *flags):
  assert pagoda('sample', f'--out={tmp_path / "x.npz"}', *flags) == 0
  with np.load(tmp_path / 'x.npz') as arrays:
    return arrays['arr_0']


def test_import_stays_instant():
  code = ('import sys, pagoda_jax; assert callable(pagoda_jax.load); '
          'print([name for name in ("jax", "flax", "numpy", "orbax", "PIL", "absl") if name in sys.modules])')
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
  assert found.strip() == '[]'


def test_three_lines_draw_what_the_command_draws_from_everywhere(run, tmp_path, monkeypatch):
  expected = sampled(tmp_path, f'--workdir={run}', '--labels=3,5', '--num_images=2', '--seed=7')
  assert expected.shape == (2, 16, 16, 1) and expected.std() > 2
  assert pagoda('export', f'--workdir={run}', f'--output={tmp_path / "exported"}') == 0
  assert pagoda('convert', f'--input={run / "grow_16"}', f'--output={tmp_path}/w.safetensors', '--to=torch') == 0
  assert pagoda('convert', f'--input={tmp_path}/w.safetensors', f'--output={tmp_path}/converted', '--resolution=8',
                '--grown_num_blocks=1') == 0
  monkeypatch.chdir(run / 'grow_16')
  for place in (run, run / 'grow_16', '.', tmp_path / 'exported', tmp_path / 'converted'):
    generator = pagoda_jax.load(place)
    np.testing.assert_array_equal(generator(labels=[3, 5], seed=7), expected)
  # One image is the same image alone, but for rounding; and on one device or eight.
  assert np.abs(generator(labels=3, seed=7).astype(int) - expected[:1]).max() <= 1
  one = pagoda_jax.load(run, mesh=sharding.make_mesh(devices=sharding.make_mesh().devices.flat[:1].tolist()))
  assert np.abs(one([3, 5], 7).astype(int) - expected).max() <= 1
  np.testing.assert_array_equal(generator('3,5', seed=7, truncate=1), expected)
  # Fewer labels are repeated, an image's noise is its place's.
  assert np.abs(generator([3, 5], 7, num_images=5, batch_size=2)[:2].astype(int) - expected).max() <= 1
  from_files = sampled(tmp_path, f'--weights={tmp_path / "exported"}', '--labels=3,5', '--num_images=2', '--seed=7')
  np.testing.assert_array_equal(from_files, expected)


def test_truncation_scales_the_noise(run):
  generator = pagoda_jax.load(run)
  noise = np.asarray(generator.noise(3, 2))
  np.testing.assert_array_equal(generator.noise(3, 2, 0.5), noise * np.float32(0.5))
  with jax.enable_x64(True):  # whoever computes in float64 is drawn the same picture of a seed, also by the loader
    np.testing.assert_array_equal(generator.noise(3, 2), noise)
    np.testing.assert_array_equal(80.0 * exported_loader.normal(3, 2, noise.shape[1:]), noise)
  none = generator([3, 3], seed=0, truncate=0)
  assert np.ptp(none.astype(int), axis=0).max() <= 1  # no noise: one image


@pytest.mark.parametrize('arguments, said', [
  ({'labels': [10]}, '10 is no class; there are 0 to 9'),
  ({'labels': [-1]}, '-1 is no class'),
  ({'labels': [1.5]}, 'must be whole numbers'),
  ({'labels': [[0, 1, 0], [1, 0, 0]]}, 'labels are [2, 3]; must be a class, or a list of them [N]'),
  ({'labels': []}, 'there are none'),
  ({'labels': 'three'}, "must be 'cycle', 'random' or numbers"),
  ({'seed': -1}, 'must be in 0 to 4294967295'),
  ({'seed': 2**32}, 'must be in 0 to 4294967295'),
  ({'num_images': 0}, 'must be at least 1'),
  ({'num_images': 2.5}, 'num_images = 2.5: must be at least 1, and whole'),
  ({'seed': 1.5}, 'seed = 1.5: must be in 0 to 4294967295, and whole'),
  ({'labels': 'random', 'seed': -1}, 'seed = -1: must be in 0 to 4294967295'),
  ({'batch_size': -1}, 'batch_size = -1: must be at least 1'),
  ({'batch_size': 2.5}, 'batch_size = 2.5: must be at least 1, and whole'),
  ({'truncate': float('nan')}, 'truncate = nan: must be in 0 to 10'),
  ({'guidance': 2.0}, 'was trained without guidance'),
  ({'guidance': [1.0, 2.0], 'labels': [1]}, '2 strengths for 1 images'),
  ({'guidance': float('inf')}, 'inf must be a number in [0, 100]'),
  ({'prompts': ['a dog']}, 'was not trained with captions'),
  ({'prompts': np.array(['a dog', 'a cat'])}, 'was not trained with captions'),
], ids=str)
def test_what_it_cannot_draw_is_refused(run, arguments, said):
  with pytest.raises(ValueError) as error:
    pagoda_jax.load(run)(**arguments)
  assert said in str(error.value)


def test_labels_and_strengths_beside_noise_are_those_of_a_call(run):
  generator = pagoda_jax.load(run)
  noise = generator.noise(0, 2)
  for labels, omegas, said in (
    ([3, 10], None, '10 is no class; there are 0 to 9, and -1 for none'),
    ([3, -2], None, '-2 is no class'),
    (np.array([3, 2**32 + 5]), None, '4294967301 is no class'),  # 5 in 32 bits
    ([3.7, 5.2], None, 'labels are float64 [2]; must be whole numbers [N]'),
    ([], None, 'labels are float64 [0]'),
    (3, None, 'labels are int64 []'),
    (np.eye(10, dtype=int)[[3, 5]], None, 'labels are int64 [2, 10]'),
    ([3, 5], np.ones(2), 'trained without guidance'),
    ([3, 5], 2.0, 'omegas are []; must be [2]'),
  ):
    with pytest.raises(ValueError, match=re.escape(said)):
      generator.of_noise(noise, labels, omegas)
  with pytest.raises(ValueError, match='noise, omegas: a number in them is not finite'):
    generator.of_noise(noise.at[1, 0, 0, 0].set(np.nan), [3, 5])


def test_what_is_no_generator_is_refused(run, tmp_path):
  for place, asked, said in (
      (tmp_path / 'nowhere', {}, 'no such folder'),
      (tmp_path, {}, 'no phase of any experiment there'),
      (run, {'phase': 'invert'}, 'must be one of teacher, distill, grow_16'),
      (run, {'kind': 'teacher'}, 'kind and levels are of converted weights'),
      (run / 'grow_16', {'phase': 'distill'}, 'is phase grow_16'),
      (run, {'step': '3'}, 'no checkpoint of step 3')):
    with pytest.raises(ValueError, match=said):
      pagoda_jax.load(place, **asked)
  weights = random_folder(tmp_path)
  for asked, said in (({'phase': 'distill'}, "phase = 'distill'.*is no work directory"),
                      ({'kind': 'teacher', 'levels': 1}, 'levels = 1: must be at least 2, and whole')):
    with pytest.raises(ValueError, match=said):
      pagoda_jax.load(weights, **asked)


def made_up_run(folder, config, name):
  """A work directory with one phase of made-up numbers."""
  params = step_tools.params_of(models.make_unet(config, name))
  workdir.claim(folder, config, name)
  saver = checkpoints.Checkpoints(folder / name)
  saver.save(4, {'ema': params, 'step': np.array(4)}, {})
  saver.close()
  return folder


def test_a_phase_is_itself_though_it_is_called_dot_or_by_a_link(tmp_path, monkeypatch):
  """And not the last phase of its run."""
  for name in ('teacher', 'distill'):
    made_up_run(tmp_path / 'run', tiny.get_config(), name)
  (tmp_path / 'best').symlink_to('run/teacher')
  monkeypatch.chdir(tmp_path / 'run' / 'teacher')
  for place in ('.', '../teacher/', tmp_path / 'best', tmp_path / 'best' / '.'):
    assert pagoda_jax.load(place).where == 'phase teacher, step 4'
    assert to_published.read_phase(place).notes == ('phase teacher at step 4',)


@pytest.fixture(scope='module')
def guided(tmp_path_factory):
  return made_up_run(tmp_path_factory.mktemp('guided') / 'run', tiny.get_config('guided'), 'distill')


def test_guidance_is_an_argument_and_survives_export(guided, tmp_path):
  expected = {omega: sampled(tmp_path, f'--workdir={guided}', '--num_images=2', f'--guidance={omega}')
              for omega in (1, 3)}
  assert np.any(expected[1] != expected[3])
  assert pagoda('export', f'--workdir={guided}', f'--output={tmp_path / "exported"}') == 0
  for place in (guided, tmp_path / 'exported'):
    generator = pagoda_jax.load(place)
    np.testing.assert_array_equal(generator([0, 1], guidance=3), expected[3])
    np.testing.assert_array_equal(generator([0, 1]), expected[1])  # none
    each = generator([0, 1], guidance=[1, 3])
    np.testing.assert_array_equal(each, [expected[1][0], expected[3][1]])
  alone = only_jax(tmp_path / 'exported', 'load(".")([0, 1], omega=3.0)', tmp_path)
  assert np.abs(alone.astype(int) - expected[3]).max() <= 1


def test_the_ends_of_the_strengths_that_it_was_trained_at_are_no_guess(monkeypatch):
  config, said = tiny.get_config('guided'), []
  config.guidance.update({'low': 1.3, 'high': 2.7})  # which as float32 lie outside
  monkeypatch.setattr(logging, 'warning', lambda form, *values: said.append(form % values))
  generator = Generator(config, 'distill', '', {}, dict)
  assert generator.strengths([1.3, 2.7], 2).dtype == np.float32 and not said
  generator.strengths(3, 2)
  assert said == ['--guidance: distill was trained with strengths of 1.3 to 2.7; what it makes at 3 is a guess']


def only_jax(folder, expression, tmp_path):
  """What an exported folder's loader draws in a process that cannot import this package, flax or orbax."""
  code = f'''import sys
for name in ('pagoda_jax', 'flax', 'orbax', 'ml_collections', 'absl'):
  sys.modules[name] = None
from load import load
import numpy as np
np.save({str(tmp_path / "alone.npy")!r}, {expression})'''
  env = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.environ.get('PYTHONPATH', '')}
  subprocess.run([sys.executable, '-B', '-c', code], cwd=folder, check=True, env=env)
  return np.load(tmp_path / 'alone.npy')


@pytest.fixture(scope='module')
def hub(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp('hub') / 'digits'
  figures = {'step': 4, 'asked': {'samples': 2000}, 'accuracy': 0.9321, 'frechet': 1.25}
  files.write_sealed(run / 'grow_16' / 'evaluation.json', figures)
  result = {'metrics': {'fid': 3.25}, 'held_out': {'fid': 1.5}, 'samples': {'count': 50_000, 'guidance': 2.0}}
  for step in (2, 4):  # only the latter is of the checkpoint that is published
    files.write_sealed(run / 'grow_16' / 'evaluate' / f'step_{step}_ab.json', result)
  with mock.patch.object(starts, 'read_average', wraps=starts.read_average) as read:
    assert pagoda('publish', f'--workdir={run}', f'--output={folder}', '--licence=apache-2.0') == 0
  assert read.call_count == 1  # at a second look a run that goes on may have removed its checkpoint
  return folder


def test_the_loader_needs_only_jax_and_draws_any_number(run, hub, tmp_path):
  for count in (1, 3, 7):
    expected = pagoda_jax.load(run)(num_images=count, seed=5)
    found = only_jax(hub, f'load(".")(list(range({count})), seed=5)', tmp_path)
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= 1
  for wrong in (10, 1.5):
    with pytest.raises(ValueError, match=f'labels: {wrong} is no class; there are 0 to 9'):
      exported_loader.load(hub)([3, wrong])
  with pytest.raises(ValueError, match='seed = 4294967296: must be in 0 to 4294967295'):
    exported_loader.load(hub)([3], seed=2**32)
  loader = (hub / exported.LOADER).read_text()
  body = loader.split('def load(')[1].split('if __name__')[0]
  assert len([line for line in body.splitlines() if line.strip()]) <= 22


def test_a_strength_that_the_program_does_not_take_is_refused_by_its_loader(monkeypatch):
  config = {'default_omega': None, 'num_classes': 10, 'noise_shape': [4, 4, 1], 'diffusion': {'sigma_max': 80.0}}
  drawn = lambda params, noise, labels: noise[..., 0]
  monkeypatch.setattr(exported_loader, 'read', lambda folder: (config, {}, drawn))
  assert exported_loader.load('.')([3]).shape == (1, 4, 4)
  with pytest.raises(ValueError, match='omega = 2: the program takes no strength of guidance'):
    exported_loader.load('.')([3], omega=2)


def test_a_card_says_what_it_is(hub):
  card = (hub / publish.CARD).read_text()
  for text in ('license: "apache-2.0"', '![samples](samples.png)', '| accuracy | 0.9321 |', 'mnist', '500 held out',
               '10 classes', "pagoda_jax.load('PATH OF THIS FOLDER')", 'phase grow_16, step 4'):
    assert text in card
  assert '| asked' not in card and '| metrics fid | 3.25 |' in card and '| held_out fid | 1.5 |' in card
  assert 'From `step_4_ab.json` (50,000 samples, guidance 2):' in card
  assert 'step_2' not in card
  assert publish.gaps(hub) == [] and (hub / publish.SAMPLES).stat().st_size > 1000
  assert {path.name for path in hub.iterdir()} == {
    'README.md', 'samples.png', 'config.json', 'load.py', 'model.safetensors', 'generator.stablehlo'}


def test_a_card_shows_figures_of_the_average_that_is_published(tmp_path):
  figures = {'fid': 3.25}
  files.write_sealed(tmp_path / 'teacher' / 'evaluation.json', {'step': 4, 'accuracy': 0.5})  # of the first average
  for ema in ('std_0.05', 'std_0.1'):
    for omega in (None, 2.0):
      files.write_sealed(tmp_path / 'teacher' / 'evaluate' / f'step_4_{ema}_{omega}.json', {
        'metrics': figures, 'samples': {'count': 50_000, 'guidance': omega, 'ema': ema}})
  config = tiny.get_config()
  config.phases.teacher.ema_std = (0.05, 0.1)
  found = {}
  for source in ({}, {'average': 'std_0.05'}, {'average': 'std_0.1'}):
    generator = Generator(config, 'teacher', '', {'step': 4} | source, dict)
    found[source.get('average')] = publish._evaluation(tmp_path, generator)
  assert found['std_0.1'] == {'`step_4_std_0.1_None.json` (50,000 samples)': {'metrics': figures},
                              '`step_4_std_0.1_2.0.json` (50,000 samples, guidance 2)': {'metrics': figures}}
  assert found[None] == found['std_0.05'] and len(found[None]) == 3
  assert found[None]['`evaluation.json`'] == {'step': 4, 'accuracy': 0.5}
  # Of other weights that had the step before the phase was begun anew.
  for name, digest in (('before', 'another'), ('now', checkpoints.digest({}))):
    files.write_sealed(tmp_path / 'distill' / 'evaluate' / f'step_4_{name}.json', {
      'metrics': figures, 'samples': {'checkpoint_sha256': digest}})
  generator = Generator(config, 'distill', '', {'step': 4}, lambda: {'autoencoder': {'decoder': np.ones(1)}})
  assert publish._evaluation(tmp_path, generator) == {'`step_4_now.json`': {'metrics': figures}}


def test_the_examples_of_a_card_run_where_there_is_one_class():
  config = tiny.get_config()
  config.data.num_classes = 1
  generator = Generator(config, 'distill', 'phase distill, step 4', {}, dict, folder='run')
  described = {'kind': 'generator', 'parameters': 1, 'files': {}, 'noise_shape': [8, 8, 1], 'guidance': None,
               'text': None, 'params_sha256': '', 'pagoda_jax': '1'}
  card = publish._card(generator, described, 'One', 'other', '', {}, [0] * 8, ())
  given = re.findall(r"generator\(labels=(.*), seed=0|load\('\.'\)\((.*), seed=0", card)
  for labels in map(''.join, given):
    assert generator.labels(json.loads(labels), None, 0).tolist() == [0, 0]
  assert len(given) == 2


def test_the_three_platforms_and_a_symbolic_batch_are_in_the_program(hub):
  import jax

  program = jax.export.deserialize(bytearray((hub / exported.PROGRAM).read_bytes()))
  assert program.platforms == exported.PLATFORMS and str(program.in_avals[-1].shape) == '(b,)'


@pytest.mark.parametrize('name', [exported.PROGRAM, exported.WEIGHTS, exported.LOADER, exported.CONFIG])
@pytest.mark.parametrize('how', ['flip', 'cut', 'gone', 'empty', 'swapped'])
def test_damage_is_refused_by_both_loaders(hub, name, how, tmp_path, capfd):
  folder = shutil.copytree(hub, tmp_path / 'copy')
  path, content = folder / name, bytearray((folder / name).read_bytes())
  if how == 'gone':
    path.unlink()
  elif how == 'swapped':
    path.write_bytes((hub / publish.CARD).read_bytes())
  else:
    content[len(content) // 2] ^= 1
    path.write_bytes({'flip': content, 'cut': content[:-1], 'empty': b''}[how])
  with pytest.raises(exported.ExportError) as error:
    pagoda_jax.load(folder)
  assert str(folder) in str(error.value) and len(str(error.value)) < 500
  assert pagoda('sample', f'--weights={folder}', f'--out={tmp_path / "x.png"}') == 1
  assert 'Traceback' not in capfd.readouterr().err and not (tmp_path / 'x.png').exists()
  if name in (exported.PROGRAM, exported.WEIGHTS) and how == 'flip':
    with pytest.raises(subprocess.CalledProcessError):
      only_jax(folder, 'load(".")([0])', tmp_path)
    assert f'damaged: {name}' in capfd.readouterr().err


def test_an_edited_config_is_refused_and_an_edited_card_is_not(hub, tmp_path, capfd):
  folder = shutil.copytree(hub, tmp_path / 'copy')
  (folder / publish.CARD).write_text('my words')
  pagoda_jax.load(folder)
  edited = (folder / exported.CONFIG).read_text().replace('"sigma_max": 80.0', '"sigma_max": 81.0')
  (folder / exported.CONFIG).write_text(edited)
  with pytest.raises(exported.ExportError, match='its values do not fit its checksum'):
    pagoda_jax.load(folder)
  with pytest.raises(subprocess.CalledProcessError):
    only_jax(folder, 'load(".")([0])', tmp_path)
  assert 'damaged: config.json' in capfd.readouterr().err


def test_another_networks_weights_and_a_config_that_lacks_something(hub, tmp_path):
  folder = shutil.copytree(hub, tmp_path / 'copy')
  values = files.read_sealed(folder / exported.CONFIG)
  options = values['options'] | {'channels': 16}
  files.write_sealed(folder / exported.CONFIG, values | {'options': options})  # sealed anew: a checksum is no signature
  with pytest.raises(checkpoints.CheckpointError, match='model.safetensors: of another network'):
    pagoda_jax.load(folder)
  del values['options']
  files.write_sealed(folder / exported.CONFIG, values)
  with pytest.raises(exported.ExportError, match='it lacks options'):
    pagoda_jax.load(folder)
  files.write_sealed(folder / exported.CONFIG, values | {'format': 'pagoda_jax generator, version 2'})
  with pytest.raises(exported.ExportError, match='this version reads .*version 1'):
    pagoda_jax.load(folder)


def test_a_folder_that_is_there_is_left_alone(run, hub, tmp_path, monkeypatch, capsys):
  before = sorted(path.name for path in hub.parent.iterdir())
  for command in ('export', 'publish'):
    assert pagoda(command, f'--workdir={run}', f'--output={hub}') == 1
    assert 'exists already; remove it, or choose another --output' in capsys.readouterr().err
  assert sorted(path.name for path in hub.parent.iterdir()) == before

  def on_a_full_disk(path, *_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

  monkeypatch.setattr(exported.torch_files, 'write_safetensors', on_a_full_disk)
  assert pagoda('export', f'--workdir={run}', f'--output={tmp_path / "new"}') == 1
  assert f'pagoda export: {tmp_path / "new"}: No space left on device' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_an_older_run_whose_config_lacks_keys_still_draws(run, tmp_path):
  """config.json of an earlier version: no R3GAN, no guidance, no choice of attention."""
  folder = shutil.copytree(run, tmp_path / 'old')
  path = folder / 'grow_16' / 'config.json'
  values = files.read_sealed(path)
  for phase in values['config']['phases'].values():
    for key in ('loss', 'r1', 'r2'):
      phase.get('adversarial', {}).pop(key, None)
  for key in ('guidance', 'attention', 'remat'):
    del values['config'][key]
  files.write_sealed(path, values)
  labels = [1, 2]
  np.testing.assert_array_equal(pagoda_jax.load(folder)(labels), pagoda_jax.load(run)(labels))
