"""Eight virtual CPU devices, one compilation cache for all tests."""

import fcntl
import functools
import gc
import os
import pathlib
import shutil

import pytest
from quick import SAME_ANY_SIZE, XLA_FLAGS

os.environ['JAX_PLATFORMS'] = 'cpu'
FLAGS = ('--xla_force_host_platform_device_count=8', XLA_FLAGS)
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS])
MAPPINGS, MOST_MAPPINGS = pathlib.Path('/proc/self/maps'), 20_000
CACHE = pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'compiled'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'none')  # as main.set_up_jax: one key for all tests

import jax  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags
# Tracing makes many objects, few of them in cycles: looking for those at Python's usual pace is a quarter of its time.
gc.set_threshold(50_000, 20, 20)
assert jax.device_count() == 8  # from now on: a test that plans for more CPUs before any other uses JAX would get them


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
  """A work directory with every phase of the tiny experiment finished: 4 steps each.

  Run once for all processes of pytest-xdist, whose folders lie side by side; each has a copy.
  """
  import runs

  folder, own = tmp_path_factory.mktemp('finished'), tmp_path_factory.getbasetemp()
  shared = (own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own) / 'run_for_all'
  with open(f'{shared}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (whole := shared.with_suffix('.whole')).exists():
      shutil.rmtree(shared, ignore_errors=True)
      assert runs.pagoda('run', runs.CONFIG, f'--workdir={shared}') == 0
      whole.touch()
  return pathlib.Path(shutil.copytree(shared, folder, dirs_exist_ok=True))


@pytest.fixture
def same_any_size(monkeypatch):
  """What is compiled meanwhile is rounded alike in batches of any size."""
  monkeypatch.setattr(jax, 'jit', functools.partial(jax.jit, compiler_options=SAME_ANY_SIZE))


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of `finished`, to be damaged."""
  return pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))


@pytest.fixture
def keeps_cache():
  """Compiling for devices that are not here turns the compilation cache off; afterwards it is as it was."""
  enabled = jax.config.jax_enable_compilation_cache
  yield
  jax.config.update('jax_enable_compilation_cache', enabled)
