"""What the processes of test_processes.py run: process_worker.py TASK ADDRESS COUNT INDEX LIMIT [FOLDER [NAME]]."""

import os
import signal
import sys
import time

import jax
import numpy as np

from pagoda_jax.runtime import distributed, sharding, trees


def step(folder, name):
  """A train step of one of ACROSS_PROCESSES on all devices; process 0 leaves the parameters and the loss."""
  import step_tools

  sharding.SHARDED_FROM = 16
  after, metrics = step_tools.run_step(name, jax.device_count(), **step_tools.ACROSS_PROCESSES[name])
  if distributed.is_primary():
    np.savez(f'{folder}/step.npz', loss=metrics['loss'], **trees.flat_leaves(after.params))


def agree(folder):
  """Each tells what it learnt from process 0, and leaves by the handler that it had before the others came."""
  del folder
  told = distributed.from_primary('question', lambda: {'from': jax.process_index()})
  print(f'{jax.process_index()} of {jax.process_count()} learnt {told}', flush=True)
  distributed.wait_for_all('end')
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)


def leaving(folder):
  """Nothing; the watch is always within a call (below) when Python ends."""
  del folder
  distributed.wait_for_all('end')


def absent(folder):
  """Process 1 does not come to a barrier."""
  del folder
  if jax.process_index() == 1:
    time.sleep(60)
  distributed.wait_for_all('begin distill')


def stuck(folder):
  """Process 1 stays at step 3."""
  del folder
  for number in range(6):
    distributed.beat(0, min(number, 3) if jax.process_index() == 1 else number)
    time.sleep(0.1)
  time.sleep(60)


def stuck_alone(folder):
  """Process 0 does not come back from a disk, say, where another waits until it says that it is done."""
  del folder
  if jax.process_index() == 0:
    distributed.work_alone('invert: noise-00002')
    while distributed.begun_alone() != 1:
      time.sleep(0.1)
    distributed.work_alone('invert: noise-00003')
    time.sleep(60)
  while not distributed.look('invert/end'):
    time.sleep(0.1)


def missing_one_that_stops(folder):
  """Process 0 was asked to stop, and process 1 notices first that it has lost it."""
  del folder
  if jax.process_index() == 0:
    distributed.fail('asked to stop', 75)
  while not distributed.look('failed'):
    time.sleep(0.01)
  distributed.fail('connection closed by peer')


def weights_of_one(folder):
  """Process 0 writes and reads a folder of weights, and process 1 waits for what it says of it."""
  from pagoda_jax.weights import autoencoders
  from pagoda_jax.weights.convert import folders, formats

  def make():
    converted = formats.Converted({'params': {'a': np.arange(3)}}, {}, autoencoders.FORMAT)
    folders.write_converted(f'{folder}/weights', converted, {'file': 'a'})
    return folders.read_folder(f'{folder}/weights').variables['params']['a'].tolist()

  print(distributed.from_primary('weights', make))


def compiling(folder):
  """One process compiles for more than twice the limit while the other waits: in three places."""
  del folder

  def slow(x):
    time.sleep(6)  # JAX calls this while it traces, which is a part of compiling
    return x

  def wait_until_it_compiles(index):
    while 'slow' not in distributed.compiling().get(index, ''):
      time.sleep(0.01)

  if jax.process_index() == 1:
    jax.jit(slow)(1)
  else:
    wait_until_it_compiles(1)
    distributed.beat(0, 0)
  distributed.wait_for_all('after the step')
  distributed.rest()
  if jax.process_index() == 1:
    wait_until_it_compiles(0)
  distributed.from_primary('question', lambda: int(jax.jit(slow)(2)))
  distributed.wait_for_all('end')


def sleeping(folder):
  """Says when it is there."""
  del folder
  time.sleep(2 * distributed.POLL_SECONDS)  # each has heard of the other
  print('ready', flush=True)
  time.sleep(300)


def failing(folder):
  """Process 1 raises; process 0 would wait."""
  del folder
  if jax.process_index() == 1:
    raise OSError('no disk here')
  time.sleep(60)


if __name__ == '__main__':
  task, address, *numbers = sys.argv[1:6]
  count, index, limit = (int(number) if number != '-' else None for number in numbers)
  try:
    if task == 'sleeping':
      distributed.SILENCE_SECONDS = 6
    if task == 'leaving':
      distributed.POLL_SECONDS = 0.0005
    if task == 'agree':
      signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    if task == 'compiling':
      distributed.POLL_SECONDS = 0.2
    distributed.start(None if address == '-' else address, count, index, limit, run=task)
    globals()[task](*sys.argv[6:] or [None])
  except (distributed.HostsError, OSError) as error:
    print(error)
    if distributed.several():
      distributed.fail(str(error))
    sys.exit(1)
