"""SIGKILL in every phase, at every boundary and within a save: what is computed stays the same, bit by bit.

Real processes and checkpoints: one run that nothing stops beside one that is killed again and again and
always started with the same command. At boundaries too by `pytest -m slow`.
"""

import json
import os
import random
import signal
import time

import pytest
from runs import CONFIG, pagoda, start

from pagoda_jax.data import shards
from pagoda_jax.training import checkpoints

TRAINED = ['teacher', 'distill', 'grow_16']
FLAGS = ['--config.checkpoint.every_steps=5', *(f'--config.phases.{name}.steps=20' for name in TRAINED)]
# Other moments each time; a failure prints the seed, to be given here for the same ones.
SEED = int(os.environ.get('KILL_SEED', random.SystemRandom().randrange(10**6)))


def trained(phase, step, last=19):
  """Whether a phase has logged `step` steps and is not past `last`."""
  def condition(folder):
    path = folder / phase / 'metrics.jsonl'
    lines = path.read_text().split('\n')[:-1] if path.exists() else []
    return bool(lines) and step <= json.loads(lines[-1])['step'] <= last

  return condition


def begun(phase):
  """Whether a phase has left a first mark in the work directory."""
  return lambda folder: (folder / phase / 'config.json').exists()


def inverting(count):
  """Whether `count` shards of the noise are there, and not all."""
  def condition(folder):
    store = folder / 'invert'
    return len(list(store.glob('noise-*.json'))) >= count and not (store / 'manifest.json').exists()

  return condition


def saving(phase, step):
  """Whether a checkpoint of a phase is being written, after `step` steps."""
  def condition(folder):
    path = folder / phase / 'checkpoints'
    return trained(phase, step)(folder) and any('.orbax-checkpoint-tmp' in name for name in os.listdir(path))

  return condition


def killed(folder, condition, wait):
  """Output of a run that is killed once the condition holds: `wait` seconds later, or while it holds (None)."""
  with start('run', CONFIG, f'--workdir={folder}', *FLAGS) as process:
    deadline, ours = time.monotonic() + 300, False
    while process.poll() is None and time.monotonic() < deadline:
      if condition(folder):
        time.sleep(wait or 0)
        process.send_signal(signal.SIGSTOP)
        if ours := wait is not None or condition(folder):
          break
        process.send_signal(signal.SIGCONT)  # it was over too soon: the next time
      time.sleep(0.001)
    process.kill()
    output, _ = process.communicate()
  assert ours and process.returncode == -signal.SIGKILL, output
  return output


def finished(folder):
  """Output of a run to the end."""
  with start('run', CONFIG, f'--workdir={folder}', *FLAGS) as process:
    output, _ = process.communicate(timeout=600)
  assert process.returncode == 0, output
  return output


def left(folder):
  """What a run left: its files (but those within checkpoints, whose names are drawn), its numbers."""
  paths = [path.relative_to(folder).as_posix() for path in folder.rglob('*')]
  numbers = {}
  for phase in TRAINED:
    lines = [json.loads(line) for line in (folder / phase / 'metrics.jsonl').read_text().splitlines()]
    timed = ('time', 'images_per_second')
    numbers[phase] = [{key: value for key, value in line.items() if key not in timed} for line in lines]
  return sorted(path for path in paths if path.count('/') <= 2), numbers, (folder / 'invert/manifest.json').read_text()


# What is killed when the next phase has only begun is begun anew: a process more each time.
@pytest.mark.parametrize('boundaries', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_computes_the_same(boundaries, tmp_path, capsys):
  rng = random.Random(SEED)
  print(f'KILL_SEED={SEED}')
  straight, folder = tmp_path / 'straight', tmp_path / 'killed'
  finished(straight)

  def kill(condition, wait):
    """Kills a run and says which trained phase has to go on from which step."""
    outputs.append(killed(folder, condition, wait))
    steps = {phase: max(checkpoints.finished_steps(folder / phase), default=0) for phase in TRAINED}
    return [f'{phase}: goes on from step {step}' for phase, step in steps.items() if 0 < step < 20]

  outputs = []
  # In the teacher. From step 11 on there is a checkpoint: the save of step 10 waits for that of step 5.
  teacher = kill(trained('teacher', rng.randint(11, 14)), 0.05 * rng.random())
  if boundaries:  # teacher to noise
    kill(begun('invert'), 0)
  # In the noise: finished shards stay.
  kill(inverting(rng.randint(1, 3)), None)
  assert teacher[0] in outputs[1] and checkpoints.finished_steps(folder / 'teacher') == [5, 10, 15, 20]
  store = folder / 'invert'
  done = {path: path.stat().st_mtime_ns for path in store.glob('noise-*') if path.suffix == shards.SUFFIX}
  assert done and not (store / 'manifest.json').exists()
  if boundaries:  # noise to generator
    kill(begun('distill'), 0)
  # In a save.
  distill = kill(saving('distill', 11), None)
  assert list((folder / 'distill' / 'checkpoints').glob('*.orbax-checkpoint-tmp'))
  then = len(outputs)
  if boundaries:  # generator to its growth
    kill(begun('grow_16'), 0)
  # In the growth.
  grown = kill(trained('grow_16', rng.randint(11, 14)), 0.05 * rng.random())
  assert distill[0] in outputs[then] and grown[0] in finished(folder)

  assert all(path.stat().st_mtime_ns == done[path] for path in done)
  assert left(folder) == left(straight)
  assert [line['step'] for line in left(folder)[1]['grow_16']] == list(range(1, 21))
  capsys.readouterr()
  said = []
  for run in (straight, folder):
    assert pagoda('inspect', f'--workdir={run}') == 0
    said.append(capsys.readouterr().out)
  assert said[0] == said[1] and said[0].count('; step 20: sha256 ') == 3 and 'all shards whole' in said[0]
