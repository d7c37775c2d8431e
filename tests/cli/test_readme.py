"""The README's train-step example runs as it stands, and is as short as promised."""

import pathlib
import re

import numpy as np

README = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()


def test_the_foreign_loop_runs_as_it_stands():
  section = README.split('## One train step in your own loop')[1].split('\n## ')[0]
  code = re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]
  assert len(code.splitlines()) < 30
  scope = {}
  exec(code, scope)
  assert int(scope['train_state'].step) == 3 and int(scope['train_state'].skipped) == 0
  assert all(np.isfinite(float(value)) for value in scope['metrics'].values())
