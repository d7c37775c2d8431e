"""A server as a process of its own, and ways to talk to it: well, badly, and slowly."""

import base64
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time

from quick import XLA_FLAGS
from runs import ROOT

STRICT = """
import json, sys
import pagoda_jax
from pagoda_jax.use.serve import server
from pagoda_jax.use.serve.limits import Limits
bound = server.listening('127.0.0.1', 0)
ready = lambda: print(server.address(bound) + ': ready', flush=True)
server.serve(pagoda_jax.load(sys.argv[1]), bound, Limits(**json.loads(sys.argv[2])), ready=ready)
"""


class Served:
  """A server that listens on loopback; `log` is where its standard error goes."""

  def __init__(self, process, log):
    self.process, self.log, said = process, log, []
    for line in process.stdout:
      said.append(line)
      if found := re.match(r'http://127\.0\.0\.1:(\d+)/', line):
        self.port = int(found[1])
        return
    raise RuntimeError('it did not begin: ' + ''.join(said))

  @property
  def url(self):
    return f'http://127.0.0.1:{self.port}/'

  @property
  def resident(self) -> int:
    """Bytes of memory."""
    with open(f'/proc/{self.process.pid}/statm') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

  def ask(self, method, path, body=None, headers=None, timeout=300):
    """(status, body, headers)."""
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout)
    try:
      connection.request(method, path, body, headers or {})
      answer = connection.getresponse()
      return answer.status, answer.read(), dict(answer.getheaders())
    finally:
      connection.close()

  def get(self, path, **headers):
    return self.ask('GET', path, headers=headers)

  def post(self, path, values, headers=None, timeout=300):
    """(status, JSON, headers) of values, or of bytes as they are."""
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    headers = {'Content-Type': 'application/json'} | (headers or {})
    status, found, answered = self.ask('POST', path, body, headers, timeout)
    return status, json.loads(found), answered

  def connect(self) -> socket.socket:
    return socket.create_connection(('127.0.0.1', self.port), timeout=120)

  def raw(self, data: bytes, half_close=False) -> bytes:
    """Everything that is answered to bytes until the server closes."""
    with self.connect() as connection:
      with contextlib.suppress(ConnectionError):
        connection.sendall(data)
        if half_close:
          connection.shutdown(socket.SHUT_WR)
      return received(connection)


def received(connection) -> bytes:
  """What comes until the other side closes, or resets."""
  found = b''
  with contextlib.suppress(ConnectionError):
    while data := connection.recv(2**16):
      found += data
  return found


def head(path='/draw', **headers) -> bytes:
  """The head of a POST."""
  fields = {'Host': '127.0.0.1', 'Content-Type': 'application/json'} | {
    name.replace('_', '-'): value for name, value in headers.items()}
  return f'POST {path} HTTP/1.1\r\n'.encode() + b''.join(
    f'{name}: {value}\r\n'.encode() for name, value in fields.items() if value is not None) + b'\r\n'


def text(content: bytes) -> str:
  return base64.b64encode(content).decode()


@contextlib.contextmanager
def running(command, log):
  """Served of a command."""
  env = {**os.environ, 'XLA_FLAGS': XLA_FLAGS, 'PYTHONPATH': str(ROOT)}
  with open(log, 'w') as errors:
    process = subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, stdout=subprocess.PIPE,
                               stderr=errors)
  try:
    yield Served(process, log)
  finally:
    process.kill()
    process.communicate()


def by_command(log, *flags):
  return running(['-m', 'pagoda_jax.main', 'serve', '--port=0', *flags], log)


def strictly(log, folder, **limits):
  return running(['-c', STRICT, folder, json.dumps(limits)], log)


def alive(found) -> bool:
  return found.process.poll() is None and found.post('/draw', {'seed': 1, 'labels': [2]})[0] == 200


def wait_until(holds):
  ends = time.monotonic() + 600
  while True:
    with contextlib.suppress(ConnectionError, AssertionError, json.JSONDecodeError):
      if holds():
        return
    assert time.monotonic() < ends
    time.sleep(0.1)
