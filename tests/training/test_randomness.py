"""No two uses of randomness draw the same numbers, at equal seeds."""

import types

import jax
import numpy as np
import pytest
import tiny

from pagoda_jax.data import noise_store
from pagoda_jax.runtime import randomness
from pagoda_jax.runtime.files import read_sealed, write_sealed
from pagoda_jax.stages import models, sampler
from pagoda_jax.training import inverting, workdir


def test_inversion_adds_other_noise_than_images_are_drawn_from(monkeypatch):
  """A denoiser that returns its input leaves the state as it is: what inversion gives is the noise that it added."""
  config = tiny.get_config()
  config.phases.invert.add_noise = True
  still = types.SimpleNamespace(denoise=lambda params, x, sigma, cond: x)
  monkeypatch.setattr(models, 'build', lambda config, name: still)
  config.phases.invert.clip_denoised = False
  batch = {'image': np.zeros((64, 8, 8, 1), np.float32), 'label': np.zeros(64, np.int32), 'key': np.arange(64)}
  added = np.asarray(inverting.make_inverter(config, 'invert')({}, batch)) / config.diffusion.sigma_min
  drawn = np.asarray(sampler.noise_of(config.seed, np.arange(64), (8, 8, 1), 1.0))
  assert added.std() == pytest.approx(1, abs=0.05) and drawn.std() == pytest.approx(1, abs=0.05)
  assert abs(np.corrcoef(added.ravel(), drawn.ravel())[0, 1]) < 0.05  # 4096 numbers: deviation 0.016


def test_a_phase_from_before_a_key_goes_on_where_the_default_computes_the_same(copied):
  config = tiny.get_config()
  path = copied / 'grow_16' / 'config.json'
  values = read_sealed(path)
  values['identity'] = {k: v for k, v in values['identity'].items() if 'phases.teacher.matmul_precision' not in k}
  write_sealed(path, values)
  workdir.check_claim(copied, config, 'grow_16')
  values['identity'] = {k: v for k, v in values['identity'].items() if 'matmul_precision' not in k}
  write_sealed(path, values)
  with pytest.raises(workdir.WorkdirError, match="invert.matmul_precision: there 'default', here 'highest'"):
    workdir.check_claim(copied, config, 'grow_16')


def test_every_domain_has_a_key_of_its_own():
  domains = ['teacher', 'teacher/init', 'invert', randomness.PRIOR, randomness.INVERSION, 'projections/x']
  keys = {tuple(jax.random.key_data(randomness.key_for(0, domain)).tolist()) for domain in domains}
  plain = {tuple(jax.random.key_data(jax.random.fold_in(jax.random.key(0), i)).tolist()) for i in range(100)}
  assert len(keys) == len(domains) and not keys & plain


def test_a_store_whose_noise_was_drawn_as_samples_are_is_refused(copied):
  """Earlier versions wrote add_noise: True, and no domain."""
  config = tiny.get_config()
  config.phases.invert.add_noise = True
  store = copied / 'invert'
  manifest = noise_store.read_manifest(store)
  origin = manifest['origin'] | {'add_noise': True}
  expected = manifest['origin'] | {'add_noise': inverting.origin(config, 'invert', {})['add_noise']}
  noise_store.check_origin({'origin': manifest['origin']}, manifest['origin'], store)
  with pytest.raises(noise_store.NoiseStoreError, match='add_noise: the store has True, this run needs .*/inversion'):
    noise_store.check_origin({'origin': origin}, expected, store)
