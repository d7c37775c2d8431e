"""A run whose work directory, pictures and weights lie in a bucket: an emulated one, through gcsfs and tensorstore."""

import errno
import functools
import sys
import tempfile
import urllib.parse
import urllib.request
import zlib

import bucket
import make_data
import numpy as np
import pytest
import runs
import tiny
from etils import epath
from PIL import Image

from pagoda_jax.data import noise_store, prepare, record_places, records, shards
from pagoda_jax.data import stream as streams
from pagoda_jax.runtime import buckets
from pagoda_jax.training import checkpoints, claims
from pagoda_jax.weights.convert import folders

ROOT = f'gs://{bucket.NAME}'


@pytest.fixture(scope='module', autouse=True)
def address():
  with pytest.MonkeyPatch.context() as monkeypatch, bucket.emulated(monkeypatch) as found:
    yield found


def put(address, path, content):
  """What another host writes: past everything that this process remembers of the bucket."""
  name = urllib.parse.quote(str(path).removeprefix(f'{ROOT}/'), safe='')
  there = f'{address}/upload/storage/v1/b/{bucket.NAME}/o?uploadType=media&name={name}'
  urllib.request.urlopen(urllib.request.Request(there, data=content, method='POST')).close()


def test_a_run_in_a_bucket_is_that_of_a_folder_and_survives_what_one_does(finished, capfd):
  """All phases, bit for bit; then a changed byte, and the noise's shards gone with their manifest."""
  folder = epath.Path(f'{ROOT}/runs/tiny')
  assert runs.pagoda('run', runs.CONFIG, f'--workdir={folder}') == 0
  for phase in ('teacher', 'distill', 'grow_16'):
    assert runs.digest(folder, phase) == runs.digest(finished, phase)
  assert noise_store.read_manifest(folder / 'invert') == noise_store.read_manifest(finished / 'invert')
  grid = 'grow_16/samples/step_00000004.png'
  assert (folder / grid).read_bytes() == (finished / grid).read_bytes()
  lines = [(place / 'distill/metrics.jsonl').read_text().count('\n') for place in (folder, epath.Path(finished))]
  assert lines[0] == lines[1] == 4
  assert not [path.name for path in folder.iterdir() if path.name.startswith('lock')]

  (largest,) = sorted((folder / 'grow_16/checkpoints/4/state/d').iterdir(), key=lambda file: file.stat().length)[-1:]
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(bytes(content))
  store = noise_store.open_store(folder / 'invert', 80.0, False)
  kept = store[1030]
  (folder / 'invert' / noise_store.MANIFEST).unlink()
  (folder / 'invert' / 'noise-00001-of-00005.json').unlink()
  capfd.readouterr()
  assert runs.pagoda('run', runs.CONFIG, f'--workdir={folder}') == 0
  said = capfd.readouterr().out
  assert 'checkpoints/4 is damaged' in said and 'set aside as damaged-4' in said and 'goes on from step 2' in said
  assert 'invert: 4 of 5 shards are there; makes noise-00001-of-00005' in said
  assert runs.digest(folder, 'grow_16') == runs.digest(finished, 'grow_16')
  assert checkpoints.finished_steps(folder / 'grow_16') == [2, 4]
  np.testing.assert_array_equal(store[1030], kept)
  assert runs.pagoda('sample', f'--workdir={folder}', '--num_images=2', f'--out={ROOT}/drawn/two.png') == 0
  assert epath.Path(f'{ROOT}/drawn/two.png').read_bytes().startswith(b'\x89PNG')


def test_a_bucket_is_never_remembered(address):
  """gcsfs would keep sizes for ever: a lock would seem untouched, and a file that has grown be read cut off."""
  folder = epath.Path(f'{ROOT}/seen')
  put(address, folder / 'lock', b'short')
  assert [path.name for path in folder.iterdir()] == ['lock'] and (folder / 'lock').stat().length == 5
  put(address, folder / 'lock', b'longer than before')
  assert (folder / 'lock').stat().length == 18 and (folder / 'lock').read_bytes() == b'longer than before'
  put(address, folder / 'other', b'other')
  assert sorted(path.name for path in folder.glob('*')) == ['lock', 'other']


def test_prepared_pictures_are_read_from_a_bucket_as_from_a_folder(tmp_path, address):
  rng, places = np.random.default_rng(0), {}
  (tmp_path / 'photos').mkdir()
  for number in range(12):
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / 'photos' / f'{number:02}.png')
  for where in (str(tmp_path / 'out'), f'{ROOT}/data'):
    assert runs.pagoda('prepare', f'--source=folder:{tmp_path}/photos', f'--output={where}', '--resolutions=8,16',
                       '--shard_size=5', '--workers=1', '--format=raw') == 0
    config = tiny.get_config()
    config.data.update({'source': 'array_record', 'path': where, 'channels': 3, 'num_classes': 0, 'holdout': 2})
    batches = streams.Stream(config.data, 16, seed=1).batches(4)
    places[where] = [next(batches) for _ in range(6)]
    batches.close()
  for ours, theirs in zip(*places.values()):
    for part in ours:
      np.testing.assert_array_equal(ours[part], theirs[part])
  assert runs.pagoda('prepare', f'--output={ROOT}/data', '--verify') == 0
  copied = f'{ROOT}/copied'  # as `gcloud storage cp` does
  for path in (tmp_path / 'out').iterdir():
    put(address, f'{copied}/{path.name}', path.read_bytes())
  assert records.open_records(copied)[7]['name'] == records.open_records(str(tmp_path / 'out'))[7]['name']


def test_a_save_to_a_bucket_that_is_away_is_said_to_have_failed(monkeypatch):
  """The look for the checkpoints that are there fails then too."""
  saved = checkpoints.Checkpoints(f'{ROOT}/away/teacher')

  def away(*args, **kwargs):
    raise ConnectionRefusedError(errno.ECONNREFUSED, 'Connect call failed')

  monkeypatch.setattr(saved._manager, 'save', away)
  monkeypatch.setattr(checkpoints, 'finished_steps', away)
  with pytest.raises(checkpoints.CheckpointError, match=r'saving failed: Connect call failed; .*\(latest: not known\). '
                     'See that the bucket can be reached'):
    saved.save(1, {'a': np.zeros(1)}, {})


def test_a_bucket_that_is_away_is_not_taken_for_damage(monkeypatch):
  """Nobody is told to delete what is whole, and nothing is made anew."""
  folder, layout = epath.Path(f'{ROOT}/whole'), noise_store.make_layout(2, 2)
  noise_store.write_shard(folder, layout, 0, np.zeros((2, 8, 8, 3), np.float32), {})
  store = noise_store.NoiseStore(str(folder), layout, (8, 8, 3), 'float32')

  def away(*args, **kwargs):
    raise ConnectionRefusedError(errno.ECONNREFUSED, 'Connect call failed')

  monkeypatch.setattr(type(folder), 'read_bytes', away)
  for look in (lambda: store[0], lambda: noise_store.finished_shards(folder, layout, {}),
               lambda: noise_store.read_holdout(folder), lambda: claims.read(folder),
               lambda: folders.read_description(folder)):
    with pytest.raises(ConnectionRefusedError):
      look()


@pytest.mark.slow  # two processes that import all
def test_what_a_killed_worker_has_not_sent_to_a_bucket_is_gone(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  monkeypatch.setenv('TMPDIR', str(tmp_path))  # of the workers
  with pytest.raises(prepare.PrepareError, match='exit code 7'):
    prepare.prepare(make_data.Fatal(), f'{ROOT}/fatal', records.Recipe((8,), 'png', 95), 2, 2, 0.0)
  assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_shard_in_a_bucket_is_named(address, monkeypatch):
  folder, layout = epath.Path(f'{ROOT}/store'), noise_store.make_layout(6, 3)
  noise = np.random.default_rng(1).standard_normal((6, 8, 8, 3)).astype(np.float32)
  for shard in range(2):
    noise_store.write_shard(folder, layout, shard, noise[3 * shard : 3 * shard + 3], {})
  store = noise_store.NoiseStore(str(folder), layout, (8, 8, 3), 'float32')
  np.testing.assert_array_equal(np.stack([store[key] for key in range(6)]), noise)
  with monkeypatch.context() as more_shards:  # than files may be open: what tells where records lie is kept
    more_shards.setattr(shards, 'open_shard', functools.lru_cache(maxsize=1)(shards.open_shard.__wrapped__))
    more_shards.setattr(shards, 'read_sidecar', None)
    np.testing.assert_array_equal(np.stack([store[key] for key in (0, 3, 1, 4)]), noise[[0, 3, 1, 4]])
  path = f'{folder}/{layout.name(0)}{shards.SUFFIX}'
  content = bytearray(epath.Path(path).read_bytes())
  content[content.index(noise[1].tobytes()) + 9] ^= 1
  put(address, path, bytes(content))
  np.testing.assert_array_equal(store[0], noise[0])
  with pytest.raises(noise_store.NoiseStoreError, match=r'record 1 is damaged \(its bytes have changed \(CRC-32\)\)'):
    store[1]
  put(address, path, bytes(content[: content.index(noise[2].tobytes()) + 9]))
  with pytest.raises(noise_store.NoiseStoreError, match='record 2 is damaged'):
    store[2]
  epath.Path(path).unlink()
  with pytest.raises(noise_store.NoiseStoreError, match='array_record: missing'):
    store[0]
  sidecar = shards.sidecar_path(folder, layout.name(1))
  for kept in (shards.open_shard, shards._in_bucket):
    kept.cache_clear()
  for changed in (sidecar.read_bytes().replace(b'"places": "', b'"places": "AAAA'), sidecar.read_bytes()[:-40]):
    put(address, sidecar, changed)
    with pytest.raises(noise_store.NoiseStoreError, match=r'noise-00001-of-00002.json: missing or damaged'):
      store[4]
  shards.write_sealed(sidecar, {'count': 3, 'bytes': 1, 'sha256': ''})
  with pytest.raises(noise_store.NoiseStoreError, match='earlier version wrote it, without the places of records'):
    store[4]


@pytest.mark.parametrize('place, said', [
  ('gcs://bucket/run', 'names no bucket; must be gs://BUCKET/PATH'), ('gs://', 'names no bucket'),
  ('http://host/run', 'names no bucket'), ('s3://bucket/run', 'names no bucket')])
def test_a_place_that_is_in_no_bucket_is_refused(place, said, capsys):
  """epath would take the first for a folder of this machine, which no other host sees."""
  assert runs.pagoda('run', runs.CONFIG, f'--workdir={place}') == 2
  assert said in capsys.readouterr().err


def test_a_bucket_needs_a_package_that_is_named(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  monkeypatch.delitem(sys.modules['fsspec.registry']._registry, 'gs', raising=False)  # what was found before
  assert runs.pagoda('run', runs.CONFIG, f'--workdir={ROOT}/run') == 2
  assert 'gcsfs' in (said := capsys.readouterr().err) and 'pip install "pagoda_jax[gcs]"' in said


def test_a_bucket_that_is_not_there_is_said_to_be_none(capsys):
  assert runs.pagoda('run', runs.CONFIG, '--workdir=gs://another/run') == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith('pagoda run: Google Cloud Storage: b/another') and 'Is there such a bucket' in said


def test_records_lie_where_the_places_say(tmp_path, monkeypatch):
  """Of any lengths, across the blocks of 64 KiB; another build of the file is refused when it is written."""
  monkeypatch.setattr(buckets, 'read_range', lambda path, start, end: (tmp_path / path).read_bytes()[start:end])
  rng = np.random.default_rng(2)
  lengths = [1, 39, 40, 127, 128, 65_495, 65_496, 65_512, 65_535, 65_536, 65_537, 131_072, 200_000]
  for number in range(40):
    written = [rng.bytes(length) for length in rng.permutation([*lengths, *rng.integers(1, 70_000, 5)])]
    writer = shards.ShardWriter(tmp_path, f'shard{number}')
    for record in written:
      writer.add(record)
    writer.close()
    reader = record_places.Reader(f'shard{number}{shards.SUFFIX}',
                                  shards.read_sidecar(tmp_path, f'shard{number}')[shards.PLACES])
    assert reader.num_records() == len(written) and reader.read(range(len(written))) == written
  first, _ = reader.read([0, 1])
  with pytest.raises(RuntimeError, match='record 1 lies elsewhere'):
    record_places.of_file(tmp_path / f'shard39{shards.SUFFIX}', [zlib.crc32(first)] * 2)
