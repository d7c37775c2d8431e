"""Eight virtual CPU devices, one compilation cache for all tests."""

import os
import pathlib
import shutil

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
MAPPINGS, MOST_MAPPINGS = pathlib.Path('/proc/self/maps'), 20_000
CACHE = pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'compiled'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'none')  # as main.set_up_jax: one key for all tests

import jax  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags


@pytest.fixture(scope='module', autouse=True)
def nothing_stays_compiled():
  """Compiled programs would pile up to gigabytes; what another module needs again is in the cache on disk."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def few_mappings():
  """A compiled program is thousands of memory mappings: at 65,530, what Linux allows a process, XLA crashes."""
  yield
  if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b'\n') > MOST_MAPPINGS:
    jax.clear_caches()


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
  """A work directory with every phase of the tiny experiment finished: 4 steps each."""
  import runs

  folder = tmp_path_factory.mktemp('finished')
  assert runs.pagoda('run', runs.CONFIG, f'--workdir={folder}') == 0
  return folder


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of `finished`, to be damaged."""
  return pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))
