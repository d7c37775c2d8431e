"""Connections that do not get on are ended: heads and bodies that drip, answers that nobody takes."""

import asyncio
import socket
import struct
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pagoda_jax.use.serve.limits import Limits

LINGER_SECONDS = 2.0
_BODY = b'{"error": "too many connections are open; try again"}'
FULL = (b'HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close\r\n'
        b'content-length: %d\r\n\r\n' % len(_BODY) + _BODY)


class Lingering:
  """A transport that goes on reading for a moment when it is closed with a body unread.

  The system would tell the client of a reset connection, which takes the answer away that says why the body was
  refused.

  Args:
    transport: asyncio's.
    unread: unread() -> whether there is more to come of a body.
  """

  def __init__(self, transport, unread: Callable[[], bool]):
    self._transport, self._unread, self.lingers = transport, unread, False

  def __getattr__(self, name):
    return getattr(self._transport, name)

  def is_closing(self) -> bool:
    return self.lingers or self._transport.is_closing()

  def close(self) -> None:
    if self.is_closing():
      return
    if not self._unread():
      self._transport.close()
      return
    self.lingers = True
    try:
      self._transport.resume_reading()
      self._transport.write_eof()
    except OSError:  # the client has gone already
      self._transport.abort()
    else:
      asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.abort)


def protocol(limits: Limits) -> type[H11Protocol]:
  """The class of connections with these limits."""

  class Connection(H11Protocol):
    """`look` ends it where it is late."""

    def connection_made(self, transport):
      full = len(self.connections) >= limits.connections
      super().connection_made(Lingering(transport, lambda: full or self.conn.their_state is h11.SEND_BODY))
      self._seen, self._since, self._unsent_since = None, self.loop.time(), None
      if full:
        self.transport.write(FULL)
        self.transport.close()

    def data_received(self, data):
      if not self.transport.lingers:
        super().data_received(data)

    def timeout_keep_alive_handler(self):
      if not self.transport.is_closing():
        super().timeout_keep_alive_handler()

    def shutdown(self):
      if not self.transport.is_closing():
        super().shutdown()

    def look(self, now: float) -> None:
      """Called about once a second."""
      state = self.conn.their_state, self.cycle
      if state != self._seen:
        self._seen, self._since = state, now
      unsent = self.transport.get_write_buffer_size() > 0
      self._unsent_since = (self._unsent_since or now) if unsent else None
      most = {h11.IDLE: limits.head_seconds, h11.SEND_BODY: limits.body_seconds + 5}.get(self.conn.their_state)
      if unsent and now - self._unsent_since > limits.answer_seconds:
        # The system, too, is to forget what it holds for this client; it would offer it for minutes.
        self.transport.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.transport.abort()
      elif most and now - self._since > most:
        self.transport.abort()

  return Connection


class Server(uvicorn.Server):
  """Looks at its connections each second; ends in order at SIGINT and SIGTERM, and is not killed by them after that.

  Args:
    ending: called when it is asked to end.
  """

  def __init__(self, config: uvicorn.Config, ending):
    super().__init__(config)
    self._ending = ending

  async def on_tick(self, counter: int) -> bool:
    if counter % 10 == 0:
      now = asyncio.get_running_loop().time()
      for connection in list(self.server_state.connections):
        connection.look(now)
    return await super().on_tick(counter)

  async def shutdown(self, sockets=None) -> None:
    self._ending()
    await super().shutdown(sockets)
    self._captured_signals.clear()  # they have been heeded
