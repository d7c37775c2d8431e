"""Edits: what is measured of pictures, the descent, each edit on arrays, and `pagoda edit` on files."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_tools
import tiny
from PIL import Image
from runs import pagoda
from test_generator import made_up_run
from test_to_published import trained_phase

import pagoda_jax
from pagoda_jax.method import inverse_problems
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.files import write_sealed
from pagoda_jax.stages import models
from pagoda_jax.training import inverting
from pagoda_jax.use import edit, picture_files
from pagoda_jax.use.generator import Generator

QUICK = edit.Options(steps=50, tries=2)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A work directory with a grown generator of made-up numbers."""
  return trained_phase(tmp_path_factory.mktemp('run') / 'run', 'edm', 'grow_16')[0].parent


@pytest.fixture(scope='module')
def generator(run):
  """On one device: on eight, few candidates are filled up to eight, and as much is computed of each."""
  return pagoda_jax.load(run, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope='module')
def pictures(generator):
  """Images that the generator can make: labels 3 and 5."""
  return generator([3, 5], seed=9)


def test_what_is_measured():
  rng = np.random.default_rng(0)
  images = rng.random((2, 8, 8, 3)).astype(np.float32)
  whole = inverse_problems.whole(8, 3)
  np.testing.assert_allclose(whole(images), images, atol=1e-6)
  means = whole._replace(sides=edit.resize.resize_matrix(8, 4, 'area').astype(np.float32))(images)
  np.testing.assert_allclose(means, images.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)), atol=1e-6)
  grey = np.asarray(Image.fromarray(np.uint8(255 * images[0])).convert('L'))
  np.testing.assert_allclose(255 * whole._replace(mix=edit.LUMA)(images)[0, ..., 0], grey, atol=1.5)
  blur = inverse_problems.gaussian_blur(33, 2.0)
  np.testing.assert_allclose(blur.sum(1), 1, atol=1e-6)  # a plain picture stays as it is
  assert np.sum(blur[16] * (np.arange(33) - 16) ** 2) == pytest.approx(4, rel=1e-3)


def test_the_descent_of_a_linear_generator_ends_where_it_must():
  """Closed form: without prior the least squares; with it alone the norm sqrt(d - 1)."""
  rng = np.random.default_rng(0)
  matrix = np.linalg.qr(rng.standard_normal((16, 16)))[0].astype(np.float32)
  generate = lambda w: (w.reshape(-1, 16) @ matrix.T).reshape(-1, 4, 4, 1)
  target = rng.uniform(-1, 1, (2, 4, 4, 1)).astype(np.float32)
  begin = rng.standard_normal((2, 4, 4, 1)).astype(np.float32)
  measure = inverse_problems.whole(4, 1)

  @jax.jit
  def ended(error, prior):
    fit = inverse_problems.begin(jnp.asarray(begin))
    return inverse_problems.descend(generate, measure, target, fit, 2000, 0.02, error, prior)

  exact = ended(0.1, 0.0)
  np.testing.assert_allclose(generate(exact.best_w), target, atol=1e-3)
  alone = ended(1e6, 1.0)
  np.testing.assert_allclose(np.square(alone.best_w).sum((1, 2, 3)), 15, rtol=1e-3)
  np.testing.assert_allclose(alone.best, 0, atol=1e-3)
  # Of both, neither can be bettered.
  both = ended(0.5, 1.0)
  total = lambda w: inverse_problems.objective(generate, measure, target, w, 0.5, 1.0)[0].sum()
  assert np.abs(jax.grad(total)(both.best_w)).max() < 1e-2
  np.testing.assert_allclose(total(both.best_w), both.best.sum(), rtol=1e-5)


def test_each_edit_on_arrays(generator, pictures):
  start = generator(np.repeat([3, 5], 1), seed=0).astype(float)
  rms = lambda a, b: np.sqrt(np.square(a.astype(float) - b).mean((1, 2, 3)))
  told = []
  found = edit.reconstruct(generator, pictures, [3, 5], QUICK, lambda *seen: told.append(seen))
  assert found.images.shape == (2, 16, 16, 1) and found.labels.tolist() == [3, 5]
  np.testing.assert_allclose(found.misfit, rms(found.images, pictures), rtol=1e-4)
  assert np.all(found.misfit < 0.5 * rms(start, pictures))
  assert [step for step, _ in told] == [25, 50] and told[1][1] < told[0][1] and found.steps == 50
  # The noise is what the images are made of.
  np.testing.assert_array_equal(generator.of_noise(found.noise, found.labels), found.images)
  hole = np.zeros((1, 16, 16), bool)
  hole[:, 4:9, 3:12] = True
  painted = edit.inpaint(generator, pictures, hole, [3, 5], QUICK)
  known = ~hole[..., None].repeat(2, 0)
  np.testing.assert_array_equal(painted.images[known], pictures[known])
  assert np.any(painted.images != pictures)
  unseen = np.where(known, pictures, 255 - pictures)
  again = edit.inpaint(generator, unseen, hole, [3, 5], QUICK)
  np.testing.assert_array_equal(again.images, painted.images)  # what the mask marks is not looked at
  small = pictures.reshape(2, 4, 4, 4, 4, 1).mean((2, 4)).round().astype(np.uint8)
  grown = edit.super_resolve(generator, small, [3, 5], QUICK)
  np.testing.assert_allclose(grown.misfit, rms(grown.images.reshape(2, 4, 4, 4, 4, 1).mean((2, 4)), small), atol=0.1)
  matrix = inverse_problems.gaussian_blur(16, 1.5)
  blurred = np.einsum('ri,bijk,sj->brsk', matrix, pictures, matrix).round().astype(np.uint8)
  sharp = edit.deblur(generator, blurred, 1.5, [3, 5], QUICK)
  assert np.all(sharp.misfit < rms(blurred, pictures))
  other = edit.restyle(generator, pictures, 7, [3, 5], QUICK)
  np.testing.assert_array_equal(other.images, generator.of_noise(found.noise, [7, 7]))
  assert other.labels.tolist() == [7, 7] and np.any(other.images != found.images)
  frames = edit.interpolate(generator, *pictures, [3, 5], 5, QUICK)
  np.testing.assert_array_equal(frames[[0, -1]], found.images)


def test_labels_that_nobody_gives_are_tried(generator, pictures):
  """Made of the noise that the search begins at, a picture is explained by its own label at once."""
  own = generator([6], seed=0)
  found = edit.reconstruct(generator, own, None, edit.Options(steps=25, tries=1, error=0.01))
  assert found.labels.tolist() == [6] and found.misfit[0] < 1
  # More candidates than a batch, and as many as no device count divides: the same winners.
  edit_batch, edit.LARGEST_BATCH = edit.LARGEST_BATCH, 8 * 16**2
  try:
    again = edit.reconstruct(generator, own, None, edit.Options(steps=25, tries=1, error=0.01))
  finally:
    edit.LARGEST_BATCH = edit_batch
  assert again.labels.tolist() == [6]
  np.testing.assert_allclose(again.noise, found.noise, atol=0.5)


def test_it_stops_when_nothing_is_to_be_won(generator):
  own = generator([6], seed=0)
  found = edit.reconstruct(generator, own, 6, edit.Options(steps=4000, tries=1, error=1.0))
  assert found.settled and found.steps < 4000


def test_by_inversion_noise_is_of_the_strength_that_it_is_drawn_with(tmp_path, monkeypatch):
  config = tiny.get_config('guided')
  generator = pagoda_jax.load(made_up_run(tmp_path / 'run', config, 'distill'))
  teacher = step_tools.params_of(models.make_teacher(config, 'invert'))
  monkeypatch.setattr(edit.starts, 'read_start', lambda *where: (teacher, None))
  pictures, labels = generator([3, 5], seed=9), np.array([3, 5], np.int32)
  inverter = jax.jit(inverting.make_inverter(config, 'invert'))
  noise = {}
  for omega, expected in ((3.0, 3.0), (1.0, 1.0), (None, 1.0)):
    found = edit.reconstruct(generator, pictures, labels, by='inversion', omega=omega)
    batch = {'image': pictures, 'label': labels, 'key': np.arange(2, dtype=np.int32),
             'omega': np.full(2, expected, np.float32)}
    np.testing.assert_allclose(found.noise, inverter(teacher, batch), rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(found.images, generator.of_noise(found.noise, labels, [expected] * 2))
    noise[omega] = found.noise
  assert np.abs(noise[3.0] - noise[1.0]).max() > 1


def test_by_inversion_noise_is_standardised_as_the_generator_has_learnt_it(tmp_path, monkeypatch):
  config, noise = tiny.get_config(), np.full((2, 8, 8, 1), 50, np.float32)
  config.phases.distill.standardize_noise = True
  generator = pagoda_jax.load(made_up_run(tmp_path / 'run', config, 'distill'))
  manifest = {'count': 4500, 'shard_size': 1024, 'shape': [8, 8, 1], 'dtype': 'float32', 'mean': 10.0, 'std': 20.0}
  write_sealed(tmp_path / 'run' / 'invert' / 'manifest.json', manifest | {'origin': {}, 'shards': {}})
  monkeypatch.setattr(edit.starts, 'read_start', lambda *where: ({}, None))
  monkeypatch.setattr(edit.inverting, 'Solver', lambda *of: lambda pictures: {'noise': noise})
  found = edit.invert(generator, np.zeros((2, 8, 8, 1), np.uint8), [3, 5])
  np.testing.assert_allclose(found, np.full_like(noise, (50 - 10) * 80 / 20))


def other(name, classes):
  """A network of the tiny experiment with so many classes, that is never applied."""
  config = tiny.get_config()
  config.data.num_classes = classes
  return Generator(config, name, f'phase {name}', {}, dict, folder='run')


@pytest.mark.parametrize('edited, said', [
  (lambda g, p: edit.reconstruct(g, p[:, :8]), 'must be uint8 [B, 16, 16, 1]'),
  (lambda g, p: edit.reconstruct(g, p.astype(float)), 'pictures are float64'),
  (lambda g, p: edit.reconstruct(g, p[:0]), 'must be uint8'),
  (lambda g, p: edit.reconstruct(g, p, [1, 2, 3]), '3 labels for 2 pictures'),
  (lambda g, p: edit.reconstruct(g, p, 10), '10 is no class'),
  (lambda g, p: edit.reconstruct(g, p, 1, by='magic'), "must be 'adam' or 'inversion'"),
  (lambda g, p: edit.reconstruct(g, p, by='inversion'), 'a picture needs its label'),
  (lambda g, p: edit.reconstruct(g, p, 1, edit.Options(learning_rate=float('nan'))), 'learning_rate = nan'),
  (lambda g, p: edit.reconstruct(g, p, 1, edit.Options(steps=0)), 'steps = 0'),
  (lambda g, p: edit.reconstruct(g, p, 1, omega=2.0), 'was trained without guidance'),
  (lambda g, p: edit.restyle(g, p, labels=[3, 5]), 'restyle needs the label that the pictures are to have'),
  (lambda g, p: edit.super_resolve(g, p), 'with r below 16'),
  (lambda g, p: edit.super_resolve(g, p[:, :4, :4], 1, by='inversion'), 'the teacher inverts those of 8 px'),
  (lambda g, p: edit.inpaint(g, p, np.zeros((1, 16, 16), bool)), 'marks nothing'),
  (lambda g, p: edit.inpaint(g, p, np.ones((1, 16, 16), bool)), 'marks everything'),
  (lambda g, p: edit.inpaint(g, p, np.zeros((1, 8, 8), bool)), 'masks are bool [1, 8, 8]'),
  (lambda g, p: edit.deblur(g, p, 0), 'blur = 0: must be above 0'),
  (lambda g, p: edit.deblur(g, p, float('nan')), 'blur = nan'),
  (lambda g, p: edit.colorize(g, p), 'makes grey images itself'),
  (lambda g, p: edit.interpolate(g, p[0], p[1], frames=1), 'frames = 1'),
  (lambda g, p: edit.solve(g, inverse_problems.whole(16, 1), p / 127.5 - 1, 1), 'measured is float64 [2, 16, 16, 1]'),
  (lambda g, p: edit.solve(g, inverse_problems.whole(16, 1), p[:, :8, :8], 1), 'must be uint8 [B, 16, 16, 1]'),
  (lambda g, p: edit.reconstruct(other('teacher', 10), p[:, :8, :8], 1, by='inversion'), 'a teacher, which takes many'),
  (lambda g, p: edit.reconstruct(other('grow_16', 0), p, 3), 'labels = 3: grow_16 knows no classes; leave them out'),
  (lambda g, p: edit.reconstruct(other('grow_16', 0), p, 3, by='inversion'), 'knows no classes; leave them out'),
  (lambda g, p: edit.invert(g, p, None), 'a picture needs its label'),
  (lambda g, p: edit.invert(g, p, 10), '10 is no class'),
  (lambda g, p: edit.invert(g, p, [1.5, 2]), 'must be whole numbers'),
])
def test_what_cannot_be_edited_is_refused(generator, pictures, edited, said):
  with pytest.raises(ValueError) as error:
    edited(generator, pictures)
  assert said in str(error.value)


def test_what_was_found_before_the_objective_is_no_number_stays():
  leaves = lambda w: jnp.where(w > 1, jnp.nan, w)
  fit = inverse_problems.begin(jnp.zeros((1, 4, 4, 1)))
  fit = inverse_problems.descend(leaves, inverse_problems.whole(4, 1), jnp.full((1, 4, 4, 1), 5.0), fit, 40, 0.1, 1, 0)
  assert np.all(fit.w > 1) and np.isfinite(fit.best).all() and 0.5 < fit.best_w.min() <= fit.best_w.max() <= 1


def test_a_search_that_finds_nothing_finite_says_so(generator, pictures, monkeypatch):
  monkeypatch.setattr(generator, 'params', jax.tree.map(lambda x: x * jnp.nan, generator.params))
  with pytest.raises(edit.EditError, match='no noise with a finite objective'):
    edit.reconstruct(generator, pictures, [3, 5], edit.Options(steps=25, tries=1))


def encoded(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def odd_pictures():
  """Name -> bytes of a picture file of 20 x 24 pixels, dark on the left and light on the right."""
  ramp = np.linspace(0, 255, 20).astype(np.uint8)[None].repeat(24, 0)
  grey, colours = Image.fromarray(ramp), Image.fromarray(ramp[..., None].repeat(3, 2))
  clear = colours.convert('RGBA')
  clear.putalpha(Image.fromarray(np.where(np.arange(20) < 10, 255, 0).astype(np.uint8)[None].repeat(24, 0)))
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  return {
    'grey': encoded(grey, 'PNG'), 'rgba': encoded(clear, 'PNG'), 'cmyk': encoded(colours.convert('CMYK'), 'JPEG'),
    '16-bit': encoded(Image.fromarray(ramp.astype(np.uint16) * 257), 'PNG'),
    'animated': encoded(grey, 'GIF', save_all=True, append_images=[Image.new('L', (20, 24))]),
    'palette': encoded(colours.convert('P'), 'PNG'), 'bilevel': encoded(grey.convert('1'), 'PNG'),
    'one pixel': encoded(Image.new('L', (1, 1), 77), 'PNG'),
    'turned': encoded(colours.rotate(90, expand=True), 'JPEG', exif=exif, quality=100),
  }


@pytest.mark.parametrize('name', odd_pictures())
@pytest.mark.parametrize('channels', [1, 3])
def test_any_picture_file_comes_in(name, channels, tmp_path):
  path = tmp_path / 'picture.bin'  # the content decides
  path.write_bytes(odd_pictures()[name])
  found = picture_files.square(picture_files.read(path), 16, channels)
  assert found.shape == (16, 16, channels) and found.dtype == np.uint8
  if name == 'one pixel':
    assert np.all(found == 77)
  else:
    left, right = found[:, :4].mean(), found[:, -4:].mean()
    assert left < 80 and right > 170  # upright, and transparency over white
  assert (picture_files.read(path).size == (1, 1)) == (name == 'one pixel')


def refused(tmp_path, capsys, *flags):
  assert pagoda('edit', *flags, f'--out={tmp_path / "out.png"}') == 1
  said = capsys.readouterr().err
  assert 'Traceback' not in said and not (tmp_path / 'out.png').exists()
  return said


def test_files_that_are_no_pictures_are_refused_before_anything_is_read(tmp_path, capsys):
  nowhere = f'--workdir={tmp_path / "nowhere"}'
  (tmp_path / 'text.png').write_text('no picture')
  cut = odd_pictures()['grey']
  (tmp_path / 'cut.png').write_bytes(cut[: len(cut) // 2])
  (tmp_path / 'empty.png').write_bytes(b'')
  huge = bytearray(encoded(Image.new('1', (8, 8)), 'PNG'))
  import zlib
  huge[16:24] = (10_000).to_bytes(4, 'big') * 2
  huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, 'big')
  (tmp_path / 'huge.png').write_bytes(huge)
  for name, said in (('text.png', 'no format that Pillow reads'), ('cut.png', 'no picture that can be read'),
                     ('empty.png', 'no picture'), ('huge.png', '10000 x 10000 pixels; at most'),
                     ('gone.png', 'No such file'), ('.', 'folder, no regular file')):
    assert said in refused(tmp_path, capsys, 'reconstruct', tmp_path / name, nowhere)


@pytest.fixture(scope='module')
def files(pictures, tmp_path_factory):
  folder = tmp_path_factory.mktemp('files')
  for name, picture in zip('ab', pictures):
    Image.fromarray(picture[..., 0]).resize((32, 32), Image.Resampling.NEAREST).save(folder / f'{name}.png')
  hole = np.zeros((32, 32), np.uint8)
  hole[8:16, 8:24] = 255
  Image.fromarray(hole).save(folder / 'mask.png')
  Image.fromarray(pictures[0, ::4, ::4, 0]).save(folder / 'small.png')
  Image.fromarray(hole[:16, :16]).save(folder / 'small_mask.png')
  return folder


@pytest.mark.parametrize('word, flags', [
  ('reconstruct', ()), ('restyle', ('--label=7', '--from_label=3')), ('inpaint', ('--mask={}/mask.png', '--label=3')),
  ('deblur', ('--blur=1', '--label=3')), ('super_resolve', ('--label=3',)),
])
def test_edits_of_files(run, files, word, flags, tmp_path, capsys):
  out = tmp_path / 'out.png'
  picture = files / ('small.png' if word == 'super_resolve' else 'a.png')
  flags = [flag.format(files) for flag in flags]
  assert pagoda('edit', word, picture, f'--workdir={run}', f'--out={out}', '--steps=10', '--tries=1', *flags) == 0
  printed = capsys.readouterr()
  assert '16 px, label' in printed.out and 'step 25/25  objective' in printed.err
  assert Image.open(out).size == (16, 16) and Image.open(tmp_path / 'out_beside.png').size == (128, 64)


def test_interpolation_and_colour_of_files(run, files, tmp_path):
  flags = ('--steps=25', '--tries=1')
  ends = (files / 'a.png', files / 'b.png')
  out = tmp_path / 'out.webp'
  assert pagoda('edit', 'interpolate', *ends, f'--workdir={run}', '--from_label=3', '--label=5', '--frames=4',
                f'--out={out}', *flags) == 0
  with Image.open(out) as animation:
    assert animation.n_frames == 6 and animation.size == (64, 64)  # there and back
  config = tiny.get_config()
  config.data.channels = 3
  folder = made_up_run(tmp_path / 'colours', config, 'distill')
  assert pagoda('edit', 'colorize', ends[0], f'--workdir={folder}', '--label=1', f'--out={tmp_path / "c.png"}',
                *flags) == 0
  assert Image.open(tmp_path / 'c.png').mode == 'RGB' and Image.open(tmp_path / 'c.png').size == (8, 8)


def test_wrong_command_lines(run, files, tmp_path, capsys):
  here, a = f'--workdir={run}', files / 'a.png'
  for flags, said in (
      (('paint', a, here), 'use one of reconstruct'),
      ((here,), 'use one of reconstruct'),
      (('reconstruct', here), 'takes 1 picture file, and 0 are given'),
      (('interpolate', a, here), 'takes 2 picture files, and 1 is given'),
      (('inpaint', a, here), 'needs --mask'),
      (('inpaint', a, here, '--mask='), 'needs --mask'),
      (('restyle', a, here), 'needs --label'),
      (('interpolate', a, a, here, '--from_label=3'), '--from_label=3: needs --label beside it'),
      (('interpolate', a, a, here, '--from_prompt=x'), '--from_prompt=x: needs --prompt beside it'),
      (('reconstruct', a, here, '--blur=2'), '--blur=2.0: is of deblur'),
      (('reconstruct', a, here, '--by=inversion', '--tries=2'), '--tries=2: is of Adam'),
      (('inpaint', a, here, f'--mask={files}/small_mask.png'), 'mask of 16 x 16 pixels, picture of 32 x 32'),
      (('super_resolve', a, here), '32 x 32 pixels: no smaller than what the generator makes, 16 px'),
      (('reconstruct', a, here, '--label=12'), '12 is no class'),
      (('reconstruct', a), 'give --workdir=RUN or --weights=FOLDER')):
    assert said in refused(tmp_path, capsys, *flags)
