"""Whether a config can be run: one `validate`, before any device work."""

import difflib
import math

import optax
from ml_collections import ConfigDict

from pagoda_jax import config as configs
from pagoda_jax.config import ConfigError


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
  _check_keys(config, configs.experiment(), 'config')
  _check(config.order, 'config.order', config.order, f'must name at least one phase of {tuple(config.phases)}')
  for name in config.order:
    _choose('config.order', name, tuple(config.phases))
  _check(len(set(config.order)) == len(config.order), 'config.order', config.order, 'names a phase twice')
  _validate_shared(config)
  shards = _batch_shards(config, num_devices)
  for place, name in enumerate(config.order):
    _validate_phase(config, name, config.order[:place], shards)
  largest = max(config.phases, key=lambda name: configs.phase_resolution(config, name))
  reached = configs.phase_resolution(config, largest)
  _check(reached == config.data.resolution, 'config.data.resolution', config.data.resolution,
         f'must be {reached}, the largest resolution that a phase reaches ({largest})')


def _validate_shared(config):
  data = config.data
  _choose('config.data.source', data.source, configs.SOURCES)
  _check(data.resolution > 0, 'config.data.resolution', data.resolution, 'must be > 0')
  _check(data.channels in (1, 3), 'config.data.channels', data.channels, 'must be 1 (grey) or 3 (RGB)')
  _check(data.num_classes >= -1, 'config.data.num_classes', data.num_classes,
         'must be >= 0, or -1 for as many as the source has')
  for key in ('holdout', 'workers'):
    _check(data[key] >= 0, f'config.data.{key}', data[key], 'must be >= 0')
  _check(0 <= data.max_unreadable <= 1, 'config.data.max_unreadable', data.max_unreadable, 'must lie in [0, 1]')
  for source, key in (('folder', 'path'), ('array_record', 'path'), ('tfds', 'name')):
    _check(data.source != source or data[key], f'config.data.{key}', data[key], f'source {source} needs it')
  _choose('config.precision', config.precision, configs.PRECISIONS)
  _choose('config.evaluation.matmul_precision', config.evaluation.matmul_precision, configs.MATMUL_PRECISIONS)
  _check(config.microbatch >= 0, 'config.microbatch', config.microbatch, 'must be >= 0')
  _validate_network(config.network)
  base, levels = config.base_resolution, len(config.network.channel_mult)
  _check(base > 0 and base % 2 ** (levels - 1) == 0, 'config.base_resolution', base,
         f'must be a multiple of {2 ** (levels - 1)}: config.network.channel_mult has {levels} levels')
  _check(base <= data.resolution, 'config.base_resolution', base,
         f'must not exceed config.data.resolution = {data.resolution}')
  lowest = base >> (levels - 1)
  sides = [lowest << doublings for doublings in range((data.resolution // lowest).bit_length())]
  _check(isinstance(config.remat, (tuple, list)) and set(config.remat) <= set(sides), 'config.remat', config.remat,
         f'must be a tuple of some of {", ".join(map(str, sides))}, the resolutions of the U-Nets')
  d = config.diffusion
  _check(0 < d.sigma_min < d.sigma_max, 'config.diffusion.sigma_min', d.sigma_min,
         f'must lie between 0 and sigma_max = {d.sigma_max}')
  _check(config.barrier_timeout > 0, 'config.barrier_timeout', config.barrier_timeout, 'must be > 0')
  for group, key in (('checkpoint', 'every_steps'), ('checkpoint', 'keep'), ('log', 'every_steps'),
                     ('log', 'samples_every'), ('log', 'samples')):
    _check(config[group][key] > 0, f'config.{group}.{key}', config[group][key], 'must be > 0')
  _check(config.checkpoint.keep_every >= 0, 'config.checkpoint.keep_every', config.checkpoint.keep_every,
         'must be >= 0')
  _choose('config.checkpoint.best_mode', config.checkpoint.best_mode, ('min', 'max'))


def _validate_network(network):
  _choose('config.network.form', network.form, configs.FORMS)
  mult, levels = network.decoder_channel_mult, len(network.channel_mult)
  _check(len(mult) in (0, levels), 'config.network.decoder_channel_mult', mult,
         f'must have {levels} levels, as config.network.channel_mult, or none')
  for key in ('stem_channels', 'embed_channels', 'num_heads', 'augment_dim'):
    _check(network[key] >= 0, f'config.network.{key}', network[key], 'must be >= 0')
  _check(0 <= network.dropout < 1, 'config.network.dropout', network.dropout, 'must lie in [0, 1)')


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
  _choose(f'{path}.stage', phase.get('stage'), configs.STAGES)
  _check_keys(phase, configs.PHASE_DEFAULTS[phase.stage](), path)
  _check(phase.batch_size > 0, f'{path}.batch_size', phase.batch_size, 'must be > 0')
  _choose(f'{path}.matmul_precision', phase.matmul_precision, configs.MATMUL_PRECISIONS)
  if shards:
    _check(phase.batch_size % shards == 0, f'{path}.batch_size', phase.batch_size,
           f'must be a multiple of {shards}, the devices that config.mesh = {dict(config.mesh)} splits it over')
  if phase.stage in configs.TRAINED_STAGES:
    _validate_training(phase, path)
    best, choices = config.checkpoint.best, configs.METRICS[phase.stage]
    _check(not best or best in choices, 'config.checkpoint.best', best,
           f"must be '' or a metric of every phase; {name} ({phase.stage}) has {', '.join(choices)}")
    if shards:
      _validate_microbatch(config, phase.batch_size // shards, f'{path}.batch_size = {phase.batch_size}')
  if phase.stage in ('invert', 'distill'):
    _check_start(config, path, 'teacher', phase, earlier, ('teacher',))
  if phase.stage in configs.GENERATOR_STAGES:
    _check_reference(config, path, 'noise', phase.noise, earlier, ('invert',))
    _check(config.phases[phase.noise].store or not phase.standardize_noise, f'{path}.standardize_noise',
           phase.standardize_noise,
           f'needs the mean and deviation of a store, and config.phases.{phase.noise}.store is False')
    _validate_generator(config, phase, path)
  if phase.stage == 'invert':
    _choose(f'{path}.dtype', phase.dtype, configs.NOISE_DTYPES)
    _check(phase.store or phase.dtype == 'float32', f'{path}.dtype', phase.dtype,
           f'is the type of what is stored, and {path}.store is False; it must be float32')
    _check(phase.num_levels >= 2, f'{path}.num_levels', phase.num_levels, 'must be >= 2')
    _check(phase.shard_size > 0, f'{path}.shard_size', phase.shard_size, 'must be > 0')
  if phase.stage == 'grow':
    _check_start(config, path, 'start', phase, earlier, configs.GENERATOR_STAGES)
    _check(phase.init_from or not phase.init_levels, f'{path}.init_levels', phase.init_levels,
           f'describes the generator of init_from, and {path}.init_from is empty')
    for level in phase.init_levels:
      _check(len(level) == 3, f'{path}.init_levels', phase.init_levels,
             'must hold (channels, num_blocks, scale_shift) for each level')
    start = configs.start_resolution(config, name)
    _check(_is_doubling(start, phase.resolution), f'{path}.resolution', phase.resolution,
           f'must be {start} (the resolution of {phase.start or phase.init_from}) times 2, 4, 8, ...')
    _check(phase.resolution <= config.data.resolution, f'{path}.resolution', phase.resolution,
           f'must not exceed config.data.resolution = {config.data.resolution}')


def _validate_microbatch(config, share, batch_size):
  most = config.microbatch
  divisors = ', '.join(str(n) for n in range(1, share + 1) if share % n == 0)
  _check(most == 0 or most >= share or share % most == 0, 'config.microbatch', most,
         f'must divide {share} ({divisors}), a device\'s share of {batch_size}, or be larger or 0')


def _check_start(config, path, key, phase, earlier, stages):
  """A phase starts from an earlier one or from `init_from`: from one of them."""
  if not phase.init_from:
    _check(phase[key], f'{path}.{key}', phase[key],
           f'must name a phase of stage {"/".join(stages)}, or {path}.init_from a folder of weights')
    _check_reference(config, path, key, phase[key], earlier, stages)
  else:
    _check(not phase[key], f'{path}.init_from', phase.init_from,
           f"cannot be given beside {path}.{key} = {phase[key]!r}; one of them must be ''")


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
  rec, disc = phase.reconstruction, phase.discriminator
  _choose(f'{path}.reconstruction.distance', rec.distance, configs.DISTANCES)
  _choose(f'{path}.discriminator.features', disc.features, configs.FEATURES)
  for group, views in (('reconstruction', rec), ('discriminator', disc)):
    for name in views.augment:
      _choose(f'{path}.{group}.augment', name, configs.AUGMENTATIONS)
    for name in views.backbones:
      _choose(f'{path}.{group}.backbones', name, configs.BACKBONES)
    _check(views.backbones, f'{path}.{group}.backbones', views.backbones,
           f'must name at least one of {", ".join(configs.BACKBONES)}')
    _check(len(set(views.backbones)) == len(views.backbones), f'{path}.{group}.backbones', views.backbones,
           'names a feature network twice')
  _check(0 < phase.pairs_fraction <= 1, f'{path}.pairs_fraction', phase.pairs_fraction, 'must lie in (0, 1]')
  _check(not disc.conditional or config.data.num_classes != 0, f'{path}.discriminator.conditional', disc.conditional,
         'needs labels: config.data.num_classes is 0')
