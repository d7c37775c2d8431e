"""Every golden check: each module golden_checks_*.py yields (id, check) from its `cases()`."""

import importlib
import pathlib

import jax
import pytest

FILES = sorted(pathlib.Path(__file__).parent.glob('golden_checks_*.py'))
MODULES = [importlib.import_module(path.stem) for path in FILES]
CASES = [pytest.param(check, id=name) for module in MODULES for name, check in module.cases()]


@pytest.mark.parametrize('check', CASES)
def test_golden(check):
  with jax.default_matmul_precision('highest'):
    check()
