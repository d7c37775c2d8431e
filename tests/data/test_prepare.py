"""`pagoda prepare`: any source into shards and back, the same after a kill, and damage is named."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import make_data
import numpy as np
import pytest
from PIL import Image

from pagoda_jax import config as configs
from pagoda_jax import main
from pagoda_jax.data import folders, pictures, prepare, records, shards, sources
from pagoda_jax.data import stream as streams
from pagoda_jax.runtime import lock

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path):
  make_data.write_class_folders(tmp_path / 'photos')
  return tmp_path / 'photos'


def run(*flags) -> int:
  return main.main(['prepare', *flags])


def files(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def prepared(photos, output, image_format='png', **overrides):
  """The twelve pictures of a folder in three shards of 64 px."""
  options = {'shard_size': 4, 'workers': 1, 'max_unreadable': 0.01} | overrides
  prepare.prepare(folders.open_folder(photos, check=False), output, records.Recipe((64,), image_format, 95), **options)
  return output


@pytest.mark.parametrize('image_format, tolerance', [('png', 0), ('jpeg', 12), ('raw', 0)])
def test_a_folder_comes_back_cropped_and_resized_once(photos, tmp_path, image_format, tolerance, capsys):
  output = tmp_path / 'out'
  assert run(f'--source=folder:{photos}', f'--output={output}', '--resolution=10', '--shard_size=5', '--workers=1',
             f'--format={image_format}', *['--quality=100'] * (image_format == 'jpeg')) == 0
  assert '12 pictures of 3 classes at 10 px, in 3 shards' in capsys.readouterr().out
  source, original = records.open_records(output, verify=True), folders.open_folder(photos)
  assert len(source) == 12 and source.class_names == make_data.CLASSES and source.resolution == 10
  assert source.all_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
  for i in (0, 4, 5, 11):
    expected, found = original[i], source[i]
    assert (found['label'], found['name']) == (expected['label'], expected['name'])
    image = np.asarray(found['image']).astype(int)
    np.testing.assert_allclose(image, pictures.picture(expected['image'], 10, 3), atol=tolerance)


def test_captions_are_kept(tmp_path):
  make_data.write_captions(tmp_path / 'photos', [{'file': '0.png', 'caption': 'ein Käfer', 'label': 'beetle'}])
  source = records.open_records(prepared(tmp_path / 'photos', tmp_path / 'out'))
  assert source[0]['caption'] == 'ein Käfer' and source.class_names == ('beetle',)


def test_tfds_and_its_labels_come_back(tmp_path):
  make_data.write_tfds(tmp_path / 'tfds', 'small_pictures', 7)
  assert run('--source=tfds:small_pictures', f'--data_dir={tmp_path / "tfds"}', f'--output={tmp_path / "out"}',
             '--resolution=12', '--workers=1') == 0
  source = records.open_records(tmp_path / 'out')
  assert [source[i]['label'] for i in range(7)] == [i % 3 for i in range(7)]
  np.testing.assert_array_equal(np.asarray(source[3]['image']), make_data.pixels(3)[:, 2:14])


def test_prepared_digits_give_the_batches_of_the_digits(tmp_path):
  assert run('--source=mnist', f'--output={tmp_path}', '--resolution=32', '--workers=1') == 0
  digits = configs.experiment().data
  digits.update({'source': 'mnist', 'resolution': 8, 'channels': 1, 'num_classes': 10, 'holdout': 500})
  stored = digits.copy_and_resolve_references()
  stored.update({'source': 'array_record', 'path': str(tmp_path), 'verify': True})
  expected, found = (next(streams.Stream(group, 8, seed=3).batches(32)) for group in (digits, stored))
  for key in expected:
    np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize('source', ['folder', 'folder:', 'mnist:x', 'camera:0', ''])
def test_a_source_that_does_not_exist_is_explained(tmp_path, source, capsys):
  assert run(f'--source={source}', f'--output={tmp_path}') == 1
  assert f'--source={source}: must be folder:PATH, webdataset:PATH, tfds:NAME' in capsys.readouterr().err


@pytest.mark.parametrize('source, said', [
  ('folder:gs://b/photos', 'gs://b/photos: of source folder only local files are read'),
  ('webdataset:gs://b/*.tar', 'gs://b/*.tar: of source webdataset only local files are read'),
  ('array_record:s3://b/data', 's3://b/data: names no bucket; must be gs://BUCKET/PATH')])
def test_a_source_that_can_be_in_no_bucket_is_explained(tmp_path, source, said, capsys):
  assert run(f'--source={source}', f'--output={tmp_path}') == 1
  assert said in capsys.readouterr().err


def test_unreadable_pictures_are_left_out_and_listed_in_the_manifest(photos, tmp_path, capsys):
  (photos / 'cat' / '01.png').write_bytes(b'no picture')
  with pytest.raises(pictures.SourceError, match=r'1 of 12 .*max_unreadable = 0.01[^$]*cat/01.png: no format'):
    prepared(photos, tmp_path / 'out')
  assert not (tmp_path / 'out' / records.MANIFEST).exists()
  source = records.open_records(prepared(photos, tmp_path / 'out', max_unreadable=0.1))
  assert 'cat/01.png' in capsys.readouterr().err
  assert 'cat/01.png' in records.read_manifest(tmp_path / 'out')['unreadable'][0]
  names = [source[i]['name'] for i in range(11)]
  assert names == sorted(names) and 'cat/01.png' not in names


def test_other_settings_or_pictures_do_not_go_on_with_what_is_there(photos, tmp_path):
  output = prepared(photos, tmp_path / 'out')
  with pytest.raises(prepare.PrepareError, match='shard_size: there 4, here 5'):
    prepared(photos, output, shard_size=5)
  (photos / 'dog' / '99.png').write_bytes(make_data.png(make_data.pixels(5)))
  with pytest.raises(prepare.PrepareError, match='pictures: there 12, here 13'):
    prepared(photos, output)


def spoil(path, how):
  content = bytearray(path.read_bytes())
  if how == 'remove':
    path.unlink()
  elif how == 'truncate':
    path.write_bytes(content[:-100])
  else:
    content[content.index(b'IDAT') + 20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('how', ['flip', 'truncate', 'remove'])
def test_a_damaged_shard_is_named_and_made_anew(photos, tmp_path, how, capsys):
  output = prepared(photos, tmp_path / 'out')
  whole = files(output)
  path = output / 'pictures-00001-of-00003.array_record'
  spoil(path, how)
  assert run('--verify', f'--output={output}') == 1
  assert f'damaged or missing: {path.name};' in capsys.readouterr().err
  with pytest.raises(pictures.SourceError, match=path.name):
    records.open_records(output, verify=how == 'flip')  # a changed length shows without reading
  path.unlink(missing_ok=True)
  prepared(photos, output)
  assert files(output) == whole
  assert run('--verify', f'--output={output}') == 0
  assert run('--verify', f'--output={output}', '--source=mnist') == 1  # which it would not look at
  assert '--source=mnist: --verify looks at what is in --output alone' in capsys.readouterr().err


def test_a_damaged_record_is_named_when_it_is_read(photos, tmp_path):
  output = prepared(photos, tmp_path / 'out')
  spoil(output / 'pictures-00002-of-00003.array_record', 'flip')
  source = records.open_records(output)
  source[0]
  with pytest.raises(pictures.SourceError, match='pictures-00002-of-00003.array_record: record 0 is damaged'):
    [source[i] for i in range(12)]


def test_a_record_is_read_without_making_a_path(photos, tmp_path, monkeypatch):
  """It would take as long as the reading."""
  source = records.open_records(prepared(photos, tmp_path / 'out', 'raw'))
  monkeypatch.setattr(shards, 'epath', None)
  assert source[1]['name'] == 'bird/01.png'


def test_every_changed_byte_of_raw_pictures_is_named(photos, tmp_path):
  """Pixels have no checksum of their own, as PNGs do: ArrayRecord's are all there is."""
  path = prepared(photos, tmp_path / 'out', 'raw') / 'pictures-00000-of-00003.array_record'
  source, content, named = records.open_records(tmp_path / 'out'), path.read_bytes(), 0
  pixels = lambda: [np.asarray(source[i]['image']) for i in range(4)]
  expected, places = pixels(), range(0, len(content), 997)
  for place in places:
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    shards.open_shard.cache_clear()
    try:
      found = pixels()
    except pictures.SourceError as error:
      named += path.name in str(error)
    else:
      np.testing.assert_array_equal(found, expected)  # a byte that is only there to fill up
  assert len(content) > 4 * 64 * 64 * 3 and named > len(places) // 4


def test_raw_pixels_of_another_number_are_damaged_and_older_programs_are_told_of_them(photos, tmp_path):
  output = prepared(photos, tmp_path / 'out', 'raw')
  manifest = records.read_manifest(output)
  assert manifest['format'] == 'raw' and manifest['format_version'] == records.RAW_VERSION > records.FORMAT_VERSION
  source = dataclasses.replace(records.open_records(output), resolution=63)
  with pytest.raises(pictures.SourceError, match=r'record 0 is damaged \(12288 bytes, not the 3969 or 11907 of raw'):
    source[0]
  assert records.read_manifest(prepared(photos, tmp_path / 'png'))['format_version'] == records.FORMAT_VERSION
  with pytest.raises(prepare.PrepareError, match="format: there 'raw', here 'png'"):
    prepared(photos, output)


def test_a_damaged_record_ends_training_with_its_name(photos, tmp_path):
  output = prepared(photos, tmp_path / 'out')
  spoil(output / 'pictures-00002-of-00003.array_record', 'flip')
  settings = configs.experiment().data
  settings.update({'source': 'array_record', 'path': str(output), 'resolution': 8})
  with pytest.raises(pictures.SourceError, match='pictures-00002-of-00003.array_record: record'):
    batches = streams.Stream(settings, 8, seed=0).batches(12)
    [next(batches) for _ in range(3)]


def test_a_shard_under_another_ones_name_is_not_taken_for_it(photos, tmp_path):
  output = prepared(photos, tmp_path / 'out')
  shutil.copy(output / 'pictures-00000-of-00003.array_record', output / 'pictures-00001-of-00003.array_record')
  with pytest.raises(pictures.SourceError, match='pictures-00001.*: record 0 is record 0 of shard 0'):
    records.open_records(output)[4]


def test_damaged_labels_are_found_when_opening(photos, tmp_path):
  output = prepared(photos, tmp_path / 'out')
  path = output / 'pictures-00000-of-00003.json'
  path.write_text(path.read_text().replace('"labels": [0', '"labels": [1'))
  with pytest.raises(pictures.SourceError, match=path.name):
    records.open_records(output)


def test_a_large_folder_is_opened_shard_by_shard(monkeypatch):
  """All sidecars of a hundred million pictures at once were gigabytes, in each process of a machine."""
  whole = {'labels': list(range(1000, 6000)), shards.PLACES: 'x' * 22 * 5000}
  monkeypatch.setattr(shards, 'read_sidecar', lambda folder, name: json.loads(json.dumps(whole)))
  names = shards.Layout('pictures', 10**5, 5000).names
  manifest = {'shards': {name: {'count': 5000, 'sha256': ''} for name in names}, 'classes': [], 'format': 'png'}
  tracemalloc.start()
  source = records._one_side('', manifest, 64, names)
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert source.all_labels[[0, 5000, -1]].tolist() == [1000, 1000, 5999] and most < 2 * 10**6


def test_an_unfinished_folder_is_not_trained_on(photos, tmp_path):
  output = prepared(photos, tmp_path / 'out')
  (output / records.MANIFEST).unlink()
  with pytest.raises(pictures.SourceError, match='no finished data set'):
    records.open_records(output)


def test_a_second_prepare_on_one_output_is_refused(photos, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.05)
  with lock.hold(tmp_path / 'out'):
    assert run(f'--source=folder:{photos}', f'--output={tmp_path / "out"}', '--workers=1') == 1
    assert f'process {os.getpid()} on ' in capsys.readouterr().err
    assert len(files(tmp_path / 'out')) == 1  # the lock


def test_a_worker_that_dies_is_reported(tmp_path):
  with pytest.raises(prepare.PrepareError, match='exit code 7.*start the same command again'):
    prepare.prepare(make_data.Fatal(), tmp_path, records.Recipe((8,), 'png', 95), shard_size=2, workers=2,
                    max_unreadable=0)


SIDES = records.Recipe((64, 256), 'png', 95)


@pytest.fixture(scope='module')
def many(tmp_path_factory):
  """A folder of 240 pictures, and what an undisturbed `prepare` makes of it."""
  folder = tmp_path_factory.mktemp('many')
  (folder / 'photos' / 'a').mkdir(parents=True)
  for i in range(240):
    Image.fromarray(make_data.pixels(i, 64)).save(folder / 'photos' / 'a' / f'{i:03d}.png')
  prepare.prepare(folders.open_folder(folder / 'photos', check=False), folder / 'undisturbed',
                  SIDES, shard_size=12, workers=1, max_unreadable=0)
  return folder


def start(folder, output):
  """`pagoda prepare` as a process of its own with two workers."""
  command = [sys.executable, '-m', 'pagoda_jax.main', 'prepare', f'--source=folder:{folder / "photos"}',
             f'--output={output}', '--resolutions=64,256', '--shard_size=12', '--workers=2']
  # A test run started in the background ignores SIGINT, and its children would inherit that.
  heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          preexec_fn=heeding)


@pytest.mark.parametrize('number, code', [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_prepare_goes_on_to_the_same_bytes(many, tmp_path, number, code):
  output = tmp_path / 'out'
  process = start(many, output)
  while process.poll() is None and len(list(output.glob('*.array_record'))) < 3:
    time.sleep(0.005)
  process.send_signal(number)
  printed = process.communicate(timeout=60)[0]  # returns when the workers have ended too: they hold the pipe's end
  assert process.returncode == code, printed
  if number == signal.SIGINT:
    assert 'start the same command again to go on' in printed
  names = [name for layout in SIDES.layouts(240, 12).values() for name in layout.names]
  finished = [name for name in names if shards.is_finished(output, name)]
  assert 0 < len(finished) < len(names) == 40
  before = {name: (output / (name + shards.SUFFIX)).stat().st_mtime_ns for name in finished}
  process = start(many, output)
  printed = process.communicate(timeout=120)[0]
  assert process.returncode == 0, printed
  assert {name: (output / (name + shards.SUFFIX)).stat().st_mtime_ns for name in finished} == before
  assert files(output) == files(many / 'undisturbed')


def test_records_survive_any_text_in_their_header():
  header = {'shard': 1, 'record': 2, 'label': -1, 'name': 'ü/"\n', 'caption': '🦊' * 100}
  assert shards.decode_record(shards.encode_record(header, b'\x00content')) == (header, b'\x00content')


def test_the_manifest_counts_what_is_there(photos, tmp_path):
  (photos / 'dog' / '03.png').unlink()
  manifest = json.loads((prepared(photos, tmp_path / 'out') / records.MANIFEST).read_text())
  assert manifest['class_counts'] == [4, 4, 3] and manifest['count'] == 11 and manifest['enlarged'] == 11
  assert [entry['count'] for entry in manifest['shards'].values()] == [4, 4, 3]
  assert sources.open_whole('array_record', str(tmp_path / 'out')).class_names == make_data.CLASSES
