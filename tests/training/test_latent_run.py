"""A run in latent space: its data, every phase, what each leaves, going on, and what is drawn, edited and handed on."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import captioned
import jax
import latent_tools
import make_data
import numpy as np
import pytest
import step_tools
import tiny
from runs import ROOT, digest, pagoda

import pagoda_jax
from pagoda_jax import config as c
from pagoda_jax import validation
from pagoda_jax.data import fitting, latents, noise_store, records, shards, sources
from pagoda_jax.data import stream as streams
from pagoda_jax.evaluation import pictures, references
from pagoda_jax.planning import plan, programs
from pagoda_jax.runtime import sharding, topologies
from pagoda_jax.stages import decoding
from pagoda_jax.training import loop, workdir
from pagoda_jax.use import edit, exported_loader, to_onnx
from pagoda_jax.weights import autoencoders, frozen_weights
from pagoda_jax.weights.convert import folders

CONFIG = f'--config={ROOT / "tests" / "latent_tools.py"}'


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Pictures, an autoencoder and the latents."""
  folder = tmp_path_factory.mktemp('latent')
  latent_tools.prepare(folder)
  return folder


@pytest.fixture(scope='module')
def run(root):
  """The work directory, with every phase finished."""
  assert pagoda('run', f'{CONFIG}:{root}', f'--workdir={root / "run"}') == 0
  return root / 'run'


@pytest.fixture
def mine(run, tmp_path):
  return pathlib.Path(shutil.copytree(run, tmp_path / 'run'))


def settled(root):
  config = latent_tools.get_config(root)
  autoencoders.settle(config)
  return config


# Data: no network is compiled but the encoder.


def test_latents_are_those_of_each_picture_and_of_its_mirror_image(root):
  source, photos = records.open_records(str(root / 'latents'), verify=True), sources.open_whole(
    'folder', str(root / 'photos'))
  assert source.resolutions == (8, 16) and len(source) == 12
  assert source.all_labels.tolist() == photos.all_labels.tolist()
  encoder, (variables, _) = autoencoders.encoder(root / 'vae'), folders.load_converted(root / 'vae')
  module = decoding.make_autoencoder(latent_tools.get_config(root))
  for index, flip, side in ((0, False, 8), (7, True, 16), (11, True, 8)):
    stored = source.at(side).oriented(index, flip)
    assert stored['name'] == photos[index]['name'] and stored['image'].mean.shape == (side, side, 2)
    pixels = streams.picture_of(photos[index], 2 * side, 3, flip)
    mean, log_variance = module.apply(variables, pixels[None] / np.float32(127.5) - 1, method='encode')
    np.testing.assert_allclose(stored['image'].mean, mean[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(stored['image'].deviation, np.exp(log_variance[0] / 2), rtol=2e-3)
  mirrored = source.oriented(0, True)['image'].mean
  assert np.abs(mirrored - source.oriented(0, False)['image'].mean[:, ::-1]).max() > 0.05  # it is no flip of latents
  assert encoder.sha256 == source.autoencoder['sha256'] and source.autoencoder['factor'] == 2


def test_every_epoch_draws_anew_from_key_and_epoch_alone(root):
  config = settled(root)
  drawn, source = streams.sampling(config), sources.open_source(config.data, 'train')
  stream = streams.Stream(config.data, 8, 3, drawn=drawn)
  keys = len(source) * 2
  batches = stream.batches(6)
  seen = {}
  for step in range(3 * keys // 6):
    if step == 4:
      position = batches.get_state()
    batch = next(batches)
    if step == 4:
      kept = batch
    for row, key in enumerate(batch['key']):
      seen.setdefault(int(key), []).append(batch['image'][row])
  assert set(map(len, seen.values())) == {3} and len(seen) == keys
  of = streams.Keys(len(source), True)
  for key, images in seen.items():
    moments = sources.at(source, 8).oriented(*of[key])['image']
    for epoch, image in enumerate(images):
      noise = ((image / drawn.scaling + drawn.shift) - moments.mean) / moments.deviation
      expected = np.random.default_rng((latents.DOMAIN, config.seed, key, epoch, 8)).standard_normal((8, 8, 2), 'f4')
      np.testing.assert_allclose(noise, expected, atol=2e-3)
  # The same on resume, and on each of two hosts.
  again = stream.batches(6)
  again.set_state(position)
  np.testing.assert_array_equal(next(again)['image'], kept['image'])
  halves = [stream.batches(6, np.arange(3) + 3 * host) for host in range(2)]
  for half in halves:
    half.set_state(position)
  np.testing.assert_array_equal(np.concatenate([next(half)['image'] for half in halves]), kept['image'])


def test_pairs_are_one_draw_for_good(root):
  config = settled(root)
  drawn = streams.sampling(config)
  stream = streams.Stream(config.data, 16, 3, streams.ToInvert(18, 8), drawn=drawn, real_base=8)
  batches, seen = stream.batches(6), {}
  for _ in range(6):
    batch = next(batches)
    assert batch['image'].shape == (6, 16, 16, 2) and batch['real_base_image'].shape == (6, 8, 8, 2)
    for row, key in enumerate(batch['key']):
      base = batch['base_image'][row]
      np.testing.assert_array_equal(base, seen.setdefault(int(key), base))
  source = sources.open_source(config.data, 'train')
  load = streams.LoadPicture(source, streams.Keys(len(source), True), 8, 3, drawn=drawn)  # as `invert` reads them
  for key, base in seen.items():
    np.testing.assert_array_equal(load(key)['image'], base)


def test_the_same_command_goes_on_and_gives_the_same_bytes(root, tmp_path, capsys):
  for name in ('photos', 'vae'):
    (tmp_path / name).symlink_to(root / name)
  latent_tools.prepare(tmp_path)
  names = sorted(path.name for path in (root / 'latents').iterdir())
  content = lambda folder: {name: (folder / name).read_bytes() for name in names}
  assert content(tmp_path / 'latents') == content(root / 'latents')
  assert 'as latents of 8 x 8 x 2, 16 x 16 x 2 of autoencoder' in capsys.readouterr().out
  for lost in ('latents_8-00001-of-00003.array_record', 'latents_16-00002-of-00003.json', 'manifest.json'):
    (tmp_path / 'latents' / lost).unlink()
  latent_tools.prepare(tmp_path)
  assert content(tmp_path / 'latents') == content(root / 'latents')


def refused(capsys, *args):
  assert pagoda(*args) == 1
  return capsys.readouterr().err


def test_what_cannot_be_prepared_is_refused(root, tmp_path, capsys):
  latent_tools.write_autoencoder(tmp_path / 'other', seed=1)
  prepare = ('prepare', f'--source=folder:{root / "photos"}', '--shard_size=5')
  said = refused(capsys, *prepare, f'--output={root / "latents"}', '--resolutions=16,32',
                 f'--autoencoder={tmp_path / "other"}')
  both = [folders.read_description(folder)['variables_sha256'] for folder in (root / 'vae', tmp_path / 'other')]
  assert 'autoencoder' in said and all(each in said for each in both)
  fresh = (*prepare, f'--output={tmp_path / "fresh"}')
  assert '17 px: the autoencoder makes one place of 2 x 2 pixels, which does not divide them; 16 or 18' in refused(
    capsys, *fresh, '--resolution=17', f'--autoencoder={root / "vae"}')
  assert '--format=raw: is of pictures' in refused(
    capsys, *fresh, '--resolution=16', f'--autoencoder={root / "vae"}', '--format=raw')
  assert '--mirror=False: is of latents' in refused(capsys, *fresh, '--resolution=16', '--nomirror')
  assert 'no converted.json there' in refused(capsys, *fresh, '--resolution=16', f'--autoencoder={root / "photos"}')
  assert 'holds latents; give the pictures' in refused(
    capsys, 'prepare', f'--source=array_record:{root / "latents"}', f'--output={tmp_path / "fresh"}', '--resolution=16')
  with pytest.raises(pictures.EvaluationError, match='/latents: holds latents; name the pictures that they are of'):
    samples = pictures.of_array(np.zeros((2, 16, 16, 3), np.uint8), 'samples', {})
    references.open_reference(f'array_record:{root / "latents"}', '', '', samples, 0, None)
  # An autoencoder of which nothing finite comes.
  broken, config = folders.load_converted(root / 'vae')
  broken['params']['encoder']['conv_out']['bias'][:] = np.inf
  folders.write_converted(tmp_path / 'broken', dataclasses.replace(
    folders.read_folder(root / 'vae'), variables=broken), {'file': 'x', 'sha256': ''})
  assert 'bird/00.png: its latents are not finite' in refused(
    capsys, *fresh, '--resolution=16', f'--autoencoder={tmp_path / "broken"}')


@pytest.mark.parametrize('name', ['shard', 'record', 'sidecar', 'manifest', 'weights'])
def test_a_flipped_byte_is_named_and_not_used(root, tmp_path, name, capsys):
  for folder in ('latents', 'vae'):
    shutil.copytree(root / folder, tmp_path / folder)
  path = {'sidecar': 'latents/latents_8-00000-of-00003.json', 'manifest': 'latents/manifest.json'}.get(
    name, 'latents/latents_8-00000-of-00003.array_record')
  path = tmp_path / path
  if name == 'weights':
    path = max((tmp_path / 'vae' / 'variables').rglob('*'), key=lambda each: each.stat().st_size * each.is_file())
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  shards.open_shard.cache_clear()
  sources.open_whole.cache_clear()
  config = settled(tmp_path)
  with pytest.raises(ValueError, match='damaged|do not fit') as error:
    config.data.verify = name == 'shard'
    fitting.settle(config)
    if name == 'weights':
      autoencoders.load(config)
    source = sources.open_source(config.data)
    for index in range(len(source)):
      sources.at(source, 8).oriented(index, False)
      sources.at(source, 8).oriented(index, True)
  assert str(tmp_path) in str(error.value)
  sources.open_whole.cache_clear()


def test_a_run_takes_the_latents_of_its_autoencoder_and_no_others(root, tmp_path):
  latent_tools.write_autoencoder(tmp_path / 'other', seed=1)
  config = latent_tools.get_config(root)
  config.autoencoder.weights = str(tmp_path / 'other')
  autoencoders.settle(config)
  both = [folders.read_description(folder)['variables_sha256'][:16] for folder in (root / 'vae', tmp_path / 'other')]
  with pytest.raises(sources.SourceError) as error:
    fitting.settle(config)
  assert all(each in str(error.value) for each in both) and 'factor 2' in str(error.value)
  with pytest.raises(autoencoders.AutoencoderError, match='config.autoencoder.sha256 is'):
    autoencoders.settle(config if setattr(config.autoencoder, 'weights', str(root / 'vae')) is None else None)
  for key, value, said in (('widths', (8, 8), r'config.autoencoder.widths: there \(4, 8\), in the config \(8, 8\)'),
                           ('channels', 4, 'config.autoencoder.channels: there 2, in the config 4')):
    config = latent_tools.get_config(root)
    config.autoencoder[key] = value
    with pytest.raises(autoencoders.AutoencoderError, match=said):
      autoencoders.settle(config)
  config = settled(root)
  assert (config.autoencoder.scaling, config.autoencoder.shift) == (2.0, 0.25)
  config.space = 'pixel'
  with pytest.raises(sources.SourceError, match="space = 'pixel': .* holds latents; set config.space = 'latent'"):
    fitting.settle(config)
  config = settled(root)
  config.phases.grow_16.resolution = config.data.resolution = 32
  with pytest.raises(sources.SourceError, match='stored at 16 px|none of 32.*--resolutions=16,64'):
    fitting.settle(config)
  latent_tools.prepare(tmp_path, '--nomirror', name='plain')
  config = settled(tmp_path)
  config.data.path = str(tmp_path / 'plain')
  with pytest.raises(sources.SourceError, match='config.data.mirror = True: .* must be False'):
    fitting.settle(config)
  config.data.mirror = False
  config.autoencoder.sha256 = folders.read_description(tmp_path / 'vae')['variables_sha256']
  fitting.settle(config)


BAD = [
  ('data.source', 'mnist', "config.data.source = 'mnist': must be 'array_record'"),
  ('autoencoder.weights', '', "config.autoencoder.weights = '': must name the folder"),
  ('autoencoder.shift', 0.5, 'shift = 0.5: must be 0 while config.autoencoder.scaling is 0'),  # had no effect
  ('autoencoder.groups', 3, 'must be a multiple of config.autoencoder.groups = 3'),
  ('phases.teacher.augmentation', c.augmentation(rate=0.1), 'augmentation.rate = 0.1: must be 0 in latent space'),
  ('phases.invert.clip_denoised', True, 'clip_denoised = True: must be False in latent space'),
  ('phases.distill.discriminator.features', 'dino', "must be 'pixels' .* or config.phases.distill.adversarial.space ="),
  ('phases.distill.discriminator.features', 'projected', "must be 'pixels' .*adversarial.space = 'decoded'"),
  ('phases.distill.discriminator.augment', ('contrast',), 'must be some of translation, cutout of latents'),
  ('phases.grow_16.reconstruction.distance', 'lpips', "must be 'pixels' .*reconstruction.space = 'decoded'"),
  ('phases.grow_16.reconstruction_adversarial', c.adversarial(weight=0.5),
   "reconstruction_adversarial.space = 'latent': must be 'decoded', as .*adversarial.space is"),
  ('phases.grow_16.adversarial.r1', 1.0, r'adversarial.r1 = 1.0: and r2 = 0.0: must be 0'),
  ('phases.grow_16.adversarial.space', 'pixel', 'must be one of latent, decoded'),
  ('space', 'pixel', "reconstruction.space = 'decoded': must be 'latent', the space of the networks"),
  ('remat', (64,), 'some of 8, 16, 32, the resolutions of the networks'),
]


@pytest.mark.parametrize('key, value, said', BAD, ids=[f'{key}={value!s:.20}' for key, value, _ in BAD])
def test_what_means_nothing_of_latents_is_refused(key, value, said, tmp_path):
  config = latent_tools.get_config(tmp_path)
  validation.validate(config, 8)
  *path, last = key.split('.')
  group = config
  for part in path:
    group = group[part]
  with group.unlocked(), group.ignore_type():
    group[last] = value
  with pytest.raises(c.ConfigError, match=said):
    validation.validate(config, 8)


def test_decoded_losses_may_have_the_published_feature_networks(tmp_path):
  config = latent_tools.get_config(tmp_path)
  grow = config.phases.grow_16
  grow.reconstruction.update({'space': 'decoded', 'distance': 'lpips'})
  grow.discriminator.features = 'projected'
  validation.validate(config, 8)
  config.remat = (32,)  # of the decoder
  validation.validate(config, 8)
  assert frozen_weights.names(grow)


# The run.


def test_a_run_goes_on_bit_by_bit(root, run, mine, capsys):
  for phase in ('teacher', 'distill', 'grow_16'):
    shutil.rmtree(mine / phase / 'checkpoints' / '4')
  shard = next((mine / 'invert').glob('noise-*.array_record'))
  before = shard.read_bytes()
  shard.unlink()
  # Later phases were made from a teacher of step 4: what goes on must not see it at step 2.
  assert pagoda('train', f'{CONFIG}:{root}', f'--workdir={mine}', '--phase=teacher') == 0
  assert pagoda('run', f'{CONFIG}:{root}', f'--workdir={mine}') == 0
  said = capsys.readouterr().out
  assert all(f'{phase}: goes on from step 2' in said for phase in ('teacher', 'distill', 'grow_16'))
  assert shard.read_bytes() == before
  for phase in ('teacher', 'distill', 'grow_16'):
    assert digest(mine, phase) == digest(run, phase)
  identity = workdir.identity(settled(root), 'distill')
  assert identity['config.autoencoder.sha256'] and 'config.autoencoder.weights' not in identity
  manifest = noise_store.read_manifest(run / 'invert')
  assert manifest['shape'] == [8, 8, 2] and manifest['origin']['autoencoder'][1:] == [2, 2.0, 0.25]


def test_another_autoencoder_in_its_place_is_refused(root, run, tmp_path, capsys):
  for name in ('latents', 'run'):
    shutil.copytree(root / name, tmp_path / name)
  latent_tools.write_autoencoder(tmp_path / 'vae', seed=1)
  config = workdir.read_config(tmp_path / 'run')
  config.autoencoder.weights = str(tmp_path / 'vae')
  with pytest.raises(autoencoders.AutoencoderError, match='the autoencoder there is .* and these latents are of'):
    autoencoders.load(config)
  assert pagoda('run', f'{CONFIG}:{tmp_path}', f'--workdir={tmp_path / "run"}') == 1
  assert 'config.autoencoder.weights' in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_through_the_decoder_is_the_same_on_one_device_and_on_eight(root, run):
  config, found = settled(root), []
  for count in (1, 8):
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
      parts = loop.make_phase(config, run, 'grow_16', count)
      batch = loop.drop_keys(next(parts.stream.batches(8)))
      placed = sharding.place(jax.device_get(parts.init()[0]), mesh)
      assert set(parts.frozen) == {decoding.AUTOENCODER}
      step = step_tools.jitted(parts.step, placed, mesh)
      after, metrics = step(placed, sharding.place_batch(batch, mesh), sharding.place(parts.frozen, mesh),
                            jax.device_get(step_tools.RNG))
      found.append((jax.device_get(after.params), float(metrics['loss']), float(metrics['adversarial'])))
  (one, *losses), (eight, *others) = found
  np.testing.assert_allclose(losses, others, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_images_are_pictures_wherever_they_are_drawn(root, run, tmp_path):
  expected = pagoda_jax.load(run)
  assert (expected.resolution, expected.channels) == (32, 3)
  images = expected(labels=[0, 2], seed=3)
  assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 2
  # By hand: latents of the generator, through the autoencoder.
  config, params = expected.config, dict(expected.params)
  variables = params.pop(decoding.AUTOENCODER)
  noise = expected.noise(3, 2)
  drawn = expected.networks.generate(params, noise, {'label': np.array([0, 2], np.int32)})
  module = decoding.make_autoencoder(config)
  by_hand = module.apply(jax.device_get(variables), np.asarray(drawn) / 2.0 + 0.25, method='decode')
  assert np.abs(np.clip((np.asarray(by_hand) + 1) * 127.5, 0, 255) - images).max() <= 1
  assert pagoda('export', f'--workdir={run}', f'--output={tmp_path / "exported"}') == 0
  assert pagoda('publish', f'--workdir={run}', f'--output={tmp_path / "published"}') == 0
  assert 'It works on latents, 2 times smaller' in (tmp_path / 'published' / 'README.md').read_text()
  shutil.rmtree(root / 'vae')  # which they hold what they need of
  try:
    for folder in ('exported', 'published'):
      assert np.abs(pagoda_jax.load(tmp_path / folder)([0, 2], 3).astype(int) - images).max() <= 1
    code = "import sys, numpy; sys.path[:0] = ['.']; from load import load; numpy.save('x.npy', load('.')([0, 2], 3))"
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path / 'exported', check=True)
    assert np.abs(np.load(tmp_path / 'exported' / 'x.npy').astype(int) - images).max() <= 1
    convert = to_onnx.generator(*exported_loader.read(tmp_path / 'exported')[:2])  # what becomes ONNX
    assert np.abs(to_onnx.grey_levels(jax.jit(convert)(noise, np.array([0, 2], np.int32))) - images).max() <= 1
  finally:
    latent_tools.write_autoencoder(root / 'vae')
  for phase, side in (('teacher', 16), ('grow_16', 32)):
    assert pagoda('sample', f'--workdir={run}', f'--phase={phase}', '--num_images=2', f'--out={tmp_path}/x.npz') == 0
    assert np.load(tmp_path / 'x.npz')['arr_0'].shape == (2, side, side, 3)


def test_pictures_are_edited_and_measured_through_the_autoencoder(root, run, tmp_path):
  generator = pagoda_jax.load(run)
  pictures = generator([0, 1], seed=5)
  found = edit.reconstruct(generator, pictures, [0, 1], edit.Options(steps=25, tries=1))
  assert found.images.shape == (2, 32, 32, 3) and found.noise.shape == (2, 8, 8, 2)
  inverted = edit.reconstruct(generator, pictures, [0, 1], by='inversion')
  assert inverted.images.shape == (2, 32, 32, 3) and np.isfinite(inverted.misfit).all()
  small = pictures[:, ::2, ::2]
  assert edit.super_resolve(generator, small, [0, 1], by='inversion').images.shape == (2, 32, 32, 3)
  with pytest.raises(edit.EditError, match='the teacher inverts those of 16 px'):
    edit.super_resolve(generator, pictures[:, ::4, ::4], [0, 1], by='inversion')
  out = tmp_path / 'figures.json'
  assert pagoda('evaluate', f'--workdir={run}', '--metrics=psnr', '--num_images=16', f'--out={out}') == 0
  figures = json.loads(out.read_text())
  assert np.isfinite(figures['metrics']['reconstruction_psnr']) and figures['metrics']['reconstructions'] == 16
  assert figures['reference']['decoded_by'] == generator.config.autoencoder.sha256
  reference = references.of_data(generator.config, 'grow_16')
  held = reference.held_out.read(np.arange(3))
  assert held.shape == (3, 32, 32, 3) and held.dtype == np.uint8 and reference.pictures.count == 9


def test_guidance_is_estimated_of_latents_as_they_are(root, run):
  """No step of it takes them for pictures: they are neither cut to [-1, 1] nor rounded to 256 levels."""
  config = settled(root)
  config.guidance.law, config.phases.teacher.label_dropout = 'uniform', 0.1
  c.add_phase(config, 'guide', c.guide(batch_size=8, sample_levels=2))
  config.order = ('teacher', 'guide', 'invert', 'distill', 'grow_16')
  config.phases.distill.guide = config.phases.grow_16.guide = 'guide'
  validation.validate(config, 8)
  parts = loop.make_phase(config, run, 'guide')
  begun, batch, rng = jax.device_get(parts.init()[0]), next(parts.stream.batches(8)), jax.random.key(5)
  after, metrics = jax.jit(parts.step)(begun, loop.drop_keys(batch), parts.frozen, rng)
  assert after.step == 1 and after.skipped == 0 and 1 <= metrics['omega_real'] <= 4
  noise_key, omega_key = jax.random.split(jax.random.fold_in(rng, 0))
  networks, cond = parts.networks, {'label': batch['label']}
  noise = 80 * jax.random.normal(noise_key, batch['image'].shape)
  omegas = networks.law.draw(omega_key, (8,))
  drawn = networks.draw(parts.frozen['teacher'], noise, cond | {'omega': omegas})
  assert np.abs(drawn).max() > 1
  expected = float(np.mean((omegas - networks.estimate(begun.params, drawn, cond)) ** 2))
  assert metrics['loss'] == pytest.approx(expected, rel=1e-4)


def test_captions_embeddings_lie_beside_latents(tmp_path):
  """A picture and its mirror image share them; steps and drawing take both at once."""
  make_data.write_captions(tmp_path / 'pictures', [
    {'file': f'{i:02d}.png', 'caption': captioned.captions(i)[0]} for i in range(12)])
  latent_tools.write_autoencoder(tmp_path / 'vae')
  assert pagoda('prepare', f'--source=folder:{tmp_path / "pictures"}', f'--output={tmp_path / "latents"}',
                '--resolutions=16,32', '--shard_size=5', f'--autoencoder={tmp_path / "vae"}',
                '--text_encoder=captioned:embed', f'--text_length={captioned.LENGTH}') == 0
  assert pagoda('prepare', '--verify', f'--output={tmp_path / "latents"}') == 0
  config = latent_tools.get_config(tmp_path)
  config.data.num_classes, config.network.text_attention = 0, 'cross'
  config.text.update({'encoder': 'captioned:embed', 'length': 4, 'width': 6, 'pooled_width': 5})
  autoencoders.settle(config)
  fitting.settle(config)
  validation.validate(config, 8)
  stream = streams.Stream(config.data, 8, 0, text=True, drawn=streams.sampling(config))
  batch, (source, keys) = next(stream.batches(18)), streams.source_keys(config.data)
  assert sorted(batch['key']) == list(range(18)) and batch['image'].shape == (18, 8, 8, 2)
  shown = {int(key): place for place, key in enumerate(batch['key'])}
  for key, place in shown.items():
    (expected,) = captioned.entries([source[keys[key][0]]['caption']])
    for name, values in expected.items():
      np.testing.assert_array_equal(batch[name][place], values)
  program = programs.make(config, 'grow_16')
  _, metrics = program.trace().out_info
  assert metrics['loss'].shape == () and program.batch['real_text'].shape == (8, 4, 6)
  assert programs.sampling(config, 'grow_16', 2).trace().out_info.shape == (2, 32, 32, 3)


def test_a_run_from_before_latent_space_goes_on():
  """Its config.json has none of the new keys, and a run in pixel space computes what it did."""
  identity = workdir.identity(tiny.get_config(), 'grow_16')
  assert not [key for key in identity if key.startswith(('config.space', 'config.autoencoder'))]
  before = {key: value for key, value in identity.items() if not key.endswith('.space')}
  assert len(before) == len(identity) - 6 and workdir._differences(before, identity) == []


def test_a_plan_needs_no_files(tmp_path):
  config = latent_tools.get_config(tmp_path / 'nowhere')
  for name in config.order:
    assert plan.phase_costs(config, name, topologies.parse('1xh100')).flops > 0
  guided = config.copy_and_resolve_references()
  guided.guidance.law, guided.phases.teacher.label_dropout = 'uniform', 0.1
  c.add_phase(guided, 'guide', c.guide(batch_size=8, sample_levels=2))
  assert plan.phase_costs(guided, 'guide', topologies.parse('1xh100')).flops > 0
  plain = config.copy_and_resolve_references()
  plain.phases.distill.reconstruction.space = 'latent'
  through, beside = (plan.image_flops(each, 'distill') for each in (config, plain))
  assert through > beside
