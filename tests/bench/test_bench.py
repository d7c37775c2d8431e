"""The measurements run and say what they promise; their figures are for a person to read."""

import io
import json
import pathlib
import re
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from pagoda_jax import main, pipeline, stages
from pagoda_jax.bench import convert, data, shares, step, synthetic
from pagoda_jax.cli import bench as command
from pagoda_jax.data import pictures
from pagoda_jax.networks import attention, chips
from pagoda_jax.planning import costs, plan, programs
from pagoda_jax.runtime import progress, topologies

CONFIG = f'--config={tiny.__file__}'


def test_convert_measures_each_network():
  networks = {'small': ('lpips', {'widths': (64, 128), 'depths': (2, 2)}, {})}
  (row,) = convert.bench_convert(networks)
  parameters = 64 * 27 + 64 + 64 * 64 * 9 + 64 + 128 * 64 * 9 + 128 + 128 * 128 * 9 + 128 + 64 + 128
  assert row['name'] == 'small' and row['parameters'] == parameters and row['weights_bytes'] == 4 * parameters
  assert 0 < row['seconds'] < 60 and row['extra_bytes'] < 2**30


def test_unknown_measurement():
  with pytest.raises(ValueError, match='use convert'):
    command.run(None, ['speed'])


def test_bench_data_prints_a_row_for_each_path(capsys, monkeypatch):
  monkeypatch.setattr(data, 'LARGE_COUNT', 2)
  monkeypatch.setattr(data, 'SMALL_COUNT', 2 * data.BATCH)
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


def test_chips_are_known_by_what_jax_calls_them():
  names = {'NVIDIA H100 80GB HBM3': 'h100', 'NVIDIA H200': 'h200', 'NVIDIA A100-SXM4-80GB': 'a100',
           'TPU v5 lite': 'v5e', 'TPU v5p': 'v5p', 'TPU v5': 'v5p', 'TPU v6 lite': 'v6e', 'cpu': 'cpu'}
  assert {kind: topologies.chip_name(kind) for kind in names} == names
  assert topologies.chip_name('NVIDIA GeForce RTX 2080') == 'GeForce RTX 2080'  # no peak is made up for it
  kinds = [kind for chip in topologies.CHIPS.values() for kind in chip.kinds]
  assert len(kinds) == len(set(kinds))


def test_mfu_by_hand(monkeypatch):
  # An ADM-64 teacher: 658 GFLOP an image, 601 images/s on an H100.
  assert topologies.utilisation(601, 658e9, topologies.Topology('h100', 1)) == pytest.approx(0.400, abs=5e-4)
  assert topologies.utilisation(601, 658e9, topologies.Topology('h100', 4)) == pytest.approx(0.100, abs=5e-4)
  told = progress.Progress('teacher', 10)
  told.image_flops = 2e9
  monkeypatch.setattr(told, 'images_per_second', lambda: 40.0)
  assert told.rates() == {'images_per_second': 40.0}  # nothing is known of this CPU
  monkeypatch.setitem(topologies.CHIPS, 'cpu', topologies.Chip(1e11, None, ('cpu',), 8))
  count = jax.device_count()
  assert told.rates() == {'images_per_second': 40.0, 'images_per_second_per_chip': 40 / count, 'mfu': 0.8 / count}


def test_the_step_that_compiles_is_no_part_of_the_rate(monkeypatch, capsys):
  now = 100.0
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now)
  told = progress.Progress('teacher', 12, done=9)
  now = 160.0  # step 10 has been compiled; what it did is counted a step later
  told.restart_clock(10)
  now = 160.5
  told.update(10, 64, force=True)
  assert told.rates() == {} and capsys.readouterr().err == 'teacher  step 10/12\n'
  now = 164.0
  told.update(11, 64, force=True)
  assert told.rates() == {'images_per_second': 16.0}
  assert capsys.readouterr().err == 'teacher  step 11/12  16 images/s  0:04 left\n'


def test_flops_are_counted_by_the_cpu_backend_without_what_saves_memory(monkeypatch, caplog):
  """XLA counts nothing of what is lowered for a GPU or a TPU."""
  config = tiny.get_config()
  config.phases.teacher.batch_size = 2
  plain = programs.make(config, 'teacher')
  config.remat, config.microbatch, config.attention = (8,), 1, 'flash'
  assert plan.image_flops(config, 'teacher') == costs.flops(plain.trace()) / 2
  monkeypatch.setitem(topologies.CHIPS, 'cpu', topologies.Chip(1e12, None, ('cpu',), 8))
  monkeypatch.setattr(jax, 'local_devices', mock.Mock(side_effect=RuntimeError('Unknown backend cpu')))
  assert pipeline.image_flops_for_mfu(config, 'teacher') == 0
  jax.local_devices.assert_called_once_with(backend='cpu')
  assert 'teacher: MFU is not told' in caplog.text and 'JAX_PLATFORMS=cpu,cpu, or leave' in caplog.text
  monkeypatch.setattr(plan, 'image_flops', mock.Mock(side_effect=NotImplementedError('a kernel without CPU')))
  assert pipeline.image_flops_for_mfu(config, 'teacher') == 0 and 'a kernel without CPU' in caplog.text


def test_parts_of_an_operation_by_its_name():
  names = {
    'jit(step)/jvp(generator)/UNet/out_conv/conv_general_dilated': 'generator forward',
    'jit(step)/transpose(jvp(generator))/UNet/out_conv/conv_general_dilated': 'generator backward',
    'jit(step)/while/body/closed_call/features/sub': 'features forward',
    'jit(step)/transpose(jvp(distance))/discriminator/mul': 'distance backward',  # the outermost counts
    'jit(step)/update/mul': 'update',
    'jit(step)/jvp(encoder)/UNet/add': 'encoder forward',
    'jit(step)/generators/add': 'other',
    '': 'other',
  }
  assert {name: shares.part_of(name) for name in names} == names
  hlo = """
ENTRY %main {
  %fusion.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%f, metadata={op_name="jit(step)/update/mul"}
  ROOT %copy.2 = f32[8]{0} copy(%fusion.1)
}
"""
  assert shares.parts_of_instructions(hlo) == {'fusion.1': 'update', 'copy.2': 'other'}
  named = set().union(*(re.findall(r"named_scope\('(\w+)'\)", path.read_text())
                        for path in pathlib.Path(stages.__file__).parent.glob('*.py')))
  assert named == set(shares.PARTS)


def test_seconds_of_parts_are_those_of_their_own_operations():
  def line(name, *events):
    return SimpleNamespace(name=name, events=[
      SimpleNamespace(name=op, start_ns=start, duration_ns=end - start, stats=[('hlo_op', op)] if stat else [])
      for op, start, end, stat in events])

  plane = lambda name, *lines: SimpleNamespace(name=name, lines=lines)
  read = lambda *planes: shares.seconds_by_part(SimpleNamespace(planes=planes), parts)
  parts = {'while.1': 'other', 'conv.2': 'generator forward', 'mul.3': 'update'}
  # A loop with two turns of a convolution; Python's call, and an operation of another program.
  thread = line('thread', ('while.1', 0, 100, True), ('conv.2', 10, 40, True), ('conv.2', 50, 90, True),
                ('mul.3', 100, 120, True), ('call', 0, 200, False), ('sort.9', 120, 200, True))
  nanoseconds = {'generator forward': 70, 'other': 30, 'update': 20}
  assert read(plane('/host:CPU', thread)) == pytest.approx({part: ns / 1e9 for part, ns in nanoseconds.items()})
  # Of two GPUs; what the host did for them does not count.
  gpus = [plane(f'/device:GPU:{i}', line('Stream #7', ('mul.3', 0, 5, True))) for i in range(2)]
  assert read(plane('/host:CPU', thread), *gpus) == pytest.approx({'update': 10e-9})
  # A CUDA graph's kernels: XLA's, and a library's, which are counted to what stands before them.
  def kernel(name, start, end, op='command_buffer_7'):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=end - start, stats=[('hlo_op', op)])

  graph = SimpleNamespace(name='Stream #14', events=[
    kernel('memcpy', 0, 1), kernel('sm90_xmma', 1, 4, 'conv.2'), kernel('mul_3', 4, 9), kernel('nvjet_sm90', 9, 16)])
  nanoseconds = {'other': 1, 'generator forward': 3, 'update': 12}
  assert read(plane('/device:GPU:0', graph)) == pytest.approx({part: ns / 1e9 for part, ns in nanoseconds.items()})
  # A TPU names its operations by their text, and tells of them once more by module.
  tpu = plane('/device:TPU:0', line('XLA Modules', ('conv.2', 0, 50, False)),
              line('XLA Ops', ('%conv.2 = f32[8] convolution(%a, %b)', 0, 40, False)))
  assert read(tpu) == pytest.approx({'generator forward': 40e-9})


def test_the_next_run_is_issued_before_one_is_waited_for(monkeypatch):
  log = []
  monkeypatch.setattr(jax, 'block_until_ready', lambda number: log.append(f'end {number}'))
  issued = iter(range(100))

  def run():
    number = next(issued)
    log.append(f'begin {number}')
    return number

  assert len(step.run_seconds(run, repeats=2, warm_up=1)) == 2
  assert log == ['begin 0', 'begin 1', 'end 0', 'begin 2', 'end 1', 'begin 3', 'end 2', 'end 3']


@pytest.fixture
def quick_compilation():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def test_bench_step_end_to_end(quick_compilation, tmp_path, capsys):
  assert main.main(['bench', 'step', CONFIG, '--phase=teacher', '--repeats=2', '--warm_up=1', '--json', '--peak=1e12',
                    f'--profile={tmp_path / "trace"}']) == 0
  found, devices = json.loads(capsys.readouterr().out), jax.device_count()
  assert list((tmp_path / 'trace').glob('plugins/profile/*/*.xplane.pb'))
  assert (found['phase'], found['images'], found['chip'], found['devices']) == ('teacher', 8, 'cpu', devices)
  assert found['flops_per_image'] == plan.image_flops(tiny.get_config(), 'teacher')
  assert found['mfu'] == pytest.approx(found['images_per_second'] * found['flops_per_image'] / 1e12 / devices)
  assert found['seconds']['lowest'] <= found['seconds']['median'] <= found['seconds']['highest']
  assert {'denoiser forward', 'denoiser backward', 'update'} <= set(found['parts'])
  assert found['operations'] == pytest.approx(sum(found['parts'].values())) and found['input_seconds'] > 0
  assert found['memory']['arguments'] > 0 and found['peak_memory'] is None  # CPU counts none
  text = '\n'.join(command.table(found))
  assert 'FLOP/s a device; MFU' in text and 'denoiser backward' in text and str(tmp_path) in text
  assert 'no MFU: the peak of this chip is not known' in '\n'.join(
    command.table(found | {'mfu': None, 'peak_flops_per_second': None, 'input_seconds': None}))


def test_what_is_measured_of_sampling_and_inversion(monkeypatch):
  calls = []
  monkeypatch.setattr(step, 'measure', lambda *args, **options: calls.append(args) or {})
  config, devices = tiny.get_config(), jax.device_count()
  config.phases.teacher.sample_levels, config.phases.invert.num_levels = 6, 6
  monkeypatch.setattr(chips, 'chip', lambda: 'tpu')
  monkeypatch.setattr(attention, 'FLASH_FROM', 64)  # a kernel, which the CPU backend that counts does not know
  step.bench_sample(config, 'teacher', 2 * devices - 1, repeats=1)
  step.bench_invert(config, 'invert', repeats=1)
  (*_, sampling, _, sampled), (*_, inversion, _, inverted) = calls
  assert sampling.images == 2 * devices and inversion.images == 512
  # 6 levels are 10 evaluations; sampling goes on to zero noise by one more.
  assert sampled == pytest.approx(inverted * 11 / 10, rel=0.02)
  assert set(synthetic.batch(config, sampling)) == {'noise', 'label'}


@pytest.mark.parametrize('phase', ['teacher', 'grow_16'])
def test_made_up_states_have_the_shapes_of_the_step_and_are_finite(phase):
  config = tiny.get_config()
  program = programs.make(config, phase)
  made = synthetic.state(config, phase, program)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(made) == shapes(program.state)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made)) and made.step == 0
  assert shapes(synthetic.batch(config, program)) == shapes(program.batch)


@pytest.mark.parametrize('phase', ['teacher', 'invert', 'grow_16'])
def test_made_up_captions_have_the_shapes_and_types_of_the_step(phase):
  config = tiny.get_config('text')
  program = programs.make(config, phase)
  made = synthetic.batch(config, program)
  assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
    name: (x.shape, x.dtype) for name, x in program.batch.items()}
  assert made['text_mask'].all() and made['text'].std() == pytest.approx(1, rel=0.2)


REFUSED = [
  (['step'], 'pagoda bench: step needs --config=FILE'),
  (['step', CONFIG, '--phase=invert'], '--phase=invert: must be one of teacher, distill, grow_16'),
  (['invert', CONFIG, '--phase=teacher'], '--phase=teacher: must be one of invert'),
  (['sample', CONFIG, f'--profile={tiny.__file__}'], 'is there and is not a folder'),
  (['sample', CONFIG, '--peak=nan'], 'must be finite'),
  (['step', CONFIG, '--config.phases.teacher.batch_size=0'], 'config.phases.teacher.batch_size = 0'),
  (['step', CONFIG, '--batch_size=64'], '--batch_size is of sample; --config.phases.NAME.batch_size=N is'),
  (['data', '--json'], 'pagoda bench: data: --json is of step, sample, invert'),
  (['convert', '--seconds=9'], '--seconds is of data'),
  (['sample', CONFIG, '--profile=/proc/none/trace'], '/proc/none'),  # where no folder can be made
]


@pytest.mark.parametrize('args, text', REFUSED, ids=[' '.join(args[-1:]) for args, _ in REFUSED])
def test_bench_refuses_before_it_measures(args, text, capsys):
  assert main.main(['bench', *args]) in (1, 2)
  assert text in capsys.readouterr().err
