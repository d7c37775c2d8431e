"""Runs of the tiny experiment: commands in this process or in one of their own, and what they leave."""

import os
import pathlib
import subprocess
import sys

from quick import XLA_FLAGS

from pagoda_jax import main
from pagoda_jax.training import checkpoints

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = f'--config={ROOT / "tests" / "tiny.py"}'
ORDER = ['teacher', 'invert', 'distill', 'grow_16']


def pagoda(*args):
  """The exit code of a command, run in this process."""
  return main.main([str(arg) for arg in args])


def start(*args, **kwargs):
  """A command as a process of its own, on one device."""
  env = {**os.environ, 'XLA_FLAGS': XLA_FLAGS, 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [sys.executable, '-m', 'pagoda_jax.main', *map(str, args)], env=env, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs,
  )  # fmt: skip


def digest(folder, phase):
  """(step, SHA-256 of everything) of a phase's newest checkpoint."""
  state, step = checkpoints.read_state(folder / phase)
  return step, checkpoints.digest(state, checkpoints.read_data_position(folder / phase, step))
