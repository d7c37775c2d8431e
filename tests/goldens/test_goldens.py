"""Every check against the golden files; the checks are in golden_checks_*.py, one `cases()` each.

PAGODA_GOLDENS=folder runs them on other golden files of the same array names.
"""

import importlib
import pathlib

import pytest

MODULES = sorted(path.stem for path in pathlib.Path(__file__).parent.glob('golden_checks_*.py'))
CASES = [case for module in MODULES for case in importlib.import_module(module).cases()]


SLOW = ('step-',)  # a whole step is compiled, for minutes
slow = lambda name: [pytest.mark.slow] if name.startswith(SLOW) else []


@pytest.mark.parametrize('check', [pytest.param(check, id=name, marks=slow(name)) for name, check in CASES])
def test_golden(check):
  check()
