"""What growth does to pictures, on pictures of which it is known."""

import numpy as np
import pytest

from pagoda_jax.evaluation import growth_figures

RNG = np.random.default_rng(0)
LABELS = np.arange(40) % 4


def test_an_object_that_stays_has_moved_by_nothing_and_another_of_its_class_by_one():
  base = RNG.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
  grown = base.repeat(2, 1).repeat(2, 2)
  assert growth_figures.moved(base, grown, LABELS) == 0
  assert growth_figures.moved(base, np.roll(grown, 4, 0), LABELS) == pytest.approx(1, abs=0.1)
  unrelated = RNG.integers(0, 256, base.shape, dtype=np.uint8).repeat(2, 1).repeat(2, 2)
  assert growth_figures.moved(base, unrelated, LABELS) == pytest.approx(1, abs=0.1)


def test_fine_power_of_halved_contrast_is_a_quarter_and_of_averaged_pixels_little():
  noise = RNG.normal(scale=20, size=(40, 16, 16, 1))
  real, half = (np.uint8(np.round(128 + scale * noise)) for scale in (1, 0.5))
  assert growth_figures.fine_power(real, real) == 1
  assert growth_figures.fine_power(half, real) == pytest.approx(0.25, rel=0.01)
  coarse = real.reshape(40, 8, 2, 8, 2, 1).mean((2, 4)).repeat(2, 1).repeat(2, 2)
  smooth = np.uint8(np.round((coarse + np.roll(coarse, 1, 1)) / 2))
  smooth = np.uint8(np.round(smooth / 2 + np.roll(smooth, 1, 2) / 2))
  assert growth_figures.fine_power(smooth, real) < 0.1
