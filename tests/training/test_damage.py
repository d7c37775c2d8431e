"""Noise stores and prepared pictures that are changed, cut short or removed: named, never used, mended."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image
from runs import CONFIG, ROOT, pagoda

from pagoda_jax.data import noise_store, pictures, prepare, records, shards, sources
from pagoda_jax.training import checkpoints, loop

LAYOUT = noise_store.make_layout(count=8, shard_size=8)


def stored_noise(folder, side):
  """(name of its only shard, how to open it, how to read record i, what all eight give)."""
  noise = np.random.default_rng(0).standard_normal((8, side, side, 1), np.float32)
  noise_store.write_shard(folder, LAYOUT, 0, noise, {})
  noise_store.write_manifest(folder, LAYOUT, (side, side, 1), 'float32', {})
  return LAYOUT.name(0), lambda: noise_store.open_store(folder, 80.0, False), lambda store, i: store[i], noise


class Eight:
  """Eight pictures of noise, which PNG hardly compresses."""

  class_names, all_labels, digest = ('a',), None, ''

  def __init__(self, side):
    self.resolution = side
    self.pixels = np.random.default_rng(1).integers(0, 256, (8, side, side), np.uint8)

  def __len__(self):
    return 8

  def __getitem__(self, index):
    return {'image': Image.fromarray(self.pixels[index]), 'label': 0, 'name': str(index)}


def prepared_pictures(folder, side):
  """As `noise_store`, of pictures."""
  source = Eight(side)
  prepare.prepare(source, folder, records.Recipe((side,), 'png', 95), shard_size=8, workers=1, max_unreadable=0)
  pixels = lambda source, i: np.asarray(source[i]['image'])
  return 'pictures-00000-of-00001', lambda: records.open_records(str(folder)), pixels, source.pixels


KINDS = pytest.mark.parametrize('make', [stored_noise, prepared_pictures])


def fate(name, open_it, read, expected) -> set[str]:
  """What becomes of the records: 'whole', 'named' (an error that names the shard), 'silent' (other values)."""
  shards.open_shard.cache_clear()
  found = set()
  for i in range(8):
    try:
      found.add('whole' if np.array_equal(read(open_it(), i), expected[i]) else 'silent')
    except (noise_store.NoiseStoreError, pictures.SourceError) as error:
      found.add('named' if f'{name}{shards.SUFFIX}' in str(error) else str(error))
  return found


@KINDS
def test_no_damage_to_a_shard_goes_unnoticed(tmp_path, make):
  """Every third byte that says something, and every 997th of the zeros between, changed; blocks zeroed; cut short."""
  name, *reading = make(tmp_path, 8)
  path = tmp_path / (name + shards.SUFFIX)
  good = path.read_bytes()
  assert fate(name, *reading) == {'whole'}
  places = np.union1d(np.flatnonzero(np.frombuffer(good, np.uint8))[::3], np.arange(0, len(good), 997))
  flips = [good[:i] + bytes([good[i] ^ 0x10]) + good[i + 1 :] for i in places]
  zeroed = [good[:i] + bytes(512) + good[i + 512 :] for i in (0, 512, len(good) - 65536, len(good) - 512)]
  cut = [good[:length] for length in (0, 100, 65536, len(good) // 2, len(good) - 1)]
  counts = {'whole': 0, 'named': 0}
  for content in flips + zeroed + cut:
    path.write_bytes(content)
    fates = fate(name, *reading)
    assert fates <= {'whole', 'named'}
    for each in fates:
      counts[each] += 1
  assert counts['named'] > len(flips) / 3
  path.unlink()
  assert fate(name, *reading) == {'named'}


@KINDS
def test_damage_to_a_shard_that_is_open(tmp_path, make):
  name, open_it, read, expected = make(tmp_path, 128)
  path = tmp_path / (name + shards.SUFFIX)
  good = path.read_bytes()
  source = open_it()
  assert np.array_equal(read(source, 0), expected[0])
  path.unlink()
  for i in range(8):  # what is open stays readable
    assert np.array_equal(read(source, i), expected[i])
  path.write_bytes(good)
  shards.open_shard.cache_clear()
  assert np.array_equal(read(source, 0), expected[0])
  with path.open('r+b') as file:
    file.truncate(len(good) // 3)
  for i in (6, 7):  # for these, ArrayRecord gives empty records without an error
    with pytest.raises((noise_store.NoiseStoreError, pictures.SourceError), match=f'{name}.*record {i} is damaged'):
      read(source, i)


@pytest.mark.parametrize('read, file', [
  (lambda folder: noise_store.read_manifest(folder), noise_store.MANIFEST),
  (lambda folder: shards.read_sidecar(folder, LAYOUT.name(0)), LAYOUT.name(0) + '.json'),
])
def test_no_changed_byte_of_a_manifest_or_sidecar_goes_unnoticed(tmp_path, read, file):
  stored_noise(tmp_path, 8)
  good, expected = (tmp_path / file).read_bytes(), read(tmp_path)
  for place in range(len(good)):
    for bit in (0, 4):
      (tmp_path / file).write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
      try:
        found = read(tmp_path)
      except (noise_store.NoiseStoreError, shards.ShardError) as error:
        assert file in str(error)
      else:
        assert found == expected
  (tmp_path / file).write_text(json.dumps(expected | {'sum': 1.0}))  # changed, and its seal taken away
  with pytest.raises((noise_store.NoiseStoreError, shards.ShardError), match=f'{file}.*no seal'):
    read(tmp_path)


def spoil(path, how):
  content = bytearray(path.read_bytes())
  if how == 'remove':
    path.unlink()
  elif how == 'truncate':
    path.write_bytes(content[: len(content) // 2])
  else:  # in every record of the first half
    places = slice(100, len(content) // 2, 150)
    content[places] = bytes(byte ^ 1 for byte in content[places])
    path.write_bytes(content)


def at_step_2(folder, phase='distill'):
  """Undoes a phase's last two steps; returns the digest of what is left."""
  undo(folder, phase, 4)
  return digest(folder, phase)


def undo(folder, phase, step):
  """Deletes the newest checkpoint; the phase has noticed."""
  shutil.rmtree(folder / phase / 'checkpoints' / str(step))
  assert checkpoints.newest_good_step(folder / phase)


def digest(folder, phase='distill'):
  state, step = checkpoints.read_state(folder / phase)
  return step, checkpoints.digest(state, checkpoints.read_data_position(folder / phase, step))


def assert_refused(capsys, text, *args):
  """The command ends with exit code 1 and one line that holds `text`."""
  capsys.readouterr()
  assert pagoda(*args) == 1
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert text in line and line.startswith('pagoda train: ')


def contents(store):
  """Of all its files but metrics.jsonl, whose lines hold times."""
  return {path.name: path.read_bytes() for path in store.iterdir() if path.name != 'metrics.jsonl'}


def test_a_damaged_record_stops_a_run_and_only_its_shard_is_made_anew(finished, copied, capsys):
  """A process of its own, with workers: what it was saving is saved, and one line says what to do."""
  before, store = at_step_2(copied), copied / 'invert'
  opened = noise_store.open_store(store, 80.0, standardize=False)
  batches = loop.make_phase(tiny.get_config(), copied, 'distill').stream.batches(8)
  key = int([next(batches) for _ in range(4)][3]['key'][5])  # is read at step 4
  name = opened.layout.name(key // opened.layout.shard_size)
  whole, written = contents(store), {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
  content = bytearray(whole[name + shards.SUFFIX])
  content[content.index(opened[key].tobytes()[:64]) + 40] ^= 1
  (store / (name + shards.SUFFIX)).write_bytes(content)
  assert pagoda('inspect', f'--workdir={copied}', '--phase=invert') == 0
  assert f'damaged or missing: {name}\n' in capsys.readouterr().out
  args = ['train', CONFIG, f'--workdir={copied}', '--phase=distill', '--config.data.workers=2',
          '--config.checkpoint.every_steps=1']
  done = subprocess.run([sys.executable, '-m', 'pagoda_jax.main', *args], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1
  said = re.findall(r'^pagoda train: .*', done.stderr, re.MULTILINE)
  assert len(said) == 1 and 'Traceback' not in done.stderr and 'ERROR' not in done.stderr
  assert re.search(rf'/{name}{shards.SUFFIX}: record \d+ is damaged .*; delete {name}', said[0])
  assert checkpoints.finished_steps(copied / 'distill') == [2, 3]
  undo(copied, 'distill', 3)
  assert digest(copied) == before
  for part in store.glob(f'{name}.*'):  # as the message says
    part.unlink()
  shards.open_shard.cache_clear()
  assert pagoda('run', CONFIG, f'--workdir={copied}', '--phases=invert,distill') == 0
  assert f'invert: 4 of 5 shards are there; makes {name}\n' in capsys.readouterr().out
  assert contents(store) == whole
  kept = [file for file in whole if file.startswith('noise') and not file.startswith(name)]
  assert all((store / file).stat().st_mtime_ns == written[file] for file in kept)
  assert digest(copied) == digest(finished)


@pytest.mark.parametrize('file, how, text', [
  ('noise-00001-of-00005.array_record', 'truncate', 'missing: noise-00001-of-00005, and phase distill starts from it'),
  ('noise-00000-of-00005.array_record', 'remove', 'missing: noise-00000-of-00005, and phase distill starts from it'),
  ('noise-00003-of-00005.json', 'remove', 'missing: noise-00003-of-00005, and phase distill starts from it'),
  ('manifest.json', 'truncate', 'manifest.json: damaged'),
  ('manifest.json', 'remove', 'nothing finished there'),
  ('holdout.npz', 'flip', 'holdout.npz: missing or damaged'),
  ('holdout.npz', 'remove', 'damaged or missing: holdout.npz'),
])
def test_a_lost_part_of_a_store_is_named_and_mended(copied, file, how, text, capsys):
  before, store = at_step_2(copied), copied / 'invert'
  whole = contents(store)
  spoil(store / file, how)
  assert_refused(capsys, text, 'train', CONFIG, f'--workdir={copied}', '--phase=distill')
  assert digest(copied) == before
  if file in ('manifest.json', 'holdout.npz'):
    (store / file).unlink(missing_ok=True)  # as the message says
  assert pagoda('train', CONFIG, f'--workdir={copied}', '--phase=invert') == 0
  assert contents(store) == whole


def test_damaged_prepared_pictures_stop_a_run(tmp_path, capsys):
  folder, run = tmp_path / 'digits', tmp_path / 'run'
  assert pagoda('prepare', '--source=mnist', f'--output={folder}', '--resolution=16', '--workers=1',
                '--shard_size=1000') == 0
  args = ['train', CONFIG, f'--workdir={run}', '--phase=teacher', '--config.data.source=array_record',
          f'--config.data.path={folder}']
  assert pagoda(*args, '--max_steps=2') == 0
  before = digest(run, 'teacher')
  for path in folder.glob('pictures-*.array_record'):
    spoil(path, 'flip')
  shards.open_shard.cache_clear()
  assert_refused(capsys, 'is damaged', *args)
  assert digest(run, 'teacher') == before
  spoil(folder / 'pictures-00002-of-00005.array_record', 'truncate')
  sources.open_whole.cache_clear()
  sources.open_part.cache_clear()
  assert_refused(capsys, 'damaged or missing: pictures-00002-of-00005.array_record; delete', *args)
  manifest = json.loads((folder / 'manifest.json').read_text())
  (folder / 'manifest.json').write_text(json.dumps(manifest | {'count': 4999}))
  sources.open_whole.cache_clear()
  sources.open_part.cache_clear()
  assert_refused(capsys, 'manifest.json: damaged (its values do not fit its checksum)', *args)
  del manifest['seal']
  (folder / 'manifest.json').write_text(json.dumps(manifest | {'count': 4999}))
  sources.open_whole.cache_clear()
  sources.open_part.cache_clear()
  assert_refused(capsys, 'manifest.json: damaged (no seal', *args)
  assert digest(run, 'teacher') == before
