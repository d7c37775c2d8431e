"""What the processes of test_processes.py run: python process_worker.py TASK ADDRESS COUNT INDEX LIMIT [FOLDER]."""

import sys
import time

import jax
import numpy as np

from pagoda_jax.runtime import distributed, sharding
from pagoda_jax.training import checkpoints


def step(folder):
  """One train step of each stage on all devices; process 0 leaves the parameters and the loss."""
  import step_tools

  sharding.SHARDED_FROM = 16
  for name in step_tools.PHASES:
    after, metrics = step_tools.run_step(name, jax.device_count(), fsdp=2)
    if distributed.is_primary():
      np.savez(f'{folder}/{name}.npz', loss=metrics['loss'], **checkpoints.flat_leaves(after.params))


def agree(folder):
  """Each tells what it learnt from process 0."""
  del folder
  told = distributed.from_primary('question', lambda: {'from': jax.process_index()})
  print(f'{jax.process_index()} of {jax.process_count()} learnt {told}')
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
    distributed.start(None if address == '-' else address, count, index, limit)
    globals()[task](*sys.argv[6:7] or [None])
  except (distributed.HostsError, OSError) as error:
    print(error)
    if distributed.several():
      distributed.fail(str(error))
    sys.exit(1)
