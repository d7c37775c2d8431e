"""The authors' other roads: an encoder's noise, the teacher's own pairs, Haar bands, a generator above its teacher."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_tools
import tiny
from runs import CONFIG, digest, pagoda

from pagoda_jax import config as configs
from pagoda_jax import validation
from pagoda_jax.config import ladder
from pagoda_jax.data import noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.data.images import normalize
from pagoda_jax.evaluation import references
from pagoda_jax.planning import programs
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.files import write_sealed
from pagoda_jax.stages import models, sampler
from pagoda_jax.training import inverting, loop, starts, workdir

ROADS = f'{CONFIG}:roads'
PHASES = '--phases=teacher,invert,encode,encoded,distill'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('roads')
  assert pagoda('run', ROADS, f'--workdir={folder}', PHASES) == 0
  return folder


def stepped(parts, begun, batch, devices):
  """(parameters, metrics) after a phase's first step on so many devices, as host arrays."""
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    placed = sharding.place(begun, mesh)
    args = sharding.place_batch(loop.drop_keys(batch), mesh), sharding.place(parts.frozen, mesh), jax.random.key(0)
    return jax.device_get(step_tools.jitted(parts.step, placed, mesh)(placed, *args))


def assert_same_on_eight(parts, begun, batch, tolerance=1e-5):
  """The metrics and the parameters of one step on one device, which eight agree with."""
  (one, metrics), (many, others) = (stepped(parts, begun, batch, devices) for devices in (1, 8))
  assert others['loss'] == pytest.approx(metrics['loss'], rel=tolerance)
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params)):
    np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())
  return metrics, one.params


def test_a_run_goes_on_bit_by_bit_with_an_encoders_noise(run, tmp_path, capsys):
  config, mine = tiny.get_config('roads'), pathlib.Path(shutil.copytree(run, tmp_path / 'run'))
  for phase in ('encode', 'distill'):
    shutil.rmtree(mine / phase / 'checkpoints' / '4')
  (mine / 'encoded' / 'noise-00001-of-00005.array_record').unlink()
  assert pagoda('run', ROADS, f'--workdir={mine}', PHASES) == 0
  said = capsys.readouterr().out
  assert 'encode: goes on from step 2' in said and 'distill: goes on from step 2' in said
  assert 'encoded: 4 of 5 shards are there; makes noise-00001-of-00005' in said
  assert digest(mine, 'encode') == digest(run, 'encode') and digest(mine, 'distill') == digest(run, 'distill')
  assert noise_store.damaged_shards(mine / 'encoded') == []

  # The store holds what the encoder says of the pictures, and that it was an encoder.
  found = noise_store.read_manifest(run / 'encoded')['origin']
  params, where = starts.read_start(config, run, 'encoded')
  assert where == f'{run}/encode, step 4' and 'teacher_sha256' not in found
  assert found['encoder_sha256'] and found['solver'] == 'an encoder' and found['downsampling'] == 'haar'
  load = streams.LoadPicture(*streams.source_keys(config.data), 8, 1, band_of=32)
  records = [load(key) for key in (0, 1234, 4499)]
  images, labels = (np.stack([record[part] for record in records]) for part in ('image', 'label'))
  network, sigma = models.make_unet(config, 'encode'), 0.002
  shown = normalize(jnp.asarray(images)) / np.hypot(sigma, 0.5)  # a clean picture as the teacher's state at sigma_min
  expected = 80 * network.apply({'params': params}, shown, jnp.full(3, np.log(sigma) / 4), {'label': labels})
  store = noise_store.open_store(run / 'encoded', 80.0, standardize=False)
  np.testing.assert_allclose([store[key] for key in (0, 1234, 4499)], expected, rtol=0,
                             atol=1e-5 * np.abs(expected).max())

  # Its grids and samples are of 16 px, of a teacher of 8.
  assert pagoda('sample', f'--workdir={run}', '--phase=distill', '--num_images=3', f'--out={tmp_path / "x.npz"}') == 0
  assert np.load(tmp_path / 'x.npz')['arr_0'].shape == (3, 16, 16, 1)
  capsys.readouterr()
  assert pagoda('inspect', f'--workdir={run}', '--phase=encoded') == 0
  assert f'encoder_sha256: {found["encoder_sha256"]}\n' in capsys.readouterr().out
  assert pagoda('plan', ROADS, '--topology=cpu:8', '--num_images=2250') == 0
  said = capsys.readouterr().out
  assert 'encode (stage encode, 8 px): 4 steps of 8 images' in said and 'distill (stage distill, 16 px)' in said


def test_noise_of_another_road_is_refused_by_both_names(run, tmp_path, capsys):
  config, mine = tiny.get_config('roads'), pathlib.Path(shutil.copytree(run, tmp_path / 'run'))
  other = inverting.origin(config, 'invert', starts.read_start(config, mine, 'invert')[0])
  manifest = noise_store.read_manifest(mine / 'encoded')
  write_sealed(mine / 'encoded' / 'manifest.json', manifest | {'origin': other})
  with pytest.raises(noise_store.NoiseStoreError) as error:
    inverting.check_store(config, mine, 'encoded')
  assert "solver: the store has 'heun, clipped', this run needs 'an encoder'" in str(error.value)
  encoder = manifest['origin']['encoder_sha256']
  assert f"encoder_sha256: the store has None, this run needs '{encoder}'" in str(error.value)
  shutil.rmtree(mine / 'distill' / 'checkpoints' / '4')
  assert pagoda('train', ROADS, f'--workdir={mine}', '--phase=distill') == 1
  said = capsys.readouterr().err
  assert f'read the noise of encoded with encoder {encoder[:16]}, and what' in said
  assert f'is there now is encoded with teacher {other["teacher_sha256"][:16]}' in said
  # So is the same store by another config.
  config.phases.encoded.update({'encoder': '', 'teacher': 'teacher'})
  with pytest.raises(workdir.WorkdirError, match="config.phases.encoded.encoder: there 'encode', here ''"):
    workdir.check_claim(run, config, 'distill')


def test_an_encoder_learns_squared_and_absolute_errors_of_the_solvers_noise(run):
  """In the step's own pairs, of a store's, and the same on eight devices."""
  config = tiny.get_config('roads')
  parts = loop.make_phase(config, run, 'encode')
  batch, begun = next(parts.stream.batches(8)), jax.device_get(parts.init()[0])
  assert set(batch) == {'image', 'label', 'key', 'base_image'} and set(parts.frozen) == {'teacher'}
  teacher = parts.frozen['teacher']
  for a, b in zip(jax.tree.leaves(begun.params), jax.tree.leaves(teacher)):
    np.testing.assert_array_equal(a, b)  # it begins as the teacher
  metrics, _ = assert_same_on_eight(parts, begun, batch)
  invert = jax.jit(inverting.make_inverter(config, 'invert'))
  noise = np.asarray(invert(teacher, batch | {'image': batch['base_image']}))
  answer = parts.networks.encode(teacher, normalize(jnp.asarray(batch['image'])), {'label': batch['label']})
  apart = np.asarray(answer, np.float64) - noise / 80
  assert metrics['loss'] == pytest.approx(np.mean(apart**2) + np.mean(np.abs(apart)), rel=1e-4)


def noise_to_data(finished):
  """(config, distill phase, its state at step 0, a batch) where the pairs are the teacher's own."""
  config = tiny.get_config()
  config.phases.distill.pairs = 'teacher'
  validation.validate(config, 8)
  parts = loop.make_phase(config, finished, 'distill')
  return config, parts, jax.device_get(parts.init()[0]), next(parts.stream.batches(8))


@pytest.mark.slow
def test_noise_to_data_distillation_is_the_same_on_eight_devices(finished):
  assert_same_on_eight(*noise_to_data(finished)[1:], 1e-4)  # several steps of an untaught teacher


def test_noise_to_data_distillation_learns_the_teachers_own_images(finished):
  """L_rec compares them, of noise of the prior, with the generator's; the data's pictures it does not look at."""
  config, parts, begun, batch = noise_to_data(finished)
  _, metrics = stepped(parts, begun, batch, 1)
  blank = {key: np.zeros_like(batch[key]) for key in ('image', 'base_image')}
  _, of_blank = stepped(parts, begun, batch | blank, 1)
  assert of_blank['loss'] == metrics['loss']
  # The same by hand: D through the sampler of config.phases.invert.num_levels = 3 levels.
  noise = 80 * jax.random.normal(jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 9)[8], (8, 8, 8, 1))
  teacher, cond = parts.frozen['teacher'], {'label': batch['label']}
  images = sampler.make_teachers_draw(config, 'distill', 3)(teacher, noise, cond)
  networks = parts.networks
  draws = networks.distance_draws(jax.random.key(1), 8)  # of pixels there are none
  expected = networks.distance({}, images, networks.generate(begun.params, noise, cond), draws)
  assert metrics['loss'] == pytest.approx(float(jnp.mean(expected)), rel=1e-4)


def test_smaller_pictures_are_the_haar_band_of_the_largest(finished):
  """So what a generator makes, made smaller in the same way, is compared with what its noise was inverted of."""
  config = tiny.get_config('roads')
  mean = lambda images, side: images.reshape(-1, side, 32 // side, side, 32 // side, 1).mean((2, 4))
  whole, _ = streams.epoch_pictures(config.data, 32, 'train', range(6))
  for side in (8, 16):
    small, _ = streams.epoch_pictures(config.data, side, 'train', range(6))
    np.testing.assert_array_equal(small, np.floor(mean(whole.astype(np.float64), side) + 0.5))
  of_phase = references.of_data(config, 'distill').pictures  # as figures compare with them
  np.testing.assert_array_equal(of_phase.read(np.arange(6)), small)
  stream = streams.Stream(config.data, 32, 0, streams.ToInvert(4500, 8), real_base=8)
  batch = next(stream.batches(4))
  for part, base in (('image', 'base_image'), ('real_image', 'real_base_image')):
    assert np.abs(mean(batch[part].astype(np.float64), 8) - batch[base]).max() <= 0.5
  cut = tiny.get_config()
  cut.data.resolution = 32
  assert np.any(streams.epoch_pictures(cut.data, 8, 'train', range(6))[0] != streams.epoch_pictures(
    config.data, 8, 'train', range(6))[0])
  # What is learnt of them is told from what is learnt of others, and from a run from before there was a choice.
  identity = {key.replace('.distill.', '.students.'): value  # a phase may be named anything
              for key, value in workdir.identity(tiny.get_config(), 'distill').items()}
  new = ['config.data.downsampling', 'config.phases.invert.encoder', *(
    f'config.phases.students.{key}' for key in ('resolution', 'channels', 'num_blocks', 'scale_shift'))]
  before = {key: value for key, value in identity.items() if key not in new}
  assert len(before) == len(identity) - 6 and workdir._differences(before, identity) == []
  assert 'downsampling' not in noise_store.read_manifest(finished / 'invert')['origin']


def test_a_generator_above_its_teachers_resolution_begins_as_it_and_trains_whole(run):
  config = tiny.get_config('roads')
  parts = loop.make_phase(config, run, 'distill')
  begun, said = parts.init()
  assert parts.networks.noise_shape(2) == (2, 8, 8, 1) and begun.fixed == {}
  teacher, _ = starts.read_start(config, run, 'distill')
  new = {name for name in begun.params if name not in teacher}
  assert new == {'dec_16_up', 'dec_16_block0'} and f'{run}/teacher, step 4: ' in said
  for name, leaves in teacher.items():
    jax.tree.map(np.testing.assert_array_equal, leaves, begun.params[name])
  # At the start its features are the teacher's, each four times.
  noise, level, cond = jax.random.normal(jax.random.key(3), (2, 8, 8, 1)), jnp.zeros(2), {'label': jnp.array([1, 2])}
  features = lambda unet, params: unet.apply({'params': params}, noise, level, cond, features_only=True)
  small = features(models.make_teacher(config, 'distill'), teacher)
  np.testing.assert_allclose(features(parts.networks.unet, begun.params), small.repeat(2, 1).repeat(2, 2), atol=1e-6)
  assert parts.networks.generate(begun.params, 80 * noise, cond).shape == (2, 16, 16, 1)
  # What grows from it knows its levels.
  begun = programs.make(config, 'grow_32').state
  assert set(begun.params) == {'dec_16_up', 'dec_16_block0', 'dec_32_up', 'dec_32_block0', 'out_norm', 'out_conv'}
  assert list(ladder.decoder_blocks(config, 'grow_32'))[-4:] == ['dec_16_up', 'dec_16_block0', 'dec_32_up',
                                                                'dec_32_block0']


@pytest.mark.parametrize('key, value, said', [
  ('encode.noise', 'encoded', "'encoded': must be an earlier phase of stage invert"),
  ('distill.pairs', 'teacher', "distill.noise = 'encoded': takes the noise of encoder encode; must be a phase that"),
  ('encoded.teacher', 'teacher', "must be '' with config.phases.encoded.encoder = 'encode'"),
  ('encoded.add_noise', True, "must be False with config.phases.encoded.encoder = 'encode'"),
])
def test_roads_that_do_not_meet_are_refused(key, value, said):
  config = tiny.get_config('roads')
  validation.validate(config, 8)
  phase, field = key.split('.')
  config.phases[phase][field] = value
  with pytest.raises(configs.ConfigError) as error:
    validation.validate(config, 8)
  assert said in str(error.value)
  assert json.dumps(str(error.value)).count('\\n') == 0


def test_what_learns_from_the_teacher_works_at_its_resolution():
  config = tiny.get_config('roads')
  config.phases.distill.update({'pairs': 'teacher', 'noise': 'invert'})
  with pytest.raises(configs.ConfigError, match="distill.resolution = 16: must be 8 with .*pairs = 'teacher'"):
    validation.validate(config, 8)
  config = tiny.get_config('roads')
  config.space = 'latent'
  config.data.update({'source': 'array_record', 'path': 'latents'})
  with pytest.raises(configs.ConfigError, match="config.data.downsampling = 'haar': must be 'cut' in latent space"):
    validation.validate(config, 8)
