"""Several real processes on loopback: one step, one run, one stop, and an end with a name when one is missing."""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import step_tools
import tiny
from quick import XLA_FLAGS
from runs import CONFIG, ROOT

from pagoda_jax import main
from pagoda_jax.cli import run
from pagoda_jax.data import noise_store
from pagoda_jax.runtime import distributed, trees
from pagoda_jax.training import checkpoints, inverting, workdir


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


STARTED = []


@pytest.fixture(autouse=True)
def nothing_stays_behind():
  yield
  while STARTED:
    STARTED.pop().kill()


def spawn(args, devices=1, **env):
  flags = f'--xla_force_host_platform_device_count={devices} {XLA_FLAGS}'
  env = {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', **env}
  STARTED.append(subprocess.Popen(
    [sys.executable, *map(str, args)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  ))
  return STARTED[-1]


def workers(task, *args, limit=60, count=2, devices=1):
  """Runs a task of process_worker.py in `count` processes; [(exit code, output)]."""
  address = f'127.0.0.1:{free_port()}'
  started = [spawn([ROOT / 'tests' / 'process_worker.py', task, address, count, index, limit, *args], devices)
             for index in range(count)]
  return [(process.returncode, output) for process in started for output in [process.communicate(timeout=600)[0]]]


def run_both(phase, folder, *flags):
  """`pagoda train` of a phase in two processes that work together."""
  port = free_port()
  return [
    spawn(['-m', 'pagoda_jax.main', 'train', CONFIG, f'--phase={phase}', f'--workdir={folder}', *flags,
           f'--coordinator_address=127.0.0.1:{port}', '--num_processes=2', f'--process_id={index}'])
    for index in range(2)
  ]


def run_one(phase, folder, *flags):
  process = spawn(['-m', 'pagoda_jax.main', 'train', CONFIG, f'--phase={phase}', f'--workdir={folder}', *flags])
  output, _ = process.communicate(timeout=600)
  assert process.returncode == 0, output
  return output


def lines(path):
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()] if path.exists() else []


def wait_for(condition, processes):
  deadline = time.monotonic() + 300
  while not condition():
    for process in processes:
      assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name == 'distill' else pytest.mark.slow)
                                  for name in step_tools.ACROSS_PROCESSES])
def test_a_step_on_two_processes_of_four_devices_is_the_step_on_one_device(name, tmp_path):
  for code, output in workers('step', tmp_path, name, devices=4, limit=300):
    assert code == 0, output
  one, metrics = step_tools.run_step(name, 1)
  two = np.load(tmp_path / 'step.npz')
  assert two['loss'] == pytest.approx(metrics['loss'], rel=1e-6)
  for path, a in trees.flat_leaves(one.params).items():
    np.testing.assert_allclose(a, two[path], rtol=1e-5, atol=1e-5 * np.abs(a).max(), err_msg=path)


def test_two_processes_survive_a_kill_and_a_sigterm_and_one_goes_on_with_the_same_pictures(tmp_path):
  flags = ['--config.checkpoint.every_steps=4', '--config.phases.teacher.steps=100000']
  phase = tmp_path / 'pair/teacher'
  pair = run_both('teacher', tmp_path / 'pair', *flags, '--config.barrier_timeout=60')
  wait_for(lambda: checkpoints.finished_steps(phase), pair)
  pair[1].kill()
  output, _ = pair[0].communicate(timeout=120)
  assert pair[0].returncode not in (0, 75) and 'disk space' not in output, output
  # A step, or a save, that waits for it fails; what else waits for it ends as it stays silent, or makes no progress.
  assert re.search(
    r'another process has gone: see its log|process 1 has given no sign of life|no progress for 60 s; ', output), output
  steps = checkpoints.finished_steps(phase)

  pair = run_both('teacher', tmp_path / 'pair', *flags)
  wait_for(lambda: max(checkpoints.finished_steps(phase)) > max(steps), pair)
  pair[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=300)[0] for process in pair]
  assert [process.returncode for process in pair] == [75, 75], outputs
  assert f'teacher: goes on from step {max(steps)}' in outputs[0]
  step = max(checkpoints.finished_steps(phase))
  for output in outputs:
    assert f'stopped after step {step} of 100000 and saved; start the same command again' in output
  assert 'goes on from' in run_one('teacher', tmp_path / 'pair', *flags, f'--max_steps={step + 3}')
  run_one('teacher', tmp_path / 'alone', *flags, f'--max_steps={step + 3}')
  folders = [tmp_path / run / 'teacher' for run in ('pair', 'alone')]
  batches = [lines(folder / 'batches.jsonl') for folder in folders]
  assert batches[0] == batches[1] and len(batches[0]) == step + 3
  losses = [[line['loss'] for line in lines(folder / 'metrics.jsonl')] for folder in folders]
  np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_noise_written_by_two_processes_with_a_kill_is_that_of_one(finished, tmp_path):
  for folder in ('pair', 'alone'):
    shutil.copytree(finished / 'teacher', tmp_path / folder / 'teacher')
  flags = ['--config.phases.invert.shard_size=300', '--config.phases.invert.batch_size=100']
  run_one('invert', tmp_path / 'alone', *flags)
  store = tmp_path / 'pair/invert'
  pair = run_both('invert', tmp_path / 'pair', *flags, '--config.barrier_timeout=10')
  wait_for(lambda: len(list(store.glob('*.array_record'))) >= 3, pair)
  pair[1].kill()
  outputs = [process.communicate(timeout=120)[0] for process in pair]
  assert pair[0].returncode not in (0, 75), outputs[0]
  assert not (store / 'manifest.json').exists()
  before = {path.name: path.stat().st_mtime_ns for path in store.glob('noise-*.json')}
  again = run_both('invert', tmp_path / 'pair', *flags)
  for process in again:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
  after = {path.name: path.stat().st_mtime_ns for path in store.glob('noise-*.json')}
  assert len(before) >= 3
  assert [name for name, time in before.items() if after[name] != time] == []  # none was made again
  folders = [tmp_path / run / 'invert' for run in ('pair', 'alone')]
  stores = [noise_store.open_store(folder, 80.0, standardize=False) for folder in folders]
  assert len(stores[0]) == len(stores[1]) == 4500
  for key in range(4500):
    assert stores[0][key].tobytes() == stores[1][key].tobytes(), key


def test_a_process_with_another_config_ends_all_and_is_named(tmp_path):
  port = free_port()
  pair = [
    spawn(['-m', 'pagoda_jax.main', 'run', CONFIG, f'--workdir={tmp_path}', f'--coordinator_address=127.0.0.1:{port}',
           '--num_processes=2', f'--process_id={index}', f'--config.seed={index}'])
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in pair]
  assert [process.returncode for process in pair] == [1, 1], outputs
  assert 'another config than process 0' in outputs[1] and 'config.seed: there 0, here 1' in outputs[1]
  assert 'stopped, because process 1' in outputs[0] and 'config.seed' in outputs[0]
  assert not list(tmp_path.glob('*/checkpoints'))


def test_what_makes_another_program_or_another_moment_to_meet_is_the_same_in_all_processes(monkeypatch):
  """Other steps are another learning rate in one process: parameters that are to be one then drift apart silently."""
  told = {}
  monkeypatch.setattr(distributed, 'from_primary', lambda place, make: told.setdefault(place, make()))
  monkeypatch.setattr(workdir.streams, 'pictures_digest', lambda data, resolutions: 'the same')
  workdir.check_same_everywhere(tiny.get_config(), ['teacher'], 4)  # process 0
  for key, value in {'phases.teacher.steps': 5, 'phases.teacher.microbatch': 1, 'mesh.fsdp': 2, 'remat': (8,),
                     'checkpoint.every_steps': 5, 'log.samples_every': 5}.items():
    other = tiny.get_config()
    other.update_from_flattened_dict({key: value})
    with pytest.raises(workdir.WorkdirError, match=rf'config\.{key}: there .*, here '):
      workdir.check_same_everywhere(other, ['teacher'], 4)
  for names, most, said in ((['teacher'], 5, 'max_steps: there 4, here 5'), (['invert'], 4, 'phases: there .*teacher')):
    with pytest.raises(workdir.WorkdirError, match=said):
      workdir.check_same_everywhere(tiny.get_config(), names, most)
  elsewhere = tiny.get_config()
  elsewhere.update_from_flattened_dict({'data.workers': 2, 'weights_dir': '/mnt/weights'})
  workdir.check_same_everywhere(elsewhere, ['teacher'], 4)


@pytest.mark.parametrize('task, named', [
  ('absent', 'begin distill: waited 5 s; missing process: 1'),
  ('stuck', 'no progress for 5 s; behind the others, at step 3: process 1'),
  ('stuck_alone', 'no progress for 5 s; process 0 is still at: invert: noise-00003'),
  ('failing', 'stopped, because process 1'),
])
def test_a_wait_ends_within_its_limit_and_names_the_process(task, named):
  (code, output), (other_code, _) = workers(task, limit=5)
  assert code == 1 and other_code == 1
  assert named in output


def test_a_shard_of_noise_may_take_longer_than_any_wait(monkeypatch):
  """As it does in float32 on most GPUs: whoever gets on, batch by batch, is waited for."""
  config, looks = tiny.get_config(), []
  config.barrier_timeout = 5
  clock = types.SimpleNamespace(monotonic=itertools.count().__next__, sleep=lambda seconds: None)
  monkeypatch.setattr(inverting, 'time', clock)
  monkeypatch.setattr(noise_store, 'finished_shards', lambda *args: looks.append(args) or [])
  monkeypatch.setattr(distributed, 'begun_alone', lambda: min(len(looks), 20))
  stop = types.SimpleNamespace(wanted_alone=lambda phase: False)
  with pytest.raises(distributed.HostsError, match='no new batch for 5 s; missing are shards of process 0'):
    inverting._wait_for_shards(config, None, noise_store.make_layout(8, 8), {}, [0], 'invert', stop)
  assert 20 < len(looks) < 30


def test_who_misses_one_that_stops_ends_with_its_code():
  (code, _), (other_code, output) = workers('missing_one_that_stops')
  assert (code, other_code) == (75, 75) and 'stopped, because process 0' in output


def test_one_process_writes_and_reads_weights_while_the_others_wait_for_its_word(tmp_path):
  """Orbax has all write and read together: at the end of an autoencoder's phase they waited for each other."""
  outputs = workers('weights_of_one', tmp_path, limit=100)
  assert [code for code, _ in outputs] == [0, 0] and all('[0, 1, 2]' in output for _, output in outputs), outputs


def test_who_compiles_is_not_taken_for_hung_and_is_named():
  """In a step, at a meeting point and where process 0 is waited for: each time for more than twice the limit."""
  outputs = workers('compiling', limit=2)
  assert [code for code, _ in outputs] == [0, 0], outputs
  for waiting, place in ((0, 'no progress for 2 s'), (0, 'after the step: waited 2 s'), (1, 'question: waited 2 s')):
    assert f'{place}, goes on waiting: process {1 - waiting} compiles slow' in outputs[waiting][1]


def test_a_stop_of_one_outside_of_a_phase_ends_all_with_its_exit_code(tmp_path):
  """The others waited for it up to the limit, and ended with a code on which no launcher starts them again."""
  program = ('import os, signal, sys, time\nfrom pagoda_jax import main\nfrom pagoda_jax.cli import run\n'
             'from pagoda_jax.runtime import distributed\n'
             'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # tests run in the background ignore it
             'def stopped(fv, args):\n  if fv.process_id == 1:\n    os.kill(os.getpid(), fv.max_steps)\n'
             '    time.sleep(60)\n  distributed.wait_for_all("the next phase")\n'
             'run.run = stopped\nmain.console()')
  pairs = {}
  for number in (signal.SIGTERM, signal.SIGINT):
    port = free_port()
    pairs[number] = [
      spawn(['-c', program, 'run', CONFIG, f'--workdir={tmp_path}', f'--max_steps={int(number)}',
             f'--coordinator_address=127.0.0.1:{port}', '--num_processes=2', f'--process_id={index}'])
      for index in range(2)
    ]
  for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
    outputs = [process.communicate(timeout=300)[0] for process in pairs[number]]
    assert [process.returncode for process in pairs[number]] == [code, code], outputs
    assert 'stopped, because process 1' in outputs[0]


@pytest.mark.parametrize('error, hint', [
  (jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-reduce failed: Connection closed by peer'), f'. {main.LOST}'),
  (TypeError('a mistake of this program'), ''),
])
def test_who_loses_a_connection_tells_the_others_that_it_need_not_be_the_culprit(error, hint, tmp_path, monkeypatch):
  def raises(fv, args):
    raise error

  told = []
  monkeypatch.setattr(run, 'run', raises)
  monkeypatch.setattr(distributed, 'start', lambda *args, **kwargs: None)
  monkeypatch.setattr(distributed, 'several', lambda: True)
  monkeypatch.setattr(distributed, 'fail', lambda *words: told.append(words))
  assert main.main(['run', CONFIG, f'--workdir={tmp_path}']) == 1
  assert told == [(f'{error}{hint}', 1)]


def test_processes_leave_while_they_watch_each_other():
  """Python's end ended a watch in the middle of a call of the client of JAX: five of six pairs aborted."""
  outputs = workers('leaving')
  assert [code for code, _ in outputs] == [0, 0], outputs


@pytest.mark.parametrize('stopped', [1, 0])
def test_a_stopped_process_ends_the_other_with_a_line_that_names_it(stopped):
  address = f'127.0.0.1:{free_port()}'
  pair = [spawn([ROOT / 'tests' / 'process_worker.py', 'sleeping', address, 2, index, 60]) for index in range(2)]
  for process in pair:
    while 'ready' not in (line := process.stdout.readline()):
      assert line, process.wait()
  pair[stopped].send_signal(signal.SIGSTOP)
  output, _ = pair[1 - stopped].communicate(timeout=300)
  assert pair[1 - stopped].returncode == 1, output
  assert f'process {stopped} has given no sign of life for 6 s' in output and 'Check failure' not in output


@pytest.mark.parametrize('text, said', [
  ('INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout. This indicates that '
   'the remote task has failed.. Barrier Id: pagoda/task 7/0/0::0, Task: 1\n\nRPC: /xla', 'process 1 has died or is'),
  ('UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n2\nThe tasks have crashed.',
   'process 1, 2 has died or is'),
  ('UNAVAILABLE: (stopped sending heartbeats):\n/job:jax_worker/replica:0/task:12\nThe', 'process 12 has died or is'),
  ('DEADLINE_EXCEEDED: Barrier timed out. Id: pagoda/task 7/0/0::0. # of tasks that reached the barrier: 2/4.\nThe '
   'first task at the barrier: 0. Some timed out task names:\n1\n3\n\n\nRPC: /xla',
   'waited 9 s; missing process: 1, 3.'),
  ('UNAVAILABLE: failed to connect', 'the connection to process 0 is lost'),
])
def test_a_wait_that_jax_ends_says_whom_it_missed(text, said, monkeypatch):
  class Client:
    def wait_at_barrier(self, key, milliseconds):
      raise jax.errors.JaxRuntimeError(text)

    def key_value_dir_get(self, key):
      return []

  monkeypatch.setattr(distributed.jax_distributed.global_state, 'client', Client())
  monkeypatch.setattr(distributed._Watch, 'current', distributed._Watch(9, 100))
  monkeypatch.setattr(distributed, '_visits', {})
  with pytest.raises(distributed.HostsError, match=f'task 7: {re.escape(said)}'):
    distributed.wait_for_all('task 7')


def test_processes_under_slurm_find_each_other():
  job = str(free_port())  # the port follows from the job's number
  started = [
    spawn([ROOT / 'tests' / 'process_worker.py', 'agree', '-', '-', '-', 60], SLURM_JOB_ID=job, SLURM_NTASKS='2',
          SLURM_STEP_NODELIST='127.0.0.1', SLURM_PROCID=str(index), SLURM_LOCALID=str(index))
    for index in range(2)
  ]
  for index, process in enumerate(started):
    output, _ = process.communicate(timeout=120)
    assert f"{index} of 2 learnt {{'from': 0}}" in output
    assert process.returncode == 75  # by its own handler of SIGTERM, which JAX's did not replace


@pytest.mark.parametrize('args, text', [
  ((None, 2, 0), '--coordinator_address: needed'),
  (('localhost:1', 2, None), '--process_id: needed'),
  (('localhost', 2, 0), 'must be HOST:PORT'),
  (('localhost:65536', 2, 1), 'must be HOST:PORT, with a port from 1 to 65535'),
  (('localhost:1', 2, 2), '--process_id=2: must be below --num_processes=2'),
  (('localhost:1', 2, -1), '--process_id=-1: must be below --num_processes=2, and not below 0'),
])
def test_flags_that_do_not_fit_are_named(args, text):
  with pytest.raises(distributed.HostsError, match=text):
    distributed.start(*args, 1, 'run')
