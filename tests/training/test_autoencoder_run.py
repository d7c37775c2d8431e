"""A phase that trains an autoencoder: its step, going on, and the folder that latent space takes."""

import dataclasses
import json
import pathlib
import re
import shutil
import types

import jax
import jax.numpy as jnp
import latent_tools
import make_data
import numpy as np
import pytest
import step_tools
from PIL import Image
from runs import digest, pagoda

from pagoda_jax import config as c
from pagoda_jax import pipeline
from pagoda_jax.data import records
from pagoda_jax.data import stream as streams
from pagoda_jax.planning import plan
from pagoda_jax.runtime import distributed, sharding, topologies
from pagoda_jax.stages import autoencoder, decoding
from pagoda_jax.training import autoencoding, checkpoints, loop
from pagoda_jax.weights import autoencoders
from pagoda_jax.weights.convert import folders


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp('autoencoder')
  make_data.write_class_folders(folder / 'photos', 5)
  pipeline.run_experiment(latent_tools.get_autoencoder_config(folder), folder / 'run')
  return folder


@pytest.fixture
def mine(root, tmp_path):
  return pathlib.Path(shutil.copytree(root / 'run', tmp_path / 'run'))


def again(root, folder):
  pipeline.run_experiment(latent_tools.get_autoencoder_config(root), folder)


def test_it_learns_goes_on_bit_by_bit_and_shows_what_it_makes(root, mine, capsys):
  shutil.rmtree(mine / 'autoencoder' / 'checkpoints' / '4')
  again(root, mine)
  said = capsys.readouterr().out
  assert 'autoencoder: goes on from step 2' in said
  assert 'weights' not in said  # those that are there are of the same numbers, to the last bit
  assert digest(mine, 'autoencoder') == digest(root / 'run', 'autoencoder')
  rows = [json.loads(line) for line in (root / 'run' / 'autoencoder' / 'metrics.jsonl').read_text().splitlines()]
  assert [row['weight'] > 0 for row in rows] == [False, False, True, True]  # adversarial_from
  config = latent_tools.get_autoencoder_config(root)
  assert {*c.metrics(config.phases.autoencoder)} <= {*rows[-1]} and np.isfinite(list(rows[-1].values())).all()
  grid = Image.open(root / 'run' / 'autoencoder' / 'samples' / 'step_00000004.png')
  assert grid.size == (3 * 32, 2 * 32)  # the three held-out pictures, each above what comes of it
  assert plan.phase_costs(config, 'autoencoder', topologies.parse('1xh100')).flops > 0
  assert pagoda('inspect', f'--workdir={root / "run"}', '--phase=autoencoder') == 0
  assert pagoda('sample', f'--workdir={root / "run"}') == 1  # nothing there draws images


def test_what_one_of_several_processes_writes_of_it_asks_for_none_of_the_others(root, mine, monkeypatch):
  """Process 0 read the checkpoint alone, which Orbax has all do together: it waited for the others, and they for it."""
  within = []

  def alone(place, make):
    assert not within, f'{place}: within {within[-1]}, where process 0 is alone'
    within.append(place)
    try:
      return make()
    finally:
      within.pop()

  monkeypatch.setattr(distributed, 'from_primary', alone)
  shutil.rmtree(mine / 'autoencoder' / 'weights')
  again(root, mine)
  assert folders.read_folder(mine / 'autoencoder' / 'weights')


def test_the_folder_is_one_that_latent_space_takes(root, tmp_path):
  weights = root / 'run' / 'autoencoder' / 'weights'
  assert pagoda('prepare', f'--source=folder:{root / "photos"}', f'--output={tmp_path / "latents"}', '--resolution=16',
                f'--autoencoder={weights}') == 0
  source = records.open_records(str(tmp_path / 'latents'))
  scaling, shift = autoencoders.normalization(autoencoders.describe(weights))
  drawn = streams.latents.Sampling(0, scaling, shift)
  numbers = np.stack([drawn.sampled(source[key]['image'], key, epoch) for key in range(15) for epoch in range(40)])
  assert abs(numbers.mean()) < 0.1 and numbers.std() == pytest.approx(1, abs=0.1)
  # The average of the weights, and the way to diffusers' names and back.
  params, _ = checkpoints.read_generator(root / 'run' / 'autoencoder')
  loaded, options = folders.load_converted(weights)
  jax.tree.map(np.testing.assert_array_equal, loaded['params'], params)
  assert pagoda('convert', f'--input={weights}', f'--output={tmp_path}/w.safetensors', '--to=torch') == 0
  assert pagoda('convert', f'--input={tmp_path}/w.safetensors', f'--output={tmp_path / "back"}', '--groups=2',
                f'--scaling_factor={scaling!r}', f'--shift_factor={shift!r}') == 0
  back, same = folders.load_converted(tmp_path / 'back')
  jax.tree.map(np.testing.assert_array_equal, back['params'], params)
  assert same == options


@pytest.mark.parametrize('harm', ['gone', 'flipped', 'half'])
def test_weights_that_are_not_whole_are_written_anew(root, mine, harm, capsys):
  folder = mine / 'autoencoder' / 'weights'
  before = folders.read_description(folder)
  path = max((folder / 'variables').rglob('*'), key=lambda each: each.stat().st_size * each.is_file())
  if harm == 'gone':  # killed after the last checkpoint
    shutil.rmtree(folder)
  elif harm == 'flipped':
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
  else:
    path.unlink()
  again(root, mine)
  assert folders.load_converted(folder)[1] == before['options']
  assert folders.read_description(folder)['variables_sha256'] == before['variables_sha256']
  said = capsys.readouterr().out
  assert ('written anew' in said) == (harm != 'gone')
  assert re.search(r'PSNR of 3 held-out pictures from their mean latents: [\d.]+ dB at 16 px, [\d.]+ dB at 8 px', said)


def test_each_of_two_autoencoders_is_measured_at_its_own_sizes(tmp_path, monkeypatch):
  config, measured = latent_tools.get_autoencoder_config(tmp_path), []
  assert config.phases.autoencoder.sizes == 2
  c.add_phase(config, 'smaller', c.autoencoder(sizes=1))
  monkeypatch.setattr(checkpoints, 'read_generator', lambda folder: ({'x': np.zeros(1)}, 4))
  monkeypatch.setattr(autoencoding, 'measure', lambda config, params, sizes: measured.append(sizes) or 1 / 0)
  for name in config.order:
    with pytest.raises(ZeroDivisionError):
      autoencoding.leave_weights(config, tmp_path, name)
  assert measured == [2, 1]


def test_large_pictures_are_measured_and_shown_a_few_at_a_time(root, tmp_path, monkeypatch):
  """All at once they ended the phase for lack of memory, after its last step and again whenever it was started."""
  config, seen, coder = latent_tools.get_autoencoder_config(root), [], autoencoding._coder
  done, mesh = root / 'run' / 'autoencoder', sharding.make_mesh(devices=jax.devices()[:1])
  params = folders.load_converted(done / 'weights')[0]['params']

  def watched(config):
    encode, decode = coder(config)
    return lambda params, images: seen.append(images.shape[:2]) or encode(params, images), decode

  monkeypatch.setattr(autoencoding, '_coder', watched)
  monkeypatch.setattr(decoding, 'DECODED_AT_ONCE', 2 * 16**2)
  whole = folders.read_description(done / 'weights')['source']['measured']
  measured = autoencoding.measure(config, params, 1)
  assert measured.pop('psnr')['16'] == pytest.approx(whole.pop('psnr')['16'], rel=1e-4)
  assert measured == pytest.approx(whole, rel=1e-4)
  image = autoencoding.make_grid(config, mesh)(tmp_path / 'grid.png', types.SimpleNamespace(ema=params))
  there = np.asarray(Image.open(done / 'samples' / 'step_00000004.png')).reshape(image.shape)
  assert np.abs(image.astype(int) - there).max() <= 1 and set(seen) == {(1, 16), (2, 16)}


@pytest.mark.slow
def test_a_step_is_the_same_on_eight_devices_in_parts(root, monkeypatch):
  monkeypatch.setattr(sharding, 'SHARDED_FROM', 16)  # so that the tiny networks' updates are shared at all
  config, found = latent_tools.get_autoencoder_config(root), []
  phase = config.phases.autoencoder
  phase.adversarial_from, phase.batch_size = 0, 16
  # Adam's first step makes much of gradients that are rounding only, as those of attention's keys' biases are.
  phase.optimizer.name, config.autoencoder.mid_attention = 'sgd', False
  for count, zero1, microbatch in ((1, 1, 0), (8, 4, 1)):
    config.microbatch = microbatch
    mesh = sharding.make_mesh(zero1=zero1, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
      parts = loop.make_phase(config, root / 'nowhere', 'autoencoder', count)
      batch = loop.drop_keys(next(parts.stream.batches(phase.batch_size)))
      placed = sharding.place(jax.device_get(parts.init()[0]), mesh)
      before = jax.device_get(placed.params)
      step = step_tools.jitted(parts.step, placed, mesh)
      after, metrics = step(placed, sharding.place_batch(batch, mesh), {}, jax.device_get(step_tools.RNG))
      found.append(jax.device_get((after.params, after.discriminator['params'], metrics)))
  one, eight = found
  assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(one[0])))  # every leaf learns
  assert eight[2]['loss'] == pytest.approx(one[2]['loss'], rel=1e-5)
  assert eight[2]['weight'] == pytest.approx(one[2]['weight'], rel=1e-4)
  for a, b in zip(jax.tree.leaves(one[:2]), jax.tree.leaves(eight[:2])):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3 * np.abs(a).max())


def test_kl_and_psnr_are_what_they_are_called():
  mean, log_variance = np.full((1, 2, 2, 3), 1.5, np.float32), np.full((1, 2, 2, 3), np.log(0.25), np.float32)
  expected = 0.5 * (1.5**2 + 0.25 - 1 - np.log(0.25))
  np.testing.assert_allclose(autoencoder.kl(mean, log_variance), [expected], rtol=1e-6)
  images = np.zeros((2, 4, 4, 3), np.float32)
  others = images + np.float32([0.02, 4.0]).reshape(2, 1, 1, 1)  # the second is clipped to 1
  np.testing.assert_allclose(autoencoder.psnr(images, others), [40.0, -10 * np.log10(0.25)], rtol=1e-5)


def test_the_decoders_blocks_may_be_computed_again(root):
  config = latent_tools.get_autoencoder_config(root)
  variables = jax.device_get(decoding.fresh_variables(config, jax.random.key(0)))
  latents = jnp.ones((1, 8, 8, 2))
  grads = []
  for remat in ((), (8, 16)):
    config.remat = remat
    module = decoding.make_autoencoder(config)
    assert dataclasses.replace(module, remat=()) == decoding.make_autoencoder(config).clone(remat=())
    loss = lambda z, module=module: jnp.sum(module.apply(variables, z, method='decode') ** 2)
    assert ('remat' in str(jax.make_jaxpr(jax.grad(loss))(latents))) == bool(remat)
    grads.append(jax.jit(jax.grad(loss))(latents))
  np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-4)
