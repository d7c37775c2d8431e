"""One run at a time in a folder: who gets it, who is refused, who takes over, and who notices that it lost it."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from quick import XLA_FLAGS
from runs import CONFIG, ROOT, pagoda

from pagoda_jax.runtime import lock, processes
from pagoda_jax.runtime.interrupts import Interrupted

ELSEWHERE = {'host': 'node-7', 'pid': 12, 'boot': 'b', 'namespace': 1, 'started': 3, 'since': '2024-01-01 00:00:00 UTC'}


class Ended(Exception):
  """Stands for the end of this process."""


@pytest.fixture
def ending(monkeypatch):
  def leave(code):
    raise Ended(code)

  monkeypatch.setattr(lock.os, '_exit', leave)


def between_looks(monkeypatch, act):
  """Looks follow at once on each other; between two of them act() is called."""
  monkeypatch.setattr(lock.time, 'sleep', lambda seconds: act())


def left(folder, text, name='lock-node-7-12-abcd.json'):
  """A lock as another run left it."""
  path = folder / name
  path.write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())
  return path


@pytest.mark.parametrize('remote', [False, True])
def test_it_is_held_within_and_gone_after_whatever_happens(tmp_path, monkeypatch, remote):
  monkeypatch.setattr(lock.buckets, 'is_in_bucket', lambda path: remote)
  with contextlib.suppress(KeyboardInterrupt), lock.hold(tmp_path / 'new' / 'run'):
    path, = (tmp_path / 'new' / 'run').iterdir()
    assert json.loads(path.read_text())['pid'] == os.getpid()
    os.utime(path, (1, 1))
    lock._held[0]._touch()
    assert time.time() - path.stat().st_mtime < 1000
    raise KeyboardInterrupt
  assert not list((tmp_path / 'new' / 'run').iterdir()) and not lock._held


def test_of_many_that_begin_at_once_one_at_a_time_holds_it(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'StopRequest', contextlib.nullcontext)  # signals are for the first thread
  monkeypatch.setattr(lock, 'LOOK_SECONDS', 0.001)
  monkeypatch.setattr(lock, 'SILENT_LOOKS', 10**9)
  monkeypatch.setattr(lock.random, 'uniform', lambda low, high: 0.01 * int.from_bytes(os.urandom(1), 'big') / 256)
  monkeypatch.setattr(lock._Lock, '_watch', lambda self, path, over: time.sleep(0.001))  # until it is given back
  inside, most, held = [], [], []

  def run():
    with lock.hold(tmp_path):
      inside.append(1)
      most.append(len(inside))
      time.sleep(0.01)
      inside.pop()
    held.append(1)

  threads = [threading.Thread(target=run) for _ in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  assert len(held) == 12 and set(most) == {1} and not list(tmp_path.iterdir())


def test_a_lock_that_is_touched_names_its_run_and_one_that_is_not_is_taken_over(tmp_path, monkeypatch, capsys):
  path = left(tmp_path, ELSEWHERE)
  between_looks(monkeypatch, lambda: os.utime(path, (5, 5)))
  with pytest.raises(lock.LockError, match=r'process 12 on node-7 \(since 2024-01-01 00:00:00 UTC, lock-node-7-12'):
    with lock.hold(tmp_path):
      pass
  assert [p.name for p in tmp_path.iterdir()] == [path.name]
  looks = []
  between_looks(monkeypatch, lambda: looks.append(1))
  with lock.hold(tmp_path):
    assert not path.exists()
  assert len(looks) >= lock.SILENT_LOOKS
  assert 'node-7' in (said := capsys.readouterr().err) and 'has not touched it for 60 s; this run takes over' in said


@pytest.mark.parametrize('text', [
  b'', b'\0' * 50, b'[' * 4000, b'\xff\xfe', b'7', b'{}', b'x' * 10**6, ELSEWHERE | {'pid': 'x'},
  ELSEWHERE | {'pid': -1}, ELSEWHERE | {'pid': 10**40}, ELSEWHERE | {'host': 'a\n\x1b[2J'}, ELSEWHERE | {'since': None},
  processes.identity() | {'since': '', 'started': 'x'}, processes.identity() | {'since': '', 'pid': -1},
], ids=range(14))
def test_a_damaged_lock_holds_nobody_up_for_ever_and_counts_while_it_is_touched(tmp_path, monkeypatch, text, capsys):
  path = left(tmp_path, text)
  (tmp_path / 'lock-x.json').mkdir()
  os.mkfifo(tmp_path / 'lock-y.json')
  with pytest.raises(lock.LockError, match='works on it; wait for it or end it') as error:
    between_looks(monkeypatch, lambda: os.utime(path, (5, 5)))
    with lock.hold(tmp_path):
      pass
  assert '\n' not in str(error.value) and '\x1b' not in str(error.value)
  between_looks(monkeypatch, lambda: None)
  with lock.hold(tmp_path):
    assert not path.exists()


def test_a_process_that_has_ended_is_known_by_more_than_its_number(tmp_path, monkeypatch):
  child = subprocess.Popen(['sleep', '600'])
  known = processes.identity() | {'pid': child.pid, 'started': processes._started(child.pid), 'since': 'then'}
  assert not processes.has_ended(known) and not processes.has_ended(processes.identity())
  assert processes.has_ended(known | {'started': known['started'] - 1})  # another one had the number
  for elsewhere in ({'host': 'x'}, {'boot': 'x'}, {'namespace': 1}):
    assert not processes.has_ended(known | elsewhere | {'pid': 2**22 + 1})
  child.kill()
  while not processes.has_ended(known):  # before anybody waits for it, too
    time.sleep(0.01)
  child.wait()
  assert processes.has_ended(known)
  between_looks(monkeypatch, lambda: pytest.fail('waits'))
  path = left(tmp_path, known)
  with lock.hold(tmp_path):
    assert not path.exists()


def test_a_run_whose_lock_is_deleted_changed_or_taken_over_ends_before_it_writes(tmp_path, monkeypatch, ending, capsys):
  def ends(spoil):
    with pytest.raises(Ended), lock.hold(tmp_path):
      mine, = tmp_path.glob('lock-*')
      lock.confirm()
      spoil(mine)
      lock.confirm()  # seen a moment ago
      lock._held[0]._confirmed -= 31
      lock.confirm()
    lock._held.clear()
    for path in tmp_path.iterdir():
      path.unlink()
    return capsys.readouterr().err

  assert 'was deleted or changed; stopped before writing on' in ends(lambda mine: mine.unlink())
  assert 'was deleted or changed' in ends(lambda mine: mine.write_text('{}'))

  def take_over(mine):
    mine.unlink()
    left(tmp_path, ELSEWHERE)

  said = ends(take_over)
  assert 'was suspended or cut off, and process 12 on node-7 (since 2024' in said and said.count('\n') == 1


def test_a_silent_run_that_works_on_after_all_is_left_the_folder(tmp_path, monkeypatch):
  path = left(tmp_path, ELSEWHERE)
  held = lambda: path.exists() or left(tmp_path, ELSEWHERE)  # in a bucket, touching writes anew
  between_looks(monkeypatch, held)
  with pytest.raises(lock.LockError, match='works on'), lock.hold(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == [path]


def test_a_stop_that_is_asked_for_while_waiting_is_heeded(tmp_path, monkeypatch):
  left(tmp_path, ELSEWHERE)
  between_looks(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
  with pytest.raises(Interrupted) as stop, lock.hold(tmp_path):
    pass
  assert stop.value.exit_code == 75


def test_a_full_disk_is_said_and_leaves_no_lock(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
  try:
    with pytest.raises(OSError, match=f"File too large: '{tmp_path}/lock-"), lock.hold(tmp_path):
      pass
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())


RUN = [CONFIG, '--phase=teacher', '--config.phases.teacher.steps=100000', '--config.checkpoint.every_steps=100000',
       '--config.log.batches=False']
# One whose lock is touched more often, and looked at anew before writing once it was not seen for half a second.
EAGER = 'from pagoda_jax.runtime import lock; lock.BEAT_SECONDS, lock.SILENT_LOOKS = 0.1, 1'


def start(folder):
  """A run that does not end by itself; returns when it trains."""
  code = f'import sys; {EAGER}; from pagoda_jax import main; sys.exit(main.main(sys.argv[1:]))'
  env = {**os.environ, 'XLA_FLAGS': XLA_FLAGS, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen([sys.executable, '-c', code, 'train', f'--workdir={folder}', *RUN], env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  metrics = folder / 'teacher' / 'metrics.jsonl'
  before = metrics.stat().st_size if metrics.exists() else 0
  while not metrics.exists() or metrics.stat().st_size <= before:
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.05)
  return process


def lines(folder):
  """Lines of every file."""
  return {path.relative_to(folder): path.read_bytes().split(b'\n') for path in folder.rglob('*') if path.is_file()}


@pytest.mark.timeout(600)
def test_a_second_run_is_refused_a_killed_one_replaced_at_once_and_a_suspended_one_notices(
    tmp_path, monkeypatch, capsys):
  first = start(tmp_path)
  assert pagoda('train', f'--workdir={tmp_path}', *RUN) == 1
  said = capsys.readouterr().err
  assert f'{tmp_path}: process {first.pid} on ' in said and 'works on it' in said and said.count('\n') == 1
  first.kill()
  first.communicate()

  second = start(tmp_path)
  second.send_signal(signal.SIGSTOP)
  os.waitpid(second.pid, os.WUNTRACED)  # on a busy machine a thread may touch the lock until then
  monkeypatch.setattr(lock, 'LOOK_SECONDS', 0.01)
  monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.5)  # time enough for the suspended one to have been long away
  with lock.hold(tmp_path):
    assert f'process {second.pid} on ' in (said := capsys.readouterr().err) and 'takes over' in said
    before = lines(tmp_path)
    second.send_signal(signal.SIGCONT)
    output, _ = second.communicate()
    after = lines(tmp_path)
  assert second.returncode == 1 and f'process {first.pid} on ' in output and 'has ended without' in output
  assert f'was suspended or cut off, and process {os.getpid()} on ' in output and 'Traceback' not in output
  # A line more: the one that it may have been about to write, just after it had looked.
  assert after.keys() == before.keys() and all(len(after[path]) <= len(before[path]) + 1 for path in before)
