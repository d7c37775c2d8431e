"""One run at a time works on a folder: its lock is a file there, which it touches as long as it lives.

To take the folder a run writes a lock of its own, then looks: seeing another's, it withdraws. Of two that begin at
once, the one whose lock came second sees the first's, on any storage that lists a file from when it was written, as
local and network file systems and buckets do; exclusive creation, which not all have, is not asked for. A run of this
machine that has ended is known by its process; any other's lock is watched: touched, its run is alive; untouched for
`SILENT_LOOKS` looks, it is deleted and the folder taken. A run that loses its lock so, because it was suspended or
cut off, ends before it writes on. No times of two machines are compared.
"""

import contextlib
import json
import os
import random
import re
import secrets
import socket
import sys
import threading
import time

from etils import epath

from pagoda_jax.runtime import buckets, distributed, processes
from pagoda_jax.runtime.files import naming
from pagoda_jax.runtime.interrupts import Interrupted, StopRequest

PATTERN = 'lock-*.json'
BEAT_SECONDS = 5.0  # how often a lock is touched
LOOK_SECONDS = 1.0  # how often one that stands in the way is looked at
SILENT_LOOKS = 60
LARGEST = 4096  # characters; what is longer is no lock that was written here


class LockError(RuntimeError):
  """Another run holds the folder; the message says who and since when."""


_held: list['_Lock'] = []


@contextlib.contextmanager
def hold(folder):
  """Within `with`, no other run works on `folder`, which is made if need be; process 0 holds it for all processes.

  Raises:
    LockError: another run holds it.
    OSError: its lock cannot be written.
    Interrupted: asked to stop before it was held.
  """
  lock = _Lock(epath.Path(folder))
  try:
    stopped = distributed.from_primary('lock', lock.take)
    if stopped:
      raise Interrupted(f'{folder}: stopped before anything was done; start the same command again to go on', stopped)
    yield
  finally:
    lock.release()


def confirm() -> None:
  """To be called before something is written: ends this process if another has taken what it held.

  Raises:
    OSError: for long nothing could be seen of the lock.
  """
  for lock in _held:
    lock.confirm()


class _Lock:
  """One run's claim to a folder."""

  def __init__(self, folder):
    host = re.sub(r'[^\w.]', '_', socket.gethostname())[:60]
    self._folder, self._path = folder, folder / f'lock-{host}-{os.getpid()}-{secrets.token_hex(4)}.json'
    self._text = json.dumps(processes.identity() | {'since': time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())})
    self._confirmed = 0.0
    self._mutex, self._released = threading.Lock(), threading.Event()

  def take(self) -> int:
    """Returns 0 when the folder is held, or the exit code of a stop that was asked for before."""
    over = {}  # other runs' locks that do not count -> why
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      while not self._announced(over):
        for path in self._others() - over.keys():
          self._watch(path, over)
      _held.append(self)
      threading.Thread(target=self._beat, daemon=True).start()
      self._take_over(over)
    except Interrupted as stop:
      return stop.exit_code
    return 0

  def _others(self) -> set:
    """The other locks that are there; a pipe or a folder of such a name is none."""
    found = set(self._folder.glob(PATTERN)) - {self._path}
    return {path for path in found if buckets.is_in_bucket(path) or os.path.isfile(path)}

  def _announced(self, over) -> bool:
    """Writes the lock and returns whether no other one counts; otherwise it is gone again."""
    if self._others() - over.keys():
      return False
    self._confirmed = _now()
    try:
      with naming(self._path):
        self._path.write_text(self._text)
      if self._is_there() and not self._others() - over.keys():
        return True
    except OSError:  # a full disk, which leaves it empty
      self._path.unlink(missing_ok=True)
      raise
    self._path.unlink(missing_ok=True)
    time.sleep(random.uniform(0.1, 1))  # two that began at once do not begin at once again
    return False

  def _watch(self, path, over):
    """Returns when a lock is gone, or does not count and is among `over`.

    Raises:
      LockError: its run is alive.
      Interrupted: asked to stop.
    """
    first, looks = None, 0
    with StopRequest() as stop:
      while path not in over and (seen := _look(path)):
        text, touched = seen
        if processes.has_ended(_holder(text)):
          over[path] = 'has ended without giving it back'
        elif not first or first[0] != text:
          first, looks = seen, 0  # anew: it may have been half written
        elif first[1] != touched:
          raise LockError(f'{self._folder}: {_named(path, text)} works on it; wait for it or end it, or use another '
                          'folder')
        elif looks == SILENT_LOOKS:
          over[path] = f'has not touched it for {LOOK_SECONDS * SILENT_LOOKS:g} s'
        else:
          if looks == 3 * BEAT_SECONDS // LOOK_SECONDS:
            _say(f'{self._folder}: {_named(path, text)} holds it and gives no sign of life; waiting for one')
          looks += 1
          time.sleep(LOOK_SECONDS)
        if stop.wanted_alone('lock'):
          raise Interrupted('', stop.exit_code)

  def _take_over(self, over):
    """Deletes the locks that do not count."""
    silent = []
    for path, why in over.items():
      if seen := _look(path):
        _say(f'{self._folder}: {_named(path, seen[0])} {why}; this run takes over')
        if not processes.has_ended(_holder(seen[0])):
          silent.append(path)
        path.unlink(missing_ok=True)
    if silent:  # one that goes on just now misses its lock meanwhile, or in a bucket puts it back
      time.sleep(2 * BEAT_SECONDS)
      if back := [path for path in silent if path.is_file()]:
        raise LockError(f'{back[0]}: its run works on')

  def _beat(self):
    while not self._released.wait(BEAT_SECONDS):
      with contextlib.suppress(Exception):  # the storage is away (each has its own errors), and so it is for the others
        self._touch()

  def confirm(self):
    """Ends this process if the lock is lost; looks at it only if it was not seen for long."""
    if _now() - self._confirmed < LOOK_SECONDS * SILENT_LOOKS / 2:
      return
    self._touch()

  def _touch(self):
    with self._mutex:
      if self._released.is_set():
        return
      now = _now()
      try:
        if not self._is_there():
          self._lose()
        if buckets.is_in_bucket(self._path):
          self._path.write_text(self._text)
        else:
          os.utime(self._path)
      except FileNotFoundError:
        self._lose()
      self._confirmed = now

  def _is_there(self) -> bool:
    seen = _look(self._path)
    return seen is not None and seen[0] == self._text

  def _lose(self):
    """Ends this process: any of its threads may be about to write."""
    self._confirmed = -float('inf')  # until it has ended, `confirm` does not return
    message = f'{self._folder}: the lock of this run, {self._path.name}, was deleted or changed'
    for path in self._others():
      if seen := _look(path):
        message = (f'{self._folder}: this run was suspended or cut off, and {_named(path, seen[0])} has taken over')
    message += '; stopped before writing on. The same command goes on from the last checkpoint'
    _say(f'pagoda: {message}')
    if distributed.several():
      distributed.fail(message)
    os._exit(1)

  def release(self):
    """Gives the folder back; one that was not taken stays as it is."""
    self._released.set()
    if self in _held:
      _held.remove(self)
    with self._mutex, contextlib.suppress(Exception):  # as in _beat; others take it over
      if self._is_there():
        self._path.unlink(missing_ok=True)


def _now() -> float:
  """Seconds on a clock that goes on while the machine sleeps, where there is one."""
  return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, 'CLOCK_BOOTTIME') else time.monotonic()


def _say(text):
  print(text, file=sys.stderr, flush=True)


def _look(path) -> tuple[str, float] | None:
  """(text, when it was touched) of a lock; None where there is none.

  Read before its time is asked for: network file systems ask the server when a file is opened.
  """
  text = ''
  try:
    with contextlib.suppress(PermissionError), path.open('rb') as file:
      text = file.read(LARGEST).decode(errors='replace')
    return text, path.stat().mtime if buckets.is_in_bucket(path) else os.stat(path).st_mtime_ns
  except FileNotFoundError:
    return None


def _holder(text: str) -> dict:
  """The `processes.identity` in a lock, and since when; {} if it is damaged."""
  try:
    values = json.loads(text)
    whole = isinstance(values['pid'], int) and all(values[key].isprintable() for key in ('host', 'since'))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return {}
  return values if whole else {}


def _named(path, text) -> str:
  if holder := _holder(text):
    return f'process {holder["pid"]} on {holder["host"]} (since {holder["since"]}, {path.name})'
  return f'a run whose lock {path.name} is damaged'
