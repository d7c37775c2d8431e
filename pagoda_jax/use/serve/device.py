"""The one queue for the device: first come, first served; who has gone is not served."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pagoda_jax.use.serve.limits import Refusal

ENDING = 'the server is about to end'


class Stopped(Exception):
  """Nobody waits for this work any more."""


class Work:
  """One request's work.

  Attributes:
    waited, took: seconds in the queue and at the device.
  """

  def __init__(self):
    self._stop, self._came = threading.Event(), time.perf_counter()
    self.waited = self.took = 0.0

  def stop(self) -> None:
    self._stop.set()

  def check(self, *unused) -> None:
    """Called by long work now and then, from its thread; raises Stopped when it may end."""
    del unused
    if self._stop.is_set():
      raise Stopped

  def run(self, function: Callable[['Work'], Any]) -> Any:
    self.check()
    begun = time.perf_counter()
    self.waited = begun - self._came
    try:
      return function(self)
    finally:
      self.took = time.perf_counter() - begun


class Device:
  """A thread that works for one request after the other.

  Args:
    most: requests that wait or are worked for.
  """

  def __init__(self, most: int):
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='device')
    self._most, self._lock, self._works = most, threading.Lock(), {}
    self._mean, self._ending = 0.1, False

  @property
  def length(self) -> int:
    """Requests that wait or are worked for."""
    return len(self._works)

  def _submit(self, work: Work, function) -> concurrent.futures.Future:
    with self._lock:
      if self._ending:
        raise Refusal(503, ENDING, 5)
      if len(self._works) >= self._most:
        raise Refusal(503, f'{self._most} requests wait already; try again', self._most * self._mean)
      future = self._pool.submit(work.run, function)
      self._works[future] = work
    future.add_done_callback(self._done)
    return future

  def _done(self, future):
    with self._lock:
      work = self._works.pop(future)
      if work.took:
        self._mean += 0.2 * (work.took - self._mean)

  async def run(self, function: Callable[[Work], Any], gone: Awaitable) -> tuple[Any, Work]:
    """(what function(work) returns in its turn, the work).

    Args:
      gone: ends when nobody waits for it any more; what waits is then taken out of the queue, what runs is asked to
        end.

    Raises:
      Refusal: the queue is full, or the server ends.
      Stopped: nobody waits for it.
    """
    work, gone = Work(), asyncio.ensure_future(gone)
    try:
      future = self._submit(work, function)
    except Refusal:
      gone.cancel()  # a coroutine that is left alone is complained of
      raise
    result = asyncio.wrap_future(future)
    try:
      await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
      if result.done() and not result.cancelled():
        return result.result(), work
      raise Stopped
    except Stopped:
      if self._ending:
        raise Refusal(503, ENDING, 5) from None
      raise
    finally:
      work.stop()
      future.cancel()  # where it has not begun
      result.cancel()
      gone.cancel()

  def end(self) -> None:
    """Takes nothing more, drops what waits and asks what runs to end; does not wait for it."""
    with self._lock:
      self._ending = True
      works = list(self._works.values())
    for work in works:
      work.stop()
    self._pool.shutdown(wait=False, cancel_futures=True)
