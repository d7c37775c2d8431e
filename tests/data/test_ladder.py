"""`pagoda prepare --resolutions`: each resolution is cut from the original, and a phase reads only what it needs."""

import pathlib
import shutil
import types

import make_data
import numpy as np
import pytest
from PIL import ExifTags, Image

from pagoda_jax import config as configs
from pagoda_jax import main
from pagoda_jax.data import fitting, folders, pictures, prepare, records, shards, sources
from pagoda_jax.data import stream as streams
from pagoda_jax.data.images import grid_of_both, image_grid
from pagoda_jax.runtime.files import write_sealed
from pagoda_jax.training import grids


@pytest.fixture
def photos(tmp_path):
  make_data.write_class_folders(tmp_path / 'photos')
  return tmp_path / 'photos'


def run(*flags) -> int:
  return main.main(['prepare', *flags])


def spoil(path):
  content = bytearray(path.read_bytes())
  content[content.index(b'IDAT') + 20] ^= 1
  path.write_bytes(content)


def files(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


LADDER = (16, 32, 64)


@pytest.fixture(scope='module')
def ladder(tmp_path_factory):
  """Pictures of odd forms, larger and smaller than the ladder, as files and prepared at LADDER: two shards each."""
  folder = tmp_path_factory.mktemp('ladder')
  (folder / 'photos').mkdir()
  rng = np.random.default_rng(0)
  noise = lambda *shape, of=np.uint8: rng.integers(0, np.iinfo(of).max, shape, of)
  forms = {
    'grey.png': Image.fromarray(noise(150, 201)),
    'rgba.png': Image.fromarray(noise(140, 131, 4)),
    'deep.png': Image.fromarray(noise(133, 260, of=np.uint16)),
    'cmyk.jpg': Image.fromarray(noise(90, 140, 4), 'CMYK'),
    'small.png': Image.fromarray(noise(20, 31, 3)),
    'plain.png': Image.fromarray(noise(200, 333, 3)),
  }
  for name, image in forms.items():
    image.save(folder / 'photos' / name)
  turned = Image.Exif()
  turned[ExifTags.Base.Orientation] = 6
  Image.fromarray(noise(170, 96, 3)).save(folder / 'photos' / 'turned.jpg', exif=turned)
  frames = [Image.fromarray(noise(80, 99, 3)) for _ in range(2)]
  frames[0].save(folder / 'photos' / 'moving.webp', save_all=True, append_images=frames[1:], lossless=True)
  for image_format in ('png', 'raw'):
    assert run(f'--source=folder:{folder / "photos"}', f'--output={folder / image_format}', '--workers=1',
               '--resolutions=64,16,32', '--shard_size=5', f'--format={image_format}') == 0
  return folder


def data_of(source, path, **overrides):
  settings = configs.experiment().data
  settings.update({'source': source, 'path': str(path), 'resolution': 64, 'mirror': True} | overrides)
  return settings


@pytest.mark.parametrize('image_format', ['png', 'raw'])
def test_each_resolution_is_cut_from_the_original_and_a_phase_opens_what_it_needs(ladder, image_format, monkeypatch):
  """A ladder's batches are those of the folder itself; the 16 px picture is not the 64 px one made smaller."""
  stored, files_there = data_of('array_record', ladder / image_format), data_of('folder', ladder / 'photos')
  opened, read = set(), shards.read_record
  monkeypatch.setattr(shards, 'read_record', lambda folder, name, *place: opened.add(name[:13]) or read(
    folder, name, *place))
  for resolution, noise, reads in ((16, None, {16}), (64, None, {64}), (32, streams.ToInvert(16, 16), {16, 32})):
    opened.clear()
    expected, found = (next(streams.Stream(data, resolution, 3, noise).batches(16)) for data in (files_there, stored))
    assert expected.keys() == found.keys() and opened == {f'pictures_{side}px' for side in reads}
    for key in expected:
      np.testing.assert_array_equal(found[key], expected[key])
  for side in LADDER:
    np.testing.assert_array_equal(*(streams.epoch_pictures(data, side, 'train')[0] for data in (stored, files_there)))
  whole = records.open_records(ladder / image_format, verify=True)
  assert whole.resolutions == LADDER and whole.resolution == 64
  images = [np.asarray(whole.at(side)[4]['image'], float) for side in (16, 64)]
  assert whole[4]['name'] == 'plain.png'
  assert len(list(whole)) == len(whole)
  with pytest.raises(IndexError, match='picture -1: .* holds 0 to'):
    whole[-1]
  reduced = pictures.picture(whole[4]['image'], 16, 3)
  assert np.sqrt(np.mean((reduced - images[0]) ** 2)) > 2  # grey levels


def test_cuts_of_one_picture_are_those_made_one_by_one(ladder):
  """guided-diffusion's order by hand: BOX while there is twice the side, then BICUBIC, then the centre."""
  source = folders.open_folder(ladder / 'photos')
  for index in range(len(source)):
    found = pictures.cuts(source[index]['image'], LADDER, 3)
    for side in LADDER:
      image = source[index]['image'].convert('RGB')
      while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
      scale = side / min(image.size)
      pixels = np.asarray(image.resize((round(image.width * scale), round(image.height * scale)),
                                       Image.Resampling.BICUBIC))
      top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
      np.testing.assert_array_equal(found[side], pixels[top : top + side, left : left + side])


def test_what_was_enlarged_is_counted_for_each_resolution(ladder, capsys):
  assert records.read_manifest(ladder / 'png')['enlarged'] == {'16': 0, '32': 1, '64': 1}
  assert run('--verify', f'--output={ladder / "png"}') == 0
  assert '16, 32, 64 px, 1 of them enlarged to 32 px, 1 of them enlarged to 64 px, in 6 shards' in (
    capsys.readouterr().out)


@pytest.mark.parametrize('resolutions, said', [
  ('64,64', 'names 64 twice'),
  ('0,64', 'must be numbers of pixels from 1 to 8192'),
  ('64,', 'must be numbers of pixels'),
  ('', 'must be numbers of pixels'),
  ('-64', 'must be numbers of pixels'),
  ('64,1e2', 'must be numbers of pixels'),
  ('64;128', 'must be numbers of pixels'),
  ('9999', 'from 1 to 8192'),
  ('64,96,128', '96 must be 64, the smallest, times 2, 4, 8'),
  ('64,192', '192 must be 64, the smallest, times 2, 4, 8'),
])
def test_resolutions_of_no_ladder_are_refused(tmp_path, resolutions, said, capsys):
  assert run('--source=mnist', f'--output={tmp_path / "out"}', f'--resolutions={resolutions}') == 1
  printed = capsys.readouterr().err
  assert f'--resolutions={resolutions}: ' in printed and said in printed and 'Traceback' not in printed
  assert not (tmp_path / 'out').exists()


def test_one_resolution_is_told_one_way_and_makes_the_folder_that_it_always_made(photos, tmp_path, capsys):
  flags = f'--source=folder:{photos}', '--workers=1'
  assert run(*flags, f'--output={tmp_path / "a"}', '--resolution=16') == 0
  assert run(*flags, f'--output={tmp_path / "b"}', '--resolutions=16') == 0
  assert files(tmp_path / 'a') == files(tmp_path / 'b')
  manifest = records.read_manifest(tmp_path / 'a')
  assert manifest['format_version'] == records.FORMAT_VERSION and manifest['resolution'] == 16
  assert run(*flags, f'--output={tmp_path / "c"}', '--resolution=16', '--resolutions=16,32') == 1
  assert '--resolution=16: cannot be given beside --resolutions=16,32' in capsys.readouterr().err


def test_other_resolutions_do_not_go_on_with_what_is_there(ladder, tmp_path, capsys):
  """Neither more of them, nor one where there were several, nor several where there was one."""
  flags = f'--source=folder:{ladder / "photos"}', '--workers=1', '--shard_size=5'
  shutil.copytree(ladder / 'png', tmp_path / 'several')
  (tmp_path / 'several' / records.MANIFEST).unlink()
  assert run(*flags, f'--output={tmp_path / "several"}', '--resolutions=16,32,64,128') == 1
  assert 'resolutions: there [16, 32, 64], here [16, 32, 64, 128]' in capsys.readouterr().err
  assert run(*flags, f'--output={tmp_path / "several"}', '--resolution=64') == 1
  assert 'resolutions: there [16, 32, 64], here [64]' in capsys.readouterr().err
  assert run(*flags, f'--output={tmp_path / "one"}', '--resolution=64') == 0
  assert run(*flags, f'--output={tmp_path / "one"}', '--resolutions=32,64') == 1
  assert 'resolutions: there [64], here [32, 64]' in capsys.readouterr().err
  assert run(*flags, f'--output={tmp_path / "several"}', '--resolutions=16,32,64') == 0
  assert files(tmp_path / 'several') == files(ladder / 'png')


@pytest.mark.parametrize('lost', [
  'pictures_16px-00001-of-00002.array_record', 'pictures_32px-00000-of-00002.json', 'pictures_64px-00001*', '*-00000-*'
])
def test_lost_shards_of_a_resolution_are_named_and_made_anew_alone(ladder, tmp_path, lost, capsys):
  output = pathlib.Path(shutil.copytree(ladder / 'png', tmp_path / 'out'))
  whole = files(output)
  gone = sorted(output.glob(lost))
  kept = {path: path.stat().st_mtime_ns for path in output.glob('*.array_record')
          if not any(path.stem == other.stem for other in gone)}
  for path in gone:
    path.unlink()
  with pytest.raises(pictures.SourceError) as refused:
    records.open_records(output)
  assert all(path.name in str(refused.value) for path in gone)
  assert run(f'--source=folder:{ladder / "photos"}', f'--output={output}', '--resolutions=16,32,64', '--shard_size=5',
             '--workers=2') == 0
  assert files(output) == whole and {path: path.stat().st_mtime_ns for path in kept} == kept


def test_changed_bytes_and_exchanged_resolutions_are_named_where_they_are_read(ladder, tmp_path, capsys):
  output = pathlib.Path(shutil.copytree(ladder / 'png', tmp_path / 'out'))
  spoil(output / 'pictures_32px-00000-of-00002.array_record')
  source = records.open_records(output)
  source.at(16)[0], source.at(64)[0]  # what a phase does not read does not stop it
  with pytest.raises(pictures.SourceError, match='pictures_32px-00000-of-00002.array_record: record 0 is damaged'):
    [source.at(32)[i] for i in range(5)]
  assert run('--verify', f'--output={output}') == 1
  assert 'damaged or missing: pictures_32px-00000-of-00002.array_record;' in capsys.readouterr().err
  shards.open_shard.cache_clear()
  large, small = (output / f'pictures_{side}px-00000-of-00002.array_record' for side in (64, 16))
  shutil.copy(large, small)
  with pytest.raises(pictures.SourceError, match='pictures_16px.*of 64 x 64 px, not of 16'):
    source.at(16)[0]


def test_noise_and_phases_notice_other_pictures_at_the_resolutions_that_they_read(ladder, tmp_path):
  """A ladder with one more step has the same base pictures, and one whose base pictures are others does not."""
  flags = f'--source=folder:{ladder / "photos"}', '--workers=1', '--shard_size=5'
  assert run(*flags, f'--output={tmp_path / "longer"}', '--resolutions=16,32,64,128') == 0
  assert run(*flags, f'--output={tmp_path / "top"}', '--resolution=64') == 0
  digest = lambda path, *sides: streams.pictures_digest(data_of('array_record', path, holdout=2), sides)
  assert digest(ladder / 'png', 16) == digest(tmp_path / 'longer', 16) != digest(tmp_path / 'top', 16)
  assert digest(ladder / 'png', 16, 64) == digest(tmp_path / 'longer', 16, 64)
  assert len({digest(ladder / 'png', *sides) for sides in ((16,), (64,), (16, 64), (16, 32, 64))}) == 4
  source = sources.open_source(data_of('array_record', tmp_path / 'top', holdout=2))
  assert digest(tmp_path / 'top', 16, 64) == source.digest  # as it was: earlier runs go on


def test_what_is_not_cut_from_the_originals_is_warned_of(ladder, tmp_path, caplog):
  config = configs.experiment(base_resolution=16)
  config.data.update(data_of('array_record', ladder / 'png'))
  configs.add_phase(config, 'teacher', configs.teacher())
  configs.add_phase(config, 'invert', configs.invert())
  configs.add_phase(config, 'distill', configs.distill())
  configs.add_phase(config, 'grow_64', configs.grow(resolution=64))
  fitting.settle(config)
  assert not caplog.records
  assert run(f'--source=array_record:{ladder / "png"}', f'--output={tmp_path / "out"}', '--workers=1',
             '--resolutions=8,32,64') == 0
  assert 'prepared at 64 px, not from the originals, which would give other pixels: 8 px' in caplog.text
  np.testing.assert_array_equal(*(records.open_records(path).at(32)[5]['image'] for path in (
    ladder / 'png', tmp_path / 'out')))  # not cut anew
  caplog.clear()
  config.data.path = str(tmp_path / 'out')
  fitting.settle(config)
  assert f'{tmp_path / "out"} holds pictures of 8, 32, 64 px only' in caplog.text
  assert '16 px of those of 32 px. `pagoda prepare --resolutions=16,64`' in caplog.text


def test_pictures_that_could_be_read_for_one_resolution_only_are_not_mixed(ladder, tmp_path):
  output = pathlib.Path(shutil.copytree(ladder / 'png', tmp_path / 'out'))
  (output / records.MANIFEST).unlink()
  name = 'pictures_16px-00000-of-00002'
  sidecar = shards.read_sidecar(output, name)
  write_sealed(shards.sidecar_path(output, name), sidecar | {'labels': sidecar['labels'][1:]}, indent=None)
  source = folders.open_folder(ladder / 'photos', check=False)
  with pytest.raises(prepare.PrepareError, match=f'{name}, .* do not hold the same pictures'):
    prepare.prepare(source, output, records.Recipe(LADDER, 'png', 95), 5, 1, 0.0)


def test_grids_show_the_pictures_that_the_phase_is_trained_on(ladder, tmp_path, monkeypatch):
  """Beside reconstructions stands the cut of the original at the phase's resolution, not the largest made smaller."""
  config = configs.experiment(base_resolution=16)
  config.data.update(data_of('array_record', ladder / 'png', resolution=64))
  configs.add_phase(config, 'invert', configs.invert())
  configs.add_phase(config, 'distill', configs.distill())
  configs.add_phase(config, 'grow_64', configs.grow(resolution=64))

  class Black:
    def __init__(self, *args):
      self.side = configs.phase_resolution(config, args[1])

    def __call__(self, params, noise, labels, omegas):
      return np.zeros((8, self.side, self.side, 3), np.uint8)

    def draw(self, params, seed, labels):
      return self(params, None, labels, None)

  monkeypatch.setattr(grids.sampling, 'Sampler', Black)
  monkeypatch.setattr(grids.noise_store, 'read_holdout', lambda _: {'noise': np.zeros(8), 'label': np.zeros(8)})
  config.log.samples = 8
  for name, side in (('distill', 16), ('grow_64', 64)):
    grids.make(config, tmp_path, name, None)(tmp_path / 'grid.png', types.SimpleNamespace(ema={}))
    shown = np.asarray(Image.open(tmp_path / 'grid.png'))
    expected, _ = streams.epoch_pictures(config.data, side, 'train', np.arange(8))
    enlarged = image_grid(expected, 8)
    np.testing.assert_array_equal(shown[-2 * len(enlarged) : -len(enlarged)], enlarged)


@pytest.mark.parametrize('count', [5, 8, 10])
def test_a_picture_stands_above_its_reconstruction_in_a_row_that_is_not_full_too(count):
  above = np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2)
  shown = grid_of_both(above, above + 100, 8)[::32, ::32, 0]
  assert shown[::2].ravel()[:count].tolist() == list(range(1, count + 1))
  np.testing.assert_array_equal(shown[1::2][shown[::2] > 0], above[:, 0, 0, 0] + 100)
