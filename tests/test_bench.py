"""The measurements run and say what they promise; their figures are for a person to read."""

import pytest

from pagoda_jax import bench


def test_convert_measures_each_network():
  networks = {'small': ('lpips', {'widths': (64, 128), 'depths': (2, 2)}, {})}
  (row,) = bench.bench_convert(networks)
  parameters = 64 * 27 + 64 + 64 * 64 * 9 + 64 + 128 * 64 * 9 + 128 + 128 * 128 * 9 + 128 + 64 + 128
  assert row['name'] == 'small' and row['parameters'] == parameters and row['weights_bytes'] == 4 * parameters
  assert 0 < row['seconds'] < 60 and row['extra_bytes'] < 2**30


def test_unknown_measurement():
  with pytest.raises(ValueError, match='use convert'):
    bench.run(None, ['speed'])
