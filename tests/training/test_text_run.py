"""A run with captions: every phase, going on, one device and eight, and what is drawn of prompts."""

import json
import pathlib
import shutil

import captioned
import jax
import numpy as np
import pytest
import step_tools
import text_files
import tiny
from PIL import Image
from runs import CONFIG, digest, pagoda

import pagoda_jax
from pagoda_jax.data import fitting, noise_store, sources
from pagoda_jax.data import stream as streams
from pagoda_jax.data.images import write_png
from pagoda_jax.evaluation import encoders, prompts
from pagoda_jax.evaluation.metrics import cmmd
from pagoda_jax.method import guidance
from pagoda_jax.runtime import randomness, sharding
from pagoda_jax.runtime.files import read_sealed
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints, loop
from pagoda_jax.use import edit, exported_loader
from pagoda_jax.use import sample as sampling
from pagoda_jax.use.serve import calls, limits
from pagoda_jax.weights.convert.mapping import ConversionError

TEXT = f'{CONFIG}:text'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return captioned.prepare(tmp_path_factory.mktemp('captioned'))


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  assert pagoda('run', TEXT, f'--config.data.path={data}', f'--workdir={folder}') == 0
  return folder


def config_of(data):
  config = tiny.get_config('text')
  config.data.path = str(data)
  fitting.settle(config)
  return config


def test_a_run_of_captions_goes_on_bit_by_bit(run, data, tmp_path, capsys):
  """And each picture is inverted with the strength that its caption's kind has a law for."""
  mine = pathlib.Path(shutil.copytree(run, tmp_path / 'run'))
  shutil.rmtree(mine / 'distill' / 'checkpoints' / '4')
  shutil.rmtree(mine / 'grow_16')
  assert pagoda('run', TEXT, f'--config.data.path={data}', f'--workdir={mine}') == 0
  assert 'distill: goes on from step 2' in capsys.readouterr().out
  for phase in ('distill', 'grow_16'):
    assert digest(mine, phase) == digest(run, phase)

  config = config_of(data)
  store = noise_store.open_store(run / 'invert', 80.0, standardize=False)
  law, keys = models.law_of(config), np.arange(len(store))
  source, of = streams.source_keys(config.data)
  kinds = np.array([source.text(of[key][0], key)['caption_kind'] for key in keys])
  expected = np.asarray(law.of_pictures(randomness.key_for(config.seed, randomness.GUIDANCE), keys, kinds))
  np.testing.assert_array_equal([store.pair(key)['omega'] for key in keys], expected)
  assert 1 <= expected[kinds == 0].min() and expected[kinds == 0].max() <= 4 < expected[kinds == 1].max() <= 10


@pytest.mark.slow
def test_a_step_of_captions_is_the_same_on_eight_devices(run, data):
  parts = loop.make_phase(config_of(data), run, 'distill')
  batch = loop.drop_keys(next(parts.stream.batches(8)))
  assert batch['text'].shape == batch['real_text'].shape == (8, 4, 6)
  begun = jax.device_get(parts.init()[0])
  begun = begun.replace(params=jax.tree.map(step_tools._spread, begun.params))
  after = []
  for count in (1, 8):
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
      placed = sharding.place(begun, mesh)
      rows = sharding.place_batch(batch, mesh)
      new, metrics = step_tools.jitted(parts.step, placed, mesh)(
        placed, rows, sharding.place(parts.frozen, mesh), jax.random.key(0))
      after.append(jax.device_get((new.params, new.discriminator['params'], metrics)))
  for one, eight in zip(*map(jax.tree.leaves, after)):
    np.testing.assert_allclose(one, eight, rtol=2e-4, atol=2e-5)


def sample(folder, out, *flags):
  return pagoda('sample', f'--workdir={folder}', f'--out={out}', *flags)


def test_prompts_are_drawn_written_and_refused(run, tmp_path, capsys, monkeypatch):
  config, out = tiny.get_config('text'), tmp_path / 'x.npz'
  taught = lambda folder, *_: (step_tools.params_of(models.make_unet(config, folder.name)), 4)
  monkeypatch.setattr(checkpoints, 'read_generator', taught)  # four steps have taught them nothing
  assert sample(run, out, '--prompts=red flag;blue cat', '--guidance=1,3') == 0
  drawn = np.load(out)
  assert drawn['prompt'].tolist() == ['red flag'] * 2 + ['blue cat'] * 2 and drawn['omega'].tolist() == [1, 3] * 2
  (tmp_path / 'p.txt').write_text('red flag\r\nblue cat\n', encoding='utf-8')
  again = tmp_path / 'again.npz'
  assert sample(run, again, f'--prompts={tmp_path / "p.txt"}', '--guidance=1,3', '--num_images=3') == 0
  assert np.load(again)['prompt'].tolist()[-2:] == ['red flag'] * 2  # from the first again
  np.testing.assert_array_equal(np.load(again)['arr_0'][:4], drawn['arr_0'])
  # The same by hand, in Python; another prompt draws another picture.
  generator = pagoda_jax.load(run)
  np.testing.assert_array_equal(generator(prompts=['red flag', 'blue cat'], guidance=3), drawn['arr_0'][1::2])
  one = generator(prompts='green bird', guidance=3)
  assert np.any(one != drawn['arr_0'][1])
  # And over HTTP.
  served = calls.Calls(generator, limits.Limits())
  told = calls.describe(generator, limits.Limits())
  assert told['text'] and told['omega']['high'] == 10  # of re-written captions
  images, noise, labels, _ = served.draw(json.dumps({'prompt': 'green bird', 'omega': 3}).encode())(None)
  np.testing.assert_array_equal(images, one)
  assert noise.shape == (1, 8, 8, 1) and labels.tolist() == [-1]
  for values in ({'prompt': 3}, {'prompt': 'a' * 2000}, {'prompt': 'a', 'labels': [3]}):
    with pytest.raises(limits.Refusal):
      served.draw(json.dumps(values).encode())
  # A grid has captions; a folder is one that the source 'folder' reads.
  assert sample(run, tmp_path / 'x.png', '--prompts=red flag;' + 'long ' * 2000) == 0
  assert Image.open(tmp_path / 'x.png').size[1] > 16
  assert sample(run, tmp_path / 'folder', '--prompts=red flag;\u0444\u043b\u0430\u0433', '--num_images=2') == 0
  rows = map(json.loads, (tmp_path / 'folder' / 'captions.jsonl').read_text(encoding='utf-8').splitlines())
  assert list(rows) == [{'file': '0.png', 'caption': 'red flag'},
                        {'file': '1.png', 'caption': '\u0444\u043b\u0430\u0433'}]
  # A teacher is guided away from the empty caption.
  for omega in (1, 3):
    assert sample(run, tmp_path / f'{omega}.npz', '--phase=teacher', '--prompts=red flag', f'--guidance={omega}') == 0
  assert np.any(np.load(tmp_path / '1.npz')['arr_0'] != np.load(tmp_path / '3.npz')['arr_0'])

  broken = tmp_path / 'broken.txt'
  broken.write_bytes(b'red flag\n\xff\xfe\n')
  capsys.readouterr()
  for flags, said in (
      (['--prompts=a;b', '--labels=3'], '--labels=3 and --prompts: give one of them'),
      (['--prompts=a;;b'], '--prompts, number 2: is empty'),
      ([f'--prompts={broken}'], 'broken.txt, line 2: no UTF-8 (byte 1'),
      ([f'--prompts={tmp_path / "none.txt"}'], 'none.txt: no such file'),
      ([], 'was trained with captions: give prompts'),
  ):
    assert sample(run, tmp_path / 'y.npz', *flags) == 1
    assert said in capsys.readouterr().err and not (tmp_path / 'y.npz').exists()
  with pytest.raises(ValueError, match='labels and prompts: give one'):
    generator(labels=3, prompts='a')
  with pytest.raises(ValueError, match='was trained with captions: give prompts'):
    generator()
  check_edits(generator, run, tmp_path, capsys)
  check_exports(generator, run, tmp_path, capsys)


def check_edits(generator, run, tmp_path, capsys):
  """Noise is sought under a picture's prompt; another prompt restyles it."""
  quick, own = edit.Options(steps=25, tries=1, error=0.01), generator(prompts=['red flag', 'blue cat'], guidance=3)
  found = edit.reconstruct(generator, own, options=quick, omega=3, prompts=['red flag', 'blue cat'])
  other = edit.reconstruct(generator, own[::-1], options=quick, omega=3, prompts=['red flag', 'blue cat'])
  assert found.misfit[0] < 1 < other.misfit.min()  # the noise that the search begins at made the first
  texts = generator.texts(['green bird'], 2)
  np.testing.assert_array_equal(
    edit.restyle(generator, own, options=quick, omega=3, prompt='green bird', prompts=['red flag', 'blue cat']).images,
    generator.of_noise(found.noise, np.full(2, -1), np.full(2, 3.0), texts=texts))
  frames = edit.interpolate(generator, *own, frames=3, options=quick, omega=3, prompts=['red flag', 'blue cat'])
  np.testing.assert_array_equal(frames[[0, -1]], found.images)
  with pytest.raises(edit.EditError, match='3 prompts for 2 pictures'):
    edit.reconstruct(generator, own, prompts=['a', 'b', 'c'])
  with pytest.raises(edit.EditError, match="take by = 'adam'"):
    edit.reconstruct(generator, own, by='inversion', prompts='red flag')
  write_png(tmp_path / 'own.png', own[0])
  write_png(tmp_path / 'mask.png', np.uint8(255 * (np.indices((16, 16))[0] < 4))[..., None])
  for word, flags in (('inpaint', [f'--mask={tmp_path / "mask.png"}', '--prompt=red flag']),
                      ('restyle', ['--prompt=blue cat', '--from_prompt=red flag'])):
    assert pagoda('edit', word, tmp_path / 'own.png', f'--workdir={run}', f'--out={tmp_path / "out.png"}', '--steps=25',
                  '--tries=1', *flags) == 0
  for flags, said in ((['deblur', '--blur=1'], 'draws what captions say: needs --prompt'),
                      (['restyle', '--prompt=a'], 'needs --from_prompt'),
                      (['reconstruct', '--prompt=a', '--label=3'], '--prompt=a and a label')):
    assert pagoda('edit', flags[0], tmp_path / 'own.png', f'--workdir={run}', *flags[1:]) == 1
    assert said in capsys.readouterr().err


def check_exports(generator, run, tmp_path, capsys):
  """A program that takes embeddings beside the noise; its folder draws prompts where their encoder is."""
  assert pagoda('publish', f'--workdir={run}', f'--output={tmp_path / "published"}') == 1
  assert 'was trained with captions: give prompts' in capsys.readouterr().err
  assert pagoda('publish', f'--workdir={run}', f'--output={tmp_path / "published"}', '--prompts=red flag;blue cat') == 0
  card = (tmp_path / 'published' / 'README.md').read_text()
  assert 'text-to-image' in card and '"red flag"; "blue cat"' in card and '`captioned:embed`' in card
  again = pagoda_jax.load(tmp_path / 'published')
  expected = generator(prompts=['red flag', 'blue cat'], seed=5)
  np.testing.assert_array_equal(again(prompts=['red flag', 'blue cat'], seed=5), expected)
  texts = dict(zip(guidance.TEXT, captioned.embed(['red flag', 'blue cat'])))
  alone = exported_loader.load(tmp_path / 'published')(texts, seed=5)
  assert np.abs(alone.astype(int) - expected).max() <= 1
  with pytest.raises(ValueError, match='made of them by the encoder captioned:embed, which is not in the folder'):
    exported_loader.load(tmp_path / 'published')('red flag')
  assert exported_loader.read(tmp_path / 'published')[0]['text']['sha256'] == generator.config.text.sha256


def test_figures_are_of_what_captions_of_held_out_pictures_say(run, data, tmp_path, capsys, monkeypatch):
  """By CLIP: CMMD, and whether pictures are what their captions say; the same of pictures that are drawn by hand."""
  text_files.write_clip(tmp_path / 'clip')
  text_files.write_picture_tower(tmp_path / 'weights' / 'clip_vit_l14_336.bin', patch=112, grid=3)
  flags = [f'--workdir={run}', '--metrics=cmmd,clip,psnr', '--num_images=18', '--guidance=2', '--batch_size=8',
           f'--weights_dir={tmp_path / "weights"}', f'--clip={tmp_path / "clip"}']
  for phase in ('distill', 'teacher'):
    metrics = '--metrics=cmmd,clip' if phase == 'teacher' else flags[1]
    assert pagoda('evaluate', *flags, metrics, f'--phase={phase}', f'--out={tmp_path / phase}.json') == 0
  assert 'reconstruction_psnr' in capsys.readouterr().out
  found = read_sealed(tmp_path / 'distill.json')
  config = config_of(data)
  held = sources.open_source(config.data, 'holdout')
  assert found['samples']['prompts'] == {'captions_of': 'holdout', 'pictures': 8, 'sha256':
                                         sources.at(held, 8).digest, 'encoder_sha256': config.text.sha256}
  assert found['features']['clip']['sha256'] and found['features']['clip_336']['sha256']
  assert found['held_out']['count'] == 8 and 'clip' not in found['held_out']
  assert (found['how']['cmmd']['reference_pictures'], found['how']['cmmd']['estimate']) == (32, 'biased')

  # By hand: the first captions of the eight, then the second ones, then the first again.
  texts = [captioned.captions(int(held[i % 8]['name'][:2]))[i // 8 % 2] for i in range(18)]
  stored = prompts.of_data(config)
  assert stored.captions(np.arange(18)) == texts
  generator = pagoda_jax.load(run / 'distill')
  embedded = dict(zip(guidance.TEXT, stored.embedded(np.arange(18))))
  np.testing.assert_array_equal(embedded['text'], np.stack([row['text'] for row in captioned.entries(texts)]))
  images = generator.of_noise(generator.noise(0, 18), np.full(18, -1), np.full(18, 2.0),
                              texts={'text': embedded, 'null': stored.null})
  tower, embed = encoders.of_captions(str(tmp_path / 'clip'))
  of_image = np.asarray(tower.apply(tower.variables, images)['features'], np.float64)
  np.testing.assert_allclose(np.linalg.norm(of_image, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(found['metrics']['clip'], np.mean(np.sum(of_image * embed(texts), axis=1)), atol=1e-4)
  large = encoders.of_clip_336(tmp_path / 'weights')
  real = streams.epoch_pictures(config.data, 8, 'train')[0]
  rows = [np.asarray(large.apply(large.variables, x)['features']) for x in (images, real)]
  np.testing.assert_allclose(found['metrics']['cmmd'], cmmd.cmmd(*rows), rtol=1e-3)

  # Finished pictures with their captions, from a file and from a folder, are judged the same.
  np.savez(tmp_path / 'x.npz', arr_0=images, prompt=np.array(texts))
  sampling.write(tmp_path / 'folder', images, np.full(18, -1), (), False, tuple(texts))
  for place in ('x.npz', 'folder'):
    assert pagoda('evaluate', f'--images={tmp_path / place}', '--metrics=clip', f'--clip={tmp_path / "clip"}',
                  f'--out={tmp_path / "again.json"}') == 0
    assert read_sealed(tmp_path / 'again.json')['metrics']['clip'] == pytest.approx(found['metrics']['clip'], abs=1e-4)
  np.savez(tmp_path / 'y.npz', arr_0=images, prompt=np.array(texts[:3]))
  for flags, said in (
      ([f'--images={tmp_path / "x.npz"}', '--metrics=clip'], 'needs --clip=FOLDER'),
      ([f'--images={tmp_path / "x.npz"}', '--metrics=clip', f'--clip={tmp_path / "weights"}'], 'no weights in it'),
      ([f'--images={tmp_path / "y.npz"}', '--metrics=clip'], 'must be a text for each of the 18 pictures'),
      ([f'--workdir={run}', '--metrics=cmmd', f'--weights_dir={tmp_path}'], 'clip_vit_l14_336 is not there'),
      ([f'--workdir={run}', '--metrics=cmmd', f'--clip={tmp_path / "clip"}'], 'is of the metric clip'),
      ([f'--workdir={run}', '--metrics=cmmd', '--labels=3,5'], 'is of captions, not of classes')):
    assert pagoda('evaluate', *flags) == 1
    assert said in capsys.readouterr().err
  text_files.write_picture_tower(tmp_path / 'small' / 'clip_vit_l14_336.bin', patch=14, grid=2)
  with pytest.raises(ConversionError, match='pictures of 28 px; CMMD is of 336 px'):
    encoders.of_clip_336(tmp_path / 'small')


def test_networks_of_labels_take_no_prompts(finished, tmp_path, capsys):
  assert sample(finished, tmp_path / 'x.npz', '--prompts=red flag') == 1
  assert 'was not trained with captions; give labels' in capsys.readouterr().err
  with pytest.raises(ValueError, match='was not trained with captions'):
    pagoda_jax.load(finished)(prompts=['a'])


def test_nothing_is_the_empty_caption():
  cond = {'label': np.zeros(2000, np.int32), 'text': np.ones((2000, 4, 6), np.float16),
          'text_mask': np.ones((2000, 4), bool), 'text_pooled': np.ones((2000, 5), np.float16)}
  null = captioned.entries([''])[0]
  dropped = guidance.dropped(jax.random.key(0), cond, 0.1, null)
  rows = np.asarray(dropped['label']) == -1
  assert 0.07 < rows.mean() < 0.13
  for key, value in null.items():
    assert dropped[key].dtype == cond[key].dtype
    np.testing.assert_array_equal(dropped[key][rows], np.broadcast_to(value, (rows.sum(), *value.shape)))
    np.testing.assert_array_equal(dropped[key][~rows], cond[key][~rows])
  with pytest.raises(ValueError, match='no text, text_mask, text_pooled of it'):
    guidance.nothing(cond)


def test_the_guided_denoiser_of_captions_is_between_both_answers():
  null = captioned.entries([''])[0]
  cond = {'label': np.full(3, -1), **{key: np.stack([row[key] for row in captioned.entries(['a', 'b c', ''])])
                                      for key in null}}
  omega, x = np.array([0.0, 1.0, 3.0], np.float32), np.ones((3, 2, 2, 1), np.float32)
  answer = lambda cond: np.float32(cond['text']).sum((1, 2)) + np.float32(cond['text_pooled']).sum(1)

  def denoise(x, sigma, cond):
    value = np.float32(1) * cond['text'].astype(np.float32).sum((1, 2)) + cond['text_pooled'].astype(np.float32).sum(1)
    return x * value[:, None, None, None]

  found = guidance.guided(denoise, omega, null)(x, 1.0, cond)[:, 0, 0, 0]
  without = answer({key: value[None] for key, value in null.items()})
  np.testing.assert_allclose(found, without + omega * (answer(cond) - without), rtol=1e-5)
