"""Experiment configs: the defaults of every key, and one `validate` before any device work.

An experiment file calls `experiment()`, sets what differs and adds phases built by `teacher()`,
`invert()`, `distill()` and `grow()`. Keys that are not listed here do not exist: the dicts are
locked, and `validate` compares a config with these defaults once more.
"""

import difflib
import math

import optax
from ml_collections import ConfigDict

STAGES = ('teacher', 'invert', 'distill', 'grow')
GENERATOR_STAGES = ('distill', 'grow')
TRAINED_STAGES = ('teacher', 'distill', 'grow')
SOURCES = ('mnist', 'folder', 'array_record', 'tfds')
PRECISIONS = ('float32', 'bfloat16')
NOISE_DTYPES = ('float32', 'float16')
DISTANCES = ('pixels',)
FEATURES = ('pixels',)
AUGMENTATIONS = ('brightness', 'saturation', 'contrast', 'translation', 'cutout')


class ConfigError(ValueError):
  """A config that cannot be run; the message names the key, its value and the choices."""


def _locked(values: dict, overrides: dict) -> ConfigDict:
  config = ConfigDict(values, sort_keys=False).lock()
  with config.ignore_type():  # an int where the default is a float, a list for a tuple: validate() judges
    config.update(overrides)
  return config


def optimizer(**overrides) -> ConfigDict:
  """Any optimiser of optax by its name; `learning_rate` is reached after `warmup_steps`, then constant or cosine."""
  return _locked(
    {
      'name': 'radam',
      'learning_rate': 1e-4,
      'warmup_steps': 0,
      'schedule': 'constant',  # or 'cosine': falls to zero at the phase's last step
      'b1': 0.9,
      'b2': 0.999,
      'clip_norm': 0.0,  # largest global gradient norm; 0 = no clipping
    },
    overrides,
  )


def network(**overrides) -> ConfigDict:
  """The U-Net of the teacher, which the generator begins as a copy of (networks/unet.py explains each)."""
  return _locked(
    {
      'form': 'edm',  # 'edm' | 'guided': the two published forms of the ADM U-Net
      'channels': 192,
      'channel_mult': (1, 2, 3, 4),
      'num_blocks': 3,
      'attention_resolutions': (32, 16, 8),
      'channels_per_head': 64,
      'dropout': 0.0,
    },
    overrides,
  )


def teacher(**overrides) -> ConfigDict:
  """Stage 1, the diffusion teacher at the base resolution (EDM; METHOD: batch 4096, ln sigma ~ N(-1.2, 1.2^2))."""
  return _locked(
    {
      'stage': 'teacher',
      'steps': 100_000,
      'batch_size': 4096,
      'optimizer': optimizer(name='adam'),
      'ema': 0.9999,
      'label_dropout': 0.0,
      'p_mean': -1.2,
      'p_std': 1.2,
      'sample_levels': 18,  # sigma levels of the Heun sampler that draws the sample grids
    },
    overrides,
  )


def invert(**overrides) -> ConfigDict:
  """Data to noise by the probability-flow ODE, once for every image (and its mirror image)."""
  return _locked(
    {
      'stage': 'invert',
      'teacher': 'teacher',
      'batch_size': 256,
      'num_levels': 40,
      'clip_denoised': True,
      'add_noise': False,  # to the image, of the lowest level; for images with pixels that never change
      'dtype': 'float32',
      'shard_size': 8192,  # pairs per ArrayRecord shard, the unit that is redone after a crash
    },
    overrides,
  )


def reconstruction(**overrides) -> ConfigDict:
  """L_rec: the distance between a real image and the generator's answer to its inverted noise."""
  return _locked(
    {
      'distance': 'pixels',
      'scales': 3,  # pixels: resolutions compared, each half the one before
      'weight': 1.0,
    },
    overrides,
  )


def discriminator(**overrides) -> ConfigDict:
  """The discriminator: which features it sees, its size, and the augmentation of what it sees."""
  return _locked(
    {
      'features': 'pixels',
      'scales': 2,  # pixels: resolutions seen, each half the one before
      'channels': 64,
      'conditional': True,
      'augment': AUGMENTATIONS,
    },
    overrides,
  )


def adversarial(**overrides) -> ConfigDict:
  """L_adv's weight: `weight`, times |grad L_rec| / |grad L_adv| at the last layer where `adaptive`."""
  return _locked({'weight': 0.2, 'adaptive': True, 'low': 0.01, 'high': 10.0}, overrides)


def _generator_phase(stage: str) -> dict:
  return {
    'stage': stage,
    'noise': 'invert',
    'steps': 90_000,
    'batch_size': 256,  # for each loss
    'optimizer': optimizer(learning_rate=8e-6),
    'discriminator_optimizer': optimizer(learning_rate=2e-3),
    'ema': 0.999,
    'reconstruction': reconstruction(),
    'discriminator': discriminator(),
    'adversarial': adversarial(),
    'pairs_fraction': 1.0,  # share of the store's pairs that L_rec sees
    'standardize_noise': False,  # scale inverted noise to mean 0, deviation sigma_max: for weak teachers
  }


def distill(**overrides) -> ConfigDict:
  """Stage 2, the one-step generator at the base resolution (METHOD: 0.2 x adaptive weight, RAdam)."""
  return _locked(_generator_phase('distill') | {'teacher': 'teacher'}, overrides)


def grow(**overrides) -> ConfigDict:
  """Stage 3, the generator `start` grown to `resolution` (METHOD: fixed weight 1.0, new and last old blocks train)."""
  defaults = _generator_phase('grow') | {
    'start': 'distill',
    'resolution': 0,
    'channels': 192,
    'num_blocks': 2,
    'scale_shift': False,
    'adversarial': adversarial(weight=1.0, adaptive=False),
  }
  return _locked(defaults, overrides)


PHASE_DEFAULTS = {'teacher': teacher, 'invert': invert, 'distill': distill, 'grow': grow}


def experiment(**overrides) -> ConfigDict:
  """A config with every top-level default and no phases yet."""
  return _locked(
    {
      'seed': 0,
      'order': (),
      'data': {
        'source': 'mnist',  # or 'folder', 'array_record' (what `pagoda prepare` writes), 'tfds'
        'path': '',  # the folder; tfds: its data_dir, '' for the default one
        'name': '',  # tfds: the data set, such as imagenet2012 or imagenet2012:5.1.0
        'split': 'train',  # tfds: which of its splits; the held-out images come out of it too
        'resolution': 32,  # the largest resolution that any phase reaches
        'channels': 3,
        'num_classes': 0,  # 0: unconditional; -1: as many as the source has
        'mirror': True,  # whether a mirror image is as good an image (not so for digits)
        'holdout': 0,  # images kept out of training, for evaluation
        'workers': 0,  # processes that decode and resize; 0: in the training process
        'max_unreadable': 0.01,  # folder: share of files that may be unreadable; they are listed and left out
        'verify': False,  # array_record: compare every shard with its checksum before training
      },
      'base_resolution': 64,
      'network': network(),
      'diffusion': {'sigma_min': 0.002, 'sigma_max': 80.0, 'sigma_data': 0.5, 'rho': 7.0},
      'phases': {},
      'precision': 'float32',
      'mesh': {'data': -1, 'fsdp': 1},
      'checkpoint': {'every_steps': 1000, 'keep': 3, 'keep_every': 0},
      'log': {'every_steps': 50, 'samples_every': 1000, 'samples': 64},
      # What the end-of-run summary measures of each phase's samples; 0 samples: nothing.
      'evaluation': {'samples': 0, 'components': 32},
    },
    overrides,
  )


def add_phase(config: ConfigDict, name: str, phase: ConfigDict) -> None:
  """Appends a phase to the experiment's order."""
  with config.unlocked():
    config.phases[name] = phase
  config.order = (*config.order, name)


def phase_resolution(config: ConfigDict, name: str) -> int:
  """Side in pixels of the images that a phase works on."""
  phase = config.phases[name]
  return phase.resolution if phase.stage == 'grow' else config.base_resolution


def growth_chain(config: ConfigDict, name: str) -> list[ConfigDict]:
  """The growth phases from the base generator up to phase `name`, lowest resolution first."""
  chain = []
  while config.phases[name].stage == 'grow':
    chain.insert(0, config.phases[name])
    name = config.phases[name].start
  return chain


def _check_keys(config, reference, path):
  for key in config:
    if key not in reference:
      close = difflib.get_close_matches(key, list(reference), n=1)
      hint = f'; did you mean {close[0]}?' if close else ''
      raise ConfigError(f'{path}.{key}: no such key{hint} (there are {", ".join(reference)})')
    if isinstance(reference[key], ConfigDict) and path + '.' + key != 'config.phases':
      if not isinstance(config[key], ConfigDict):
        raise ConfigError(f'{path}.{key} = {config[key]!r}: must be a group of keys: {", ".join(reference[key])}')
      _check_keys(config[key], reference[key], f'{path}.{key}')
    elif isinstance(reference[key], (int, float, str, bool)):
      _check_type(f'{path}.{key}', config[key], reference[key])


def _check_type(key, value, reference):
  kind = type(reference)
  fine = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
  if not fine:
    raise ConfigError(f'{key} = {value!r}: must be of type {kind.__name__}, such as {reference!r}')


def _check(condition, key, value, must):
  if not condition:
    raise ConfigError(f'{key} = {value!r}: {must}')


def _choose(key, value, choices):
  _check(value in choices, key, value, f'must be one of {", ".join(map(str, choices))}')


def _is_doubling(low: int, high: int) -> bool:
  return low > 0 and high > low and high % low == 0 and math.log2(high // low).is_integer()


def validate(config: ConfigDict, num_devices: int | None = None) -> None:
  """Refuses a config that cannot be run, before any device work.

  Args:
    config: an experiment.
    num_devices: devices of all hosts together; None leaves what depends on it unchecked.

  Raises:
    ConfigError: names the key, its value and what would be right.
  """
  _check_keys(config, experiment(), 'config')
  _check(config.order, 'config.order', config.order, f'must name at least one phase of {tuple(config.phases)}')
  for name in config.order:
    _choose('config.order', name, tuple(config.phases))
  _check(len(set(config.order)) == len(config.order), 'config.order', config.order, 'names a phase twice')
  _validate_shared(config)
  shards = _batch_shards(config, num_devices)
  for place, name in enumerate(config.order):
    _validate_phase(config, name, config.order[:place], shards)
  largest = max(config.phases, key=lambda name: phase_resolution(config, name))
  reached = phase_resolution(config, largest)
  _check(reached == config.data.resolution, 'config.data.resolution', config.data.resolution,
         f'must be {reached}, the largest resolution that a phase reaches ({largest})')


def _validate_shared(config):
  data = config.data
  _choose('config.data.source', data.source, SOURCES)
  _check(data.resolution > 0, 'config.data.resolution', data.resolution, 'must be > 0')
  _check(data.channels in (1, 3), 'config.data.channels', data.channels, 'must be 1 (grey) or 3 (RGB)')
  _check(data.num_classes >= -1, 'config.data.num_classes', data.num_classes,
         'must be >= 0, or -1 for as many as the source has')
  for key in ('holdout', 'workers'):
    _check(data[key] >= 0, f'config.data.{key}', data[key], 'must be >= 0')
  _check(0 <= data.max_unreadable <= 1, 'config.data.max_unreadable', data.max_unreadable, 'must lie in [0, 1]')
  for source, key in (('folder', 'path'), ('array_record', 'path'), ('tfds', 'name')):
    _check(data.source != source or data[key], f'config.data.{key}', data[key], f'source {source} needs it')
  _choose('config.precision', config.precision, PRECISIONS)
  base, levels = config.base_resolution, len(config.network.channel_mult)
  _check(base > 0 and base % 2 ** (levels - 1) == 0, 'config.base_resolution', base,
         f'must be a multiple of {2 ** (levels - 1)}: config.network.channel_mult has {levels} levels')
  _check(base <= data.resolution, 'config.base_resolution', base,
         f'must not exceed config.data.resolution = {data.resolution}')
  d = config.diffusion
  _check(0 < d.sigma_min < d.sigma_max, 'config.diffusion.sigma_min', d.sigma_min,
         f'must lie between 0 and sigma_max = {d.sigma_max}')
  for group, key in (('checkpoint', 'every_steps'), ('checkpoint', 'keep'), ('log', 'every_steps'),
                     ('log', 'samples_every'), ('log', 'samples')):
    _check(config[group][key] > 0, f'config.{group}.{key}', config[group][key], 'must be > 0')


def _batch_shards(config, num_devices):
  """How many ways a batch is split: over the data and the fsdp axis together; None where it is not known."""
  sizes = dict(config.mesh)
  for axis, size in sizes.items():
    _check(size > 0 or size == -1, f'config.mesh.{axis}', size, 'must be > 0, or -1 for all remaining devices')
  _check(list(sizes.values()).count(-1) <= 1, 'config.mesh', sizes, 'only one axis can be -1')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if num_devices is None:
    return None
  if -1 in sizes.values():
    _check(num_devices % fixed == 0, 'config.mesh', sizes, f'{num_devices} devices are no multiple of {fixed}')
    return num_devices
  _check(num_devices == fixed, 'config.mesh', sizes, f'takes {fixed} devices, there are {num_devices}')
  return fixed


def _validate_phase(config, name, earlier, shards):
  phase, path = config.phases[name], f'config.phases.{name}'
  _choose(f'{path}.stage', phase.get('stage'), STAGES)
  _check_keys(phase, PHASE_DEFAULTS[phase.stage](), path)
  _check(phase.batch_size > 0, f'{path}.batch_size', phase.batch_size, 'must be > 0')
  if shards:
    _check(phase.batch_size % shards == 0, f'{path}.batch_size', phase.batch_size,
           f'must be a multiple of {shards}, the devices that config.mesh = {dict(config.mesh)} splits it over')
  if phase.stage in TRAINED_STAGES:
    _validate_training(phase, path)
  if phase.stage in ('invert', 'distill'):
    _check_reference(config, path, 'teacher', phase.teacher, earlier, ('teacher',))
  if phase.stage in GENERATOR_STAGES:
    _check_reference(config, path, 'noise', phase.noise, earlier, ('invert',))
    _validate_generator(config, phase, path)
  if phase.stage == 'invert':
    _choose(f'{path}.dtype', phase.dtype, NOISE_DTYPES)
    _check(phase.num_levels >= 2, f'{path}.num_levels', phase.num_levels, 'must be >= 2')
    _check(phase.shard_size > 0, f'{path}.shard_size', phase.shard_size, 'must be > 0')
  if phase.stage == 'grow':
    _check_reference(config, path, 'start', phase.start, earlier, GENERATOR_STAGES)
    start = phase_resolution(config, phase.start)
    _check(_is_doubling(start, phase.resolution), f'{path}.resolution', phase.resolution,
           f'must be {start} (the resolution of {phase.start}) times 2, 4, 8, ...')
    _check(phase.resolution <= config.data.resolution, f'{path}.resolution', phase.resolution,
           f'must not exceed config.data.resolution = {config.data.resolution}')


def _check_reference(config, path, key, value, earlier, stages):
  choices = [name for name in earlier if config.phases[name].stage in stages]
  listed = ', '.join(choices) or f'none; add one of stage {" or ".join(stages)} before it in config.order'
  _check(value in choices, f'{path}.{key}', value, f'must be an earlier phase of stage {"/".join(stages)} ({listed})')


def _validate_training(phase, path):
  _check(phase.steps > 0, f'{path}.steps', phase.steps, 'must be > 0')
  _check(0 <= phase.ema < 1, f'{path}.ema', phase.ema, 'must lie in [0, 1)')
  for key in ('optimizer', 'discriminator_optimizer'):
    if key in phase:
      opt = phase[key]
      _check(callable(getattr(optax, opt.name, None)), f'{path}.{key}.name', opt.name,
             'must be an optimiser of optax, such as radam, adam or adamw')
      _check(opt.learning_rate > 0, f'{path}.{key}.learning_rate', opt.learning_rate, 'must be > 0')
      _choose(f'{path}.{key}.schedule', opt.schedule, ('constant', 'cosine'))
  if phase.stage == 'teacher':
    _check(0 <= phase.label_dropout <= 1, f'{path}.label_dropout', phase.label_dropout, 'must lie in [0, 1]')


def _validate_generator(config, phase, path):
  _choose(f'{path}.reconstruction.distance', phase.reconstruction.distance, DISTANCES)
  _choose(f'{path}.discriminator.features', phase.discriminator.features, FEATURES)
  for name in phase.discriminator.augment:
    _choose(f'{path}.discriminator.augment', name, AUGMENTATIONS)
  _check(0 < phase.pairs_fraction <= 1, f'{path}.pairs_fraction', phase.pairs_fraction, 'must lie in (0, 1]')
  conditional = phase.discriminator.conditional
  _check(not conditional or config.data.num_classes != 0, f'{path}.discriminator.conditional', conditional,
         'needs labels: config.data.num_classes is 0')
