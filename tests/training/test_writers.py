"""TensorBoard and Weights & Biases by stand-ins: the names of metrics.jsonl, and no fault of theirs stops a run."""

import json
import sys
import types

import numpy as np
import pytest
import tiny

from pagoda_jax.runtime.interrupts import Interrupted
from pagoda_jax.training import inverting, logs, writers

VALUES = {'kimg': 0.5, 'epochs': 0.25, 'loss': 1.5, 'skipped': 0.0}
CONFIG = {'seed': 3, 'order': ['teacher']}


@pytest.fixture
def calls(monkeypatch):
  """What the stand-ins were told, by library; as if nobody had set anything up."""
  told = {'tensorboardX': [], 'wandb': []}

  class Told:
    def __init__(self, library, *args, **kwargs):
      self._told = told[library]
      self._told.append(('init', args, kwargs))

    def __getattr__(self, method):
      return lambda *args, **kwargs: self._told.append((method, args, kwargs))

  monkeypatch.delenv('WANDB_MODE', raising=False)
  monkeypatch.setattr(writers, '_said', set())
  monkeypatch.setitem(sys.modules, 'tensorboardX', types.SimpleNamespace(
    SummaryWriter=lambda *args, **kwargs: Told('tensorboardX', *args, **kwargs)))
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(
    login=lambda prompt: True, Image=lambda image: ('image', image.shape),
    init=lambda **kwargs: Told('wandb', **kwargs)))
  return told


def written(folder, step=0):
  log = logs.MetricLog(folder, step, CONFIG)
  log.write(step + 10, VALUES)
  log.image(step + 10, 'samples', np.zeros((4, 8, 1), np.uint8))
  log.close()
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_scalars_grids_and_config_have_the_same_names_everywhere(tmp_path, calls):
  folder = tmp_path / 'digits' / 'teacher'
  folder.mkdir(parents=True)
  assert {key: value for key, value in written(folder)[0].items() if key not in ('step', 'time')} == VALUES
  board, wandb = calls['tensorboardX'], calls['wandb']
  assert [args for method, args, _ in board if method == 'add_scalar'] == [(*pair, 10) for pair in VALUES.items()]
  assert ('add_image', 'samples', 10) == next((method, args[0], args[2]) for method, args, _ in board if len(args) == 3
                                              and method == 'add_image')
  text = next(args for method, args, _ in board if method == 'add_text')
  assert text[0] == 'config' and json.loads(text[1].removeprefix('```json').removesuffix('```')) == CONFIG
  init = wandb[0][2]
  assert init['group'] == 'digits' and init['name'] == 'digits/teacher' and init['resume'] == 'allow'
  assert json.loads(init['config']['config']) == CONFIG
  assert [args[0] for method, args, _ in wandb if method == 'log'] == [
    VALUES | {'step': 10}, {'samples': ('image', (4, 8)), 'step': 10}]
  assert board[-1][0] == 'close' and wandb[-1][0] == 'finish'


def test_a_run_that_goes_on_is_the_same_run_there_and_one_begun_anew_is_not(tmp_path, calls):
  written(tmp_path)
  assert len(written(tmp_path, step=10)) == 2
  written(tmp_path, step=0)
  marks = [kwargs['id'] for method, _, kwargs in calls['wandb'] if method == 'init']
  assert marks[0] == marks[1] != marks[2]
  purged = [kwargs['purge_step'] for method, _, kwargs in calls['tensorboardX'] if method == 'init']
  assert purged == [1, 11, 1]  # what a crash has undone is hidden, before the first checkpoint too


def test_a_writer_that_fails_is_left_out_and_the_lines_go_on(tmp_path, calls, monkeypatch, caplog):
  def fail(*args, **kwargs):
    raise ConnectionError('no network')

  def fail_without_a_word(*args, **kwargs):
    raise TimeoutError

  sys.modules['wandb'].init = fail_without_a_word
  monkeypatch.setattr(writers.TensorBoard, 'image', fail)
  log = logs.MetricLog(tmp_path, 0, CONFIG)
  for step in (1, 2):
    log.write(step, VALUES)
    log.image(step, 'samples', np.zeros((4, 8, 3), np.uint8))
  log.close()
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2
  assert [record.getMessage().partition(';')[0] for record in caplog.records] == [
    'WandB is left out from now on: TimeoutError', 'TensorBoard is left out from now on: no network']
  assert len([method for method, _, _ in calls['tensorboardX'] if method == 'add_scalar']) == len(VALUES)


def test_nothing_installed_is_no_fault_and_nobody_logged_in_is_said_once(tmp_path, calls, monkeypatch, caplog, capsys):
  sys.modules['wandb'].login = lambda prompt: False
  written(tmp_path)
  sys.modules['wandb'].login, sys.modules['wandb'].api = lambda: True, types.SimpleNamespace(api_key='')  # an older one
  written(tmp_path)
  assert capsys.readouterr().out.count('wandb is installed, but nobody is logged in') == 1 and calls['wandb'] == []
  monkeypatch.setenv('WANDB_MODE', 'offline')
  written(tmp_path)
  assert calls['wandb'][0][0] == 'init'
  for name in ('tensorboardX', 'wandb'):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  before = len(calls['tensorboardX'])
  written(tmp_path)
  assert len(calls['tensorboardX']) == before and not caplog.records


def test_an_inversion_that_is_stopped_closes_its_writers(tmp_path, calls, monkeypatch):
  """Their last minutes would be lost with the process, and the next one starts at the shards that are there."""
  monkeypatch.setattr(inverting, 'Solver', lambda *args: Zeros())
  monkeypatch.setattr(inverting.starts, 'read_start', lambda *args: ({}, ''))
  monkeypatch.setattr(inverting, 'origin', lambda *args: {'teacher_sha256': '0'})
  monkeypatch.setattr(inverting, '_write_holdout', lambda *args: None)
  answers = iter([False, False, True])
  stop = types.SimpleNamespace(wanted_alone=lambda name: next(answers), exit_code=75)
  with pytest.raises(Interrupted, match='invert: stopped with 1 of the 5 shards written'):
    inverting.run_phase(tiny.get_config(), tmp_path, 'invert', stop)
  assert [args[2] for method, args, _ in calls['tensorboardX'] if method == 'add_scalar'][0] == 1024
  assert calls['tensorboardX'][-1][0] == 'close' and calls['wandb'][-1][0] == 'finish'


@pytest.mark.parametrize('first, outcome', [(False, ['left', 'left']), (True, ['goes on', 'goes on'])])
def test_a_stop_while_a_store_is_closed_is_for_all_processes_or_for_none(monkeypatch, first, outcome):
  """`first`: whether process 0 has closed the store before process 1 is stopped."""
  words, found = {}, []
  monkeypatch.setattr(inverting.distributed, 'put', lambda key, value: words.setdefault(key, value))
  monkeypatch.setattr(inverting.distributed, 'look', words.get)
  stop = types.SimpleNamespace(wanted_alone=lambda name: True, exit_code=75)
  for primary in (first, not first):
    monkeypatch.setattr(inverting.distributed, 'is_primary', lambda primary=primary: primary)
    try:
      inverting._end_together('invert', stop)
      found.append('goes on')
    except Interrupted:
      found.append('left')
  assert found == outcome


class Zeros:
  """Inverts pictures to zeros, at no cost."""

  batch_size = 512

  def __call__(self, pictures):
    return {'noise': np.zeros(pictures['image'].shape, np.float32)}
