"""The noise store: what is written is read, a kill leaves whole shards, damage and mismatch are named."""

import numpy as np
import pytest
from etils import epath

from pagoda_jax.data import noise_store, shards

LAYOUT = noise_store.make_layout(count=10, shard_size=4)
NOISE = (80 * np.random.default_rng(0).standard_normal((10, 4, 4, 3))).astype(np.float32)
ORIGIN = {'teacher_sha256': 'ab', 'resolution': 4}


GUIDED = ORIGIN | {'guidance': ['uniform', 1.0, 4.0, '/guidance']}
OMEGAS = np.random.default_rng(1).uniform(1, 4, 10).astype(np.float32)


def write(folder, dtype='float32', shards=range(3), origin=ORIGIN):
  folder = epath.Path(folder)
  for shard in shards:
    keys = list(LAYOUT.keys(shard))
    omegas = OMEGAS[keys] if 'guidance' in origin else None
    noise_store.write_shard(folder, LAYOUT, shard, NOISE[keys].astype(dtype), origin, omegas)
  return folder


@pytest.mark.parametrize('dtype, tolerance', [('float32', 0), ('float16', 2**-10)])
def test_every_record_is_read_back_by_its_key(tmp_path, dtype, tolerance):
  folder = write(tmp_path, dtype)
  manifest = noise_store.write_manifest(folder, LAYOUT, (4, 4, 3), dtype, ORIGIN)
  store = noise_store.open_store(folder, 80.0, standardize=False)
  assert len(store) == 10
  for key in (9, 0, 4, 3):
    np.testing.assert_allclose(store[key], NOISE[key], rtol=tolerance)
  assert len(list(store)) == 10
  for key in (-1, 10):  # was a shard that has lost a record, to be deleted
    with pytest.raises(IndexError, match=f'key {key}: .* holds the noise of keys 0 to 9'):
      store[key]
  assert manifest['std'] == pytest.approx(NOISE.std(), rel=1e-3)


def test_standardized_noise_has_the_priors_moments(tmp_path):
  folder = write(tmp_path)
  noise_store.write_manifest(folder, LAYOUT, (4, 4, 3), 'float32', ORIGIN)
  store = noise_store.open_store(folder, 80.0, standardize=True)
  values = np.stack([store[key] for key in range(10)])
  assert values.mean() == pytest.approx(0, abs=1e-4)
  assert values.std() == pytest.approx(80, rel=1e-5)


def test_only_whole_shards_count_as_finished(tmp_path):
  folder = write(tmp_path, shards=[0, 2])
  (folder / (LAYOUT.name(1) + '.partial')).write_bytes(b'half a shard')
  assert shards.finished_shards(folder, LAYOUT) == [0, 2]
  with pytest.raises(noise_store.NoiseStoreError, match='no finished noise store'):
    noise_store.open_store(folder, 80.0, standardize=False)


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove'])
def test_a_damaged_shard_is_named(tmp_path, damage):
  folder = write(tmp_path)
  noise_store.write_manifest(folder, LAYOUT, (4, 4, 3), 'float32', ORIGIN)
  assert noise_store.damaged_shards(folder) == []
  path = folder / (LAYOUT.name(1) + '.array_record')
  content = bytearray(path.read_bytes())
  if damage == 'remove':
    path.unlink()
  elif damage == 'truncate':
    path.write_bytes(content[:-100])
  else:
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
  assert noise_store.damaged_shards(folder) == [LAYOUT.name(1)]


def test_shards_of_another_teacher_are_not_gone_on_with(tmp_path):
  folder = write(tmp_path, shards=[0, 2])
  assert noise_store.finished_shards(folder, LAYOUT, ORIGIN) == [0, 2]
  with pytest.raises(noise_store.NoiseStoreError, match='another teacher.*noise-00000-of-00003, noise-00002-of-00003;'):
    noise_store.finished_shards(folder, LAYOUT, {**ORIGIN, 'teacher_sha256': 'cd'})


def test_the_last_shard_of_a_run_of_fewer_pairs_is_made_anew(tmp_path):
  """Of 9 pairs (`--max_steps`) as of 10 it is number 2 of 3."""
  fewer = noise_store.make_layout(count=9, shard_size=4)
  for shard in range(3):
    noise_store.write_shard(epath.Path(tmp_path), fewer, shard, NOISE[list(fewer.keys(shard))], ORIGIN)
  assert noise_store.finished_shards(tmp_path, fewer, ORIGIN) == [0, 1, 2]
  assert noise_store.finished_shards(tmp_path, LAYOUT, ORIGIN) == [0, 1]


def test_a_store_made_for_something_else_is_refused_field_by_field(tmp_path):
  folder = write(tmp_path)
  manifest = noise_store.write_manifest(folder, LAYOUT, (4, 4, 3), 'float32', ORIGIN)
  noise_store.check_origin(manifest, ORIGIN, folder)
  with pytest.raises(noise_store.NoiseStoreError, match="teacher_sha256: the store has 'ab', this run needs 'cd'"):
    noise_store.check_origin(manifest, {**ORIGIN, 'teacher_sha256': 'cd'}, folder)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_the_strength_of_guidance_is_stored_with_its_noise_and_guarded_as_it_is(tmp_path, dtype):
  folder = write(tmp_path, dtype, origin=GUIDED)
  noise_store.write_manifest(folder, LAYOUT, (4, 4, 3), dtype, GUIDED)
  store = noise_store.open_store(folder, 80.0, standardize=True)
  for key in (9, 0, 4):
    pair = store.pair(key)
    assert pair['omega'] == OMEGAS[key] and pair['omega'].dtype == np.float32  # standardised is the noise alone
    np.testing.assert_allclose(pair['noise'], (NOISE[key] - store.shift) * store.scale, rtol=1e-2, atol=1)
  path = folder / (LAYOUT.name(1) + '.array_record')
  content = path.read_bytes()
  place = content.index(OMEGAS[5].tobytes())
  for byte in range(4):
    changed = bytearray(content)
    changed[place + byte] ^= 1
    path.write_bytes(bytes(changed))
    shards.open_shard.cache_clear()
    assert noise_store.damaged_shards(folder) == [LAYOUT.name(1)]
    with pytest.raises(noise_store.NoiseStoreError, match='noise-00001-of-00003.*record 1 is damaged'):
      store.pair(5)


def test_a_store_without_guidance_brings_none_and_no_law_is_taken_for_another(tmp_path):
  plain, guided = write(tmp_path / 'plain'), write(tmp_path / 'guided', origin=GUIDED)
  for folder, origin in ((plain, ORIGIN), (guided, GUIDED)):
    noise_store.write_manifest(folder, LAYOUT, (4, 4, 3), 'float32', origin)
  assert set(noise_store.open_store(plain, 80.0, False).pair(3)) == {'noise'}
  other = ORIGIN | {'guidance': ['uniform', 1.0, 8.0, '/guidance']}
  for folder, there, needed in ((plain, ORIGIN, GUIDED), (guided, GUIDED, ORIGIN), (guided, GUIDED, other)):
    noise_store.check_origin(noise_store.read_manifest(folder), there, folder)
    with pytest.raises(noise_store.NoiseStoreError, match=r'guidance: the store has .*, this run needs '):
      noise_store.check_origin(noise_store.read_manifest(folder), needed, folder)
    with pytest.raises(noise_store.NoiseStoreError, match='with other settings'):
      noise_store.finished_shards(folder, LAYOUT, needed)
  for origin, omegas in ((GUIDED, None), (ORIGIN, OMEGAS[:4])):
    with pytest.raises(ValueError, match='go together'):
      noise_store.write_shard(plain, LAYOUT, 0, NOISE[:4], origin, omegas)
