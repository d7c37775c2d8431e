"""Ctrl-C and preemption: the loop is asked to stop, saves, and says how to go on."""

import signal

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: launchers start the job again
EXIT_INTERRUPTED = 130


class Interrupted(Exception):
  """A phase was asked to stop and has saved."""

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code


class StopRequest:
  """Within `with`, SIGINT and SIGTERM ask for a stop; a second SIGINT stops at once."""

  def __init__(self):
    self._signal = None
    self._previous = {}

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *unused):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _receive(self, number, frame):
    del frame
    if self._signal == signal.SIGINT == number:
      raise KeyboardInterrupt
    self._signal = number

  def wanted(self, step: int) -> bool:
    """Whether to stop after this step; all hosts get the same answer at the same step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._signal is not None

  @property
  def exit_code(self) -> int:
    return EXIT_INTERRUPTED if self._signal == signal.SIGINT else EXIT_PREEMPTED
