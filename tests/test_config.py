"""What `validate` refuses: each message names the key, its value and what would be right."""

import importlib.util
import pathlib

import pytest
import tiny

from pagoda_jax import config as configs

EXPERIMENTS = sorted((pathlib.Path(__file__).parent.parent / 'experiments').glob('*.py'))


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  configs.validate(module.get_config(), 1)


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
  ('diffusion.sigma_min', 90.0, ['config.diffusion.sigma_min = 90.0', 'sigma_max = 80.0']),
]


@pytest.mark.parametrize('key, value, expected', BAD, ids=[f'{key}={value}' for key, value, _ in BAD])
def test_refuses(key, value, expected):
  config = tiny.get_config()
  configs.validate(config, 8)
  set_key(key, value)(config)
  with pytest.raises(configs.ConfigError) as error:
    configs.validate(config, 8)
  for text in expected:
    assert text in str(error.value)


def test_a_misspelt_key_in_an_experiment_file_is_refused_where_it_stands():
  with pytest.raises((KeyError, AttributeError), match='stepz'):
    configs.teacher(stepz=3)
