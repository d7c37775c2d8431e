"""Several processes that run one program: their start, what they agree on, and a limit on every wait.

Everything here goes through the coordinator that `jax.distributed` starts in process 0; with one process
every function is immediate. Each process must make the same calls in the same order.
"""

import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax._src import clusters  # the launchers that JAX knows; it has no public name
from jax._src import distributed as jax_distributed  # likewise its key-value store; Orbax uses it too

POLL_SECONDS = 2.0
HEARTBEAT_SECONDS = 100


class HostsError(RuntimeError):
  """Processes did not start, did not come or do not fit together; the message names them."""


def start(address: str | None, count: int | None, index: int | None, limit: int) -> None:
  """Joins the other processes, if there are any. Comes before anything that asks JAX for its devices.

  Args:
    address: HOST:PORT of process 0; None, like the next two, asks the cluster that this runs in, if any.
    count: number of processes.
    index: of this process, in [0, count).
    limit: seconds; the longest that any wait for another process may take, here and later.

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
  if not re.fullmatch(r'.+:\d+', address):
    raise HostsError(f'--coordinator_address={address}: must be HOST:PORT')
  if index >= count:
    raise HostsError(f'--process_id={index}: must be below --num_processes={count}')
  if count == 1:
    return
  _meet(address, count, index, limit)
  jax.distributed.initialize(
    address, count, index, local_device_ids=local_devices, initialization_timeout=limit,
    # Later than a process that fails is read about, which says why; JAX only says that it is gone.
    heartbeat_timeout_seconds=min(HEARTBEAT_SECONDS, max(limit, int(5 * POLL_SECONDS))),
    shutdown_timeout_seconds=limit, cluster_detection_method='deactivate',
  )
  jax.devices()  # each process waits for the others here: better now than within something that one does alone
  _Watch.current = _Watch(limit)
  _Watch.current.start()


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


# How often each place was passed: the same in every process, so that a key is used once.
_visits: dict[str, itertools.count] = {}


def _key(place: str) -> str:
  return f'pagoda/{place}/{next(_visits.setdefault(place, itertools.count()))}'


def wait_for_all(place: str) -> None:
  """Returns when every process is at `place`.

  Raises:
    HostsError: names those that did not come within the limit.
  """
  if not several():
    return
  limit = _Watch.current.limit
  try:
    jax_distributed.global_state.client.wait_at_barrier(_key(place), limit * 1000)
  except jax.errors.JaxRuntimeError as error:
    _, _, rest_of_it = str(error).partition('timed out task names:\n')
    late = ', '.join(rest_of_it.split('\n\n')[0].split()) or f'unknown ({error})'
    raise HostsError(f'{place}: waited {limit} s; missing process: {late}. See its log.') from None


def from_primary(place: str, make) -> Any:
  """What make() returns in process 0 (any JSON), in every process.

  Raises:
    HostsError: process 0 did not come to `place` within the limit.
  """
  if not several():
    return make()
  client, key = jax_distributed.global_state.client, _key(place)
  if is_primary():
    client.key_value_set(key, json.dumps(make()))
  try:
    return json.loads(client.blocking_key_value_get(key, _Watch.current.limit * 1000))
  except jax.errors.JaxRuntimeError as error:
    raise HostsError(f'{place}: waited {_Watch.current.limit} s for process 0. See its log. ({error})') from None


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
    _Watch.current.progress, _Watch.current.since = progress, time.monotonic()


def rest() -> None:
  """Ends the watch over this process's progress until the next `beat`: nothing waits for it now."""
  if several():
    _Watch.current.progress = ()


def fail(message: str) -> None:
  """Ends this process after an error, and with it the others: they would wait for it in vain."""
  put('failed', f'{_who()}: {message}')
  _leave()


def _leave() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  if is_primary():
    time.sleep(2 * POLL_SECONDS)  # the coordinator lives here: until the others have read why
  os._exit(1)  # the ordinary way out waits for the others to leave too


class _Watch(threading.Thread):
  """Ends this process when another has failed, or when a step takes longer than the limit."""

  current: Any = None

  def __init__(self, limit: int):
    super().__init__(daemon=True)
    self.limit, self.progress, self.since = limit, (), time.monotonic()

  def run(self):
    shown = ()
    while several():
      time.sleep(POLL_SECONDS)
      try:
        failed = look('failed')
        if self.progress != shown:
          shown = self.progress
          jax_distributed.global_state.client.key_value_set(
            f'pagoda/progress/{jax_distributed.global_state.process_id}', json.dumps(shown), allow_overwrite=True)
      except (jax.errors.JaxRuntimeError, AttributeError):
        return  # the coordinator is gone; JAX ends this process with its own message
      if failed and not failed.startswith(_who()):
        print(f'{_who()}: stopped, because {failed}', file=sys.stderr)
        _leave()
      if self.progress and time.monotonic() - self.since > self.limit:
        message = f'no progress for {self.limit} s; {self._slowest()}'
        print(f'{_who()}: {message}', file=sys.stderr)
        fail(message)

  def _slowest(self):
    entries = jax_distributed.global_state.client.key_value_dir_get('pagoda/progress/')
    progress = {int(key.rsplit('/', 1)[-1]): tuple(json.loads(value)) for key, value in entries}
    least = min(progress.values())
    late = [str(index) for index, value in sorted(progress.items()) if value == least]
    if len(late) == len(progress):
      return f'all processes are at step {least[-1]}'
    return f'behind the others, at step {least[-1]}: process {", ".join(late)}. See its log.'


def _meet(address: str, count: int, index: int, limit: int) -> None:
  """Waits until all processes have started: JAX's own start ends in a stack trace that does not name who is missing.

  Process 0 listens at the coordinator's address, which JAX listens at afterwards.
  """
  host, port = address.rsplit(':', 1)
  deadline = time.monotonic() + limit
  if index == 0:
    _receive(int(port), count, deadline, limit)
    return
  while time.monotonic() < deadline + 2 * POLL_SECONDS:  # process 0 says who is missing: give it the time
    try:
      with socket.create_connection((host.strip('[]'), int(port)), timeout=POLL_SECONDS) as connection:
        connection.settimeout(max(deadline + 2 * POLL_SECONDS - time.monotonic(), 0.1))
        connection.sendall(f'{index} {count} {socket.gethostname()}\n'.encode())
        answer = connection.makefile().readline().strip()
    except OSError:
      answer = ''
    if answer == 'go':
      return
    if answer.startswith('no '):
      raise HostsError(answer[3:])
    time.sleep(0.2)
  raise HostsError(f'process 0 at {address} did not answer within {limit} s: it has not started, is unreachable '
                   'from here, or is still in a run that this process has dropped out of')


def _receive(port: int, count: int, deadline: float, limit: int) -> None:
  """Process 0's part of `_meet`."""
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    server = socket.create_server(('', port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=count)
  except OSError as error:
    raise HostsError(f'--coordinator_address: cannot listen at port {port} here: {error.strerror or error}') from None
  present: dict[int, tuple[socket.socket, str]] = {}
  connections = []
  problem = ''
  with server:
    while len(present) < count - 1 and not problem:
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        connection, _ = server.accept()
        connection.settimeout(POLL_SECONDS)
        other, others_count, name = connection.makefile().readline().split()
        other, others_count = int(other), int(others_count)
      except TimeoutError:
        if time.monotonic() < deadline:
          continue  # someone connected and said nothing
        late = ', '.join(str(i) for i in range(1, count) if i not in present)
        problem = f'waited {limit} s for {count} processes; not started, or without a way to process 0: process {late}'
        break
      except (ValueError, OSError):
        continue  # not one of ours
      if others_count != count:
        problem = f'process {other} ({name}) was started for {others_count} processes, process 0 for {count}'
      elif other in present and not _has_left(present[other][0]):
        problem = f'two processes are number {other}: on {present[other][1]} and on {name}'
      present[other] = (connection, name)
      connections.append(connection)
    for connection in connections:
      with connection:
        try:
          connection.sendall(f'no {problem}\n'.encode() if problem else b'go\n')
          connection.recv(1)  # the other side closes first, so that the port is free at once
        except OSError:
          pass
  if problem:
    raise HostsError(problem)


def _has_left(connection: socket.socket) -> bool:
  connection.settimeout(0.0)
  try:
    return connection.recv(1) == b''
  except BlockingIOError:
    return False
  except OSError:
    return True
