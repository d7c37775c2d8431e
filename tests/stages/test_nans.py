"""Numbers that are not finite in a real run: a step is skipped and counted, three in a row stop it."""

import json
import shutil

import numpy as np
import optax
import pytest
import tiny
from etils import epath
from runs import CONFIG

from pagoda_jax import main
from pagoda_jax.data import noise_store, shards
from pagoda_jax.stages import state, teacher
from pagoda_jax.training import checkpoints, loop

COUNTERS = ('step', 'skipped', 'skipped_total')


@pytest.fixture
def keys(copied):
  """keys[s]: of the pictures that step s of distill reads, counted from 1; the phase itself is taken away."""
  batches = loop.make_phase(tiny.get_config(), copied, 'distill').stream.batches(8)
  (copied / 'distill').rename(copied.parent / 'distill')
  return [[], *(next(batches)['key'] for _ in range(8))]


def put_nans(folder, keys):
  """Puts a NaN into the stored noise of some keys; the store is whole by all its checksums."""
  manifest, store = noise_store.read_manifest(folder), noise_store.open_store(folder, 80.0, False)
  for shard in sorted({key // store.layout.shard_size for key in keys}):
    noise = np.stack([store[key] for key in store.layout.keys(shard)])
    noise[[key - store.layout.keys(shard)[0] for key in keys if key in store.layout.keys(shard)], 3, 3] = np.nan
    noise_store.write_shard(folder, store.layout, shard, noise, manifest['origin'])
  noise_store.write_manifest(folder, store.layout, store.shape, store.dtype, manifest['origin'])
  shards.open_shard.cache_clear()


def distill(folder, *flags):
  return main.main(['train', CONFIG, f'--workdir={folder}', '--phase=distill', '--config.phases.distill.steps=8',
                    '--config.checkpoint.every_steps=1', *flags])


def metrics(folder, key):
  return [json.loads(line)[key] for line in (folder / 'distill' / 'metrics.jsonl').read_text().splitlines()]


def digest(folder, step, left_out=()):
  state, _ = checkpoints.read_state(folder / 'distill', step)
  return checkpoints.digest({part: leaves for part, leaves in state.items() if part not in left_out})


def test_skipped_steps_change_nothing_and_three_in_a_row_stop_the_run(copied, keys, capsys, caplog):
  """NaNs at step 2, and at 4 to 6 with a stop between them: a restart forgets no skipped step."""
  put_nans(epath.Path(copied / 'invert'), [key for step in (2, 4, 5, 6) for key in keys[step][:1]])
  assert distill(copied, '--max_steps=5') == 0
  assert metrics(copied, 'skipped_in_a_row') == [0, 1, 0, 1, 2] and metrics(copied, 'skipped') == [0, 1, 1, 2, 3]
  assert np.isfinite(metrics(copied, 'loss')).tolist() == [True, False, True, False, False]
  assert 'distill: step 2 was not finite and was skipped (1 in a row)' in caplog.text
  steps = {step: digest(copied, step, COUNTERS) for step in range(1, 6)}
  assert steps[1] == steps[2] != steps[3] == steps[4] == steps[5]
  before = digest(copied, 5)
  capsys.readouterr()
  assert distill(copied) == 1
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert 'not finite in steps 4 to 6; stopped. The last checkpoint, of step 5, is good' in line
  assert 'goes on from step 5 with the same data' in line
  assert checkpoints.finished_steps(copied / 'distill')[-1] == 5 and digest(copied, 5) == before


def test_a_run_without_a_finite_step_stops_after_three(copied, keys, capsys):
  put_nans(epath.Path(copied / 'invert'), range(4500))
  assert distill(copied, '--config.checkpoint.every_steps=100') == 1
  error = capsys.readouterr().err
  assert 'not finite in steps 1 to 3; stopped. There is no checkpoint yet' in error
  assert checkpoints.finished_steps(copied / 'distill') == []


def test_an_update_that_overflows_is_never_saved(tmp_path, capsys, monkeypatch):
  """Loss and gradients of the first step are finite; at a learning rate of 3e38, which no config may ask for any
  more, the parameters after it are not."""
  for module in (state, teacher):
    monkeypatch.setattr(module, 'make_optimizer', lambda config, steps: optax.sgd(3e38))
  args = [f'--workdir={tmp_path}', '--phase=teacher', '--config.checkpoint.every_steps=1']
  assert main.main(['train', CONFIG, *args]) == 1
  error = capsys.readouterr().err
  assert "by step 1 the state holds numbers that are not finite, in .params['" in error
  assert 'There is no checkpoint yet' in error
  assert checkpoints.finished_steps(tmp_path / 'teacher') == []


def test_a_phase_does_not_start_from_numbers_that_are_not_finite(copied, capsys):
  folder = copied / 'teacher'
  found, _ = checkpoints.read_state(folder)
  found['ema']['in_conv']['kernel'][0, 0, 0, 0] = np.inf
  shutil.rmtree(folder / checkpoints.FOLDER)
  saved = checkpoints.Checkpoints(folder)
  saved.save(4, found, {'global_next_index': 32})
  saved.close()
  for phase in ('invert', 'distill'):
    shutil.rmtree(copied / phase)
  assert main.main(['train', CONFIG, f'--workdir={copied}', '--phase=teacher', '--config.phases.teacher.steps=6']) == 1
  error = capsys.readouterr().err
  assert "its checkpoint of step 4 holds numbers that are not finite, in .ema['in_conv']['kernel']" in error
