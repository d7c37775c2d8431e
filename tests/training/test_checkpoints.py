"""Checkpoints that are damaged, deleted or the best: what is noticed, what is said, what a run goes on from."""

import errno
import json
import pathlib
import shutil
import unittest.mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from etils import epath
from runs import CONFIG, digest, pagoda

from pagoda_jax import config as configs
from pagoda_jax import validation
from pagoda_jax.cli import inspect
from pagoda_jax.planning import programs
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.interrupts import StopRequest
from pagoda_jax.stages import state
from pagoda_jax.training import checkpoints, checksums, claims, starts, workdir

STATE = {'ema': {'a': np.random.default_rng(0).standard_normal(320, np.float32)}, 'fixed': {}}


def saved(folder, values, **options):
  """A phase's folder with a checkpoint of STATE at each step of `values`: step -> metric."""
  saver = checkpoints.Checkpoints(folder, **options)
  for step, metric in values.items():
    saver.save(step, STATE, {'position': step}, metric)
  saver.close()
  return folder


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  nan = float('nan')
  return saved(tmp_path_factory.mktemp('written') / 'teacher', {2: nan, 4: nan})


@pytest.fixture
def phase(written, tmp_path):
  """A phase's folder with checkpoints at steps 2 and 4, to be damaged."""
  return pathlib.Path(shutil.copytree(written, tmp_path / 'teacher'))


def files(folder):
  """Every file of a checkpoint, relative to its folder."""
  return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def arrays(checkpoint):
  """The file that holds the arrays."""
  return max((path for path in checkpoint.rglob('d/*')), key=lambda path: path.stat().st_size)


def flip(path, place=None):
  content = bytearray(path.read_bytes())
  content[len(content) // 2 if place is None else place] ^= 1
  path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = [flip, cut, pathlib.Path.unlink]


# What is noticed


def test_each_file_of_a_checkpoint_is_missed(phase):
  checkpoint = phase / 'checkpoints' / '4'
  names = files(checkpoint)
  assert len(names) > 10 and checksums.FILE in names
  for name in names:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    assert checkpoints.damage(phase, 4) == f'{name}: missing'
    (checkpoint / name).write_bytes(content)
  assert checkpoints.damage(phase, 4) == ''


def test_a_flipped_bit_or_a_lost_end_is_noticed_in_each_file_that_is_read(phase):
  checkpoint = phase / 'checkpoints' / '4'
  rng = np.random.default_rng(0)
  for name in set(files(checkpoint)) - set(checksums.WRITTEN_LAST):
    path, content = checkpoint / name, (checkpoint / name).read_bytes()
    for place in {0, len(content) - 1, *rng.integers(0, len(content), 20).tolist()}:
      flip(path, place)
      assert checkpoints.damage(phase, 4).startswith(f'{name}: '), place
      path.write_bytes(content)
    cut(path)
    assert checkpoints.damage(phase, 4).startswith(f'{name}: ')
    path.write_bytes(content)
  assert checkpoints.damage(phase, 4) == ''


def test_orbax_alone_reads_a_flipped_bit_as_another_number(phase):
  """Why there are checksums."""
  path = phase / 'checkpoints' / '4' / 'state'
  flip(arrays(path))
  with ocp.PyTreeCheckpointer() as reader:
    read = reader.restore(path)['ema']['a']
  assert read.shape == (320,) and np.any(read != STATE['ema']['a'])


# What is done about it


@pytest.mark.parametrize('spoil', DAMAGES, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize('file', ['arrays', checksums.FILE, 'data/metadata', 'state/manifest.ocdbt'])
def test_damage_of_the_newest_the_only_one_and_of_what_another_phase_reads(phase, capsys, spoil, file):
  checkpoint = phase / 'checkpoints' / '4'
  path = arrays(checkpoint) if file == 'arrays' else checkpoint / file
  spoil(path)
  name = path.relative_to(checkpoint).as_posix()
  # What another phase reads is not replaced by something older.
  with pytest.raises(checkpoints.CheckpointError, match='`pagoda train --phase=teacher`') as error:
    checkpoints.read_generator(phase)
  assert f'{checkpoint}: damaged: {name}: ' in str(error.value)
  # The phase itself goes on from the one before, and loses nothing.
  left = files(checkpoint)
  assert checkpoints.newest_good_step(phase) == 2
  assert f'{checkpoint} is damaged: {name}: ' in (said := capsys.readouterr().out)
  assert 'set aside as damaged-4' in said and files(phase / 'checkpoints' / 'damaged-4') == left
  assert checkpoints.newest_good_step(phase) == 2 and capsys.readouterr().out == ''
  assert checkpoints.read_generator(phase)[1] == 2
  # Without another one it does not begin anew by itself, however often it is asked.
  flip(arrays(phase / 'checkpoints' / '2'))
  for _ in range(2):
    with pytest.raises(checkpoints.CheckpointError, match='none of them is whole') as error:
      checkpoints.newest_good_step(phase)
    assert 'damaged-4' in str(error.value) and f'delete {phase / "checkpoints"} to begin' in str(error.value)
  shutil.rmtree(phase / 'checkpoints')
  assert checkpoints.newest_good_step(phase) is None


def test_a_second_damaged_checkpoint_of_a_step_is_kept_beside_the_first(phase):
  for name in ('damaged-4', 'damaged-4-2'):
    flip(arrays(phase / 'checkpoints' / '4'))
    assert checkpoints.newest_good_step(phase) == 2
    assert (phase / 'checkpoints' / name / checksums.FILE).exists()
    saved(phase, {4: float('nan')})
  assert checkpoints.newest_good_step(phase) == 4


def test_deleted_checkpoints_are_missed(phase, capsys):
  shutil.rmtree(phase / 'checkpoints' / '4')
  assert checkpoints.newest_good_step(phase) == 2
  assert f'{phase / "checkpoints" / "4"} has gone' in capsys.readouterr().out
  (phase / 'checkpoints' / checkpoints.NEWEST).unlink()
  assert checkpoints.newest_good_step(phase) == 2
  assert 'newest.json: missing; whether there were checkpoints newer than that of step 2' in capsys.readouterr().out
  shutil.rmtree(phase / 'checkpoints' / '2')
  with pytest.raises(checkpoints.CheckpointError, match='2 has gone: it was the newest checkpoint'):
    checkpoints.newest_good_step(phase)


NEWEST_GONE = {
  'the checkpoint': (lambda folder: shutil.rmtree(folder / '4'), '/4 has gone: it was the newest checkpoint'),
  'newest.json and the checkpoint': (
    lambda folder: (shutil.rmtree(folder / '4'), (folder / checkpoints.NEWEST).unlink()), 'newest.json: missing'),
  'all': (lambda folder: [shutil.rmtree(folder / step) for step in '24'], '/4 has gone'),
  'an edited step': (
    lambda folder: (shutil.rmtree(folder / '4'), edit(folder / checkpoints.NEWEST, step=2)), 'do not fit its checksum'),
  'an edited step without a seal': (
    lambda folder: (shutil.rmtree(folder / '4'), (folder / checkpoints.NEWEST).write_text('{"step": 2}')), 'no seal'),
  'no JSON': (lambda folder: (folder / checkpoints.NEWEST).write_text('{"step": 4'), 'newest.json: damaged'),
  'no JSON, and no checkpoint': (
    lambda folder: ([shutil.rmtree(folder / step) for step in '24'], cut(folder / checkpoints.NEWEST)), 'damaged'),
}


def edit(path, **values):
  """Changes values of a sealed JSON, as somebody would who knows of no seal."""
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize('how', NEWEST_GONE)
def test_whoever_reads_the_newest_is_told_that_it_has_gone(phase, how, capsys):
  spoil, text = NEWEST_GONE[how]
  spoil(phase / 'checkpoints')
  assert text in checkpoints.lost(phase)
  for read in (checkpoints.newest_step, checkpoints.read_generator):
    with pytest.raises(checkpoints.CheckpointError, match='`pagoda train --phase=teacher`') as error:
      read(phase)
    assert text in str(error.value)
  left = checkpoints.finished_steps(phase)
  if not left:
    with pytest.raises(checkpoints.CheckpointError, match='none of them is whole'):
      checkpoints.newest_good_step(phase)
    return
  assert checkpoints.read_generator(phase, 2)[1] == 2  # one that is asked for by its step
  assert checkpoints.newest_good_step(phase) == left[-1]  # the phase itself goes on, and says so
  assert text in capsys.readouterr().out
  assert checkpoints.newest_step(phase) == left[-1] and checkpoints.newest_good_step(phase) == left[-1]
  assert capsys.readouterr().out == ''


def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(phase):
  path = arrays(phase / 'checkpoints' / '4')
  path.unlink()
  path.symlink_to(path)  # reading it fails otherwise than by its absence
  with pytest.raises(checkpoints.CheckpointError, match='cannot be read: .*left where it is'):
    checkpoints.newest_good_step(phase)
  assert checkpoints.finished_steps(phase) == [2, 4]


def test_a_checkpoint_does_not_count_before_its_checksums_are_there(phase, monkeypatch, capsys):
  """So no kill leaves one that counts and cannot be checked."""
  def full(folder):
    assert folder.name.startswith('6.') and (folder / 'state').exists()
    raise OSError('No space left on device')

  saver = checkpoints.Checkpoints(phase)
  with monkeypatch.context() as patch:
    patch.setattr(checksums, 'write', full)
    with pytest.raises(checkpoints.CheckpointError, match=r'No space left(.|\n)*latest: 4'):
      saver.save(6, STATE, {})
      saver.wait()
  assert checkpoints.newest_good_step(phase) == 4 and capsys.readouterr().out == ''


def test_a_checkpoint_that_a_run_removes_meanwhile_is_not_called_damaged(phase, monkeypatch):
  looked = checksums.damage

  def removed_meanwhile(folder):
    if folder.name == '2':
      shutil.rmtree(folder, ignore_errors=True)
    return looked(folder)

  monkeypatch.setattr(checksums, 'damage', removed_meanwhile)
  with pytest.raises(checkpoints.CheckpointError, match='2: removed while it was read.*; there are 4'):
    checkpoints.read_state(phase, 2)
  shutil.copytree(phase / 'checkpoints' / '4', phase / 'checkpoints' / '2')
  (first, *others) = inspect.describe(epath.Path(phase), tiny.get_config(), '', False)
  assert first.startswith('teacher (teacher): whole checkpoints at steps 4; step 4: sha256 ') and not others


@pytest.mark.parametrize('error, remedy', [
  (OSError(errno.ENOSPC, 'No space left on device'), 'Free some disk space and start'),
  (OSError(errno.EIO, 'Input/output error'), 'Mend that and start'),
  (TimeoutError('completed 3/4 futures'), 'merely slow, give config.barrier_timeout more seconds and start'),  # Orbax's
  (ValueError('of tensorstore'), 'Mend that and start'),
])  # fmt: skip
def test_a_save_that_fails_says_what_to_do(error, remedy, tmp_path, monkeypatch):
  writer = checkpoints.Checkpoints(tmp_path)
  monkeypatch.setattr(writer, '_manager', unittest.mock.Mock(**{'wait_until_finished.side_effect': error}))
  with pytest.raises(checkpoints.CheckpointError, match=f'{tmp_path}/checkpoints: saving failed: .*{remedy} the same'):
    writer.wait()


def test_a_kill_before_the_rename_is_no_loss(phase, capsys):
  (phase / 'checkpoints' / '4').rename(phase / 'checkpoints' / '4.orbax-checkpoint-tmp')
  assert checkpoints.newest_step(phase) == 2
  assert checkpoints.newest_good_step(phase) == 2 and capsys.readouterr().out == ''
  assert checkpoints.finished_steps(saved(phase, {4: float('nan')})) == [2, 4]
  assert sorted(path.name for path in (phase / 'checkpoints').iterdir()) == ['2', '4', checkpoints.NEWEST]


# The same in real runs


def test_a_run_with_a_damaged_checkpoint_ends_as_if_nothing_had_been(finished, copied, capsys):
  flip(arrays(copied / 'teacher' / 'checkpoints' / '4'))
  (copied / 'teacher' / 'evaluation.json').write_text('{"step": 4}')
  assert pagoda('inspect', f'--workdir={copied}') == 0
  said = capsys.readouterr().out
  assert 'teacher (teacher): whole checkpoints at steps 2; step 2: sha256' in said
  assert '  step 4 is damaged: state/' in said
  # A phase that reads it refuses, and says how it is mended: by the phase that made it.
  shutil.rmtree(copied / 'distill')
  assert pagoda('train', CONFIG, f'--workdir={copied}', '--phase=distill') == 1
  assert f'{copied / "teacher" / "checkpoints" / "4"}: damaged' in capsys.readouterr().err
  assert not (copied / 'distill' / 'checkpoints').exists() or not checkpoints.finished_steps(copied / 'distill')
  assert pagoda('train', CONFIG, f'--workdir={copied}', '--phase=teacher') == 0
  said = capsys.readouterr().out
  assert 'set aside as damaged-4' in said and 'teacher: goes on from step 2' in said
  assert digest(copied, 'teacher') == digest(finished, 'teacher')
  lines = (copied / 'teacher' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4]
  assert not (copied / 'teacher' / 'evaluation.json').exists()  # it spoke of the step that was undone


def test_a_deleted_newest_checkpoint_is_missed_by_sample_inspect_and_the_next_phase(copied, tmp_path, capsys):
  for name in ('teacher', 'grow_16'):
    shutil.rmtree(copied / name / 'checkpoints' / '4')
  shutil.rmtree(copied / 'grow_16' / 'checkpoints' / '2')
  gone = {name: f'{copied / name / "checkpoints" / "4"} has gone: it was the newest' for name in ('teacher', 'grow_16')}
  sample = ['sample', f'--workdir={copied}', f'--out={tmp_path / "x.png"}']
  for phase, flags in (('grow_16', []), ('grow_16', ['--phase=grow_16']), ('teacher', ['--phase=teacher'])):
    assert pagoda(*sample, *flags) == 1
    assert gone[phase] in capsys.readouterr().err
  assert pagoda('inspect', f'--workdir={copied}') == 0
  said = capsys.readouterr().out
  assert all(f'  {text}' in said for text in gone.values())
  assert 'teacher (teacher): whole checkpoints at steps 2' in said
  shutil.rmtree(copied / 'invert')
  assert pagoda('train', CONFIG, f'--workdir={copied}', '--phase=invert') == 1
  assert gone['teacher'] in capsys.readouterr().err
  with pytest.raises(checkpoints.CheckpointError, match='has gone'):
    starts.mark(copied / 'teacher')


def test_a_run_whose_only_checkpoint_is_damaged_does_not_begin_anew(copied, capsys):
  shutil.rmtree(copied / 'teacher' / 'checkpoints' / '2')
  cut(arrays(copied / 'teacher' / 'checkpoints' / '4'))
  for command in (['train', '--phase=teacher'], ['run']):
    assert pagoda(*command, CONFIG, f'--workdir={copied}') == 1
    assert 'none of them is whole' in capsys.readouterr().err
  assert checkpoints.finished_steps(copied / 'teacher') == []
  assert len((copied / 'teacher' / 'metrics.jsonl').read_text().splitlines()) == 4


# The best one


def test_a_save_may_take_as_long_as_any_other_wait(tmp_path, monkeypatch):
  """Orbax gives up after 20 minutes: to a slow disk, a large state was never saved, whatever barrier_timeout was."""
  given, options = [], ocp.AsyncOptions
  monkeypatch.setattr(ocp, 'AsyncOptions', lambda *args, **kwargs: given.append(options(*args, **kwargs)) or given[-1])
  for limit in (60, 7200):
    checkpoints.Checkpoints(tmp_path, limit=limit).close()
  assert [each.timeout_secs for each in given] == [1200, 7200]


@pytest.mark.parametrize('kind', [ValueError, jax.errors.JaxRuntimeError])
def test_a_process_that_is_lost_in_a_save_or_restore_is_no_fault_of_disk_or_checkpoint(kind, tmp_path, monkeypatch):
  """JAX raises a ValueError where Gloo answers at once."""
  raises = compile('def lost(*unused, **kwargs): raise kind("UNKNOWN: Gloo AllGather failed")', jax.__file__, 'exec')
  exec(raises, names := {'kind': kind})
  saved = checkpoints.Checkpoints(tmp_path)
  for method in ('save', 'restore'):
    monkeypatch.setattr(saved._manager, method, names['lost'])
  with pytest.raises(kind, match='^UNKNOWN: Gloo') as error:
    saved.save(1, {'x': np.zeros(1)}, {})
  assert not isinstance(error.value, checkpoints.CheckpointError)
  with pytest.raises(kind, match='^UNKNOWN: Gloo') as error:
    saved.restore(1, {'x': np.zeros(1)})
  assert not isinstance(error.value, checkpoints.CheckpointError)
  monkeypatch.undo()
  saved.close()


def test_the_best_stays_besides_the_latest(tmp_path):
  values = {1: 5.0, 2: 1.5, 3: 3.0, 4: float('nan'), 5: 4.0}
  phase = saved(tmp_path / 'phase', values, keep=2, best='loss')
  assert checkpoints.finished_steps(phase) == [2, 4, 5]
  assert saved(phase, {6: 9.0}, keep=2, best='loss') and checkpoints.finished_steps(phase) == [2, 5, 6]
  group = configs.experiment().checkpoint
  group.best = 'loss'
  assert starts.best_step(phase, group) == (2, 1.5) and starts.chosen_step(phase, 'best', group) == 2
  group.best_mode = 'max'
  assert starts.best_step(phase, group) == (6, 9.0)
  group.best = 'grad_norm'
  with pytest.raises(checkpoints.CheckpointError, match='none was saved with the metric grad_norm'):
    starts.chosen_step(phase, 'best', group)
  assert saved(phase, {7: 1.0, 8: 2.0, 9: 2.0}, keep=1, best='loss')
  assert checkpoints.finished_steps(phase) == [7, 9]


def test_every_nth_stays_besides_the_latest(tmp_path):
  phase = saved(tmp_path / 'phase', {step: float('nan') for step in range(1, 8)}, keep=2, keep_every=3)
  assert checkpoints.finished_steps(phase) == [3, 6, 7]


def test_a_damaged_metric_is_no_obstacle_and_is_named_where_it_is_used(tmp_path):
  phase = saved(tmp_path / 'phase', {1: 1.0, 2: 2.0, 3: 3.0}, best='loss')
  path = phase / 'checkpoints' / '1' / 'metrics_mean' / 'metadata'
  cut(path)
  assert checkpoints.metrics(phase, 'loss') == {2: 2.0, 3: 3.0}
  assert checkpoints.damage(phase, 1).startswith('metrics_mean/metadata: ')
  assert saved(phase, {4: 0.5}, keep=1, best='loss') and checkpoints.finished_steps(phase) == [4]


def test_a_run_that_keeps_the_best(tmp_path, capsys, monkeypatch):
  # Asked to stop in its last step: it is finished then, and no later run draws its last grid.
  monkeypatch.setattr(StopRequest, 'wanted', lambda self, phase, step: step == 6)
  flags = [CONFIG, f'--workdir={tmp_path}', '--config.checkpoint.best=loss', '--config.checkpoint.keep=1']
  assert pagoda('train', *flags, '--phase=teacher', '--config.phases.teacher.steps=6') == 0
  assert (tmp_path / 'teacher' / 'samples' / 'step_00000006.png').exists()
  lines = (tmp_path / 'teacher' / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line)['loss'] for line in lines]
  means = {step: np.mean(losses[step - 2 : step]) for step in range(2, 7, 2)}
  best = min(means, key=means.get)
  assert checkpoints.finished_steps(tmp_path / 'teacher') == sorted({best, 6})
  assert checkpoints.metrics(tmp_path / 'teacher', 'loss')[best] == pytest.approx(means[best], rel=1e-6)
  assert pagoda('inspect', f'--workdir={tmp_path}') == 0
  assert f'the best: {best} (mean loss {means[best]:.4g})' in capsys.readouterr().out
  out = tmp_path / 'samples.npz'
  assert pagoda('sample', f'--workdir={tmp_path}', '--num_images=10', '--step=best', f'--out={out}') == 0
  assert f'phase teacher, step {best}' in capsys.readouterr().out


def test_metrics_that_a_phase_does_not_have_are_refused():
  config = tiny.get_config()
  config.checkpoint.best = 'adversarial'
  with pytest.raises(configs.ConfigError, match=r"best = 'adversarial': .*teacher \(teacher\) has loss, grad_norm"):
    validation.validate(config)
  config.checkpoint.update({'best': 'loss', 'best_mode': 'least'})
  with pytest.raises(configs.ConfigError, match='must be one of min, max'):
    validation.validate(config)


def test_metrics_that_can_be_chosen_are_those_that_are_measured(finished):
  for name in ('teacher', 'distill', 'grow_16'):
    line = json.loads((finished / name / 'metrics.jsonl').read_text().splitlines()[0])
    others = {'step', 'time', 'kimg', 'epochs', 'images_per_second', 'skipped_in_a_row', 'skipped'}
    assert set(line) - others == set(configs.metrics(tiny.get_config().phases[name]))


@pytest.mark.parametrize('shape', [(1, 1), (4, 2), (1, 8)])
def test_restores_onto_any_mesh_bit_by_bit(tmp_path, shape):
  """Saved from eight devices that hold a part each."""
  def on(shape):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread), STATE)

  state = jax.tree.map(lambda leaf, target: jax.device_put(leaf, target.sharding), STATE, on((1, 8)))
  saver = checkpoints.Checkpoints(tmp_path)
  saver.save(4, state, {'position': 4})
  saver.wait()
  restored, position = saver.restore(4, target := on(shape))
  saver.close()
  assert restored['ema']['a'].sharding == target['ema']['a'].sharding
  assert checkpoints.digest(restored) == checkpoints.digest(STATE) and position == {'position': 4}


def test_a_checkpoint_from_before_a_field_of_the_state_is_restored(tmp_path):
  """Teachers' states had no `other_emas`; of two averages the second is asked of no such checkpoint in vain."""
  phase, params = tiny.get_config().phases.teacher, {'a': np.arange(3, dtype=np.float32)}
  begun = jax.device_get(state.init_teacher(params, phase))
  before = {key: value for key, value in vars(begun).items() if key != 'other_emas'}
  saver = checkpoints.Checkpoints(tmp_path)
  saver.save(2, before, {'position': 16})
  saver.wait()
  abstract = lambda tree: sharding.abstract(jax.eval_shape(lambda: tree), sharding.make_mesh())
  restored, position = saver.restore(2, abstract(begun))
  assert isinstance(restored, state.TeacherState) and restored.other_emas == {} and position == {'position': 16}
  assert checkpoints.digest(vars(restored)) == checkpoints.digest(vars(begun)) == checkpoints.digest(before)
  phase.ema_std = (0.05, 0.1)
  with pytest.raises(checkpoints.CheckpointError, match='cannot be restored'):
    saver.restore(2, abstract(state.init_teacher(params, phase)))
  saver.close()


def test_a_generators_checkpoint_from_before_the_pairs_discriminator_is_gone_on_from(copied):
  """Its state lacks fields that are empty now, and its config.json the keys that came with them."""
  later = {'pairs_discriminator', 'pairs_discriminator_opt_state'}
  folder = copied / 'distill'
  saved, position = checkpoints.read_state(folder, 4)[0], checkpoints.read_data_position(folder, 4)
  before = digest(copied, 'distill')
  shutil.rmtree(folder / 'checkpoints')
  saver = checkpoints.Checkpoints(folder)
  saver.save(4, {field: value for field, value in saved.items() if field not in later}, position)
  saver.close()
  written, came = claims.read(folder), tuple(f'.{end}' for end in workdir.EARLIER if end != 'matmul_precision')
  claims.write(folder, 'distill', {key: value for key, value in written['identity'].items()
                                   if not key.endswith(came)}, written['config'])
  config, mesh = tiny.get_config(), sharding.make_mesh(devices=jax.devices()[:1])
  assert not later & {*checkpoints.read_state(folder)[0]} and digest(copied, 'distill') == before
  checkpoints.newest_good_step(folder)
  saver = checkpoints.Checkpoints(folder)
  restored, there = saver.restore(4, sharding.abstract(programs.make(config, 'distill').state, mesh))
  saver.close()
  assert isinstance(restored, state.GeneratorState) and restored.pairs_discriminator == {} and there == position
  for field, value in saved.items():
    for kept, there in zip(jax.tree.leaves(value), jax.tree.leaves(getattr(restored, field)), strict=True):
      np.testing.assert_array_equal(kept, there)
  workdir.check_claim(copied, config, 'distill')
  config.phases.distill['update'] = 'separate'
  with pytest.raises(claims.WorkdirError, match="phases.distill.update: there 'joint', here 'separate'"):
    workdir.check_claim(copied, config, 'distill')
