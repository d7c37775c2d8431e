"""The rooms of pagoda_jax stand on floors: a file imports from its own floor or from floors below."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'pagoda_jax'
# From the top floor down.
FLOORS = (
  ('main',), ('cli',), ('pipeline',), ('bench',), ('use',), ('evaluation',), ('planning',), ('training',), ('weights',),
  ('stages',), ('method',), ('networks',), ('data',), ('runtime',),
  ('config', 'validation'), ('__init__',),
)
HEIGHT = {room: -height for height, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(PACKAGE.rglob('*.py'))


def room(path: pathlib.Path) -> str:
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return parts[0]


def imports(path: pathlib.Path) -> list[tuple[str, ...]]:
  """Dotted names, as tuples, of all that a file imports, also within functions."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [tuple(alias.name.split('.')) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: imports are absolute here'
      found += [(*node.module.split('.'), alias.name) for alias in node.names]
  return found


def test_every_room_has_its_floor():
  assert {room(path) for path in FILES} == set(HEIGHT)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_own_floor_or_below(path):
  own = HEIGHT[room(path)]
  above = [name for name in imports(path) if name[0] == 'pagoda_jax' and HEIGHT[(*name, '__init__')[1]] > own]
  assert not above


def test_only_the_command_line_knows_flags():
  """absl.flags elsewhere would be a flag that no file of cli/ shows."""
  knowing = {room(path) for path in FILES if ('absl', 'flags') in imports(path)}
  assert knowing == {'main', 'cli'}


@pytest.mark.parametrize('place', ['networks', 'method'])
def test_networks_and_mathematics_know_no_configs_and_no_devices(place):
  known = {name[1] for path in FILES if room(path) == place for name in imports(path) if name[0] == 'pagoda_jax'}
  assert not known & {'config', 'validation', 'runtime'}


def test_stages_know_no_checkpoints():
  assert not [path for path in FILES if room(path) == 'stages' and any(name[0] == 'orbax' for name in imports(path))]
