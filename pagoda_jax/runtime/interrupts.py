"""Ctrl-C and preemption: the run is asked to stop, saves, and says how to go on."""

import os
import signal

from pagoda_jax.runtime import distributed

EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75: launchers start the job again
EXIT_INTERRUPTED = 130


class Interrupted(Exception):
  """A phase was asked to stop and has saved."""

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code


class StopRequest:
  """Within `with`, SIGINT and SIGTERM to any process ask all for a stop; a second SIGINT stops at once."""

  def __init__(self):
    self._signal = None
    self._previous = {}
    self._stop_at: dict[str, int] = {}
    self.exit_code = 0

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      # None: a handler that is not Python's, which cannot be put back (JAX installs one beside several processes)
      self._previous[number] = signal.signal(number, self._receive) or signal.SIG_DFL
    return self

  def __exit__(self, *unused):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _receive(self, number, frame):
    del frame
    if self._signal == signal.SIGINT == number:
      raise KeyboardInterrupt
    self._signal = number
    text = b'stopping after this step; Ctrl-C once more stops at once\n' if number == signal.SIGINT else b'stopping\n'
    os.write(2, text)  # print is not safe within a handler

  def _own_code(self) -> int:
    return EXIT_INTERRUPTED if self._signal == signal.SIGINT else EXIT_PREEMPTED

  def wanted(self, phase: str, step: int) -> bool:
    """Whether to stop after this step of a phase; every process gets the same answer at the same step.

    Each must call it after every step that it dispatched, once the step before is finished everywhere.
    """
    if not distributed.several():
      self.exit_code = self._own_code()
      return self._signal is not None
    # No process is more than one step ahead of another, as each waits for the step before: step + 2 is one that
    # none has reached, and all look once more before it.
    self._tell(f'stop/{phase}', step + 2)
    agreed = self._told(f'stop/{phase}')
    return agreed is not None and step >= agreed

  def wanted_alone(self, phase: str) -> bool:
    """Whether to stop now, where processes work without waiting for each other."""
    if not distributed.several():
      return self.wanted(phase, 0)
    self._tell(f'stop/{phase}', 0)
    return self._told(f'stop/{phase}') is not None

  def wanted_before(self, phase: str) -> bool:
    """Whether not to begin a phase; waits for all processes, which get the same answer."""
    if not distributed.several():
      return self.wanted(phase, 0)
    self._tell(f'stop_before/{phase}', 0)
    distributed.wait_for_all(f'begin {phase}')
    return self._told(f'stop_before/{phase}') is not None

  def _tell(self, key, step):
    if self._signal is not None:
      distributed.put(key, f'{step} {self._own_code()}')

  def _told(self, key) -> int | None:
    told = distributed.look(key)
    if told is None:
      return None
    step, self.exit_code = map(int, told.split())
    return step
