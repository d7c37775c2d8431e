"""What a request may ask for, who may ask, and how often; what is refused says why, and when to come again."""

import collections
import dataclasses
import ipaddress
import math
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

LOCAL = ('localhost',)  # names besides addresses that lead here from every machine
ADDRESSES = 4096  # clients whose rate is remembered


class Refusal(Exception):
  """An answer to a request that is not done.

  Args:
    status: of HTTP.
    message: what is wrong, and what would be right.
    retry: seconds after which it may be tried again; None: not as it is.
  """

  def __init__(self, status: int, message: str, retry: float | None = None):
    super().__init__(message)
    self.status = status
    self.retry = None if retry is None else min(max(math.ceil(retry), 1), 60)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of one server.

  Attributes:
    images: a request.
    pixels: of all images of a request; large images are fewer.
    picture: pixels of an uploaded picture, known before anything of it is decoded.
    body: bytes of a request.
    memory: bytes of all bodies and answers under way.
    queue: requests that wait for the device or are at it.
    rate: requests a minute of one client; a sixth of them at once.
    connections: open at a time.
    head_seconds: for a request's head to arrive; body_seconds: for its body; answer_seconds: for an answer to be taken.
    end_seconds: for what is under way when the server is asked to end.
  """

  images: int = 64
  pixels: int = 2**22
  picture: int = 2**25
  body: int = 2**24
  memory: int = 2**28
  queue: int = 32
  rate: float = 300.0
  connections: int = 512
  head_seconds: float = 10.0
  body_seconds: float = 30.0
  answer_seconds: float = 60.0
  end_seconds: float = 10.0

  def images_of(self, side: int) -> int:
    """How many images of a side a request may ask for."""
    return min(self.images, max(self.pixels // side**2, 1))


class Memory:
  """Bytes that all requests hold together; each takes before it holds, and gives back when it ends."""

  def __init__(self, most: int):
    self._most, self._used, self._lock = most, 0, threading.Lock()

  @property
  def used(self) -> int:
    return self._used

  def take(self, count: int) -> int:
    """`count`; raises Refusal (503) where there is no room."""
    with self._lock:
      if self._used + count > self._most:
        raise Refusal(503, 'the server holds as much as it may for other requests; try again', 2)
      self._used += count
    return count

  def give(self, count: int) -> None:
    with self._lock:
      self._used -= count


class Rate:
  """Requests of each client: so many a minute, and a sixth of them at once."""

  def __init__(self, a_minute: float, clock: Callable[[], float] = time.monotonic):
    self._a_second, self._most, self._clock = a_minute / 60, max(a_minute / 6, 1), clock
    self._left: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

  def check(self, address: str) -> None:
    """Counts a request; raises Refusal (429) where there were too many."""
    client, now = client_of(address), self._clock()
    left, then = self._left.pop(client, (self._most, now))
    left = min(left + (now - then) * self._a_second, self._most)
    enough = left >= 1
    self._left[client] = (left - enough, now)
    while len(self._left) > ADDRESSES:  # the one that has been quiet for longest
      self._left.popitem(last=False)
    if not enough:
      raise Refusal(429, f'more than {60 * self._a_second:g} requests a minute; wait', (1 - left) / self._a_second)


def client_of(address: str) -> str:
  """Who an address is of: of IPv6 the /64, as one machine has all of it."""
  try:
    found = ipaddress.ip_address(address)
  except ValueError:
    return address
  if found.version == 4:
    return str(found)
  return str(found.ipv4_mapped or ipaddress.ip_network((int(found) >> 64 << 64, 64)))


def check_host(host: str | None, names: tuple[str, ...]) -> None:
  """Refuses names that are not the server's own.

  A page of somebody else's can have its own name lead here ("DNS rebinding"), and would then be of one origin with the
  server. An address cannot be made to lead elsewhere, so every one is taken.
  """
  try:
    name = urlsplit(f'//{host}').hostname if host else None
    _ = urlsplit(f'//{host}').port
  except ValueError:
    name = None
  if name in LOCAL or (name and name.rstrip('.') in names):
    return
  try:
    ipaddress.ip_address(name or '')
  except ValueError:
    raise Refusal(403, f'Host: {str(host)[:100]}: not a name of this server; --names=NAME allows it') from None


def check_site(headers: Mapping[str, str]) -> None:
  """Refuses what the page of another site sends."""
  site = headers.get('sec-fetch-site', 'none')
  if site not in ('same-origin', 'none'):
    raise Refusal(403, f'Sec-Fetch-Site: {site[:100]}: pages of other sites may not send anything here')
  origin = headers.get('origin')
  if origin is None:
    return
  try:
    own = urlsplit(origin).scheme in ('http', 'https') and urlsplit(origin).netloc == headers.get('host')
  except ValueError:
    own = False
  if not own:
    raise Refusal(403, f'Origin: {origin[:100]}: pages of other sites may not send anything here')
