"""Which process is which, and worker processes that leave nothing behind when the one that started them is killed."""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import secrets
import signal
import socket
import threading
from multiprocessing import shared_memory

PROC = pathlib.Path('/proc')
SHARED_MEMORY = pathlib.Path('/dev/shm')  # where Linux shows it; elsewhere segments cannot be listed
SEGMENTS = 'pagoda-'


def identity() -> dict[str, str | int]:
  """This process, as no other ever is: pids are given again, and each container counts its own.

  Only {'host', 'pid'} where the system has no /proc.
  """
  values = {'host': socket.gethostname(), 'pid': os.getpid()}
  with contextlib.suppress(OSError):
    values |= _machine() | {'started': _started(os.getpid())}
  return values


@functools.cache
def _machine() -> dict[str, str | int]:
  return {'boot': (PROC / 'sys/kernel/random/boot_id').read_text().strip(),
          'namespace': (PROC / 'self/ns/pid').stat().st_ino}


def _started(pid: int) -> int | None:
  """When a process began, in clock ticks since the boot; None of one that has ended and was not waited for."""
  state, *values = (PROC / str(pid) / 'stat').read_text().rsplit(')', 1)[1].split()
  return None if state in 'ZX' else int(values[18])


def has_ended(process: dict) -> bool:
  """Whether the process of an `identity` surely lives no more; of one on another machine nothing is known: False."""
  mine = identity()
  known = isinstance(process.get('started'), int) and 'started' in mine
  if not known or any(process.get(key) != mine[key] for key in ('host', 'boot', 'namespace')):
    return False
  try:
    os.kill(process['pid'], 0)
    return _started(process['pid']) != process['started']
  except ProcessLookupError:
    return True
  except (OSError, OverflowError):
    return False  # another user's, perhaps hidden


def begin_worker(*unused) -> None:
  """What a worker process calls first (Grain with its number and theirs): it ends with the one that started it.

  Ctrl-C and a scheduler's SIGTERM reach all processes of a job: that one decides when its workers end. Their shared
  memory bears its name, for `free_segments`.
  """
  del unused
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  parent = multiprocessing.parent_process().pid
  with contextlib.suppress(OSError):
    prefix = f'/{SEGMENTS}{_machine()["namespace"]}-{parent}-{_started(parent)}-'
    shared_memory._make_filename = lambda: prefix + str(secrets.randbits(48))  # Python has no public way


def _end_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)  # the parent was killed: nobody counts on this process any more


def free_segments() -> None:
  """Frees the shared memory of runs that were killed with all their processes.

  Where only a run itself is killed, Python's resource tracker, a process beside it, frees what it leaves.
  """
  mine = identity()
  for path in SHARED_MEMORY.glob(f'{SEGMENTS}*') if 'started' in mine else ():
    with contextlib.suppress(ValueError, OSError):  # not one of ours; another run was faster
      namespace, pid, started, _ = map(int, path.name.removeprefix(SEGMENTS).split('-'))
      if has_ended(mine | {'namespace': namespace, 'pid': pid, 'started': started}):
        path.unlink()


def ending(exit_code: int) -> str:
  """Why a worker process is gone, in words."""
  if exit_code == -signal.SIGKILL:
    return 'was killed (SIGKILL), perhaps for lack of memory'
  if exit_code < 0:
    return f'was ended by signal {-exit_code}'
  return f'ended with exit code {exit_code}; its message stands above'
