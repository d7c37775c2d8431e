"""What goes wrong outside the program is said in one line that names the file or the flag; mistakes in it are not."""

import contextlib
import errno
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import tiny

from pagoda_jax import main
from pagoda_jax.cli import faults
from pagoda_jax.data import images, noise_store, prepare, shards
from pagoda_jax.evaluation import evaluate
from pagoda_jax.runtime import files
from pagoda_jax.training import logs, workdir
from pagoda_jax.use import sample
from pagoda_jax.weights.convert import folders, formats, torch_files


@contextlib.contextmanager
def disk_with_room_for(size: int):
  """No file of this process and of those it starts can grow past `size` bytes: as on a disk that becomes full."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


NOISE = np.random.default_rng(0).standard_normal((20, 16, 16, 3)).astype(np.float32)
PICTURES = (NOISE * 100).astype(np.uint8)
LAYOUT = noise_store.make_layout(20, 20)


def write_metrics(folder):
  lines = logs.JsonLines(folder / 'metrics.jsonl', 0)
  for step in range(1, 2000):
    lines.write(step, {'loss': 1 / 3})


def write_converted(folder, kernel=NOISE, carried=()):
  variables = {'params': {'kernel': kernel, 'bias': NOISE[0, 0]}}
  folders.write_converted(folder / 'out', formats.Converted(variables, {}, 'edm', dict(carried)), {'sha256': ''})


WRITERS = {  # name -> (what writes, the file that the message names)
  'metrics.jsonl': (write_metrics, 'metrics.jsonl'),
  'kept lines': (lambda folder: logs.JsonLines(folder / 'kept.jsonl', 10**9), 'kept.jsonl'),
  'json': (lambda folder: files.write_sealed(folder / 'a.json', {'numbers': list(range(5000))}), 'a.json'),
  'grid': (lambda folder: images.write_png(folder / 'made' / 'grid.png', images.image_grid(PICTURES)), 'made/grid.png'),
  'npz': (lambda folder: sample.write(folder / 'a.npz', PICTURES, np.zeros(20)), 'a.npz'),
  'noise shard': (lambda folder: noise_store.write_shard(folder, LAYOUT, 0, NOISE, {}),
                  LAYOUT.name(0) + shards.SUFFIX),
  'safetensors': (lambda folder: torch_files.write_safetensors(folder / 'a.safetensors', {'a': NOISE}),
                  'a.safetensors'),
  'converted folder': (write_converted, 'out'),
  'tensors beside it': (lambda folder: write_converted(folder, NOISE[0, 0], {'filter': NOISE}), 'out'),
}


@pytest.mark.parametrize('write, name', WRITERS.values(), ids=WRITERS)
def test_what_a_full_disk_stops_names_its_file_and_leaves_all_else(tmp_path, write, name):
  (tmp_path / 'kept.jsonl').write_text(''.join(json.dumps({'step': step}) + '\n' for step in range(2000)))
  before = contents(tmp_path)
  with disk_with_room_for(10_000), pytest.raises(OSError) as raised:
    write(tmp_path)
  assert faults.is_for_the_user(raised.value)
  assert faults.text(raised.value) == f'{tmp_path / name}: File too large'
  if name != 'metrics.jsonl':  # its lines were there before the disk was full
    assert contents(tmp_path) == before
  (tmp_path / name).parent.mkdir(exist_ok=True)
  write(tmp_path)  # with room again


def test_a_full_disk_ends_prepare_with_one_line(tmp_path, capfd):
  (tmp_path / 'photos').mkdir()
  for number, picture in enumerate(PICTURES):
    images.write_png(tmp_path / 'photos' / f'{number:02}.png', picture)
  args = ['prepare', f'--source=folder:{tmp_path}/photos', f'--output={tmp_path}/out', '--resolution=64',
          '--shard_size=5', '--workers=2']
  with disk_with_room_for(10_000):
    assert runs.pagoda(*args) == 1
  said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith('prepare  picture')]
  assert len(said) == 1
  assert re.fullmatch(f'pagoda prepare: {tmp_path}/out/pictures-0000.-of-00004.array_record: File too large', said[0])
  assert [path.name for path in (tmp_path / 'out').glob('*.json')] == [prepare.PLAN]  # no shard counts


class Ending:
  """A worker process that has put its error into the queue and is found ended at the `looks`-th look, not before."""

  def __init__(self, looks, target, args, daemon):
    self.pid, self._looks = 1, looks
    self._reader, writer = multiprocessing.Pipe(duplex=False)
    self.sentinel = self._reader.fileno()
    args[-1].put(OSError(errno.ENOSPC, 'No space left on device', 'shard'))
    writer.close()  # the sentinel is ready from now on

  @property
  def exitcode(self):
    self._looks -= 1
    return None if self._looks > 0 else 1

  start = kill = join = lambda self: None


@pytest.mark.parametrize('looks', range(1, 7))
def test_a_full_disk_is_named_whenever_its_worker_is_found_ended(looks, monkeypatch):
  context = multiprocessing.get_context('spawn')
  workers = SimpleNamespace(Value=context.Value, SimpleQueue=context.SimpleQueue,
                            Process=lambda **options: Ending(looks, **options))
  monkeypatch.setattr(prepare.multiprocessing, 'get_context', lambda method: workers)
  with pytest.raises(OSError) as raised:
    prepare._write_in_processes((None, None, None), [0, 1], None, 2, SimpleNamespace(show=lambda count: None))
  assert raised.value.filename == 'shard'


def test_output_to_a_full_disk_ends_with_one_line():
  with open('/dev/full', 'w') as full:
    done = subprocess.run([sys.executable, '-m', 'pagoda_jax.main', 'weights', 'list'], stdout=full, text=True,
                          stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(runs.ROOT)})
  assert done.returncode == 1
  assert done.stderr == ('pagoda weights: standard output: No space left on device; free some space there and start '
                         'the same command again\n')


def test_output_that_nobody_reads_any_more_ends_without_a_word():
  closed, output = os.pipe()
  os.close(closed)
  done = subprocess.run([sys.executable, '-m', 'pagoda_jax.main', 'weights', 'list'], stdout=output, text=True,
                        stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(runs.ROOT)})
  os.close(output)
  assert (done.returncode, done.stderr) == (141, '')


def test_a_refusal_of_the_disk_says_what_helps(tmp_path):
  with pytest.raises(OSError) as raised, files.naming(tmp_path / 'shard'):
    raise RuntimeError('write() failed: Disk quota exceeded; writing shard.partial; at byte 0')
  assert raised.value.errno == errno.EDQUOT
  assert faults.text(raised.value) == (
    f'{tmp_path}/shard: Disk quota exceeded; free some space there and start the same command again')
  for error in (RuntimeError('another'), OSError('in words of its own')):
    with pytest.raises(type(error), match=f'^{error}$'), files.naming(tmp_path), files.replacing(tmp_path / 'a'):
      raise error


def test_errors_of_files_and_values_are_one_line_and_mistakes_keep_their_traceback(tmp_path, monkeypatch, capsys):
  class OfValue(ValueError):
    pass

  class OfDisk(OSError):
    pass

  def mismatch():
    return np.zeros(3) + np.zeros(4)

  def raises(error):
    raise error

  def command(action):
    monkeypatch.setattr('pagoda_jax.cli.weights.run', lambda fv, args: action())
    return runs.pagoda('weights')

  for action, said in [
    (lambda: raises(ValueError('plain')), 'plain'),
    (lambda: raises(OfValue('a subclass')), 'a subclass'),
    (lambda: raises(OfDisk(errno.EROFS, 'Read-only file system', '/x')), '/x: Read-only file system'),
    (lambda: (tmp_path / 'no' / 'file').write_text(''), f'{tmp_path}/no/file: No such file or directory'),
    (lambda: tmp_path.read_text(), f'{tmp_path}: Is a directory'),
    (lambda: b'\xff'.decode(), "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    (lambda: json.loads('{'), 'Expecting property name enclosed in double quotes: line 1 column 2 (char 1)'),
  ]:
    assert command(action) == 1
    assert capsys.readouterr().err == f'pagoda weights: {said}\n'
  for action, kind in [
    (mismatch, ValueError),
    (lambda: np.stack([np.zeros(3), np.zeros(4)]), ValueError),
    (lambda: np.zeros(3).sum(axis=4), np.exceptions.AxisError),
    (lambda: {}['key'], KeyError),
    (lambda: None + 1, TypeError),
    (lambda: raises(RuntimeError('what')), RuntimeError),
  ]:
    with pytest.raises(kind):
      command(action)


EXPERIMENTS = {  # content -> what is said after the file's name
  'def get_config(variant=""):\n  return (1,\n': ", line 2: SyntaxError: '(' was never closed",
  'import json\n\njson.loads("{")\n': ', line 3: JSONDecodeError: Expecting property name',
  'def get_config(variant=""):\n  return {}["a"]\n': ', line 2: KeyError: a',
  'import math\nmath.nothing\n': ", line 2: AttributeError: module 'math' has no attribute 'nothing'",
  'open("/no/such")\n': '',
  'open("/")\n': ', line 1: IsADirectoryError: /: Is a directory',
  'import nosuchmodule\n': ", line 1: ModuleNotFoundError: No module named 'nosuchmodule'",
  'import sys\nsys.exit(3)\n': ', line 2: SystemExit: 3',
  'x = 1 / 0\n': ', line 1: ZeroDivisionError: division by zero',
  'from pagoda_jax import config as c\n\ndef get_config(variant=""):\n  return c.teacher(stepz=4)\n':
    ', line 4: KeyError: Key "stepz" does not exist and cannot be added since the config is locked. Did you',
  'x = 1\n': ': there is no function get_config in it',
  'def get_config(variant=""):\n  return {"order": 1}\n': 'its get_config() must return what config.experiment() makes',
  '\0': ': SyntaxError: source code',
}  # fmt: skip


@pytest.mark.parametrize('content, said', EXPERIMENTS.items(), ids=[repr(said[:30]) for said in EXPERIMENTS.values()])
def test_a_broken_experiment_file_is_named_with_the_line(tmp_path, capsys, monkeypatch, content, said):
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # of another command in this process
  path = tmp_path / 'broken.py'
  path.write_text(content)
  assert runs.pagoda('run', f'--config={path}:variant', f'--workdir={tmp_path}/run') == 2
  printed, *rest = capsys.readouterr().err.splitlines()
  assert printed.startswith('pagoda run: ') and rest == ['`pagoda run --help` lists the flags.']
  assert said in printed and ('its get_config' in said or str(path) in printed)
  assert not (tmp_path / 'run').exists()


def test_no_experiment_file_at_all(tmp_path, capsys):
  for path, said in [(tmp_path, 'is a folder'), (tmp_path / 'no.py', 'there is no such file')]:
    for flag in ([f'--config={path}:long'], ['--config', path]):
      assert runs.pagoda('plan', *flag) == 2
      assert f'pagoda plan: --config={path}: {said}\n' in capsys.readouterr().err


REQUIRED = {
  'run': [runs.CONFIG, '--workdir=no'], 'train': [runs.CONFIG, '--workdir=no', '--phase=teacher'],
  'plan': [runs.CONFIG], 'sample': ['--workdir=no'], 'prepare': ['--output=no'], 'inspect': ['--workdir=no'],
  'evaluate': ['--workdir=no'], 'export': ['--workdir=no', '--output=no'], 'publish': ['--workdir=no', '--output=no'],
  'ema': ['--workdir=no', '--std=0.1', '--output=no'], 'convert': ['--input=no', '--output=no'],
  'report': ['--workdir=no'], 'serve': ['--workdir=no'],
}  # fmt: skip


@pytest.mark.parametrize('command', sorted({*main.COMMANDS} - {*main.WITH_WORDS}))
def test_a_word_that_a_command_does_not_take_is_refused(command, capsys):
  first, *rest = REQUIRED[command]
  for args in (['distill', first, *rest], [first, *rest, '--', 'distill']):
    assert runs.pagoda(command, *args) == 2
    assert f"pagoda {command}: 'distill': {command} takes flags only" in capsys.readouterr().err


@pytest.mark.parametrize('command, flag', [('run', 'workdir'), ('train', 'workdir'), ('sample', 'workdir'),
                                           ('inspect', 'workdir'), ('prepare', 'output'), ('sample', 'out')])
def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path, capsys, command, flag):
  there = tmp_path / 'there'
  there.write_text('')
  (tmp_path / 'file').write_text('')
  others = [arg for arg in REQUIRED[command] if not arg.startswith(f'--{flag}=')]
  for place, said in [
    (there, 'is there and is not a folder'), ('', 'is empty; must name a folder'),
    (tmp_path / ('a' * 300), 'File name too long'), (tmp_path / 'file' / 'in.png', 'Not a directory'),
  ]:  # fmt: skip
    assert runs.pagoda(command, *others, f'--{flag}={place}') == 2
    assert f'flag --{flag}={place}: {said}\n' in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'there']


def test_what_cannot_be_written_in_the_end_is_refused_before_hours_of_drawing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(os, 'access', lambda path, mode: 'shared' not in str(path))  # who is root may write anywhere
  (tmp_path / 'shared').mkdir()
  for command, flag, more in (('sample', 'out', []), ('evaluate', 'out', []), ('report', 'output', REQUIRED['report'])):
    assert runs.pagoda(command, f'--{flag}={tmp_path}/shared/new/x.png', *more) == 2
    assert f'{tmp_path}/shared is a folder that cannot be written to\n' in capsys.readouterr().err
  for command in ('export', 'publish', 'ema', 'convert'):
    for place, said in ((tmp_path / 'shared' / 'new', f'{tmp_path}/shared is a folder that cannot be written to'),
                        ('', 'is empty; must name what to make')):
      assert runs.pagoda(command, *REQUIRED[command], f'--output={place}') == 2
      assert f'flag --output={place}: {said}\n' in capsys.readouterr().err
  monkeypatch.chdir(tmp_path / 'shared')
  assert runs.pagoda('edit', 'reconstruct', 'a.png', '--workdir=no') == 1
  assert f'--out=reconstruct.png: {tmp_path}/shared is a folder that cannot be written to' in capsys.readouterr().err
  # An output that exists is said before the run is looked at, which is none here.
  assert runs.pagoda('ema', f'--workdir={tmp_path}', '--std=0.1', f'--output={tmp_path}/shared') == 1
  assert f'{tmp_path}/shared exists already' in capsys.readouterr().err
  # A run that is read-only is measured into a file of one's own, result by result.
  run, out = tmp_path / 'shared', tmp_path / 'own' / 'x.json'
  (run / 'teacher').mkdir()
  monkeypatch.setattr(workdir, 'image_phase', lambda *_: (tiny.get_config(), 'teacher'))

  def of_phase(*_):
    for step in (2, 4):
      yield {'samples': {'phase': 'teacher', 'step': step, 'guidance': None, 'count': 5}, 'metrics': {}, 'notes': []}
      found = files.read_sealed(out)
      assert found.get('results', [found])[-1]['samples']['step'] == step

  monkeypatch.setattr(evaluate, 'of_phase', of_phase)
  assert runs.pagoda('evaluate', f'--workdir={run}') == 1
  assert 'teacher/evaluate: cannot be written to; give --out=FILE' in capsys.readouterr().err
  assert runs.pagoda('evaluate', f'--workdir={run}', f'--out={out}') == 0
  assert f'teacher, step 4: {out}' in capsys.readouterr().out and len(files.read_sealed(out)['results']) == 2
  assert not list(run.glob('*/evaluate/*'))


@pytest.mark.parametrize('command, flag', [
  ('plan', 'mfu'), ('prepare', 'max_unreadable'), ('convert', 'scaling_factor'), ('convert', 'shift_factor'),
  ('serve', 'rate'), ('bench', 'seconds'), ('bench', 'peak')])
def test_a_number_that_is_none_is_refused(command, flag, capsys):
  for value in ('nan', 'inf'):
    assert runs.pagoda(command, *REQUIRED.get(command, ['data']), f'--{flag}={value}') == 2
    assert f'flag --{flag}={value}: must be finite' in capsys.readouterr().err


@pytest.mark.parametrize('command, flag, said', [
  ('prepare', '--text_length=5', '--text_length=5: is of embeddings (--text_encoder)'),
  ('prepare', '--text_width=64', '--text_width=64: is of embeddings (--text_encoder)'),
  ('prepare', '--quality=80', '--quality=80: is of --format=jpeg'),
  ('prepare', '--split=test', '--split=test: is of --source=tfds:NAME'),
  ('prepare', '--data_dir=data', '--data_dir=data: is of --source=tfds:NAME'),
  ('plan', '--mfu=0.5', '--mfu=0.5: is a share of a peak, and that of'),
  ('convert', '--groups=0', '0 is not a positive integer'),
  ('convert', '--scaling_factor=0', 'range [1e-06, 1000000.0]'),
  ('convert', '--scaling_factor=-1', 'range [1e-06, 1000000.0]'),
  ('serve', '--names=https://digits.example.org', '--names=https://digits.example.org: must be a name alone'),
  ('serve', '--names=digits.example.org:8000', '--names=digits.example.org:8000: must be a name alone'),
])
def test_a_flag_that_would_mean_nothing_is_refused(command, flag, said, capsys):
  assert runs.pagoda(command, *REQUIRED[command], flag) in (1, 2)
  assert said in capsys.readouterr().err


@pytest.mark.parametrize('seed', [10**20, 2**32, -1])
def test_a_seed_that_is_not_one_of_jax_is_refused(capsys, seed):
  assert runs.pagoda('sample', '--workdir=no', f'--seed={seed}') == 2
  assert f'{seed} is not an integer in the range [0, 4294967295]' in capsys.readouterr().err


def test_what_grades_samples_at_the_end_of_a_run_is_looked_for_before_it(tmp_path, monkeypatch, capsys):
  found = importlib.util.find_spec
  without = lambda name, *more: None if name == 'sklearn' else found(name, *more)
  monkeypatch.setattr(importlib.util, 'find_spec', without)
  flags = (runs.CONFIG, f'--workdir={tmp_path / "run"}', '--config.evaluation.samples=20')
  assert runs.pagoda('run', *flags) == 1
  assert 'config.evaluation.samples=20: scikit-learn grades them' in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()
