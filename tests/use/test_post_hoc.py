"""`pagoda ema`: an average that was not kept, from checkpoints; what is written, and what is refused."""

import jax
import numpy as np
import pytest
import tiny
from runs import pagoda

from pagoda_jax.method import ema
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints, starts, workdir

STEPS = tuple(range(128, 1025, 128))
STDS = (0.05, 0.1)


def size(step):
  """What every weight is multiplied by at a step, so that an average is one number."""
  return np.sin(step / 200) + step / 1024


def average(std, step):
  """Of `size` to a step, by its definition."""
  weights = np.diff((np.arange(step + 1) / step) ** (ema.exponent_of(std) + 1))
  return np.sum(weights * size(np.arange(1, step + 1)))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(work directory of a teacher with checkpoints, its weights before multiplication)."""
  folder, config = tmp_path_factory.mktemp('run'), tiny.get_config()
  config.phases.teacher.update({'ema_halflife': (100,), 'ema_std': STDS, 'steps': 1024})
  unet = models.make_unet(config, 'teacher')
  shapes = jax.eval_shape(lambda: models.fresh_params(unet, jax.random.key(0)))
  rng = np.random.default_rng(0)
  weights = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
  workdir.claim(folder, config, 'teacher')
  saver = checkpoints.Checkpoints(folder / 'teacher', keep=100)
  times = lambda factor: jax.tree.map(lambda leaf: np.float32(factor) * leaf, weights)
  for step in STEPS:
    others = {f'std_{std:g}': times(average(std, step)) for std in STDS}
    saver.save(step, {'ema': times(0.0), 'other_emas': others, 'step': np.array(step)}, {})
  saver.close()
  return folder, config, weights


def made(folder, config, tmp_path, *flags):
  """The weights that `pagoda ema` writes, as a phase begins with them."""
  assert pagoda('ema', f'--workdir={folder}', f'--output={tmp_path / "w"}', *flags) == 0
  config = config.copy_and_resolve_references()
  config.phases.invert.update({'teacher': '', 'init_from': str(tmp_path / 'w')})
  return starts.read_start(config, folder, 'invert')[0]


@pytest.mark.parametrize('std, step', [(0.15, 1024), (0.09, 640)])
def test_an_average_that_was_not_kept_starts_a_phase(run, tmp_path, std, step, capsys):
  folder, config, weights = run
  found = made(folder, config, tmp_path, f'--std={std}', *([f'--step={step}'] if step != 1024 else []))
  kernel, whole = found['in_conv']['kernel'], weights['in_conv']['kernel']
  np.testing.assert_allclose(kernel, whole * average(std, step), atol=0.01 * np.abs(whole).max())
  assert kernel.dtype == np.float32
  assert f'std {std:g} at step {step}, of 16 averages' in capsys.readouterr().out


def test_one_that_was_kept_is_read_by_its_name(run, tmp_path, capsys):
  folder, config, weights = run
  config = config.copy_and_resolve_references()
  config.phases.invert.start_ema = 'std_0.1'
  found, where = starts.read_start(config, folder, 'invert')
  expected = np.float32(average(0.1, 1024)) * weights['in_conv']['kernel']
  np.testing.assert_array_equal(found['in_conv']['kernel'], expected)
  assert where.endswith('step 1024, average std_0.1')
  config.phases.invert.start_ema = 'halflife_100'  # the first, by its name
  assert not np.any(starts.read_start(config, folder, 'invert')[0]['in_conv']['kernel'])
  config.phases.invert.start_ema = 'std_0.2'
  with pytest.raises(starts.StartError, match="keeps no average 'std_0.2'; there are halflife_100, std_0.05, std_0.1"):
    starts.read_start(config, folder, 'invert')
  assert pagoda('inspect', f'--workdir={folder}', '--phase=teacher') == 0 or 'params' in capsys.readouterr().err


REFUSED = [
  (('--std=0.3',), 'std = 0.3: must be in (0, 0.2887]'),
  (('--std=0',), 'std = 0.0: must be in (0, 0.2887]'),
  (('--std=nan',), 'std = nan: must be in'),
  (('--std=0.005',), 'std = 0.005 at step 1024 can be met to'),
  (('--std=0.1', '--step=1025'), 'no weights of step 1025; the newest checkpoint is of step 1024'),
  (('--std=0.1', '--phase=invert'), 'keeps no averages by power function'),
  (('--std=0.1', '--phase=nowhere'), 'keeps no averages by power function'),
]


@pytest.mark.parametrize('flags, said', REFUSED, ids=lambda part: ' '.join(part) if isinstance(part, tuple) else '')
def test_what_cannot_be_made_is_refused(run, tmp_path, flags, said, capsys):
  assert pagoda('ema', f'--workdir={run[0]}', f'--output={tmp_path / "w"}', *flags) == 1
  printed = capsys.readouterr().err
  assert said in printed and 'Traceback' not in printed and not (tmp_path / 'w').exists()
