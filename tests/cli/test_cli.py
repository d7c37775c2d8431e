"""The commands on a real work directory: what they leave, what they refuse, and how a run goes on."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from PIL import Image
from runs import CONFIG, ORDER, ROOT, digest, pagoda, start

import pagoda_jax
from pagoda_jax import main, pipeline
from pagoda_jax.data import noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.planning import plan
from pagoda_jax.runtime import files, interrupts, sharding, topologies, trees
from pagoda_jax.training import checkpoints, first_state, grids, starts, workdir
from pagoda_jax.use import edit


def test_a_run_leaves_checkpoints_metrics_grids_and_its_config(finished):
  for name in ('teacher', 'distill', 'grow_16'):
    assert checkpoints.finished_steps(finished / name) == [2, 4]
    lines = [json.loads(line) for line in (finished / name / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line['loss']) for line in lines)
    assert [(line['kimg'], line['epochs']) for line in lines] == [
      (step * 8 / 1000, round(step * 8 / 4500, 4)) for step in range(1, 5)]
    assert json.loads((finished / name / 'config.json').read_text())['config']['base_resolution'] == 8
  # 10 one-step samples in a row of 10, then two rows of held-out images and two of their reconstructions.
  grid = Image.open(finished / 'grow_16' / 'samples' / 'step_00000004.png')
  assert grid.size == (320, 32 + 4 + 4 * 32)
  assert json.loads((finished / 'invert' / 'manifest.json').read_text())['count'] == 4500
  shards = [json.loads(line) for line in (finished / 'invert' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in shards] == [1024, 2048, 3072, 4096, 4500] and shards[-1]['epochs'] == 1
  page = (finished / 'report.html').read_text()
  assert 'while the run goes on' not in page and all(page.count(f'Samples, {name}') for name in ('distill', 'grow_16'))


def test_finished_phases_are_skipped(finished, capsys):
  before = [digest(finished, name) for name in ('teacher', 'distill', 'grow_16')]
  assert pagoda('run', CONFIG, f'--workdir={finished}') == 0
  assert re.findall(r'(\w+): finished already', capsys.readouterr().out) == ORDER
  assert [digest(finished, name) for name in ('teacher', 'distill', 'grow_16')] == before


@pytest.mark.parametrize('phase', ['teacher', 'distill', 'grow_16'])
def test_a_run_that_went_on_is_bit_identical_to_one_that_never_stopped(finished, copied, phase, monkeypatch, capfd):
  shutil.rmtree(copied / phase / 'checkpoints' / '4')
  assert checkpoints.finished_steps(copied / phase) == [2]
  # As if this chip's peak were known: telling MFU changes nothing else.
  monkeypatch.setitem(topologies.CHIPS, 'cpu', topologies.Chip(1e12, None, ('cpu',), 8))
  for begin in ('init_teacher', 'init_generator'):  # its first state is not made again
    monkeypatch.setattr(first_state, begin, lambda *args: pytest.fail('begins'))
  assert pagoda('train', CONFIG, f'--workdir={copied}', f'--phase={phase}') == 0
  assert digest(copied, phase) == digest(finished, phase)
  lines = [json.loads(line) for line in (copied / phase / 'metrics.jsonl').read_text().splitlines()]
  assert [(line['step'], 'mfu' in line) for line in lines] == [(1, False), (2, False), (3, False), (4, True)]
  # What the first step took was compilation.
  assert [line['step'] for line in lines if 'images_per_second' not in line] == [1, 3]
  image_flops = plan.image_flops(tiny.get_config(), phase)
  assert lines[3]['mfu'] == pytest.approx(lines[3]['images_per_second_per_chip'] * image_flops / 1e12, abs=1e-4)
  out, err = capfd.readouterr()
  assert re.search(r'step 4/4  loss .*  kimg 0.032  epochs .* images/s/chip  MFU [\d.]+%', err)
  took_over = f'{phase}: goes on from step 2: 16 images seen (0.016 kimg, 0.0036 epochs), learning rate 0.001'
  assert took_over in out and ("discriminator's 0.002" in out) == (phase != 'teacher')


@pytest.mark.parametrize('phase, axes', [('teacher', {'fsdp': 8}), ('grow_16', {'fsdp': 2, 'zero1': 4})])
def test_a_run_that_went_on_on_another_mesh_sees_the_same_pictures_and_losses(
    finished, copied, phase, axes, monkeypatch):
  shutil.rmtree(copied / phase / 'checkpoints' / '4')
  monkeypatch.setattr(sharding, 'SHARDED_FROM', 16)  # so that the tiny networks are split at all
  mesh = [f'--config.mesh.{axis}={size}' for axis, size in axes.items()]
  assert pagoda('train', CONFIG, f'--workdir={copied}', f'--phase={phase}', *mesh) == 0
  pictures = [(run / phase / 'batches.jsonl').read_text() for run in (finished, copied)]
  assert pictures[0] == pictures[1] and pictures[0].count('\n') == 4
  lines = [(run / phase / 'metrics.jsonl').read_text().splitlines() for run in (finished, copied)]
  losses = [[json.loads(line)['loss'] for line in run] for run in lines]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_samples_depend_on_the_seed_and_not_on_the_batch_size(finished, tmp_path):
  def draw(name, *flags):
    assert pagoda('sample', f'--workdir={finished}', f'--out={tmp_path / name}', '--num_images=20', *flags) == 0
    arrays = np.load(tmp_path / name)
    return arrays['arr_0'], arrays['arr_1']

  images, labels = draw('a.npz')
  assert images.shape == (20, 16, 16, 1) and images.dtype == np.uint8
  assert labels.tolist() == [*range(10), *range(10)]
  again, _ = draw('b.npz', '--batch_size=8')
  assert np.abs(images.astype(int) - again).max() <= 1  # other shapes may round the last bit differently
  other, listed = draw('c.npz', '--seed=1', '--labels=3,5,7')
  assert np.any(images != other) and listed.tolist()[:4] == [3, 5, 7, 3]
  base, _ = draw('d.npz', '--phase=distill')
  assert base.shape == (20, 8, 8, 1)


def test_an_edit_by_inversion_finds_the_noise_of_the_store(finished):
  config = workdir.read_config(finished)
  stored = noise_store.read_holdout(finished / 'invert')
  small, labels = streams.epoch_pictures(config.data, 8, *grids.held_out(config))
  np.testing.assert_array_equal(labels, stored['label'])
  generator = pagoda_jax.load(finished)
  found = edit.super_resolve(generator, small, labels, by='inversion')
  np.testing.assert_allclose(found.noise, stored['noise'], rtol=1e-4, atol=1e-2)
  assert found.steps == 0 and found.images.shape[1] == 16
  large = streams.epoch_pictures(config.data, 16, *grids.held_out(config))[0]
  restyled = edit.restyle(generator, large, 7, labels, by='inversion')
  assert set(restyled.labels) == {7}


def test_inspect_prints_one_digest_for_everything_and_the_tree(finished, capsys):
  assert pagoda('inspect', f'--workdir={finished}', '--phase=grow_16') == 0
  out = capsys.readouterr().out
  assert f'step 4: sha256 {digest(finished, "grow_16")[1]}' in out
  assert re.search(r'\| params/out_conv/kernel +\| \(3, 3, 8, 1\) +\| float32 +\| 72 ', out)
  leaves = trees.flat_leaves(checkpoints.read_state(finished / 'grow_16')[0])
  parts = r'params/|fixed/|(pairs_)?discriminator/params/'
  shown = {path: leaf for path, leaf in leaves.items() if re.match(parts, path)}
  assert set(re.findall(r'^\| (\S+/\S+) ', out, re.MULTILINE)) == set(shown)
  assert f'Total: {sum(leaf.size for leaf in shown.values()):,} -- ' in out
  assert re.search(r'^  opt_state: [\d,]+ numbers$', out, re.MULTILINE)
  assert pagoda('inspect', f'--workdir={finished}', '--phase=invert') == 0
  assert 'all shards whole' in capsys.readouterr().out


@pytest.mark.parametrize('command', main.COMMANDS)
def test_help_lists_the_flags_with_defaults(command, capsys):
  assert pagoda(command, '--help') == 0
  out = capsys.readouterr().out
  assert '--' in out and 'default:' in out


REFUSED = [
  (['sample', '--labels=3,12'], 1, '12 is no class; there are 0 to 9'),
  (['sample', '--labels=three'], 1, "must be 'cycle', 'random' or numbers"),
  (['sample', '--phase=invert'], 1, 'must be one of teacher, distill, grow_16'),
  (['sample', '--out=x.jpg'], 1, 'must end in .png or .npz or .webp'),
  (['sample', '--step=3'], 1, 'no checkpoint of step 3; there are 2, 4'),
  (['sample', '--step=newest'], 1, "must be a number or 'best'"),
  (['sample', '--step=best'], 1, 'config.checkpoint.best is empty'),
  (['sample', '--num_images=0'], 2, 'num_images'),
  (['inspect', '--phase=nothing'], 1, 'must be one of teacher, invert, distill, grow_16'),
  (['run', CONFIG, '--phases=distil'], 1, 'must be one of teacher, invert, distill, grow_16'),
  (['run', CONFIG, '--max_step=3'], 2, 'max_step'),
  (['run', CONFIG, '--config.phases.distill.stepz=3'], 2, 'stepz'),
  (['run', CONFIG, '--config.phases.distill.ema=0.5'], 1, 'config.phases.distill.ema: there 0.999, here 0.5'),
  (['run', '--config=nowhere.py'], 2, 'nowhere.py'),
]


@pytest.mark.parametrize('args, code, text', REFUSED, ids=[' '.join(args[-1:]) for args, _, _ in REFUSED])
def test_refuses_with_a_clear_message(finished, capsys, args, code, text):
  before = sorted(path.name for path in finished.iterdir())
  assert pagoda(*args, f'--workdir={finished}') == code
  assert text in capsys.readouterr().err
  assert sorted(path.name for path in finished.iterdir()) == before


def test_no_command_and_unknown_commands_print_the_usage(capsys):
  assert pagoda() == 2 and pagoda('runn') == 2
  assert "no command 'runn'" in capsys.readouterr().err
  assert pagoda('--help') == 0


def test_samples_before_any_phase_has_finished(tmp_path, capsys):
  assert pagoda('sample', f'--workdir={tmp_path}') == 1
  assert 'no phase of any experiment there' in capsys.readouterr().err


def test_a_phase_whose_teacher_is_missing(tmp_path, capsys):
  assert pagoda('train', CONFIG, f'--workdir={tmp_path}', '--phase=distill') == 1
  assert 'run teacher first' in capsys.readouterr().err
  # Where another phase comes before, it is not run for nothing.
  assert pagoda('run', CONFIG, f'--workdir={tmp_path}', '--phases=teacher,distill') == 1
  assert 'and phase distill starts from it; run invert first' in capsys.readouterr().err
  assert not (tmp_path / 'teacher').exists()


def test_a_teacher_of_other_shapes_is_refused_leaf_by_leaf():
  with pytest.raises(checkpoints.CheckpointError, match=r'conv/kernel: there \(3, 3\), needed \(3, 4\)'):
    starts.check_same_tree({'conv': {'kernel': np.zeros((3, 4))}}, {'conv': {'kernel': np.zeros((3, 3))}}, 'here')


def test_a_phase_made_from_something_that_went_on_is_not_taken_for_finished(copied, capsys):
  path = copied / 'distill' / 'inputs.json'
  files.write_sealed(path, {**files.read_sealed(path), 'teacher': 2})
  assert pagoda('run', CONFIG, f'--workdir={copied}') == 1
  assert 'was made from teacher at step 2, which has gone on to step 4' in capsys.readouterr().err


def test_a_phase_is_not_taken_beyond_what_others_were_made_from(copied, capsys):
  """The teacher was trained on, and only then the noise refused that was made of it as it had been."""
  more = (CONFIG, f'--workdir={copied}', '--config.phases.teacher.steps=6')
  assert pagoda('run', *more) == 1
  said = capsys.readouterr().err
  assert all(f'{name}: made from teacher at step 4, which is to go on to 6' in said for name in ('invert', 'distill'))
  assert checkpoints.newest_step(copied / 'teacher') == 4
  assert pagoda('run', *more, '--phases=invert,distill', '--max_steps=4') == 0
  workdir.check_ahead(copied, tiny.get_config(), ('teacher', 'invert', 'distill'), max_steps=1)  # finished, and more
  shutil.rmtree(copied / 'teacher' / 'checkpoints' / '4')  # to be made again
  workdir.check_ahead(copied, tiny.get_config(), ('teacher', 'invert', 'distill'))


def test_a_full_disk_leaves_the_checkpoint_before_it_good(finished, copied):
  shutil.rmtree(copied / 'teacher' / 'checkpoints' / '4')
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # configs fit, checkpoints do not
  with start('train', CONFIG, f'--workdir={copied}', '--phase=teacher', preexec_fn=limit) as process:
    output, _ = process.communicate(timeout=600)
  assert process.returncode == 1, output
  assert re.search(r'saving failed: File too large; .* intact \(latest: 2\)', output)
  assert 'Traceback' not in output and 'ERROR' not in output
  assert checkpoints.finished_steps(copied / 'teacher') == [2]
  assert pagoda('train', CONFIG, f'--workdir={copied}', '--phase=teacher') == 0
  assert digest(copied, 'teacher') == digest(finished, 'teacher')


def test_a_full_disk_ends_sample_with_one_line(finished, tmp_path, capfd):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    assert pagoda('sample', f'--workdir={finished}', f'--out={tmp_path}/a.npz', '--num_images=20') == 1
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert f'pagoda sample: {tmp_path}/a.npz: File too large\n' in capfd.readouterr().err
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('command, number, code, said', [
  ('run', signal.SIGTERM, 75, 'stopped between phases; start the same command again to go on\n'),
  ('run', signal.SIGINT, 130, 'pagoda run: stopped by Ctrl-C\n'),
  ('sample', signal.SIGINT, 130, 'pagoda sample: stopped by Ctrl-C\n'),
])
def test_a_stop_outside_of_a_phase_is_said_in_one_line(command, number, code, said, tmp_path):
  # A test run in the background ignores SIGINT, and its children would.
  stopped = ('import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n'
             f'from pagoda_jax import main\nfrom pagoda_jax.cli import {command} as command\n'
             f'def stop(fv, args):\n  os.kill(os.getpid(), {int(number)})\n  time.sleep(60)\n'
             'command.run = stop\nmain.console()')
  flags = [f'--workdir={tmp_path}', CONFIG if command == 'run' else f'--out={tmp_path}/a.npz']
  done = subprocess.run([sys.executable, '-c', stopped, command, *flags], capture_output=True, text=True,
                        env={**os.environ, 'PYTHONPATH': str(ROOT)})
  assert (done.returncode, done.stderr) == (code, said)


def test_a_stop_in_the_last_steps_of_the_last_phase_is_heeded_before_the_figures(tmp_path, monkeypatch, capsys):
  """It came too late for that phase, and was forgotten: the figures were drawn until a scheduler killed the run."""
  monkeypatch.setattr(pipeline, 'run_phase', lambda *unused: os.kill(os.getpid(), signal.SIGTERM))
  with pytest.raises(interrupts.Interrupted, match='stopped after the last phase; start the same') as stop:
    pipeline.run_experiment(tiny.get_config(), tmp_path, ('teacher',), finish=lambda: pytest.fail('drew figures'))
  assert stop.value.exit_code == 75


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, capfd):
  args = [CONFIG, f'--workdir={tmp_path}', '--config.phases.teacher.steps=100000', '--phase=teacher',
          '--config.checkpoint.every_steps=100000']
  with start('train', *args) as process:
    metrics = tmp_path / 'teacher' / 'metrics.jsonl'
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
      time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
  assert process.returncode == 130, output
  step = int(re.search(r'stopped after step (\d+) of 100000 and saved; start the same command again', output)[1])
  assert checkpoints.finished_steps(tmp_path / 'teacher') == [step]
  with start('train', *args, f'--max_steps={step + 1}') as process:
    output, _ = process.communicate(timeout=300)
  assert process.returncode == 0 and f'goes on from step {step}' in output
