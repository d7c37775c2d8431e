"""Inversion inside the train step in place of a store: the same noise, the same steps, changes noticed."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import step_tools
import tiny
from etils import epath
from runs import CONFIG, digest, pagoda

from pagoda_jax import config as configs
from pagoda_jax import validation
from pagoda_jax.data import noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.interrupts import StopRequest
from pagoda_jax.training import inverting, loop

WITHOUT_STORE = '--config.phases.invert.store=False'
LEFT_BY_INVERT = {'config.json', 'holdout.npz', 'inputs.json', 'manifest.json'}


@pytest.fixture(scope='module')
def run(finished, tmp_path_factory):
  """The finished run's experiment once more from its teacher, without a store."""
  folder = tmp_path_factory.mktemp('without_store')
  shutil.copytree(finished / 'teacher', folder / 'teacher')
  assert pagoda('run', CONFIG, f'--workdir={folder}', WITHOUT_STORE) == 0
  return folder


@pytest.mark.parametrize('mirror, add_noise', [(False, False), (True, True)])
def test_the_steps_noise_is_the_stores(finished, tmp_path, same_any_size, mirror, add_noise):
  """The largest difference is below 1e-6 of the largest number; the store was made in batches of another size."""
  shutil.copytree(finished / 'teacher', tmp_path / 'teacher')
  config = tiny.get_config()
  config.data.mirror, config.phases.invert.add_noise = mirror, add_noise
  with StopRequest() as stop:
    inverting.run_phase(config, tmp_path, 'invert', stop, max_steps=1)
  store = noise_store.open_store(tmp_path / 'invert', 80.0, standardize=False)
  teacher, invert = inverting.check_store(config, tmp_path, 'invert'), inverting.make_inverter(config, 'invert')
  batch = next(streams.Stream(config.data, 16, 3, streams.ToInvert(len(store), 8)).batches(8))
  stored = np.stack([store[key] for key in batch['key']])
  assert batch['image'].shape == (8, 16, 16, 1) and batch['base_image'].shape == (8, 8, 8, 1)
  assert not mirror or 0 < np.sum(batch['key'] % 2) < 8
  for devices in (1, 8):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
      placed = sharding.place_batch(loop.drop_keys(batch), mesh)
      noise = jax.jit(lambda p, b: invert(p, b | {'image': b['base_image']}))(sharding.place(teacher, mesh), placed)
    np.testing.assert_allclose(noise, stored, rtol=0, atol=1e-6 * np.abs(stored).max())


def one_step(parts, begun):
  """(parameters, metrics, keys of the pictures) after a phase's first step, as the training loop takes it."""
  mesh = sharding.make_mesh()  # as the runs had it, whose steps are compiled already
  batch = next(parts.stream.batches(8))
  with jax.set_mesh(mesh):
    placed = sharding.place(begun, mesh)
    args = sharding.place_batch(loop.drop_keys(batch), mesh), sharding.place(parts.frozen, mesh), jax.random.key(0)
    after, metrics = step_tools.jitted(parts.step, placed, mesh)(placed, *args)
    return jax.device_get(after.params), jax.device_get(metrics), batch['key']


@pytest.mark.parametrize('name', ['distill', 'grow_16'])
def test_a_step_is_the_same_as_with_a_store(finished, run, name):
  config = tiny.get_config()
  stored = loop.make_phase(config, finished, name)
  begun = jax.device_get(stored.init()[0])
  config.phases.invert.store = False
  inverted = loop.make_phase(config, run, name)
  assert stored.frozen == {} and set(inverted.frozen) == {'teacher'}
  expected, expected_metrics, expected_keys = one_step(stored, begun)
  found, metrics, keys = one_step(inverted, begun)
  np.testing.assert_array_equal(keys, expected_keys)
  assert metrics['loss'] == pytest.approx(expected_metrics['loss'], rel=1e-6)
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_a_run_without_a_store_is_the_run_with_one(finished, run):
  assert {path.name for path in (run / 'invert').iterdir()} == LEFT_BY_INVERT
  held = [noise_store.read_holdout(folder / 'invert')['noise'] for folder in (finished, run)]
  np.testing.assert_array_equal(*held)
  for phase in ('distill', 'grow_16'):
    losses = []
    for folder in (finished, run):
      lines = (folder / phase / 'metrics.jsonl').read_text().splitlines()
      losses.append([json.loads(line)['loss'] for line in lines])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert (run / phase / 'samples' / 'step_00000004.png').exists()


def test_it_goes_on_as_any_run_does(run, tmp_path, capsys):
  copied = pathlib.Path(shutil.copytree(run, tmp_path / 'run'))
  shutil.rmtree(copied / 'distill' / 'checkpoints' / '4')
  capsys.readouterr()
  assert pagoda('run', CONFIG, f'--workdir={copied}', WITHOUT_STORE, '--phases=teacher,invert,distill') == 0
  said = capsys.readouterr().out
  assert 'invert: finished already (4500 of 4500)' in said and 'distill: goes on from step 2' in said
  assert digest(copied, 'distill') == digest(run, 'distill')
  assert pagoda('inspect', f'--workdir={copied}', '--phase=invert') == 0
  assert '4500 pairs, not stored: the phases that read them invert inside their steps\n' in capsys.readouterr().out
  (copied / 'invert' / 'holdout.npz').unlink()
  assert pagoda('train', CONFIG, f'--workdir={copied}', WITHOUT_STORE, '--phase=distill') == 1
  assert 'damaged or missing: holdout.npz' in capsys.readouterr().err
  assert pagoda('train', CONFIG, f'--workdir={copied}', WITHOUT_STORE, '--phase=invert') == 0
  assert 'nothing is stored; the phases that read invert invert inside their steps' in capsys.readouterr().out
  assert {path.name for path in (copied / 'invert').iterdir()} == LEFT_BY_INVERT


def test_another_teacher_is_noticed(run, tmp_path, capsys):
  copied = pathlib.Path(shutil.copytree(run, tmp_path / 'run'))
  shutil.rmtree(copied / 'grow_16' / 'checkpoints' / '4')
  origin = noise_store.read_manifest(copied / 'invert')['origin']
  noise_store.write_promise(epath.Path(copied / 'invert'), 4500, origin | {'teacher_sha256': 'f' * 64})
  args = ['train', CONFIG, f'--workdir={copied}', WITHOUT_STORE, '--phase=grow_16']
  assert pagoda(*args) == 1
  assert f'invert with teacher {origin["teacher_sha256"][:16]}, and what is there now is' in capsys.readouterr().err
  (copied / 'grow_16' / 'inputs.json').unlink()  # begun anew, it still compares the teacher that it would invert with
  shutil.rmtree(copied / 'grow_16' / 'checkpoints')
  assert pagoda(*args) == 1
  assert f"teacher_sha256: the store has '{'f' * 64}'" in capsys.readouterr().err


@pytest.mark.parametrize('key, value, named', [
  ('distill.standardize_noise', True, 'needs the mean and deviation of a store'),
  ('invert.dtype', 'float16', 'is the type of what is stored'),
])
def test_what_needs_a_store_is_refused_without_one(key, value, named):
  config = tiny.get_config()
  config.phases.invert.store = False
  validation.validate(config)
  phase, field = key.split('.')
  config.phases[phase][field] = value
  with pytest.raises(configs.ConfigError, match=f'config.phases.{key} = .*{named}'):
    validation.validate(config)


def test_a_share_of_the_pairs_is_the_same_share_without_a_store():
  settings = tiny.get_config().data
  batches = streams.Stream(settings, 8, 5, streams.ToInvert(4500, 8), pairs_fraction=0.02).batches(10)
  keys = [next(batches)['key'].tolist() for _ in range(18)]
  assert len({key for batch in keys for key in batch}) == 90
