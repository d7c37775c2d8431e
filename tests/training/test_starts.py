"""`init_from`: what a phase can start from outside its run, and what it refuses."""

import contextlib
import json

import jax
import numpy as np
import pytest
import tiny

from pagoda_jax import config as configs
from pagoda_jax import main
from pagoda_jax.config import ladder
from pagoda_jax.data import noise_store
from pagoda_jax.networks.unet import EDM_ADM, EDM_DDPMPP, GUIDED_ADM, UNet
from pagoda_jax.runtime import files, trees
from pagoda_jax.stages import architectures, models
from pagoda_jax.training import checkpoints, claims, starts, workdir
from pagoda_jax.weights.convert import folders, formats


def experiment(init_from, network=None, **phase):
  """The tiny experiment without a teacher phase: everything starts from `init_from`."""
  config = tiny.get_config()
  config.order = ('invert', 'distill', 'grow_16')
  for name in ('invert', 'distill'):
    config.phases[name].update({'teacher': '', 'init_from': str(init_from)})
  config.network.update(network or {})
  config.phases.distill.update(phase)
  return config


def written(path, unet, seed=0, format='edm'):
  """A folder as `pagoda convert` writes it, of random parameters."""
  rng = np.random.default_rng(seed)
  params = random_params(unet, rng)
  fields = ('parent', 'name', 'dtype', 'remat', 'attention_form', 'dropout')
  options = {f: getattr(unet, f) for f in unet.__dataclass_fields__ if f not in fields}
  folders.write_converted(path, formats.Converted({'params': params}, options, format), {'sha256': str(seed)})
  return params


def random_params(unet, rng):
  shapes = jax.eval_shape(lambda: models.fresh_params(unet, jax.random.key(0)))
  return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture
def base():
  return models.make_unet(tiny.get_config(), 'teacher')


def test_published_weights_start_invert_distill_and_teacher(tmp_path, base, capsys):
  params = written(tmp_path / 'w', base)
  config = experiment(tmp_path / 'w')
  for name in ('invert', 'distill'):
    found, where = starts.read_start(config, tmp_path / 'run', name)
    assert checkpoints.digest(found) == checkpoints.digest(params)
    assert where.endswith(f'{len(trees.flat_leaves(params))} copied, 0 new, 0 other shape, 0 left out')
  config = tiny.get_config()
  config.phases.teacher.init_from = str(tmp_path / 'w')
  assert main.main(['train', f'--config={tiny.__file__}', f'--workdir={tmp_path / "run"}', '--phase=teacher',
                    f'--config.phases.teacher.init_from={tmp_path / "w"}', '--max_steps=1']) == 0
  assert 'copied, 0 new' in capsys.readouterr().out
  after, _ = checkpoints.read_state(tmp_path / 'run' / 'teacher')
  change = np.abs(after['params']['in_conv']['kernel'] - params['in_conv']['kernel']).max()
  assert 0 < change < 2e-3  # one step of Adam from there
  # Its folder is one that another run can start from.
  config = experiment(tmp_path / 'run' / 'teacher')
  found, where = starts.read_start(config, tmp_path / 'other', 'distill')
  assert 'step 1' in where and checkpoints.digest(found) == checkpoints.digest(after['ema'])
  # However it is called: as a run remembers what it began with, and as one of an earlier version did.
  (tmp_path / 'best').symlink_to(tmp_path / 'run' / 'teacher')
  mark = starts.mark(tmp_path / 'run' / 'teacher')
  assert starts.mark(tmp_path / 'best') == mark
  assert starts.same_mark(mark.replace('phase teacher', 'phase best'), mark)
  assert not starts.same_mark(mark.replace('step 1', 'step 2'), mark) and not starts.same_mark(None, mark)
  config.network.channels = 16
  with pytest.raises(starts.StartError, match=r'config.network.channels \(channels\): there 8, in the config 16'):
    starts.read_start(config, tmp_path / 'other', 'distill')


def test_a_run_without_a_teacher_phase(tmp_path, base, capsys):
  """Inverts and distils from weights, and notices when something else lies there."""
  params = written(tmp_path / 'w', base)
  flags = ['--config.order=("invert", "distill")', f'--workdir={tmp_path / "run"}', '--config.checkpoint.every_steps=1']
  start = [f'--config.phases.{name}.{key}={value}' for name in ('invert', 'distill')
           for key, value in (('teacher', ''), ('init_from', tmp_path / 'w'))]
  command = ['run', f'--config={tiny.__file__}', *flags, '--max_steps=1']
  assert main.main([*command, *start]) == 0
  origin = json.loads((tmp_path / 'run' / 'invert' / 'manifest.json').read_text())['origin']
  assert origin['teacher_sha256'] == checkpoints.digest(params)
  (tmp_path / 'w').rename(tmp_path / 'moved')
  moved = [flag.replace(f'{tmp_path / "w"}', f'{tmp_path / "moved"}') for flag in start]
  capsys.readouterr()
  assert main.main([*command, *moved]) == 0  # the same weights elsewhere are the same start
  assert capsys.readouterr().out.count('finished already') == 2
  written(tmp_path / 'w', base, seed=1)
  assert main.main([*command, *start]) == 1
  assert 'started from weights' in capsys.readouterr().err


def test_the_mark_of_weights_tells_their_numbers(tmp_path, base):
  """The same when they are converted again, though Orbax's files differ; another for one other number."""
  params = written(tmp_path / 'w', base)
  written(tmp_path / 'again', base)
  mark = starts.mark(tmp_path / 'w')
  described = [folders.read_description(tmp_path / name) for name in ('w', 'again')]
  assert mark == starts.mark(tmp_path / 'again') and described[0]['files'] != described[1]['files']
  params['in_conv']['bias'][0] += 1e-6
  values = {key: described[0][key] for key in ('options', 'format')}
  folders.write_converted(tmp_path / 'x', formats.Converted({'params': params}, **values), described[0]['source'])
  assert starts.mark(tmp_path / 'x').split(',')[0] == mark.split(',')[0] and starts.mark(tmp_path / 'x') != mark
  assert not starts.same_mark(mark, starts.mark(tmp_path / 'x'))


def test_a_process_with_other_weights_than_process_0_is_refused(tmp_path, base, monkeypatch):
  """Folders of one name on each machine: arrays that are to be the same everywhere would silently differ."""
  for seed in (0, 1):
    written(tmp_path / f'w{seed}', base, seed)
  monkeypatch.setattr(starts.distributed, 'from_primary', lambda place, make: starts.mark(tmp_path / 'w0'))
  starts.read_start(experiment(tmp_path / 'w0'), tmp_path, 'distill')
  with pytest.raises(starts.StartError, match='w1: holds weights .*, and in process 0 weights '):
    starts.read_start(experiment(tmp_path / 'w1'), tmp_path, 'distill')


def test_growth_from_weights_that_have_grown_already(tmp_path, base):
  grown = base.clone(grown=((8, 1, False),))
  params = written(tmp_path / 'w', grown)
  config = tiny.get_config()
  config.data.resolution = 32
  config.phases.grow_16.update({'start': '', 'init_from': str(tmp_path / 'w'), 'init_levels': ((8, 1, False),),
                                'resolution': 32})
  assert ladder.start_resolution(config, 'grow_16') == 16
  found, _ = starts.read_start(config, tmp_path, 'grow_16')
  assert checkpoints.digest(found) == checkpoints.digest(params)
  unet = models.make_unet(config, 'grow_16')
  assert [tuple(level) for level in unet.grown] == [(8, 1, False), (8, 1, False)]
  config.phases.grow_16.init_levels = ()
  config.phases.grow_16.resolution = 16
  with pytest.raises(starts.StartError, match='growth phases'):
    starts.read_start(config, tmp_path, 'grow_16')


def test_growth_from_another_run_agrees_with_it_about_the_noise(finished):
  config = tiny.get_config()
  config.phases.grow_16.update({'start': '', 'init_from': str(finished / 'distill'), 'standardize_noise': True})
  with pytest.raises(starts.StartError, match='knows noise of standardize_noise = False, .*grow_16.* = True; must be'):
    starts.read_start(config, finished, 'grow_16')
  config.phases.grow_16.standardize_noise = False
  starts.read_start(config, finished, 'grow_16')


def other_run(tmp_path, monkeypatch, start, other):
  """config.json of a phase of another run, said to have a checkpoint."""
  claims.write(tmp_path / start, start, {}, json.loads(workdir.as_json(other)))
  monkeypatch.setattr(starts.checkpoints, 'newest_step', lambda path: 1)


@pytest.mark.parametrize('name, start, key, there, said', [
  ('invert', 'distill', '', None, 'a phase of stage distill, and config.phases.invert .* from one of stage teacher'),
  ('distill', 'invert', '', None, 'of stage invert, and config.phases.distill .* of stage teacher or distill or grow'),
  ('grow_16', 'teacher', '', None, 'a phase of stage teacher, and .* starts from one of stage distill or grow'),
  ('invert', 'teacher', 'diffusion.sigma_data', 1.0, 'config.diffusion.sigma_data: there 1.0, in the config 0.5'),
  ('invert', 'teacher', 'diffusion.sigma_max', 70.0, ''),  # a teacher knows all noise levels
  ('grow_16', 'distill', 'diffusion.sigma_max', 70.0, 'config.diffusion.sigma_max: there 70.0, in the config 80.0'),
])
def test_what_fits_by_its_leaves_alone_is_no_start(monkeypatch, tmp_path, name, start, key, there, said):
  """A network of another kind, or that knows other noise, was taken, and gave noise or pictures of nothing."""
  other, config = tiny.get_config(), experiment(tmp_path / start)
  config.phases.grow_16.update({'start': '', 'init_from': str(tmp_path / start)})
  if key:
    group, last = key.split('.')
    other[group][last] = there
  other_run(tmp_path, monkeypatch, start, other)
  if not said:
    return starts.check_outside(config, tmp_path / 'run', (name,))
  with pytest.raises(starts.StartError, match=said):
    starts.check_outside(config, tmp_path / 'run', (name,))


@pytest.mark.parametrize('group, key, there, here', [
  ('autoencoder', 'sha256', 'a' * 64, 'b' * 64), ('autoencoder', 'scaling', 0.5, 0.25), ('text', 'sha256', 'a', 'b')])
def test_a_start_knows_the_same_latents_and_captions(monkeypatch, tmp_path, group, key, there, here):
  other, config = tiny.get_config(), experiment(tmp_path / 'teacher')
  for each, value in ((other, there), (config, here)):
    each.update({'space': 'latent'} if group == 'autoencoder' else {'text': {'encoder': 'ngrams'}})
    each[group][key] = value
  other_run(tmp_path, monkeypatch, 'teacher', other)
  with pytest.raises(starts.StartError, match=f'config.{group}.{key}: there {there!r}, in the config {here!r}'):
    starts.check_outside(config, tmp_path / 'run', ('invert',))
  config[group][key] = there
  starts.check_outside(config, tmp_path / 'run', ('invert',))


def test_guidance_asks_for_a_teacher_of_dropped_labels_elsewhere_too(monkeypatch, tmp_path):
  config, other = experiment(tmp_path / 'teacher'), tiny.get_config()
  config.guidance.law = 'constant'
  other_run(tmp_path, monkeypatch, 'teacher', other)
  with pytest.raises(starts.StartError, match="label_dropout = 0.0, and config.guidance.law = 'constant'"):
    starts.check_outside(config, tmp_path / 'run', ('invert',))
  other.phases.teacher.label_dropout = 1.0  # and of some that are kept
  other_run(tmp_path, monkeypatch, 'teacher', other)
  with pytest.raises(starts.StartError, match='label_dropout = 1.0, .* asks it with label and without'):
    starts.check_outside(config, tmp_path / 'run', ('invert',))
  other.phases.teacher.label_dropout = 0.1
  other_run(tmp_path, monkeypatch, 'teacher', other)
  starts.check_outside(config, tmp_path / 'run', ('invert',))


def test_a_generator_of_another_run_grows_by_the_noise_of_its_own_teacher_alone(monkeypatch, tmp_path, capsys):
  """Another teacher's noise means other pictures to it: pairs of both were trained on in silence."""
  config = tiny.get_config()
  config.phases.grow_16.update({'start': '', 'init_from': str(tmp_path / 'distill')})
  other_run(tmp_path, monkeypatch, 'distill', tiny.get_config())
  files.write_sealed(tmp_path / 'distill' / 'inputs.json', {workdir.INVERTED_WITH: f'noise with teacher {"a" * 16}'})
  (tmp_path / 'run' / 'invert').mkdir(parents=True)
  (tmp_path / 'run' / 'invert' / noise_store.HOLDOUT_FILE).touch()
  for made_by in ('teacher_sha256', 'encoder_sha256'):
    for sha256 in ('b' * 64, 'a' * 64):
      noise_store.write_promise(tmp_path / 'run' / 'invert', 1, {made_by: sha256})
      refused = pytest.raises(workdir.WorkdirError, match='the noise of teacher aaa.* invert is of teacher b')
      with refused if made_by[0] == 't' and sha256[0] == 'b' else contextlib.nullcontext():
        workdir.check_inputs(tmp_path / 'run', config, 'grow_16')
  # What tells of it is damaged, or has gone.
  told = tmp_path / 'distill' / 'inputs.json'
  for content in (told.read_text().replace('aaa', 'aab', 1), told.read_text()[:-9], '[]', ''):
    told.write_text(content)
    with pytest.raises(starts.StartError, match='distill/inputs.json: damaged .* Put a copy back, or delete it'):
      workdir.check_inputs(tmp_path / 'run', config, 'grow_16')
  told.unlink()
  workdir.check_inputs(tmp_path / 'run', config, 'grow_16')
  assert f'{told} has gone' in capsys.readouterr().out


def test_a_start_that_is_not_there_is_told_before_the_first_phase(tmp_path, capsys):
  """And not when the phases before it have been trained; but for what one of these is to leave."""
  command = ['run', f'--config={tiny.__file__}', f'--workdir={tmp_path / "run"}', '--config.phases.distill.teacher=']
  assert main.main([*command, f'--config.phases.distill.init_from={tmp_path / "nowhere"}']) == 1
  assert 'neither a folder that `pagoda convert` has written' in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()
  config = experiment(tmp_path / 'run' / 'teacher')
  starts.check_outside(config, tmp_path / 'run', ('teacher', 'invert', 'distill'))
  config.phases.grow_16.start = ''
  for init_from, said in (('distil', 'distil.: neither'), ('grow_16', 'grow_16.: neither'), ('invert', 'invert.: nei'),
                          ('teacher', 'of stage teacher, and config.phases.grow_16 .* of stage distill or grow')):
    config.phases.grow_16.init_from = str(tmp_path / 'run' / init_from)
    with pytest.raises(starts.StartError, match=said):
      starts.check_outside(config, tmp_path / 'run', ('teacher', 'invert', 'distill', 'grow_16'))
  config.phases.grow_16.init_from = str(tmp_path / 'run' / 'distill')
  starts.check_outside(config, tmp_path / 'run', ('teacher', 'distill', 'grow_16'))


def test_another_architecture_is_refused_key_by_key(tmp_path, base):
  written(tmp_path / 'w', base)
  config = experiment(tmp_path / 'w', {'form': 'guided', 'num_blocks': 2})
  with pytest.raises(starts.StartError) as error:
    starts.read_start(config, tmp_path, 'distill')
  text = str(error.value)
  assert 'config.network.num_blocks (num_blocks): there 1, in the config 2' in text
  assert 'config.network.form (time_scale): there 1.0, in the config 1000.0' in text
  assert 'resolution' not in text


def test_leaves_that_do_not_fit_are_refused_leaf_by_leaf(tmp_path, base):
  params = written(tmp_path / 'x', base)
  del params['in_conv']['bias']
  options = folders.read_description(tmp_path / 'x')['options']
  folders.write_converted(tmp_path / 'w', formats.Converted({'params': params}, options, 'edm'), {})
  with pytest.raises(checkpoints.CheckpointError, match=r'in_conv/bias: there absent, needed \(8,\)'):
    starts.read_start(experiment(tmp_path / 'w'), tmp_path, 'distill')


def test_what_is_no_start_is_refused(tmp_path):
  (tmp_path / 'empty').mkdir()
  for name in ('empty', 'nowhere'):
    with pytest.raises(starts.StartError, match='neither a folder that `pagoda convert` has written nor a phase'):
      starts.read_start(experiment(tmp_path / name), tmp_path, 'invert')
  folders.write_converted(tmp_path / 'vgg', formats.Converted({'params': {'a': np.zeros(1)}}, {}, 'lpips'), {})
  with pytest.raises(starts.StartError, match='weights of format lpips; a phase starts from a U-Net'):
    starts.read_start(experiment(tmp_path / 'vgg'), tmp_path, 'invert')


PUBLISHED = {
  'EDM, ImageNet 64': EDM_ADM | {'channels': 192, 'stem_channels': 192, 'embed_channels': 768, 'num_classes': 1000},
  'EDM, CIFAR-10': EDM_DDPMPP | {
    'resolution': 32, 'channels': 128, 'channel_mult': (2, 2, 2), 'stem_channels': 128, 'embed_channels': 512,
    'num_blocks': 4, 'attention_resolutions': (16,), 'num_classes': 10, 'augment_dim': 9,
  },
  'teacher of the paper': GUIDED_ADM | {'channels': 192, 'stem_channels': 192, 'num_classes': 1000, 'in_channels': 3},
  'PaGoDA 32': GUIDED_ADM | {
    'resolution': 32, 'channels': 256, 'channel_mult': (1, 2, 4), 'attention_resolutions': (16, 8),
    'num_classes': 1000, 'decoder_channel_mult': (0.5, 2, 4), 'num_heads': 4,
  },
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_lines_that_convert_prints_make_the_network(name):
  config = configs.experiment()
  exec('\n'.join(architectures.config_lines(PUBLISHED[name])), {'config': config, 'c': configs})
  configs.add_phase(config, 'teacher', configs.teacher())
  assert architectures.differences(UNet(**PUBLISHED[name]), models.make_unet(config, 'teacher')) == []


def test_empty_references_are_no_inputs(tmp_path):
  config = experiment(tmp_path)
  assert workdir.upstream(config, 'invert') == []
  assert workdir.upstream(config, 'distill') == ['invert']
  assert 'config.phases.invert.init_from' not in workdir.identity(config, 'distill')


def test_a_phase_that_learns_from_drawn_images_goes_on_with_the_precision_that_they_were_drawn_at(tmp_path):
  config = tiny.get_config('guided')
  for name in ('teacher', 'guide', 'distill'):
    claims.write(tmp_path / name, name, workdir.identity(config, name), {})  # says nothing of it, as earlier versions
  config.evaluation.matmul_precision = 'default'
  workdir.check_claim(tmp_path, config, 'teacher')  # of which images are only shown
  for name in ('guide', 'distill'):  # the latter by the estimator's eyes
    with pytest.raises(claims.WorkdirError, match="evaluation.matmul_precision: there 'highest', here 'default'"):
      workdir.check_claim(tmp_path, config, name)
  claims.write(tmp_path / 'guide', 'guide', workdir.identity(config, 'guide'), {})
  config.evaluation.matmul_precision = 'highest'
  with pytest.raises(claims.WorkdirError, match="config.evaluation.matmul_precision: there 'default', here 'absent'"):
    workdir.check_claim(tmp_path, config, 'guide')
  config = tiny.get_config()
  config.evaluation.matmul_precision = 'high'
  key = 'config.evaluation.matmul_precision'
  assert key not in workdir.identity(config, 'distill')
  config.phases.distill.pairs = 'teacher'
  assert workdir.identity(config, 'grow_16')[key] == 'high'
