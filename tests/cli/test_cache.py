"""The cache of compiled programs that `pagoda` sets up."""

import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pagoda_jax import main

KEYS = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs',
        'jax_persistent_cache_enable_xla_caches')


@pytest.fixture
def jax_as_it_comes(monkeypatch):
  """JAX's own settings, also of this test run's environment; afterwards those that were."""
  before = {key: getattr(jax.config, key) for key in KEYS}
  monkeypatch.delenv('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES')
  jax.config.update('jax_persistent_cache_enable_xla_caches', 'xla_gpu_per_fusion_autotune_cache_dir')
  yield
  for key, value in before.items():
    jax.config.update(key, value)
  compilation_cache.reset_cache()


def compile_with(folder):
  """Compiles one small program with the cache in a folder; how many programs are in it then."""
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  compilation_cache.reset_cache()
  jax.jit(lambda x: 3 * x + 1).lower(jax.ShapeDtypeStruct((7,), 'float32')).compile()
  return len(list(folder.glob('*-cache')))


def test_a_cache_that_was_copied_elsewhere_fits(jax_as_it_comes, tmp_path):
  main.set_up_jax()
  assert compile_with(tmp_path / 'made') == 1
  shutil.copytree(tmp_path / 'made', tmp_path / 'image')
  assert compile_with(tmp_path / 'image') == 1


def test_what_the_user_says_of_xla_s_own_caches_is_heeded(jax_as_it_comes, monkeypatch):
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'xla_gpu_per_fusion_autotune_cache_dir')
  main.set_up_jax()
  assert jax.config.jax_persistent_cache_enable_xla_caches == 'xla_gpu_per_fusion_autotune_cache_dir'
