"""Where the processes of a run meet before JAX starts: one port, short lines, one deadline, a name for who is missing.

JAX's own start ends in a stack trace that does not name who is missing. Process 0 listens at the coordinator's
address, at which JAX listens afterwards. Whoever comes says one line,

    pagoda RUN COUNT INDEX HOST

and hears 'pagoda go' when all are there, or 'pagoda no REASON'. RUN keeps other runs out that were given the same
address by mistake; like the coordinator, which lets everyone in, it is no defence against those who mean harm.
"""

import hashlib
import re
import resource
import selectors
import socket
import struct
import sys
import time

POLL_SECONDS = 2.0
GREETING_SECONDS = 10.0  # within which whoever connects must have said the line
MOST_SILENT = 256  # connections that have not; the oldest makes room for one more
LONGEST = 4096  # bytes of a line
SPARE = 128  # descriptors that process 0 needs besides those of the others
OURS = b'pagoda '
GREETING = re.compile(OURS + rb'([0-9a-f]{32}) (\d{1,9}) (\d{1,9}) (\S{1,255})')


class HostsError(RuntimeError):
  """Processes did not start, did not come or do not fit together; the message names them."""


def meet(address: str, count: int, index: int, limit: int, run: str) -> None:
  """Returns in each of `count` processes when all have called it.

  Args:
    address: HOST:PORT of process 0.
    count, index: how many processes there are, which this is, in [0, count).
    limit: seconds to wait for the others.
    run: what the processes of this run have in common and those of another do not, such as its work directory.

  Raises:
    HostsError: names who did not come within `limit`, or what does not fit.
  """
  host, port = address.rsplit(':', 1)
  token = hashlib.sha256(run.encode()).hexdigest()[:32]
  if index == 0:
    _make_room(count)
    _Meeting(int(port), count, token, limit).hold()
  else:
    name = '-'.join(socket.gethostname().split()) or '?'
    _knock(address, host.strip('[]'), int(port), f'pagoda {token} {count} {index} {name}\n'.encode(), limit)


def _make_room(count: int) -> None:
  """Lets process 0 have a connection to each other one, here and at the coordinator, beside the files that it reads.

  The usual limit of 1024 descriptors is one of programs; a process may raise its own up to the hard one.
  """
  soft, hard = (float('inf') if most == resource.RLIM_INFINITY else most
                for most in resource.getrlimit(resource.RLIMIT_NOFILE))
  if hard < count + SPARE:
    raise HostsError(f'process 0 holds a connection to each of {count} processes, and may have {hard} files open here '
                     f'(`ulimit -Hn`): must be {count + SPARE} or more')
  if soft < (wanted := min(soft + count, hard)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _of_ours(received: bytes) -> bool:
  """Whether this can be the beginning of a line of ours."""
  return received[: len(OURS)] == OURS[: len(received)] and len(received) <= LONGEST


def _knock(address, host, port, greeting, limit):
  """The part of every process but 0: until process 0 answers."""
  deadline = time.monotonic() + limit + 2 * POLL_SECONDS  # process 0 says who is missing: give it the time
  other, why = '', ''
  while time.monotonic() < deadline:
    answer = b''
    try:
      with socket.create_connection((host, port), timeout=POLL_SECONDS) as connection:
        connection.sendall(greeting)
        while b'\n' not in answer and _of_ours(answer):
          connection.settimeout(max(deadline - time.monotonic(), 0.1))
          if not (part := connection.recv(LONGEST)):
            break
          answer += part
    except OSError as error:  # not there yet, or gone
      why = f': {error.strerror or error}'
    if answer == b'pagoda go\n':
      return
    if answer.startswith(b'pagoda no ') and answer.endswith(b'\n'):
      raise HostsError(_printable(answer[len('pagoda no '):-1]))
    if not _of_ours(answer) and not other:
      other = (f'at {address} answers what is not a process 0 that waits for others: most likely the coordinator of a '
               'run that has not ended yet and that this process has dropped out of, or another program')
      print(f'{other}. Tries again for {limit} s.', file=sys.stderr, flush=True)
    time.sleep(POLL_SECONDS if other else 0.2)
  raise HostsError(f'waited {limit} s; {other}. End that run first, or take another port.' if other else
                   f'process 0 at {address} did not answer within {limit} s: it has not started or is unreachable from '
                   f'here{why}')


class _Guest:
  """A connection to process 0: silent at first, then present as process `index`, then answered."""

  def __init__(self, connection: socket.socket):
    self.connection = connection
    self.received, self.answered = b'', False
    self.index, self.name = 0, ''
    self.deadline = 0.0

  def has_left(self) -> bool:
    try:
      return self.connection.recv(1, socket.MSG_PEEK) == b''
    except BlockingIOError:
      return False
    except OSError:
      return True


class _Meeting:
  """Process 0's part: whoever comes is read side by side with the others, and costs none of them time."""

  def __init__(self, port: int, count: int, token: str, limit: int):
    self.port, self.count, self.token, self.limit = port, count, token, limit
    self.present: dict[int, _Guest] = {}
    self.others: dict[_Guest, None] = {}  # silent or answered, in the order of their deadlines
    self.problem = ''
    self.said_other_run = False

  def hold(self) -> None:
    """Until all are there, or it is certain that they will not be."""
    deadline = time.monotonic() + self.limit
    with selectors.DefaultSelector() as self.selector:
      with self._listen() as server:
        self.selector.register(server, selectors.EVENT_READ)
        while len(self.present) < self.count - 1 and not self.problem:
          if time.monotonic() >= deadline:
            self.problem = (f'waited {self.limit} s for {self.count} processes; not started, gone again, or without a '
                            f'way to process 0: process {self._missing()}')
          else:
            self._round(server, deadline)
        self.selector.unregister(server)
      for guest in self.present.values():
        self._answer(guest, f'no {self.problem}' if self.problem else 'go')
      self.present = {}
      # They close first, so that the port is free at once; one that does not is not waited for.
      deadline = time.monotonic() + POLL_SECONDS
      while any(guest.answered for guest in self.others) and time.monotonic() < deadline:
        self._round(None, deadline)
      for guest in list(self.others):
        self._drop(guest)
    if self.problem:
      raise HostsError(self.problem)

  def _listen(self) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
      server = socket.create_server(('', self.port), family=family, dualstack_ipv6=family == socket.AF_INET6,
                                    backlog=max(self.count, 128))
    except OSError as error:
      raise HostsError(
        f'--coordinator_address: cannot listen at port {self.port} here: {error.strerror or error}') from None
    server.setblocking(False)
    return server

  def _missing(self) -> str:
    late = [str(index) for index in range(1, self.count) if index not in self.present]
    return ', '.join(late[:16]) + (f' and {len(late) - 16} more' if len(late) > 16 else '')

  def _round(self, server: socket.socket | None, deadline: float) -> None:
    """Waits for the next thing to happen, at most until the deadline, and sees to it."""
    while (oldest := next(iter(self.others), None)) and oldest.deadline <= time.monotonic():
      self._drop(oldest)
    until = min(deadline, oldest.deadline) if oldest else deadline
    for key, _ in self.selector.select(max(until - time.monotonic(), 0.0)):
      guest = key.data
      if guest is None:
        self._accept(server)
      elif guest in self.others:
        self._read(guest)
      elif self.present.get(guest.index) is guest:  # it has said all that there is to say: it leaves
        del self.present[guest.index]
        self._drop(guest)

  def _accept(self, server: socket.socket) -> None:
    if len(self.others) >= MOST_SILENT:
      self._drop(next(iter(self.others)))
    try:
      connection, _ = server.accept()
    except OSError:  # gone again; or no descriptor is left: the oldest gives one back
      if self.others:
        self._drop(next(iter(self.others)))
      else:
        time.sleep(0.1)
      return
    connection.setblocking(False)
    guest = _Guest(connection)
    self.selector.register(connection, selectors.EVENT_READ, guest)
    self._await(guest)

  def _await(self, guest: _Guest) -> None:
    """It has GREETING_SECONDS from now: to say the line, or to close after the answer."""
    guest.deadline = time.monotonic() + GREETING_SECONDS
    self.others.pop(guest, None)
    self.others[guest] = None

  def _read(self, guest: _Guest) -> None:
    try:
      part = guest.connection.recv(LONGEST)
    except BlockingIOError:
      return
    except OSError:
      part = b''
    if not part or guest.answered:  # its end, or more than it has to say
      self._drop(guest)
      return
    guest.received += part
    line, end, _ = guest.received.partition(b'\n')
    if end and (said := GREETING.fullmatch(line)):
      self._judge(guest, said[1].decode(), int(said[2]), int(said[3]), _printable(said[4]))
    elif end or not _of_ours(guest.received):
      self._drop(guest)

  def _judge(self, guest: _Guest, token: str, count: int, index: int, name: str) -> None:
    """What to do with someone who has said the line."""
    if token != self.token:
      here = f'process 0 ({socket.gethostname()})'
      if not self.said_other_run:
        self.said_other_run = True
        print(f'{here}: refused a process of another run, with another --workdir (on {name}); still waits for process '
              f'{self._missing()}', file=sys.stderr, flush=True)
      self._answer(guest, f'no {here} at this --coordinator_address is of another run, with another --workdir: give '
                          'both the same, or this run a port of its own')
    elif count != self.count:
      self._end(guest, f'process {index} ({name}) was started for {count} processes, process 0 for {self.count}')
    elif not 0 < index < count:
      self._answer(guest, f'no process {index} ({name}): must be from 1 to {count - 1} to come to process 0')
    elif index not in self.present or self.present[index].has_left():
      if index in self.present:
        self._drop(self.present[index])
      guest.index, guest.name = index, name
      del self.others[guest]
      self.present[index] = guest
    else:
      self._end(guest, f'two processes are number {index}: on {self.present[index].name} and on {name}')

  def _end(self, guest: _Guest, problem: str) -> None:
    """Nobody can go on: two that belong together do not fit together."""
    self.problem = self.problem or problem
    self._answer(guest, f'no {problem}')

  def _answer(self, guest: _Guest, text: str) -> None:
    try:
      guest.connection.sendall(f'pagoda {text}\n'.encode())
    except OSError:
      pass  # gone, or does not listen
    guest.answered = True
    self._await(guest)

  def _drop(self, guest: _Guest) -> None:
    """Closes a connection in such a way that nothing of it stays behind and keeps the port."""
    self.others.pop(guest, None)
    self.selector.unregister(guest.connection)
    try:
      guest.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    except OSError:
      pass
    guest.connection.close()


def _printable(text: bytes) -> str:
  return ''.join(letter if letter.isprintable() else '?' for letter in text.decode('utf-8', 'replace'))
