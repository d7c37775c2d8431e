"""Whether a config can be run: one `validate`, before any device work.

What a key may be by itself stands beside its default in pagoda_jax/config; here stands what keys must be together.
"""

import math
import re

from ml_collections import ConfigDict

from pagoda_jax import config as configs
from pagoda_jax.config import ConfigError, ladder, spaces
from pagoda_jax.validation import conditions, losses
from pagoda_jax.validation.checks import check, check_keys, choose

MOST_NUMBERS = 2**16  # of a picture whose principal components are taken (evaluation/small_data.py): 34 GB a covariance
PHASE_NAME = re.compile(r'\w[\w-]*', re.ASCII)  # a folder's, in a key and on the command line


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
  check_keys(config, configs.experiment.table(), 'config')
  check(config.phases, 'config.phases', {}, 'must hold a phase; add_phase adds one')
  for name, phase in config.phases.items():
    _check_phase_keys(name, phase)
  check(config.order, 'config.order', config.order, f'must name at least one phase of {tuple(config.phases)}')
  for name in config.order:
    check(name in config.phases, 'config.order', config.order,
           f'{name!r} must be one of {", ".join(config.phases)}')
  check(len(set(config.order)) == len(config.order), 'config.order', config.order, 'names a phase twice')
  _validate_shared(config)
  _validate_network(config)
  conditions.validate_text(config)
  conditions.validate_text_network(config)
  conditions.validate_guidance(config)
  for row in spaces.requirements(config):
    check(*row)
  shards = _batch_shards(config, num_devices)
  for place, name in enumerate(config.order):
    _validate_phase(config, name, config.order[:place], shards)
  largest = max(config.phases, key=lambda name: configs.phase_resolution(config, name))
  reached = configs.phase_resolution(config, largest)
  check(reached == config.data.resolution, 'config.data.resolution', config.data.resolution,
         f'must be {reached}, the largest resolution that a phase reaches ({largest})')
  _validate_unread(config.data)


def _validate_unread(data):
  """Of what has no effect somebody expects one: of a path beside 'mnist', that its pictures are trained on."""
  for key, unused, readers in (('path', '', ('folder', 'webdataset', 'array_record', 'tfds')), ('name', '', ('tfds',)),
                               ('split', 'train', ('tfds',)), ('verify', False, ('array_record',))):
    check(data.source in readers or data[key] == unused, f'config.data.{key}', data[key],
          f'must be {unused!r} where config.data.source is {data.source!r}: it is of {", ".join(readers)} alone')


def _check_phase_keys(name, phase):
  path = f'config.phases.{name}'
  check(PHASE_NAME.fullmatch(str(name)), 'config.phases', name,
         'a phase is named by letters, digits, _ and -: its folder has that name')
  check(isinstance(phase, ConfigDict), path, phase,
         'must be a phase, as autoencoder(), teacher(), invert(), encode(), guide(), distill(), grow() make')
  choose(f'{path}.stage', phase.get('stage'), configs.STAGES)
  check_keys(phase, configs.PHASES[phase.stage].table(), path)


def _validate_shared(config):
  data, base, levels = config.data, config.base_resolution, len(config.network.channel_mult)
  for source, key in (('folder', 'path'), ('webdataset', 'path'), ('array_record', 'path'), ('tfds', 'name'),
                      ('tfds', 'split')):
    check(data.source != source or data[key], f'config.data.{key}', data[key], f'source {source} needs it')
  check(base % 2 ** (levels - 1) == 0, 'config.base_resolution', base,
         f'must be a multiple of {2 ** (levels - 1)}: config.network.channel_mult has {levels} levels')
  check(base <= data.resolution, 'config.base_resolution', base,
         f'must not exceed config.data.resolution = {data.resolution}')
  lowest = base >> (levels - 1)
  sides = [lowest << doublings for doublings in range((data.resolution // lowest).bit_length())]
  sides += [data.resolution << level for level in range(1, spaces.factor(config).bit_length())]  # of a decoder
  check(set(config.remat) <= set(sides), 'config.remat', config.remat,
         f'must be a tuple of some of {", ".join(map(str, sides))}, the resolutions of the networks')
  check(config.attention != 'cudnn' or config.precision == 'bfloat16', 'config.attention', config.attention,
         f'computes in bfloat16 alone, and config.precision is {config.precision!r}')
  d, measured = config.diffusion, config.evaluation.samples
  check(d.sigma_min < d.sigma_max, 'config.diffusion.sigma_min', d.sigma_min,
         f'must be below config.diffusion.sigma_max = {d.sigma_max}')
  check(not measured or data.holdout >= 2, 'config.evaluation.samples', measured,
         f'compares with held-out pictures: needs config.data.holdout >= 2, not {data.holdout}')
  numbers = (data.resolution * spaces.factor(config)) ** 2 * data.channels
  check(not measured or numbers <= MOST_NUMBERS, 'config.evaluation.samples', measured,
         f'takes principal components of pictures, and their {numbers:,} numbers (config.data.resolution = '
         f'{data.resolution}) have a covariance of {8 * numbers**2 / 1e9:,.0f} GB: must be 0; `pagoda evaluate` '
         f'measures such pictures. At most {MOST_NUMBERS:,}')
  check(not measured or data.num_classes not in (0, 1), 'config.evaluation.samples', measured,
         f'grades samples by their class: needs config.data.num_classes >= 2, not {data.num_classes}')


def _validate_network(config):
  network, levels = config.network, len(config.network.channel_mult)
  if network.form == 'edm2':
    check(not network.augment_dim, 'config.network.augment_dim', network.augment_dim,
           "must be 0 where config.network.form is 'edm2', which has no input for augmentation labels")
    stem = network.stem_channels
    check(not stem, 'config.network.stem_channels', stem,
           "must be 0 where config.network.form is 'edm2': its stem is as wide as its first level")
  check(len(network.decoder_channel_mult) in (0, levels), 'config.network.decoder_channel_mult',
         network.decoder_channel_mult, f'must have {levels} levels, as config.network.channel_mult, or none')
  for key in ('channel_mult', 'decoder_channel_mult'):
    for level, mult in enumerate(network[key]):
      width, side = network.channels * mult, config.base_resolution >> level
      check(width == int(width), f'config.network.{key}', network[key],
             f'{mult} times config.network.channels = {network.channels} is {width}, which must be a whole number')
      is_middle = key == 'channel_mult' and level == levels - 1
      attends = side in network.attention_resolutions or (network.mid_attention and is_middle)
      heads = network.num_heads or (1 if network.form == 'ddpmpp' else max(1, width // network.channels_per_head))
      split_by = 'num_heads' if network.num_heads else 'channels_per_head'
      check(not attends or width % heads == 0, f'config.network.{split_by}', network[split_by],
             f'the {int(width)} channels at {side} px must split into {int(heads)} attention heads of equal size')


def _batch_shards(config, num_devices):
  """How many ways a batch is split: over all axes of the mesh together; None where it is not known."""
  sizes = dict(config.mesh)
  taking = [axis for axis, size in sizes.items() if size == -1]
  for axis in taking[1:]:
    check(False, f'config.mesh.{axis}', -1,
          f'must be a number of devices where config.mesh.{taking[0]} = -1 takes all that remain')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if num_devices is None:
    return None
  if -1 in sizes.values():
    check(num_devices % fixed == 0, 'config.mesh', sizes, f'{num_devices} devices are no multiple of {fixed}')
    return num_devices
  check(num_devices == fixed, 'config.mesh', sizes, f'takes {fixed} devices, there are {num_devices}')
  return fixed


def _validate_phase(config, name, earlier, shards):
  phase, path = config.phases[name], f'config.phases.{name}'
  if shards and phase.stage != 'invert':  # which each host does by itself, its batch filled up
    check(phase.batch_size % shards == 0, f'{path}.batch_size', phase.batch_size,
           f'must be a multiple of {shards}, the devices that config.mesh = {dict(config.mesh)} splits it over')
  if phase.stage in configs.TRAINED_STAGES:
    _validate_training(phase, path)
    best, choices = config.checkpoint.best, configs.metrics(phase)
    check(not best or best in choices, 'config.checkpoint.best', best,
           f"must be '' or a metric of every phase; {name} ({phase.stage}) has {', '.join(choices)}")
    if shards:
      _validate_microbatch(config, name, phase.batch_size // shards)
  if phase.stage == 'autoencoder':
    side = config.base_resolution
    losses.validate_views(phase, path, [side >> times for times in range(phase.sizes)], side)
  if phase.stage == 'teacher':
    _validate_teacher(config, phase, path)
  if phase.stage == 'invert' and phase.encoder:
    _validate_encoded(config, path, phase, earlier)
  elif phase.stage in ('invert', 'guide', 'distill'):
    _check_start(config, path, 'teacher', phase, earlier, ('teacher',))
    kept = configs.ema_names(config.phases[phase.teacher]) if phase.teacher else ()
    check(phase.start_ema in ('', *kept), f'{path}.start_ema', phase.start_ema,
           f"must be '' or one of {', '.join(kept)}, the averages of {phase.teacher}" if kept else
           f"must be '': {path}.init_from names weights that are one average already")
  if phase.stage == 'guide':
    law = config.guidance.law
    check(configs.omega_varies(config), f'{path}.stage', phase.stage,
           f'estimates a strength of guidance that varies, and config.guidance.law is {law!r}')
  if phase.stage in ('invert', 'guide') and configs.has_guidance(config) and phase.teacher:
    dropout = config.phases[phase.teacher].label_dropout
    check(0 < dropout < 1, f'config.phases.{phase.teacher}.label_dropout', dropout,
           f'must be above 0 and below 1, 0.1 say: guidance (config.guidance.law = {config.guidance.law!r}) asks '
           f'{phase.teacher} with label and without')
  if phase.stage == 'invert':
    check(phase.store or phase.dtype == 'float32', f'{path}.dtype', phase.dtype,
           f'is the type of what is stored, and {path}.store is False; it must be float32')
  if phase.stage == 'grow':
    _validate_growth(config, name, earlier)
  if phase.stage == 'distill':
    base, side = config.base_resolution, phase.resolution
    check(side in (0, base) or _is_doubling(base, side), f'{path}.resolution', side,
          f'must be 0 (config.base_resolution = {base}), or that times 1, 2, 4, 8, ...')
    check(side <= config.data.resolution, f'{path}.resolution', side,
          f'must not exceed config.data.resolution = {config.data.resolution}')
  if 'noise' in phase:
    _check_reference(config, path, 'noise', phase.noise, earlier, ('invert',))
    encoder = config.phases[phase.noise].encoder
    check(not encoder or not (phase.stage == 'encode' or configs.learns_from_teacher(phase)), f'{path}.noise',
          phase.noise, f'takes the noise of encoder {encoder}; must be a phase that inverts by a teacher')
  if configs.learns_from_teacher(phase):
    side = configs.phase_resolution(config, name)
    check(side == config.base_resolution, f'{path}.resolution', side,
          f"must be {config.base_resolution} with {path}.pairs = 'teacher', whose own images are the pairs'")
    law = config.guidance.law
    check(law == 'none', f'{path}.pairs', phase.pairs, f"must be 'data' with guidance: config.guidance.law is {law!r}")
    check(phase.pairs_fraction == 1, f'{path}.pairs_fraction', phase.pairs_fraction,
           f"must be 1 with {path}.pairs = 'teacher': each pair is made once, inside its step")
    named, behind = phase.get('teacher'), _teacher_behind(config, phase.noise)
    check(not named or named == behind, f'{path}.noise', phase.noise,
          f"is of {behind}, whose images the pairs would be with {path}.pairs = 'teacher'; must be a phase that "
          f'inverts by {named}, the teacher that {path}.teacher names')
  if phase.stage in configs.GENERATOR_STAGES:
    check(config.phases[phase.noise].store or not phase.standardize_noise, f'{path}.standardize_noise',
           phase.standardize_noise,
           f'needs the mean and deviation of a store, and config.phases.{phase.noise}.store is False')
    if phase.get('start'):
      known, behind = (_teacher_behind(config, config.phases[other].noise) for other in (phase.start, name))
      check(behind == known, f'{path}.noise', phase.noise,
            f'is of {behind}, and {phase.start} knows that of {known} alone: must be a phase that inverts by it, such '
            f'as config.phases.{phase.start}.noise = {config.phases[phase.start].noise!r}')
    _validate_guide(config, path, phase, earlier)
    losses.validate_losses(config, name)


def _teacher_behind(config, name):
  """The teacher that the noise of a phase of stage invert is of: a phase or a folder; an encoder learnt one's."""
  phase = config.phases[name]
  return _teacher_behind(config, config.phases[phase.encoder].noise) if phase.encoder else (
    phase.teacher or phase.init_from)


def _validate_encoded(config, path, phase, earlier):
  """A phase that takes its noise from an encoder, which knows its teacher by itself."""
  _check_reference(config, path, 'encoder', phase.encoder, earlier, ('encode',))
  for key in ('teacher', 'init_from', 'start_ema'):
    check(not phase[key], f'{path}.{key}', phase[key],
          f"must be '' with {path}.encoder = {phase.encoder!r}, which makes the noise in its place")
  check(not phase.add_noise, f'{path}.add_noise', phase.add_noise,
        f'must be False with {path}.encoder = {phase.encoder!r}: it is for the solver')
  levels, _ = configs.invert.table()['num_levels']
  for key, left in (('num_levels', levels), ('clip_denoised', not spaces.is_latent(config))):
    check(phase[key] == left, f'{path}.{key}', phase[key],
          f'must be left at {left} with {path}.encoder = {phase.encoder!r}: it is for the solver')


def _validate_guide(config, path, phase, earlier):
  """Real pictures need an estimate of their omega where it varies, and none elsewhere."""
  if not configs.omega_varies(config):
    check(not phase.guide, f'{path}.guide', phase.guide,
           f"must be '' while config.guidance.law = {config.guidance.law!r}: there is nothing to estimate")
  else:
    _check_reference(config, path, 'guide', phase.guide, earlier, ('guide',))


def _validate_teacher(config, phase, path):
  check(not phase.label_dropout or config.data.num_classes != 0 or configs.has_text(config), f'{path}.label_dropout',
        phase.label_dropout, 'must be 0 without labels or captions to drop: config.data.num_classes is 0')
  check(not phase.uncertainty or config.network.form == 'edm2', f'{path}.uncertainty', phase.uncertainty,
         f"must be False where config.network.form = {config.network.form!r}: 'edm2' alone has what learns it")
  kept = configs.ema_names(phase)
  check(len(set(kept)) == len(kept), f'{path}.ema_halflife', phase.ema_halflife,
         f'and {path}.ema_std = {phase.ema_std}: must name no average twice')
  augmentation = phase.augmentation
  check(not augmentation.rate or config.network.form != 'edm2', f'{path}.augmentation.rate', augmentation.rate,
         "must be 0 where config.network.form is 'edm2', which has no input for augmentation labels")
  labels = sum(configs.TEACHER_AUGMENTATIONS[name] for name in augmentation.transforms)
  check(not augmentation.rate or config.network.augment_dim == labels, 'config.network.augment_dim',
         config.network.augment_dim, f'must be {labels}, the labels of {path}.augmentation.transforms = '
         f'{tuple(augmentation.transforms)}: without them samples come out augmented too')


def _validate_growth(config, name, earlier):
  phase, path = config.phases[name], f'config.phases.{name}'
  _check_start(config, path, 'start', phase, earlier, configs.GENERATOR_STAGES)
  check(phase.init_from or not phase.init_levels, f'{path}.init_levels', phase.init_levels,
         f'describes the generator of init_from, and {path}.init_from is empty')
  start = ladder.start_resolution(config, name)
  check(_is_doubling(start, phase.resolution), f'{path}.resolution', phase.resolution,
         f'must be {start} (the resolution of {phase.start or phase.init_from}) times 2, 4, 8, ...')
  check(phase.resolution <= config.data.resolution, f'{path}.resolution', phase.resolution,
         f'must not exceed config.data.resolution = {config.data.resolution}')
  blocks = ladder.decoder_blocks(config, name)
  known = {*blocks, *blocks.values(), *map(ladder.side_of, blocks)}
  old = [f'{block} ({released})' for block, released in blocks.items() if ladder.side_of(block) <= start]
  for entry in phase.thaw:
    check(entry in known, f'{path}.thaw', phase.thaw,
           f'{entry!r} must be a resolution of the decoder or one of its blocks: {", ".join(old)}')
  if phase.start:
    before = config.phases[phase.start].standardize_noise
    check(phase.standardize_noise == before, f'{path}.standardize_noise', phase.standardize_noise,
           f'must be {before}, as config.phases.{phase.start}.standardize_noise: that generator knows no other noise')


def _validate_microbatch(config, name, share):
  phase, most = config.phases[name], configs.microbatch(config, name)
  key = 'config.microbatch' if phase.microbatch == -1 else f'config.phases.{name}.microbatch'
  if most and most < share and share % most:
    divisors = {n for low in range(1, math.isqrt(share) + 1) if share % low == 0 for n in (low, share // low)}
    near = max(n for n in divisors if n < most), min(n for n in divisors if n > most)
    raise ConfigError(f"{key} = {most}: must divide {share}, a device's share of config.phases.{name}.batch_size = "
                      f'{phase.batch_size}, as {near[0]} and {near[1]} do, or be larger or 0')


def _check_start(config, path, key, phase, earlier, stages):
  """A phase starts from an earlier one or from `init_from`: from one of them."""
  if not phase.init_from:
    check(phase[key], f'{path}.{key}', phase[key],
           f'must name a phase of stage {"/".join(stages)}, or {path}.init_from a folder of weights'
           + (f', or {path}.encoder a phase of stage encode' if 'encoder' in phase else ''))
    _check_reference(config, path, key, phase[key], earlier, stages)
  else:
    check(not phase[key], f'{path}.init_from', phase.init_from,
           f"cannot be given beside {path}.{key} = {phase[key]!r}; one of them must be ''")


def _check_reference(config, path, key, value, earlier, stages):
  choices = [name for name in earlier if config.phases[name].stage in stages]
  listed = ', '.join(choices) or f'none; add one of stage {" or ".join(stages)} before it in config.order'
  check(value in choices, f'{path}.{key}', value, f'must be an earlier phase of stage {"/".join(stages)} ({listed})')


def _validate_training(phase, path):
  for key in ('optimizer', 'discriminator_optimizer'):
    if key in phase:
      warmup = phase[key].warmup_steps
      begin = phase[key].decay_from
      check(phase[key].schedule != 'inverse_sqrt' or warmup <= begin, f'{path}.{key}.decay_from', begin,
             f'lies within the warm-up: must be at least {path}.{key}.warmup_steps = {warmup}')
      decay, name = phase[key].weight_decay, phase[key].name
      check(not decay or name in configs.DECAYING, f'{path}.{key}.weight_decay', decay,
             f'must be 0 for {name!r}; {", ".join(configs.DECAYING)} take one')
      for moment in ('b1', 'b2'):
        default, _ = configs.optimizer.table()[moment]
        check(name in configs.OF_MOMENTS or phase[key][moment] == default, f'{path}.{key}.{moment}', phase[key][moment],
               f'must be left at {default} for {name!r}, which takes none; {", ".join(configs.OF_MOMENTS)} do')
      check(phase[key].schedule != 'cosine' or warmup < phase.steps, f'{path}.{key}.warmup_steps', warmup,
             f'leaves no step for the cosine: must be less than {path}.steps = {phase.steps}')
