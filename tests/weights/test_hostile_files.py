"""Files that ask for far more time or memory than their size warrants: refused in one line, or read unharmed."""

import json
import os
import re
import subprocess
import sys

import hostile_files


def test_no_file_takes_more_than_half_a_gigabyte_or_hangs(tmp_path):
  for name, (write, _) in hostile_files.FILES.items():
    write(tmp_path / name)
  paths = [entry for entry in sys.path if entry]
  run = subprocess.run(
    [sys.executable, hostile_files.__file__, tmp_path],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(paths)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  outcomes = dict(map(json.loads, run.stdout.splitlines()))
  assert run.returncode == 0 and outcomes.keys() == hostile_files.FILES.keys(), run.stderr
  for name, (_, said) in hostile_files.FILES.items():
    expected = 'w' if said is None else f'WeightsFileError: {re.escape(str(tmp_path / name))}:? [^\n]*{said}[^\n]*'
    assert re.fullmatch(expected, outcomes[name]), outcomes[name]
