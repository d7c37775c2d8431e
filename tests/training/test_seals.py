"""JSON that a work directory is believed by: sealed; what is changed, broken or of earlier versions is named."""

import json
import os
import time
import tracemalloc
import types

import numpy as np
import pytest
import tiny
from etils import epath
from runs import CONFIG, pagoda

from pagoda_jax import pipeline
from pagoda_jax.data import noise_store, prepare
from pagoda_jax.evaluation import small_data
from pagoda_jax.evaluation.report import read as report
from pagoda_jax.runtime import files
from pagoda_jax.training import checkpoints, claims, logs, starts, workdir

NO_OBJECTS = ['', '{', '[]', '5', 'null', '"x"', '{}', '{"seal": 1}', '\udcff', '[' * 10**5, '{"identity": 5}']
STATE = {'ema': {'a': np.zeros(2, np.float32)}, 'fixed': {}}


@pytest.fixture
def folder(tmp_path):
  """A work directory with a checkpoint of the teacher and a store of noise, as far as JSON tells; nothing trained."""
  config = tiny.get_config()
  for name in ('teacher', 'invert'):
    workdir.claim(tmp_path, config, name)
    workdir.check_inputs(tmp_path, config, name)
    if name == 'teacher':
      saver = checkpoints.Checkpoints(tmp_path / 'teacher')
      saver.save(4, STATE, {})
      saver.close()
    else:
      (tmp_path / 'invert' / noise_store.HOLDOUT_FILE).touch()
      noise_store.write_promise(epath.Path(tmp_path / 'invert'), 4500, {'teacher_sha256': 'f' * 64})
  return tmp_path


def unseal(path, **values):
  """Changes values and takes the seal away."""
  found = json.loads(path.read_text())
  del found[files.SEAL]
  path.write_text(json.dumps(found | values))


READERS = {
  'teacher/config.json': lambda folder: claims.read(folder / 'teacher'),
  'teacher/checkpoints/newest.json': lambda folder: checkpoints.newest_step(folder / 'teacher'),
  'invert/manifest.json': lambda folder: noise_store.read_manifest(folder / 'invert'),
  'invert/inputs.json': lambda folder: workdir.check_inputs(folder, tiny.get_config(), 'invert'),
}
# inputs.json is only compared: values that are as they should be are taken without their seal.
COMPARED = ('invert/inputs.json',)


@pytest.mark.parametrize('name', READERS)
def test_no_changed_byte_and_no_missing_seal_goes_unnoticed(folder, name, monkeypatch):
  monkeypatch.setattr(workdir, 'progress', lambda folder, config, name: {'teacher': 4, 'invert': 4500}[name])
  path, read = folder / name, READERS[name]
  good, expected = path.read_bytes(), read(folder)
  for place in {*range(0, len(good), 1 + len(good) // 200), *range(len(good) - 90, len(good))}:  # the last is the seal
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    try:
      assert read(folder) == expected
    except ValueError as error:
      assert name in str(error) and type(error).__module__.startswith('pagoda_jax')
  for content in NO_OBJECTS:
    path.write_bytes(content.encode(errors='surrogateescape'))
    with pytest.raises(ValueError, match=name) as error:
      read(folder)
    assert type(error.value).__module__.startswith('pagoda_jax')
  path.write_bytes(good)
  unseal(path)
  if name in COMPARED:
    assert read(folder) == expected and files.read_sealed(path) == expected
  else:
    with pytest.raises(ValueError, match=f'{name}.*no seal'):
      read(folder)


def test_a_config_that_was_edited_is_not_sampled_from(folder, tmp_path, capsys):
  path = folder / 'invert' / 'config.json'  # the newest: the one that `sample` reads
  good = path.read_text()
  path.write_text(good.replace('"sigma_max": 80.0', '"sigma_max": 20.0'))
  for command in (['sample', f'--out={tmp_path / "x.png"}'], ['inspect']):
    assert pagoda(*command, f'--workdir={folder}') == 1
    assert 'config.json: missing or damaged (its values do not fit its checksum)' in capsys.readouterr().err
  with pytest.raises(workdir.WorkdirError, match='delete it and start `pagoda run` with that experiment'):
    workdir.check_claim(folder, tiny.get_config(), 'invert')
  # Of an earlier version, or with its seal taken away: compared by who knows the config, believed by nobody.
  path.write_text(good)
  unseal(path)
  assert pagoda('sample', f'--workdir={folder}') == 1
  assert 'the same `pagoda run` as before compares it and seals it' in capsys.readouterr().err
  config = tiny.get_config()
  unsealed, config.diffusion.sigma_max = path.read_bytes(), 20.0
  with pytest.raises(workdir.WorkdirError, match='sigma_max: there 80.0, here 20.0'):
    workdir.claim(folder, config, 'invert')
  assert path.read_bytes() == unsealed
  workdir.claim(folder, tiny.get_config(), 'invert')
  assert path.read_text() == good
  path.unlink()
  workdir.claim(folder, tiny.get_config(), 'invert')
  assert f'{path} has gone' in capsys.readouterr().out and path.read_text() == good


def test_what_a_phase_was_made_from_is_not_believed_but_compared(folder, capsys):
  path, config = folder / 'invert' / 'inputs.json', tiny.get_config()
  good = path.read_text()
  assert json.loads(good)['teacher'] == 4
  for spoil, text in (
    (lambda: path.write_text(good.replace('4', '2', 1)), 'damaged .*: what invert was made from is not known'),
    (lambda: unseal(path, teacher=2), 'was made from teacher at step 2, which has gone on to step 4'),
    (lambda: unseal(path, teacher='4'), 'it says nothing about teacher'),
    (lambda: path.write_text('{}'), 'it says nothing about teacher'),
  ):
    path.write_text(good)
    spoil()
    with pytest.raises(workdir.WorkdirError, match=text):
      workdir.check_inputs(folder, config, 'invert')
  path.unlink()  # as the message says
  workdir.check_inputs(folder, config, 'invert')
  assert f'{path} has gone; taken to be made from what is there now (teacher: 4)' in capsys.readouterr().out
  assert path.read_text() == good


def test_the_origin_of_weights_that_an_earlier_version_named_is_the_same_start():
  assert starts.same_mark('weights 12ab, values 34cd', 'weights 12ab, values 34cd')
  assert starts.same_mark('weights 12ab', 'weights 12ab, values 34cd')
  for before in ('weights 12ab, values 34ce', 'weights 12a', 'weights 13ab', None):
    assert not starts.same_mark(before, 'weights 12ab, values 34cd')


def test_a_work_directory_of_an_earlier_version_is_sealed_by_the_run_that_goes_on(copied, capsys):
  sealed = [*copied.glob('*/config.json'), *copied.glob('*/inputs.json'), *copied.glob('*/checkpoints/newest.json')]
  before = {path: files.read_sealed(path) for path in sealed}
  assert len(before) == 11
  for path in sealed:
    unseal(path)
  assert pagoda('train', CONFIG, f'--workdir={copied}', '--phase=distill') == 1
  assert 'teacher/checkpoints/newest.json: damaged (no seal' in capsys.readouterr().err
  pipeline.run_experiment(tiny.get_config(), copied)
  assert capsys.readouterr().out.count('finished already') == 4
  assert {path: files.read_sealed(path) for path in sealed} == before
  assert pagoda('inspect', f'--workdir={copied}') == 0


@pytest.fixture
def measured(tmp_path, monkeypatch):
  """Phases whose made-up figures were measured, in a work directory with a teacher."""
  found, black = [], lambda count: np.zeros((count, 8, 8, 1), np.uint8)
  real = types.SimpleNamespace(held_images=black(10), held_labels=np.arange(10), accuracy=lambda images, labels: 0.5,
                               frechet=lambda images, components: components, recall=lambda images, components: 0.25)
  monkeypatch.setattr(small_data, 'reference', lambda config, name: found.append(name) or real)
  monkeypatch.setattr(small_data.checkpoints, 'read_generator', lambda folder: ({}, 4))
  monkeypatch.setattr(small_data.sampling, 'Sampler', lambda *args: types.SimpleNamespace(
    draw=lambda params, seed, labels, omega=None: black(len(labels))))
  (tmp_path / 'teacher').mkdir()
  return found


def test_figures_of_other_samples_strengths_or_components_are_measured_anew(tmp_path, measured, monkeypatch):
  config = tiny.get_config('guided')
  config.evaluation.samples = 20
  monkeypatch.setattr(small_data.workdir, 'progress', lambda folder, config, name: 4 * (name == 'teacher'))
  assert 'omega' not in small_data.summary(config, tmp_path) and len(measured) == 1
  config.evaluation.guidance, config.evaluation.components = (1.0, 2.0), 4
  said = small_data.summary(config, tmp_path)
  assert [row.split()[2] for row in said.splitlines()[-3:]] == ['1', '2', 'held']
  assert '4.000' in said.splitlines()[1] and len(measured) == 2


@pytest.mark.parametrize('content', [*NO_OBJECTS, None], ids=lambda content: (content or 'edited')[:20])
def test_figures_that_cannot_be_believed_are_measured_again(tmp_path, measured, capsys, content):
  config, path = tiny.get_config(), tmp_path / 'teacher' / 'evaluation.json'
  figures = small_data.evaluate(config, tmp_path, 'teacher')
  assert small_data.evaluate(config, tmp_path, 'teacher') == figures and measured == ['teacher']
  good = path.read_text()
  path.write_bytes((content or good.replace('"accuracy": 0.5', '"accuracy": 0.999')).encode(errors='surrogateescape'))
  assert small_data.evaluate(config, tmp_path, 'teacher') == figures and path.read_text() == good
  assert f'{path}: damaged (' in (said := capsys.readouterr().out) and 'measured again' in said
  assert measured == ['teacher', 'teacher']


def test_lines_of_a_log_that_do_not_parse_are_counted_aloud(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  lines = [b'{"step": 1, "loss": 0.5}', b'{"step": 2x, "loss"', b'{"loss": 1}', b'[3]', b'{"step": "4"}',
           b'{"step": 4}\xff', b'[' * 10**5, b'{"step": 5}', b'{"step": 9}', b'{"step": 6, "lo']  # fmt: skip
  path.write_bytes(b'\n'.join(lines))
  logs.JsonLines(path, 5).write(6, {'loss': 2.0})
  said = capsys.readouterr().out
  assert f'{path}: 7 of 10 lines do not parse and are left out, first line 2: b\'{{"step": 2x, "loss"\'' in said
  assert path.read_text().splitlines() == ['{"step": 1, "loss": 0.5}', '{"step": 5}', '{"step": 6, "loss": 2.0}']
  logs.JsonLines(path, 6)
  assert capsys.readouterr().out == ''
  # Of a long run the file is larger than the memory: batches.jsonl, with a batch's keys in each line.
  path.write_text(''.join(f'{{"step": {step}, "keys": "{"9" * 10**4}"}}\n' for step in range(300)))
  tracemalloc.start()
  logs.JsonLines(path, 250)
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert most < 10**6 < path.stat().st_size and len(path.read_text().splitlines()) == 251


def test_a_broken_plan_of_prepare_is_named(tmp_path):
  for content in NO_OBJECTS[:6]:
    (tmp_path / prepare.PLAN).write_bytes(content.encode(errors='surrogateescape'))
    with pytest.raises(prepare.PrepareError, match='prepare.json: damaged'):
      prepare._claim(epath.Path(tmp_path), {'pictures': 3})


def test_the_experiment_is_that_of_all_phases_whatever_else_and_whatever_times_are_there(folder):
  """A run's config.json of before growth was added is the newest file of a copy; an exported generator has one too."""
  grown = tiny.get_config()
  before = tiny.get_config()
  with before.unlocked():
    before.order = ('teacher', 'invert', 'distill')
    del before.phases['grow_16']
  for name in ('distill', 'grow_16', 'teacher'):  # times as a copy has them: that of the teacher is the last
    workdir.claim(folder, grown if name == 'grow_16' else before, name)
  files.write_sealed(folder / 'exported' / claims.FILE, {'format': 'pagoda_jax generator, version 1'})
  (folder / 'clip').mkdir()
  (folder / 'clip' / claims.FILE).write_text('{"model_type": "clip"}')
  assert tuple(workdir.read_config(folder).order) == grown.order
  read = report.read(folder)
  assert tuple(read.config['order']) == grown.order and not read.notes
  # Of another branch of phases it is the newest that counts.
  other = json.loads(workdir.as_json(before))
  other |= {'order': ['teacher', 'other'], 'phases': {'teacher': other['phases']['teacher'],
                                                      'other': other['phases']['distill']}}
  claims.write(folder / 'other', 'other', {}, other)
  later = time.time() + 10  # times are told in seconds
  os.utime(folder / 'other' / claims.FILE, (later, later))
  assert tuple(workdir.read_config(folder).order) == ('teacher', 'other')
