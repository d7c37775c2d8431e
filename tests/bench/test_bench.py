"""The measurements run and say what they promise; their figures are for a person to read."""

import io

import numpy as np
import pytest
from PIL import Image

from pagoda_jax import main
from pagoda_jax.bench import convert, data
from pagoda_jax.cli import bench as command
from pagoda_jax.data import pictures


def test_convert_measures_each_network():
  networks = {'small': ('lpips', {'widths': (64, 128), 'depths': (2, 2)}, {})}
  (row,) = convert.bench_convert(networks)
  parameters = 64 * 27 + 64 + 64 * 64 * 9 + 64 + 128 * 64 * 9 + 128 + 128 * 128 * 9 + 128 + 64 + 128
  assert row['name'] == 'small' and row['parameters'] == parameters and row['weights_bytes'] == 4 * parameters
  assert 0 < row['seconds'] < 60 and row['extra_bytes'] < 2**30


def test_unknown_measurement():
  with pytest.raises(ValueError, match='use convert'):
    command.run(None, ['speed'])


def test_bench_data_prints_a_row_for_each_path(capsys):
  assert main.main(['bench', 'data', '--seconds=0.01']) == 0
  rows = capsys.readouterr().out.splitlines()
  assert '512 px JPEG -> 512 + 64 px' in rows[1] and '64 px ArrayRecord (png) -> batch of 128' in rows[2]
  assert '64 px ArrayRecord (raw) -> batch of 128' in rows[3]
  assert all(float(row.split()[-1]) > 0 for row in rows[1:])
  assert main.main(['bench', 'nothing']) == 1


def test_bench_pictures_weigh_what_photographs_weigh():
  size = len(pictures.encode(data.natural_picture(np.random.default_rng(0), 512), 'jpeg', 90))
  assert 40_000 < size < 200_000
  assert Image.open(io.BytesIO(pictures.encode(np.zeros((4, 4, 1), np.uint8), 'png', 95))).mode == 'L'
