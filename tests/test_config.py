"""What `validate` refuses: each message names the key, its value and what would be right."""

import importlib.util
import pathlib

import pytest
import tiny

from pagoda_jax import config as configs
from pagoda_jax import validation

EXPERIMENTS = sorted((pathlib.Path(__file__).parent.parent / 'experiments').glob('*.py'))


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  validation.validate(module.get_config(), 1)


def set_key(key, value):
  def change(config):
    *path, last = key.split('.')
    group = config
    for part in path:
      group = group[part]
    with group.unlocked(), group.ignore_type():
      group[last] = value
  return change


BAD = [
  ('phases.distill.stepz', 3, ['config.phases.distill.stepz', 'did you mean steps']),
  ('data.sourse', 'x', ['config.data.sourse', 'did you mean source']),
  ('phases.teacher.steps', 0, ['config.phases.teacher.steps = 0', '> 0']),
  ('phases.teacher.steps', 'many', ["config.phases.teacher.steps = 'many'", 'int']),
  ('phases.teacher.batch_size', 12, ['config.phases.teacher.batch_size = 12', 'multiple of 8']),
  ('phases.grow_16.start', 'teacher', ["config.phases.grow_16.start = 'teacher'", 'distill']),
  ('phases.grow_16.resolution', 24, ['config.phases.grow_16.resolution = 24', '8', 'times 2, 4, 8']),
  ('phases.grow_16.resolution', 32, ['config.phases.grow_16.resolution = 32', 'config.data.resolution = 16']),
  ('phases.distill.noise', 'nowhere', ["config.phases.distill.noise = 'nowhere'", 'invert']),
  ('phases.distill.stage', 'shrink', ["'shrink'", 'teacher, invert, distill, grow']),
  ('phases.distill.reconstruction.distance', 'l3', ["'l3'", 'pixels']),
  ('phases.distill.discriminator.augment', ('sepia',), ["'sepia'", 'brightness']),
  ('phases.distill.optimizer.name', 'adan2', ["'adan2'", 'optax']),
  ('phases.distill.pairs_fraction', 1.5, ['pairs_fraction = 1.5', '(0, 1]']),
  ('phases.invert.dtype', 'int8', ["'int8'", 'float32, float16']),
  ('order', ('teacher', 'invert', 'grow_16'), ['config.phases.grow_16.start', 'none; add one of stage distill']),
  ('order', ('teacher', 'distil'), ["'distil'", 'distill']),
  ('order', (), ['config.order', 'at least one phase']),
  ('mesh.data', 3, ['config.mesh', 'takes 3 devices, there are 8']),
  ('base_resolution', 32, ['config.base_resolution = 32', 'config.data.resolution = 16']),
  ('data.num_classes', -2, ['config.data.num_classes = -2', '-1']),
  ('data.source', 'camera', ["config.data.source = 'camera'", 'mnist, folder, array_record, tfds']),
  ('data.source', 'folder', ["config.data.path = ''", 'source folder needs it']),
  ('data.source', 'tfds', ["config.data.name = ''", 'source tfds needs it']),
  ('data.max_unreadable', 1.5, ['config.data.max_unreadable = 1.5', '[0, 1]']),
  ('data.resolution', 32, ['config.data.resolution = 32', 'must be 16', 'grow_16']),
  ('data.num_classes', 0, ['discriminator.conditional', 'num_classes is 0']),
  ('network.form', 'vdm', ["config.network.form = 'vdm'", 'edm, guided, ddpmpp']),
  ('network.decoder_channel_mult', (1, 2), ['config.network.decoder_channel_mult', 'must have 1 levels']),
  ('network.num_heads', -1, ['config.network.num_heads = -1', '>= 0']),
  ('phases.distill.discriminator.features', 'vgg', ["'vgg'", 'pixels, projected']),
  ('phases.distill.discriminator.backbones', ('resnet50',), ["'resnet50'", 'tf_efficientnet_lite0']),
  ('phases.distill.discriminator.backbones', (), ['discriminator.backbones', 'at least one']),
  ('phases.distill.reconstruction.backbones', configs.BACKBONES * 2, ['reconstruction.backbones', 'twice']),
  ('phases.distill.reconstruction.augment', ('sepia',), ['reconstruction.augment', "'sepia'"]),
  ('phases.invert.teacher', '', ['config.phases.invert.teacher', 'or config.phases.invert.init_from a folder']),
  ('phases.distill.teacher', '', ['config.phases.distill.teacher', 'or config.phases.distill.init_from a folder']),
  ('phases.grow_16.start', '', ['config.phases.grow_16.start', 'or config.phases.grow_16.init_from a folder']),
  ('phases.distill.init_from', 'w', ["init_from = 'w'", "beside config.phases.distill.teacher = 'teacher'"]),
  ('phases.grow_16.init_from', 'w', ["init_from = 'w'", "beside config.phases.grow_16.start = 'distill'"]),
  ('phases.grow_16.init_levels', ((8, 1, False),), ['grow_16.init_levels', 'grow_16.init_from is empty']),
  ('network.dropout', 1.0, ['config.network.dropout = 1.0', '[0, 1)']),
  ('microbatch', -1, ['config.microbatch = -1', '>= 0']),
  ('remat', (16, 4), ['config.remat = (16, 4)', 'some of 8, 16,']),
  ('remat', 16, ['config.remat = 16', 'tuple']),
  ('diffusion.sigma_min', 90.0, ['config.diffusion.sigma_min = 90.0', 'sigma_max = 80.0']),
]


@pytest.mark.parametrize('key, value, expected', BAD, ids=[f'{key}={value}' for key, value, _ in BAD])
def test_refuses(key, value, expected):
  config = tiny.get_config()
  validation.validate(config, 8)
  set_key(key, value)(config)
  with pytest.raises(configs.ConfigError) as error:
    validation.validate(config, 8)
  for text in expected:
    assert text in str(error.value)


def test_a_microbatch_divides_every_devices_share_or_holds_it_whole():
  config = tiny.get_config()
  for most, devices in ((0, 1), (4, 1), (8, 1), (100, 1), (3, 4), (3, None)):
    config.microbatch = most
    validation.validate(config, devices)
  with pytest.raises(configs.ConfigError, match=r'config.microbatch = 3: must divide 8 \(1, 2, 4, 8\).*batch_size = 8'):
    validation.validate(config, 1)


def test_init_levels_are_three_numbers_each_and_count_as_resolution():
  config = tiny.get_config()
  config.phases.grow_16.update({'start': '', 'init_from': 'weights', 'init_levels': ((8, 1),)})
  with pytest.raises(configs.ConfigError, match='init_levels.*channels, num_blocks, scale_shift'):
    validation.validate(config, 8)
  config.phases.grow_16.init_levels = ((8, 1, False),)
  with pytest.raises(configs.ConfigError, match=r'grow_16.resolution = 16: must be 16 \(the resolution of weights\)'):
    validation.validate(config, 8)


def test_a_misspelt_key_in_an_experiment_file_is_refused_where_it_stands():
  with pytest.raises((KeyError, AttributeError), match='stepz'):
    configs.teacher(stepz=3)
