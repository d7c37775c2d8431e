"""Processes find each other at one port, whatever else comes to it: real sockets on loopback, threads as processes."""

import contextlib
import hashlib
import resource
import socket
import threading
import time

import pytest
from jax._src.lib import _jax

from pagoda_jax.runtime import rendezvous

RUN = 'runs/mnist'
HANG = 120  # seconds; ends a test that hangs


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


class Process(threading.Thread):
  """A process of a run at the meeting; `end` is 'met', or the error's text."""

  def __init__(self, port, count, index, limit=HANG, run=RUN):
    super().__init__(daemon=True)
    self.args, self.end = (f'127.0.0.1:{port}', count, index, limit, run), None
    self.start()

  def run(self):
    try:
      rendezvous.meet(*self.args)
      self.end = 'met'
    except Exception as error:
      self.end = f'{type(error).__name__}: {error}'

  def ended(self):
    self.join(HANG)
    return self.end


def connect(port):
  """A connection to process 0 as soon as it listens."""
  deadline = time.monotonic() + HANG
  while time.monotonic() < deadline:
    with contextlib.suppress(ConnectionRefusedError):
      return socket.create_connection(('127.0.0.1', port), timeout=HANG)
    time.sleep(0.01)
  raise TimeoutError


def greeting(index, count=2, run=RUN, name='there'):
  return f'pagoda {hashlib.sha256(run.encode()).hexdigest()[:32]} {count} {index} {name}\n'.encode()


def said_to(port, text):
  """What process 0 answers to a stranger, up to the end of the connection."""
  with connect(port) as stranger, contextlib.suppress(ConnectionError):
    stranger.sendall(text)
    return stranger.makefile('rb').readline()
  return b''


def meet(*calls, limit=HANG):
  """What each call, (count, index), ends with; they come one after another."""
  port, processes = free_port(), []
  for call in calls:
    processes.append(Process(port, *call, limit=limit))
    time.sleep(0.1)
  return [process.ended() for process in processes]


def test_all_meet_in_any_order_and_who_does_not_fit_is_named():
  assert meet((3, 2), (3, 0), (3, 1)) == ['met'] * 3
  assert all('started for 4 processes, process 0 for 2' in end for end in meet((2, 0), (4, 1)))
  assert all('two processes are number 1' in end for end in meet((3, 0), (3, 1), (3, 1)))


def test_who_is_missing_is_named():
  assert all('waited 2 s for 4 processes' in end and 'process 1, 3' in end and 'not started' in end
             for end in meet((4, 0), (4, 2), limit=2))
  assert '1, 2, 3' in (end := meet((100, 0), limit=0)[0]) and end.endswith('16 and 83 more')


def test_nobody_at_the_address_is_said(monkeypatch):
  monkeypatch.setattr(rendezvous, 'POLL_SECONDS', 0.1)
  end = meet((2, 1), limit=1)[0]
  assert 'process 0 at 127.0.0.1' in end and end.endswith('Connection refused')


def test_a_coordinator_that_still_listens_is_named_at_once_and_waited_for(monkeypatch, capsys):
  monkeypatch.setattr(rendezvous, 'POLL_SECONDS', 0.1)
  port = free_port()
  service = _jax.get_distributed_runtime_service(f'[::]:{port}', 2)
  end = Process(port, 2, 1, limit=1).ended()
  assert end.startswith('HostsError: waited 1 s') and 'the coordinator of a run that has not ended yet' in end
  assert capsys.readouterr().err.count('Tries again for 1 s') == 1
  late = Process(port, 2, 1)
  time.sleep(0.5)
  service.shutdown()
  del service
  assert Process(port, 2, 0).ended() == late.ended() == 'met'


@pytest.mark.parametrize('index', [0, -1, 2, 10**8, 10**9, 10**30, 'abc', '1_0', '', '\u0661'])
def test_no_number_but_those_of_the_run_counts_as_a_process(index):
  port = free_port()
  first = Process(port, 2, 0)
  assert not said_to(port, greeting(index)).startswith(b'pagoda go')
  assert first.is_alive()
  assert Process(port, 2, 1).ended() == first.ended() == 'met'


def test_another_run_is_refused_and_process_0_says_so_once_and_goes_on_waiting(capsys):
  port = free_port()
  first = Process(port, 2, 0)
  for index in (1, 1, 5):
    assert 'of another run, with another --workdir' in Process(port, 9, index, run='runs/other').ended()
  assert Process(port, 2, 1).ended() == first.ended() == 'met'
  assert capsys.readouterr().err.count('refused a process of another run') == 1


@pytest.mark.parametrize('text', [
  b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(range(256)),
  b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', b'7 x y\n', b'\n', b'pagoda \n', b'pagoda ' + b'\xff' * 64 + b'\n',
])
def test_another_protocol_is_sent_away(text):
  port = free_port()
  first = Process(port, 2, 0)
  assert said_to(port, text) == b''
  assert Process(port, 2, 1).ended() == first.ended() == 'met'


def test_endless_lines_cost_no_memory_and_dripping_and_silent_connections_no_time(monkeypatch):
  """Process 0 ends at its limit with them there, and meets the others with them there."""
  monkeypatch.setattr(rendezvous, 'GREETING_SECONDS', 10.0 * HANG)  # which would help it
  over = threading.Event()

  def send(port, start, more, pause):
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)) as stranger:
      stranger.sendall(start)
      while not over.wait(pause):
        stranger.sendall(more)

  def strangers(port, silent):
    connect(port).close()
    for start, more, pause in [(b'', b'x' * 2**20, 0), (b'pagoda ', b'x' * 2**20, 0), (b'pagoda ', b'x', 0.5),
                               (greeting(1, run='other'), b'x' * 2**20, 0), *[(b'', b'', 10)] * silent]:
      threading.Thread(target=send, args=(port, start, more, pause), daemon=True).start()

  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  port = free_port()
  first = Process(port, 2, 0, limit=2)
  strangers(port, silent=20)
  assert 'waited 2 s for 2 processes' in first.ended()
  port = free_port()
  first = Process(port, 2, 0)
  strangers(port, silent=0)
  silent = [connect(port) for _ in range(rendezvous.MOST_SILENT + 50)]
  assert Process(port, 2, 1).ended() == first.ended() == 'met'
  over.set()
  for connection in silent:
    connection.close()
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_process_0_may_have_as_many_connections_as_there_are_processes(monkeypatch):
  """1,024 of them were told, under the usual limit of 1,024 files, that some had not come that were there."""
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    assert meet((2, 1), (2, 0)) == ['met'] * 2
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (258, before[1])
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
  monkeypatch.setattr(resource, 'getrlimit', lambda which: (1024, 1024))
  assert 'each of 1000 processes, and may have 1024 files open here (`ulimit -Hn`): must be 1128' in meet((1000, 0))[0]


def test_a_process_that_left_is_not_counted_and_may_come_again():
  port = free_port()
  first = Process(port, 3, 0)
  with connect(port) as gone:
    gone.sendall(greeting(1, count=3))
  others = [Process(port, 3, index) for index in (2, 1)]
  assert [process.ended() for process in (first, *others)] == ['met'] * 3


def test_the_port_is_free_for_the_coordinator_when_they_have_met(monkeypatch):
  """Also where strangers are still connected."""
  monkeypatch.setattr(rendezvous, 'POLL_SECONDS', 0.2)
  port = free_port()
  first = Process(port, 2, 0)
  with connect(port) as deaf, connect(port):
    deaf.sendall(greeting(1, run='other'))
    assert Process(port, 2, 1).ended() == first.ended() == 'met'
    _jax.get_distributed_runtime_service(f'[::]:{port}', 2).shutdown()
