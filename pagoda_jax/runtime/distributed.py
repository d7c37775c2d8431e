"""Several processes that run one program: their start, what they agree on, and a limit on every wait.

Everything here goes through the coordinator that `jax.distributed` starts in process 0; with one process
every function is immediate. Each process must make the same calls in the same order.
"""

import atexit
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
import jax.monitoring
from jax._src import clusters  # the launchers that JAX knows; it has no public name
from jax._src import distributed as jax_distributed  # likewise its key-value store; Orbax uses it too

from pagoda_jax.runtime import rendezvous
from pagoda_jax.runtime.rendezvous import HostsError

POLL_SECONDS = 2.0
JOIN_SECONDS = 10  # for a thread to come back from a call of JAX's client, on however busy a machine
SILENCE_SECONDS = 100  # after which a process that gives no sign of life (its Python threads do not run) is given up
COMPILATION = '/jax/core/compile/'  # tracing, lowering and compilation, as JAX tells those who listen


def start(address: str | None, count: int | None, index: int | None, limit: int, run: str) -> None:
  """Joins the other processes, if there are any. Comes before anything that asks JAX for its devices.

  Args:
    address: HOST:PORT of process 0; None, like the next two, asks the cluster that this runs in, if any.
    count: number of processes.
    index: of this process, in [0, count).
    limit: seconds; the longest that any wait for another process may take, here and later, compilation apart.
    run: what the processes of this run have in common and those of another do not: its work directory.

  Raises:
    HostsError: names the processes that did not start within `limit`, or what does not fit.
  """
  local_devices = None
  given = {'coordinator_address': address, 'num_processes': count, 'process_id': index}
  missing = [f'--{key}' for key, value in given.items() if value is None]
  if len(missing) == len(given):
    address, count, index, local_devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, limit
    )
    if address is None or count is None or index is None:
      return
  elif missing:
    raise HostsError(f'{", ".join(missing)}: needed beside the other flags for several processes')
  if not re.fullmatch(r'.+:[0-9]{1,5}', address) or not 0 < int(address.rsplit(':', 1)[1]) < 2**16:
    raise HostsError(f'--coordinator_address={address}: must be HOST:PORT, with a port from 1 to 65535')
  if not 0 <= index < count:
    raise HostsError(f'--process_id={index}: must be below --num_processes={count}, and not below 0')
  if count == 1:
    return
  rendezvous.meet(address, count, index, limit, run)
  silence = min(SILENCE_SECONDS, max(limit, 20))
  jax.distributed.initialize(
    address, count, index, local_device_ids=local_devices, initialization_timeout=limit,
    # Well after this module has said who is silent: JAX ends all processes at once, in a stack trace.
    heartbeat_timeout_seconds=2 * silence + 20, shutdown_timeout_seconds=limit, cluster_detection_method='deactivate',
  )
  signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)  # JAX's would swallow it
  jax.devices()  # each process waits for the others here: better now than within something that one does alone
  _Watch.current = _Watch(limit, silence)
  _Watch.current.start()
  atexit.register(_Watch.current.end)


def several() -> bool:
  """Whether other processes take part."""
  return jax_distributed.global_state.client is not None


def is_primary() -> bool:
  """Whether this process writes logs, pictures and manifests."""
  return jax_distributed.global_state.process_id == 0


def say(text: str) -> None:
  """Prints once, whatever the number of processes."""
  if is_primary():
    print(text, flush=True)


def _who() -> str:
  return f'process {jax_distributed.global_state.process_id} ({socket.gethostname()})'


def _note(text: str) -> None:
  print(f'{_who()}: {text}', file=sys.stderr, flush=True)


# How often each place was passed: the same in every process, so that a key is used once.
_visits: dict[str, itertools.count] = {}


def _key(place: str) -> str:
  return f'pagoda/{place}/{next(_visits.setdefault(place, itertools.count()))}'


def wait_for_all(place: str) -> None:
  """Returns when every process is at `place`.

  Raises:
    HostsError: names those that did not come within the limit, though they did not compile.
  """
  if not several():
    return
  key = _key(place)
  for attempt in itertools.count():  # who comes too late for one is told so at once, and comes to the next
    try:
      jax_distributed.global_state.client.wait_at_barrier(f'{key}/{attempt}', _Watch.current.limit * 1000)
      return
    except jax.errors.JaxRuntimeError as error:
      _go_on_waiting(place, key, error)


def from_primary(place: str, make) -> Any:
  """What make() returns in process 0 (any JSON), in every process.

  Raises:
    HostsError: process 0 did not come to `place` within the limit, though it did not compile.
  """
  if not several():
    return make()
  client, key = jax_distributed.global_state.client, _key(place)
  if is_primary():
    client.key_value_set(key, json.dumps(make()))
  while True:
    try:
      return json.loads(client.blocking_key_value_get(key, _Watch.current.limit * 1000))
    except jax.errors.JaxRuntimeError as error:
      _go_on_waiting(place, key, error, [0])


def _go_on_waiting(place: str, key: str, error: Exception, late: list[int] | None = None) -> None:
  """After a wait that JAX ended: returns where it is to be begun again, as those that were missed compile.

  Raises:
    HostsError: names those that were missed (`late`, or whom JAX names), or that are dead.
  """
  limit, text = _Watch.current.limit, str(error).replace(key, '')
  named = _named(text)
  if 'DEADLINE_EXCEEDED' not in text:
    raise HostsError(
      f'{place}: process {", ".join(map(str, named))} has died or is stopped: it sends no heartbeats. See its log.'
      if named else f'{place}: the connection to process 0 is lost. See its log. ({text})') from None
  late, busy = named if late is None else late, compiling()
  if not late or not set(late) <= set(busy):
    names = ', '.join(map(str, late)) or f'unknown ({text})'
    raise HostsError(f'{place}: waited {limit} s; missing process: {names}. See its log.') from None
  _note(f'{place}: waited {limit} s, goes on waiting: {", ".join(busy[index] for index in late)}')


def _named(text: str) -> list[int]:
  """The processes that an error of JAX's barriers and heartbeats names."""
  listed = re.search(r'(?:timed out task names|stopped sending heartbeats\)):\n((?:[^\n]*\d\n)+)', text)
  found = re.findall(r'(\d+)\n', listed[1]) if listed else re.findall(r'[Tt]ask:? ?(\d+)', text)
  return sorted(set(map(int, found)))


def is_of_jax(error: Exception) -> bool:
  """Whether JAX raised an error itself, such as of a lost process: a ValueError where that is noticed at once."""
  frames = traceback.extract_tb(error.__traceback__)[-1:]
  return isinstance(error, jax.errors.JaxRuntimeError) or any(f'{os.sep}jax{os.sep}' in f.filename for f in frames)


def compiling() -> dict[int, str]:
  """The processes that compile, or did within the last limit seconds, with what to say of them: they do not hang."""
  if not several():
    return {}
  busy = {}
  for index, standing in _Watch.current.standings().items():
    if standing['compiles']:
      busy[index] = f'process {index} compiles {standing["compiles"]}'
    elif standing['compiled'] is not None and standing['compiled'] < _Watch.current.limit:
      busy[index] = f'process {index} has just compiled'
  return busy


def put(key: str, value: str) -> None:
  """Shows every process a value under a key; the first value put there stays."""
  try:
    jax_distributed.global_state.client.key_value_set(f'pagoda/{key}', value)
  except jax.errors.JaxRuntimeError as error:
    if 'ALREADY_EXISTS' not in str(error):
      raise


def look(key: str) -> str | None:
  """What a process has put under a key; None as long as none has."""
  try:
    return jax_distributed.global_state.client.key_value_try_get(f'pagoda/{key}')
  except jax.errors.JaxRuntimeError as error:
    if 'NOT_FOUND' not in str(error):
      raise
    return None


def beat(*progress: int) -> None:
  """Tells the others how far this process is, for their message if one stays behind: numbers that grow."""
  if several():
    _Watch.current.progress, _Watch.current.alone = progress, ''
    _Watch.current.since, _Watch.current.resting = time.monotonic(), False


def work_alone(what: str) -> None:
  """As `beat`, where processes do not wait for each other's steps, but all in the end: says what this one begins."""
  if several():
    _Watch.current.alone = f'process {jax_distributed.global_state.process_id} is still at: {what}. See its log.'
    _Watch.current.since, _Watch.current.resting = time.monotonic(), False
    _Watch.current.begun += 1


def begun_alone() -> int:
  """What all processes have begun by `work_alone`: grows as long as one of them gets on, however long a whole takes."""
  return sum(standing['begun'] for standing in _Watch.current.standings().values()) if several() else 0


def rest() -> None:
  """Ends the watch over this process's progress until the next `beat`: nothing waits for it now."""
  if several():
    _Watch.current.resting = True


def fail(message: str, code: int = 1) -> None:
  """Ends this process after an error or a stop, and with it the others, with the same exit code: they would wait for
  it in vain."""
  try:
    put('failed', f'{code} {_who()}: {message}')
    first, why = look('failed').split(' ', 1)  # of a process that this one has missed since, perhaps
    code = int(first)
    if not why.startswith(_who()):
      _note(f'stopped, because {why}')
  except jax.errors.JaxRuntimeError:
    pass  # process 0 is gone, and the others with it
  _leave(code)


def _leave(code: int = 1) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  if is_primary():
    time.sleep(2 * POLL_SECONDS)  # the coordinator lives here: until the others have read why
  os._exit(code)  # the ordinary way out waits for the others to leave too


class _Watch:
  """Tells the others how this process stands; ends it when another has failed, is silent or keeps it waiting."""

  current: Any = None

  def __init__(self, limit: int, silence: int):
    self.limit, self.silence = limit, silence
    self.progress, self.since, self.resting = (), time.monotonic(), True
    self.alone, self.begun = '', 0  # what it does while nobody waits for its steps, in words; how many such things
    self._compiles: list[tuple[str, str]] = []  # (event, program), the outermost first
    self._compiled = None  # when the last compilation ended
    self._heard: dict[int, int] = {}  # processes whose silence this one notices: a number that grows
    self._over = threading.Event()
    self._threads = [threading.Thread(target=part, daemon=True) for part in (self._speak, self._listen)]

  def start(self):
    # JAX tells when a part of a compilation begins by a scalar, and when it ends by a duration.
    jax.monitoring.register_scalar_listener(self._compilation_begins)
    jax.monitoring.register_event_duration_secs_listener(self._compilation_ends)
    for thread in self._threads:
      thread.start()

  def end(self):
    """Leaves the others as JAX does at a process's exit, watching until then, and ends the threads.

    Python ends a thread that is within a call of JAX's client by tearing down C++ frames, which aborts the process.
    """
    try:
      jax.distributed.shutdown()
    finally:
      self._over.set()
      for thread in self._threads:
        thread.join(JOIN_SECONDS)  # one that waits for a process 0 that is stopped does not end

  def standings(self) -> dict[int, dict]:
    """What each process has last told of itself; see `_standing`."""
    entries = jax_distributed.global_state.client.key_value_dir_get('pagoda/standing/')
    return {int(key.rsplit('/', 1)[-1]): json.loads(value) for key, value in entries}

  def _standing(self, rounds: int) -> dict:
    compiles, compiled = self._compiles[:1], self._compiled
    return {
      'round': rounds,  # grows as long as this process lives and is not stopped
      'progress': self.progress,
      'begun': self.begun,
      'compiles': compiles[0][1] if compiles else '',
      'compiled': None if compiled is None else time.monotonic() - compiled,  # seconds ago; clocks differ
    }

  def _compilation_begins(self, event, value, fun_name='a program', **unused):
    del value, unused
    if event.startswith(COMPILATION):
      self._compiles.append((event, fun_name))

  def _compilation_ends(self, event, seconds, fun_name='a program', **unused):
    del seconds, unused
    if (event, fun_name) in self._compiles:
      self._compiles.remove((event, fun_name))
      self._compiled = time.monotonic()

  def _speak(self):
    """One round after another; does not come back from one while process 0 is stopped."""
    for rounds in itertools.count():
      if self._over.wait(POLL_SECONDS) or not several():
        return
      try:
        jax_distributed.global_state.client.key_value_set(
          f'pagoda/standing/{jax_distributed.global_state.process_id}', json.dumps(self._standing(rounds)),
          allow_overwrite=True)
        failed = look('failed')
        self._heard = {0: rounds}  # process 0 answers
        if is_primary():
          self._heard = {index: standing['round'] for index, standing in self.standings().items()}
        hung = self._hung()
      except (jax.errors.JaxRuntimeError, AttributeError):
        continue  # process 0 is gone, which JAX notices too, or this one is about to leave
      if failed:
        code, why = failed.split(' ', 1)
        if not why.startswith(_who()):
          _note(f'stopped, because {why}')
          _leave(int(code))
      if hung:
        _note(hung)
        fail(hung)

  def _listen(self):
    """Counts rounds of its own, so that a process that was stopped itself does not hold the others for silent."""
    last, silent = {}, {}
    while several() and not self._over.wait(POLL_SECONDS):
      heard = self._heard
      silent = {index: silent.get(index, 0) + 1 if heard[index] == last.get(index) else 0 for index in heard}
      last = heard
      late = [str(index) for index in heard if silent[index] * POLL_SECONDS >= self.silence]
      if late and several():
        message = (f'process {", ".join(late)} has given no sign of life for {self.silence} s: it was killed, is '
                   'stopped, or its machine or the way to it is gone. See its log.')
        _note(message)
        if is_primary():
          fail(message)
        _leave()  # the others notice by themselves

  def _hung(self) -> str:
    """What to say if this process has made no progress for too long and none compiles; '' otherwise."""
    if self.resting or time.monotonic() - self.since <= self.limit:
      return ''
    if busy := compiling():
      self.since = time.monotonic()
      _note(f'no progress for {self.limit} s, goes on waiting: {", ".join(busy.values())}')
      return ''
    return f'no progress for {self.limit} s; {self.alone or self._slowest()}'

  def _slowest(self):
    progress = {index: tuple(standing['progress']) for index, standing in self.standings().items()}
    least = min(progress.values())
    late = [str(index) for index, value in sorted(progress.items()) if value == least]
    where = f'at step {least[-1]}' if least else 'before their first step'
    if len(late) == len(progress):
      return f'all processes are {where}'
    return f'behind the others, {where}: process {", ".join(late)}. See its log.'
