"""Worker processes: real ones, killed or left behind."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import make_data
import pytest
from absl import flags
from runs import CONFIG, pagoda

from pagoda_jax import config as configs
from pagoda_jax.data import folders, pictures, prepare, records
from pagoda_jax.data import stream as streams
from pagoda_jax.runtime import processes


def batches(**data):
  settings = configs.experiment().data
  settings.update({'resolution': 8, 'workers': 2} | data)
  return streams.Stream(settings, 8, seed=0).batches(12)


def status(pid):
  """(state, parent's pid) of a process; None once it is gone."""
  try:
    state, parent = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[:2]
  except OSError:
    return None
  return state, int(parent)


def is_alive(pid):
  return status(pid) is not None and status(pid)[0] != 'Z'


def children(pid):
  """Pids of the living processes that a process has started."""
  pids = [int(path.name) for path in pathlib.Path('/proc').glob('[0-9]*')]
  return [child for child in pids if (status(child) or ('Z', 0)) in (('S', pid), ('R', pid), ('D', pid))]


def segments(pid):
  """Shared memory of the workers of a process."""
  return list(processes.SHARED_MEMORY.glob(f'{processes.SEGMENTS}*-{pid}-*'))


def wait_until(condition):
  deadline = time.monotonic() + 600
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.1)


@pytest.fixture
def reading():
  """Starts processes that read batches with two workers, each in a session of its own."""
  started = []

  def start():
    code = 'import test_workers; test_workers.read()'
    env = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
    started.append(subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE,
                                    start_new_session=True))
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.communicate()


def read():
  flags.FLAGS.mark_as_parsed()
  for _ in batches(source='mnist', channels=1):
    print('.', end='', flush=True)
    time.sleep(0.05)


def test_a_killed_run_leaves_no_workers_and_no_shared_memory(reading):
  alone, together = reading(), reading()
  for process in (alone, together):
    process.stdout.read(9)
    assert len(children(process.pid)) == 3 and segments(process.pid)  # two workers, Python's resource tracker
  os.killpg(together.pid, signal.SIGKILL)  # the tracker too, as when a container or a job is killed
  together.wait()
  wait_until(lambda: segments(together.pid))
  processes.free_segments()  # as the next run with workers does
  assert not segments(together.pid) and segments(alone.pid)
  alone.stdout.read(9)  # works on
  workers = children(alone.pid)
  alone.kill()
  alone.wait()
  wait_until(lambda: not segments(alone.pid) and not any(map(is_alive, workers)))


def test_a_worker_that_is_killed_ends_the_run_with_one_line_that_names_it(tmp_path, capfd):
  killed = []

  def kill():
    metrics = tmp_path / 'teacher' / 'metrics.jsonl'
    wait_until(lambda: metrics.exists() and len(multiprocessing.active_children()) == 2)
    killed.append(multiprocessing.active_children()[1].pid)
    os.kill(killed[0], signal.SIGKILL)

  killer = threading.Thread(target=kill)
  killer.start()
  assert pagoda('train', CONFIG, f'--workdir={tmp_path}', '--phase=teacher', '--config.data.workers=2',
                '--config.phases.teacher.steps=1000000') == 1
  killer.join()
  said = [line for line in capfd.readouterr().err.splitlines() if 'images/s' not in line]
  assert said == [f'pagoda train: config.data.workers = 2: worker process {killed[0]} was killed (SIGKILL), perhaps '
                  'for lack of memory; start the same command again to go on from the last checkpoint']
  assert not multiprocessing.active_children()


def test_a_damaged_picture_is_named_in_one_line_and_ctrl_c_leaves_workers_alone(tmp_path):
  make_data.write_class_folders(tmp_path / 'photos')
  prepare.prepare(folders.open_folder(tmp_path / 'photos', check=False), tmp_path / 'out',
                  records.Recipe((64,), 'png', 95), shard_size=4, workers=1, max_unreadable=0)
  path = tmp_path / 'out' / 'pictures-00002-of-00003.array_record'
  content = bytearray(path.read_bytes())
  content[content.index(b'IDAT') + 20] ^= 1
  reader = batches(source='array_record', path=str(tmp_path / 'out'))
  for _ in range(2):  # one batch of each worker: from then on it heeds no signal
    next(reader)
  for worker in multiprocessing.active_children():
    for number in (signal.SIGINT, signal.SIGTERM):
      os.kill(worker.pid, number)
  next(reader)
  reader.close()
  path.write_bytes(content)
  with pytest.raises(pictures.SourceError, match='pictures-00002-of-00003.array_record: record 0 is damaged') as error:
    [next(reader) for _ in range(9)]
  assert '\n' not in str(error.value)
  reader.close()
  assert not multiprocessing.active_children()
