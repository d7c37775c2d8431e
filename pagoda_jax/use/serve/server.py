"""The server: the page's files, what the generator is, and three calls, each a POST of JSON.

    GET  /model.json   calls.describe
    POST /draw         {seed, count, labels, omega} or {noise, labels, omega} -> {images: [{png, noise, label}], ...}
    POST /square       {picture} -> {png, width, height}: a picture as the generator would be shown it
    POST /edit         {edit, picture, mask, label, omega, steps, tries, seed} -> as /draw

A network of captions takes a `prompt` in place of labels.

Everything is in memory: no path of a request leads to a file.
"""

import asyncio
import concurrent.futures
import dataclasses
import errno
import json
import logging as python_logging
import math
import socket
from collections.abc import Callable

import uvicorn
from absl import logging
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route, Router

from pagoda_jax.use.generator import Generator
from pagoda_jax.use.serve import calls, connections, page_files
from pagoda_jax.use.serve.device import ENDING, Device, Stopped
from pagoda_jax.use.serve.limits import Limits, Memory, Rate, Refusal, check_host, check_site

# path -> file
FILES = {'/': page_files.FOLDER / 'page.html', '/backend.js': page_files.FOLDER / 'server.js'} | {
  f'/{name}': file for name, file in page_files.FILES.items()}
KINDS = {'.html': 'text/html', '.css': 'text/css', '.js': 'text/javascript'}
RULES = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
         "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = ((b'content-security-policy', RULES.encode()), (b'x-content-type-options', b'nosniff'),
           (b'referrer-policy', b'no-referrer'), (b'cross-origin-resource-policy', b'same-origin'),
           (b'cross-origin-opener-policy', b'same-origin'), (b'cache-control', b'no-store'))
PIECE = 2**16  # bytes of an answer that are handed on before the client has taken those before


class ServeError(ValueError):
  """The server cannot begin."""


class Whole(Response):
  """JSON in pieces, so that what a slow client has not taken is known to be under way."""

  def __init__(self, content: bytes, status: int = 200, headers: dict | None = None):
    super().__init__(content, status, headers, 'application/json')

  async def __call__(self, scope, receive, send):
    await send({'type': 'http.response.start', 'status': self.status_code, 'headers': self.raw_headers})
    for start in range(0, len(self.body), PIECE):
      more = start + PIECE < len(self.body)
      await send({'type': 'http.response.body', 'body': self.body[start : start + PIECE], 'more_body': more})


def refused(refusal: Refusal) -> Whole:
  headers = {} if refusal.retry is None else {'retry-after': str(refusal.retry)}
  return Whole(json.dumps({'error': str(refusal)}).encode(), refusal.status, headers)


class Guard:
  """What every request meets first: who sends it, how often; and the headers of every answer.

  Whatever goes wrong within becomes an answer: a request cannot end the server.
  """

  def __init__(self, app, names: tuple[str, ...], rate: Rate):
    self._app, self._names, self._rate = app, names, rate

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    headers = Headers(scope=scope)
    unread = headers.get('content-length', '0') != '0' or 'transfer-encoding' in headers
    begun = False

    async def received():
      nonlocal unread
      message = await receive()
      unread = unread and message.get('more_body', False)
      return message

    async def answered(message):
      nonlocal begun
      if message['type'] == 'http.response.start':
        begun = True
        close = [(b'connection', b'close')] if unread else []
        message = message | {'headers': [*message['headers'], *HEADERS, *close]}
      await send(message)

    try:
      check_host(headers.get('host'), self._names)
      if scope['method'] not in ('GET', 'HEAD'):
        check_site(headers)
        self._rate.check(scope['client'][0] if scope['client'] else '')
      await self._app(scope | {'app': self}, received, answered)  # with an app, the router raises what it refuses
    except Refusal as refusal:
      await refused(refusal)(scope, received, answered)
    except HTTPException as error:  # of starlette: no such path, or no such method there
      await refused(Refusal(error.status_code, f'{scope["method"]} here: {error.detail}'))(scope, received, answered)
    except Stopped:
      pass  # nobody is there to be answered
    except asyncio.CancelledError:  # it was given time to end, and has not
      if not begun:
        await refused(Refusal(503, ENDING, 5))(scope, received, answered)
    except Exception:
      logging.exception('a request failed')
      if not begun:
        await refused(Refusal(500, 'this went wrong; the server has written down why'))(scope, received, answered)


async def read_body(headers: Headers, receive, limits: Limits, memory: Memory, held: list[int]) -> bytes:
  """The body of a request; appends to `held` what it took of `memory`.

  Raises:
    Refusal: it is too large by what it says or by what comes (413), too slow (408), or there is no room (503).
    Stopped: the client has gone.
  """
  too_large = Refusal(413, f'the body has more than {limits.body} bytes, the most that is taken')
  declared = headers.get('content-length', '')
  if declared.isdecimal() and int(declared) > limits.body:
    raise too_large
  body, more = bytearray(), True
  try:
    async with asyncio.timeout(limits.body_seconds):
      while more:
        message = await receive()
        if message['type'] == 'http.disconnect':
          raise Stopped
        body += message.get('body', b'')
        if len(body) > limits.body:
          raise too_large
        held.append(memory.take(len(message.get('body', b''))))
        more = message.get('more_body', False)
  except TimeoutError:
    raise Refusal(408, f'the body has not come within {limits.body_seconds:g} s') from None
  return bytes(body)


async def _gone(receive) -> None:
  while (await receive())['type'] != 'http.disconnect':
    pass


@dataclasses.dataclass(frozen=True)
class Post:
  """One call: its body read, its work done in turn, its answer sent; what it holds of memory is known all the while.

  Attributes:
    do: do(body, receive) -> JSON.
  """

  do: Callable
  limits: Limits
  memory: Memory

  async def __call__(self, scope, receive, send):
    headers, held = Headers(scope=scope), []
    if headers.get('content-type', '').split(';')[0].strip().lower() != 'application/json':
      raise Refusal(415, 'content-type must be application/json')
    try:
      body = await read_body(headers, receive, self.limits, self.memory, held)
      found = await self.do(body, receive)
      held.append(self.memory.take(len(found)))
      await Whole(found)(scope, receive, send)
    finally:
      self.memory.give(sum(held))


class Application:
  """The page and the calls over HTTP; `asgi` is what a server is given.

  Args:
    what: the calls of the generator.
    limits: of requests.
    names: that the server may be called by, besides addresses and localhost.
  """

  def __init__(self, what: calls.Calls, limits: Limits, names: tuple[str, ...] = ()):
    self._what, self.memory = what, Memory(limits.memory)
    self._device, self._pictures = Device(limits.queue), Device(limits.queue)  # one picture decoded at a time
    self._host = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='host')
    model = Whole(json.dumps(calls.describe(what.generator, limits)).encode())
    gets = {path: Response(file.read_bytes(), media_type=KINDS[file.suffix]) for path, file in FILES.items()}
    posts = {'/draw': self._draw, '/edit': self._edit, '/square': self._square}
    self.asgi = Guard(Router([
      *(Route(path, answer, methods=['GET']) for path, answer in {**gets, '/model.json': model}.items()),
      *(Route(path, Post(do, limits, self.memory), methods=['POST']) for path, do in posts.items()),
    ], redirect_slashes=False), names, Rate(limits.rate))

  async def _draw(self, body, receive) -> bytes:
    return await self._drawn(await self._beside(self._what.draw, body), receive)

  async def _edit(self, body, receive) -> bytes:
    function, _ = await self._pictures.run(lambda work: self._what.edit(body), _gone(receive))
    return await self._drawn(function, receive)

  async def _square(self, body, receive) -> bytes:
    found, _ = await self._pictures.run(lambda work: self._what.square(body), _gone(receive))
    return json.dumps(found).encode()

  async def _drawn(self, function, receive) -> bytes:
    found, work = await self._device.run(function, _gone(receive))
    return await self._beside(calls.answer, *found, work.waited, work.took)

  async def _beside(self, function, *arguments):
    """What takes a moment and would hold up the loop."""
    return await asyncio.get_running_loop().run_in_executor(self._host, function, *arguments)

  def end(self) -> None:
    """Drops what waits, and takes nothing more."""
    self._pictures.end()
    self._device.end()


def listening(host: str, port: int) -> socket.socket:
  """A socket of an address, which nobody else has; who connects waits until it is served. Port 0: any that is free.

  Raises:
    ServeError: it is taken, or not of this machine.
  """
  try:
    kind, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(kind, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(place)
    bound.listen(128)  # else another server could bind it too until this one listens
    return bound
  except OSError as error:
    remedy = 'choose another --port (0: any that is free)' if error.errno in (errno.EADDRINUSE, errno.EACCES) else (
      'give an address of this machine as --host')
    raise ServeError(f'{host}:{port}: {error.strerror}; {remedy}') from None


def address(bound: socket.socket) -> str:
  """URL of a socket."""
  host, port = bound.getsockname()[:2]
  return f'http://[{host}]:{port}/' if ':' in host else f'http://{host}:{port}/'


def serve(generator: Generator, bound: socket.socket, limits: Limits, names: tuple[str, ...] = (),
          ready: Callable[[], None] = lambda: None) -> int:
  """Serves until SIGINT or SIGTERM; returns how many requests were answered.

  Args:
    generator: what draws.
    bound: of `listening`.
    limits, names: as `Application` takes them.
    ready: called once everything is compiled.
  """
  what = calls.Calls(generator, limits)
  what.warm_up()
  application = Application(what, limits, names)
  python_logging.getLogger('uvicorn.error').setLevel(python_logging.ERROR)  # it warns of every broken request
  config = uvicorn.Config(
    application.asgi, http=connections.protocol(limits), ws='none', lifespan='off', log_config=None, access_log=False,
    proxy_headers=False, server_header=False, timeout_keep_alive=max(int(limits.head_seconds / 2), 1),
    timeout_graceful_shutdown=math.ceil(limits.end_seconds), h11_max_incomplete_event_size=2**14, loop='asyncio')
  server = connections.Server(config, application.end)
  ready()
  server.run(sockets=[bound])
  return server.server_state.total_requests
