"""`pagoda sample`: truncation, captions, folders of pictures, animations; great circles of noise."""

import captioned
import numpy as np
import pytest
from PIL import Image
from runs import pagoda
from test_to_published import trained_phase

import pagoda_jax
from pagoda_jax.data.images import image_grid
from pagoda_jax.stages import sampler
from pagoda_jax.use import sample, text


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return trained_phase(tmp_path_factory.mktemp('run') / 'run', 'edm', 'grow_16')[0].parent


def drawn(run, out, *flags):
  assert pagoda('sample', f'--workdir={run}', f'--out={out}', '--num_images=6', *flags) == 0
  return out


def test_truncation_is_that_of_the_function(run, tmp_path, capsys):
  expected = pagoda_jax.load(run)(num_images=6, truncate=0.5)
  with np.load(drawn(run, tmp_path / 'x.npz', '--truncate=0.5')) as arrays:
    np.testing.assert_array_equal(arrays['arr_0'], expected)
  assert 'noise times 0.5' in capsys.readouterr().out
  assert np.any(expected != pagoda_jax.load(run)(num_images=6))


def test_a_folder_of_pictures_holds_what_the_arrays_hold(run, tmp_path, capsys):
  with np.load(drawn(run, tmp_path / 'x.npz', '--labels=3,5')) as arrays:
    images = arrays['arr_0']
  folder = drawn(run, tmp_path / 'pictures', '--labels=3,5')
  names = sorted(path.name for path in folder.iterdir())
  assert names == ['0_3.png', '1_5.png', '2_3.png', '3_5.png', '4_3.png', '5_5.png']
  for name, image in zip(names, images):
    np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), image[..., 0])
  assert pagoda('sample', f'--workdir={run}', f'--out={folder}') == 1  # never mixed with others
  assert 'there are files in it already' in capsys.readouterr().err
  assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize('stop', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_nothing_is_left_of_a_folder_that_could_not_be_written_to_its_end(tmp_path, monkeypatch, stop):
  written = []

  def write_png(path, image):
    if len(written) == 3:
      raise stop
    written.append(path)
    path.parent.mkdir(exist_ok=True)
    path.touch()

  monkeypatch.setattr(sample, 'write_png', write_png)
  (tmp_path / 'there').mkdir()
  for name in ('new', 'there'):
    written.clear()
    with pytest.raises(type(stop)):
      sample.write(tmp_path / name, np.zeros((5, 4, 4, 1), np.uint8), np.arange(5))
  assert [path.name for path in tmp_path.rglob('*')] == ['there']


def test_captions_stand_below_the_images(run, tmp_path):
  plain = np.asarray(Image.open(drawn(run, tmp_path / 'a.png')))
  grid = np.asarray(Image.open(drawn(run, tmp_path / 'b.png', '--captions')))
  assert plain.shape == (2 * 32, 3 * 32)
  side = 48  # 16 px, three times, so that two digits have room
  height = grid.shape[0] // 2
  assert grid.shape == (2 * height, 3 * side) and side < height < side + 24
  images = pagoda_jax.load(run)(num_images=6)
  for i in range(6):
    tile = grid[height * (i // 3):][:height, side * (i % 3):][:, :side]
    np.testing.assert_array_equal(tile[:side], images[i, ..., 0].repeat(3, 0).repeat(3, 1))
    assert 0 < np.mean(tile[side:] < 128) < 0.2  # dark on light
  texts = sample.captions(np.array([3, -1, 5]), (1.0, 2.5, 4.0))
  assert texts == ['3, omega 1', 'omega 2.5', '5, omega 4'] and sample.captions(np.array([-1])) == ['']
  assert sample.captioned_grid(images[:2].repeat(3, 3), texts[:2]).shape[2] == 3


def test_an_animation_goes_around(run, tmp_path, capsys):
  out = drawn(run, tmp_path / 'x.webp', '--frames=3')
  assert f'{3 * sample.STOPS} frames of 6 images' in capsys.readouterr().out
  images = pagoda_jax.load(run)(num_images=6)
  with Image.open(out) as animation:
    assert animation.n_frames == 3 * sample.STOPS and animation.info['loop'] == 0
    frames = []
    for i in range(animation.n_frames):
      animation.seek(i)
      frames.append(np.asarray(animation.convert('L')).astype(int))
  np.testing.assert_array_equal(frames[0], image_grid(images)[..., 0])  # lossless, and the seed's own images
  steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:] + frames[:1])]
  assert min(steps) > 0 and max(steps) < 4 * np.mean(steps)  # no jump, not where it starts over either


def test_slerp():
  rng = np.random.default_rng(0)
  a, b = 80 * rng.standard_normal((2, 3, 8, 8, 1))
  norm = lambda x: np.linalg.norm(x.reshape(3, -1), axis=1)
  np.testing.assert_allclose(sample.slerp(a, b, 0), a, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(sample.slerp(a, b, 1), b, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(norm(sample.slerp(a, b, 0.5)), (norm(a) + norm(b)) / 2, rtol=1e-5)
  # Equal steps of angle.
  path = [sample.slerp(a, b, t).reshape(3, -1) for t in np.linspace(0, 1, 5)]
  cosines = [np.sum(p * q, 1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1) for p, q in zip(path, path[1:])]
  np.testing.assert_allclose(cosines, np.broadcast_to(cosines[0], (4, 3)), rtol=1e-5)
  # One direction, opposite ones, nothing: no division by zero.
  np.testing.assert_allclose(sample.slerp(a, 2 * a, 0.5), 1.5 * a, rtol=1e-5)
  np.testing.assert_allclose(sample.slerp(a, -a, 0.25), 0.5 * a, rtol=1e-4, atol=1e-3)
  assert np.isfinite(sample.slerp(a, 0 * a, 0.5)).all() and not sample.slerp(0 * a, 0 * a, 0.5).any()
  each = sample.slerp(a, b, np.array([0, 0.5, 1]))
  np.testing.assert_allclose(each[0], a[0], rtol=1e-5, atol=1e-4)


def test_labels_of_a_network_without_classes():
  for given in ('cycle', 'random'):
    assert sampler.parse_labels(given, 3, 0, 0).tolist() == [-1, -1, -1]
  with pytest.raises(ValueError, match='--labels=3,5: the network knows no classes'):
    sampler.parse_labels('3,5', 3, 0, 0)


@pytest.mark.parametrize('flags, code, said', [
  (('--truncate=-1',), 2, 'truncate'), (('--truncate=nan',), 1, 'truncate = nan: must be in 0 to 10'),
  (('--captions', '--out=x.npz'), 1, '--captions: is of a .png'),
  (('--frames=3',), 1, '--frames: is of a .webp'), (('--out=x.webp', '--frames=0'), 2, 'frames'),
  (('--out=x.webp', '--guidance=1,2'), 1, 'an animation takes one strength'),
  (('--out=x.webp', '--num_images=261122'), 1, 'a .webp has at most 16383 pixels a side, which hold 261121 of them'),
  (('--out=x.gif',), 1, 'must end in .png or .npz or .webp, or in nothing for a folder'),
])
def test_what_is_refused(run, flags, code, said, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert pagoda('sample', f'--workdir={run}', *flags) == code
  assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_prompt_whose_end_is_left_out_is_named(monkeypatch):
  config, said = captioned.config_of_digits('ngrams'), []
  monkeypatch.setattr(text.logging, 'warning', lambda form, *values: said.append(form % values))
  long = 'a red flag on a high white tower by the sea'
  found = text.encode(config, ['red', long, ''])
  assert {*found} == {'text', 'text_mask', 'text_pooled'} and len(found['text']) == 3
  assert said == [f"prompts: of '{long}' only the first 4 tokens are read"]
