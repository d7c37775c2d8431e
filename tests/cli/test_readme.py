"""The pages that people read: the train-step example runs as it stands, what they name is there."""

import re

import numpy as np
import pytest
from runs import ROOT

from pagoda_jax import main

README = (ROOT / 'README.md').read_text()


def test_the_foreign_loop_runs_as_it_stands():
  section = README.split('## One train step in your own loop')[1].split('\n## ')[0]
  code = re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]
  assert len(code.splitlines()) < 30
  scope = {}
  exec(code, scope)
  assert int(scope['train_state'].step) == 3 and int(scope['train_state'].skipped) == 0
  assert all(np.isfinite(float(value)) for value in scope['metrics'].values())


PAGES = [path for folder in ('.', 'launch', 'pagoda_jax', 'pagoda_jax/*') for path in ROOT.glob(f'{folder}/README.md')]


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
  text = page.read_text()
  links = [link for link in re.findall(r'\]\(([^)#]+)\)', text) if '://' not in link]
  assert all((page.parent / link).exists() for link in links), links
  for path, test in re.findall(r'`((?:\w+/)*test_\w+\.py)(?:::(\w+))?', text):
    assert (ROOT / 'tests' / path).exists(), path
    assert test.removesuffix('_') in (ROOT / 'tests' / path).read_text(), test
  for path in re.findall(r'`((?:pagoda_jax|tests|experiments|launch)/[\w./]+\.\w+)`', text):
    assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_names_every_command():
  assert len(README.splitlines()) <= 200 and len(PAGES) > 4
  assert set(re.findall(r'`pagoda (\w+) ', README)) == set(main.COMMANDS)
