"""What a phase starts from: an earlier phase of its run, or weights from outside it (`init_from`)."""

import hashlib
import json

from etils import epath
from ml_collections import ConfigDict

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.networks import growth
from pagoda_jax.networks.unet import UNet
from pagoda_jax.runtime import buckets, distributed, files, trees
from pagoda_jax.stages import architectures, models
from pagoda_jax.training import checkpoints, claims
from pagoda_jax.weights.convert import folders, formats

# stage -> the key that names the earlier phase
REFERENCES = {'invert': 'teacher', 'guide': 'teacher', 'distill': 'teacher', 'grow': 'start'}
# stage -> stages of another run whose weights mean something to it; a teacher is trained on from any of its shape. A
# teacher, a generator and an encoder can have the same leaves.
FITTING = {'invert': ('teacher',), 'guide': ('teacher',), 'distill': ('teacher', *configs.GENERATOR_STAGES),
           'grow': configs.GENERATOR_STAGES}


class StartError(ValueError):
  """What `init_from` names cannot start the phase; the message says why, leaf by leaf or key by key."""


def read_start(config, folder, name: str) -> tuple[dict, str]:
  """(parameters, where they come from in words) that phase `name` starts from.

  Args:
    config: the experiment.
    folder: its work directory.
    name: a phase that names an earlier one, or has an `init_from`; of stage invert, what makes its noise.

  Raises:
    StartError: there is nothing at init_from, a network with other options, or other weights than in process 0.
    CheckpointError: parameters of another network, leaf by leaf; or a damaged checkpoint, or the newest has gone.
    ConversionError: a damaged converted folder.
    WorkdirError: the damaged config.json of a phase at init_from.
  """
  phase = config.phases[name]
  if phase.stage == 'encode':  # it begins as the network whose noise it learns
    return read_start(config, folder, phase.noise)
  if phase.init_from:
    return _read_outside(config, name)
  source = epath.Path(folder) / (phase.get('encoder') or phase[REFERENCES[phase.stage]])
  average = phase.get('start_ema', '')
  params, step = read_average(config, source, average)
  where = f'{source}, step {step}' + (f', average {average}' if average else '')
  if phase.stage != 'grow':
    check_same_tree(models.unet_shapes(_expected(config, name)), params, where)
  return params, where


def read_average(config, phase_folder: epath.Path, average: str = '', step: int | None = None) -> tuple[dict, int]:
  """(all parameters, step) of an average that a phase keeps of its weights, such as 'std_0.1'; '': its first.

  Raises:
    StartError: it keeps no such average.
    CheckpointError: as `checkpoints.read_state`.
  """
  first, *others = configs.ema_names(config.phases[phase_folder.name])
  if average not in ('', first, *others):
    raise StartError(f'{phase_folder}: keeps no average {average!r}; there are {", ".join((first, *others))}')
  return checkpoints.read_generator(phase_folder, step, average if average in others else '')


def check_outside(config, folder, names) -> None:
  """Refuses an `init_from` that cannot start its phase, of all these phases, before the first of them runs.

  What another of them is still to leave, in this work directory, is known by the config alone.

  Raises:
    StartError, ConversionError, WorkdirError: as `read_start`.
  """
  for place, name in enumerate(names):
    if init_from := config.phases[name].get('init_from'):
      path = buckets.absolute(epath.Path(init_from).expanduser())
      own = path.parent == buckets.absolute(folder) and path.name in names[:place]
      if own and config.phases[path.name].stage != 'invert':  # which leaves no weights
        _check_fits(config, name, path, config, path.name)
      else:
        _check_fits(config, name, _checked(init_from))


def begins_as_generator(phase) -> bool:
  """Whether what lies at a phase's `init_from` is a generator of another run, which makes pictures already.

  Converted weights are taken for a teacher's, as nothing in them tells.
  """
  if not phase.init_from or folders.is_converted(path := _checked(phase.init_from)):
    return False
  return _phase_at(path)['stage'] in configs.GENERATOR_STAGES


def mark(init_from: str) -> str:
  """A short text that changes with what lies at `init_from`, but not with where it lies."""
  path = _checked(init_from)
  if folders.is_converted(path):
    values = folders.read_description(path)
    origin = _digest([values['source'], values['options']])
    return f'weights {origin}, values {values["variables_sha256"][:16]}'
  there = claims.read(path)
  return f'phase {there["phase"]} {_digest(there["identity"])} at step {checkpoints.newest_step(path)}'


def input_of(init_from: str, key: str) -> str:
  """What the phase of a run at `init_from` was made from, by a key of its inputs.json; '' where nothing tells.

  Raises:
    StartError: the file is damaged.
  """
  path = epath.Path(init_from).expanduser() / 'inputs.json'
  try:
    return str(files.read_to_compare(path)[0].get(key, ''))
  except FileNotFoundError:  # converted weights have none
    if not folders.is_converted(path.parent):
      distributed.say(f'{path} has gone: its phase is taken to be made from what is here now')
    return ''
  except (OSError, ValueError) as error:
    if buckets.is_away(path, error):
      raise
    raise StartError(f'{path}: damaged ({error}): what its phase was made from is not known. Put a copy back, or '
                     'delete it if what is here now fits') from None


def same_mark(before: str | None, now: str | None) -> bool:
  """Whether two of `mark`'s texts are of the same start.

  Earlier versions named the origin of weights alone, and a phase as its folder was called, were it a link or '.'.
  """
  of_phase = lambda text: text.rsplit(' ', 4)[1:] if str(text).startswith('phase ') else text
  return of_phase(before) == of_phase(now) or str(now).startswith(f'{before}, values ')


def _digest(values) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _checked(init_from: str) -> epath.Path:
  path = epath.Path(init_from).expanduser()
  is_phase = (path / claims.FILE).exists() and checkpoints.newest_step(path) is not None
  if not folders.is_converted(path) and not is_phase:
    raise StartError(
      f'init_from = {str(init_from)!r}: neither a folder that `pagoda convert` has written nor a phase of another '
      'run (WORKDIR/PHASE) with a checkpoint'
    )
  return path


def _read_outside(config, name: str) -> tuple[dict, str]:
  init_from = config.phases[name].init_from
  path, here = _checked(init_from), mark(init_from)
  if here != (there := distributed.from_primary(f'{name}: init_from', lambda: here)):
    raise StartError(f'{path}: holds {here}, and in process 0 {there}: all processes start from the same')
  ours = _check_fits(config, name, path)
  if folders.is_converted(path):
    variables, _ = folders.load_converted(path)
    params, where = variables['params'], str(path)
  else:
    params, step = checkpoints.read_generator(path)
    where = f'{path}, step {step}'
  shapes = models.unet_shapes(ours)
  check_same_tree(shapes, params, where)
  _, report = growth.grow_params(shapes, params)
  return params, f'{where}: {report}'


def _converted(path: epath.Path) -> UNet:
  """The network whose weights a converted folder holds, without reading them."""
  description = folders.read_description(path)
  if description['format'] not in formats.UNET_FORMATS:
    raise StartError(f'{path}: weights of format {description["format"]}; a phase starts from a U-Net, of '
                     f'{" or ".join(formats.UNET_FORMATS)}')
  return UNet(**description['options'])


def _check_fits(config, name: str, path: epath.Path, there=None, other: str = '') -> UNet:
  """Refuses what lies at a path, but for its numbers; returns the network that phase `name` starts from.

  `there` and `other`: experiment and phase whose weights these are, or will be; None: as the path tells.
  """
  if there is None and not folders.is_converted(path):
    claim = claims.read(path)
    there, other = ConfigDict(claim['config']), claim['phase']
  theirs, ours = models.make_unet(there, other) if there else _converted(path), _expected(config, name)
  if rows := architectures.differences(theirs, ours):
    raise StartError(f'{path}: a network with other options than phase {name} has:\n  ' + '\n  '.join(rows))
  if there and config.phases[name].stage != 'teacher':
    _check_meaning(config, name, path, ours, there, there.phases[other])
  return ours


def _check_meaning(config, name: str, path: epath.Path, unet: UNet, there, before) -> None:
  """Leaves of another phase may fit and mean something else: what its network was, and what it saw."""
  phase = config.phases[name]
  wanted = FITTING[phase.stage]
  if before['stage'] not in wanted:
    raise StartError(f'{path}: a phase of stage {before["stage"]}, and config.phases.{name} (stage {phase.stage}) '
                     f'starts from one of stage {" or ".join(wanted)}')
  # A generator of another run knows its noise standardised, or as it was inverted: so it must be here.
  known = before.get('standardize_noise')
  if phase.stage == 'grow' and known not in (None, phase.standardize_noise):
    raise StartError(f'{path}: its generator knows noise of standardize_noise = {known}, and '
                     f'config.phases.{name}.standardize_noise = {phase.standardize_noise}; must be {known}')
  dropout = before.get('label_dropout')
  if phase.stage in ('invert', 'guide') and configs.has_guidance(config) and not 0 < (dropout or 0) < 1:
    raise StartError(f'{path}: trained with label_dropout = {dropout}, and config.guidance.law = '
                     f'{config.guidance.law!r} asks it with label and without; must be a teacher trained with one '
                     "above 0 and below 1, or the law 'none'")
  keys = [] if unet.ddpm_levels else ['diffusion.sigma_data']
  keys += ['diffusion.sigma_max'] * (before['stage'] in configs.GENERATOR_STAGES)
  if spaces.is_latent(config) or spaces.is_latent(there):
    keys += ['space', 'autoencoder.sha256', 'autoencoder.scaling', 'autoencoder.shift']
  keys += ['text.sha256'] * configs.has_text(config)
  pairs = {key: (_value(there, key), _value(config, key)) for key in keys}
  # Digests, scaling and shift are settled by runs alone.
  rows = [f'config.{key}: there {theirs!r}, in the config {ours!r}' for key, (theirs, ours) in pairs.items()
          if theirs != ours and (theirs and ours or key == 'space')]
  if rows:
    raise StartError(f'{path}: its network knows other noise, latents or captions than phase {name} has:\n  '
                     + '\n  '.join(rows))


def _value(config, key: str):
  """Of a dotted key; None where an earlier version had no such group."""
  for part in key.split('.'):
    config = config.get(part) if config is not None else None
  return config


def _phase_at(path: epath.Path) -> dict:
  """The config of a phase of another run."""
  there = claims.read(path)
  return there['config']['phases'][there['phase']]


def _expected(config, name: str) -> UNet:
  """The network that a phase starts from: a teacher, an encoder, or the generator that a growth phase grows."""
  if config.phases[name].get('encoder'):
    return models.make_unet(config, name)
  if config.phases[name].stage != 'grow':
    return models.make_teacher(config, name)
  unet = models.make_unet(config, name)
  return unet.clone(grown=unet.grown[: len(config.phases[name].init_levels)])


def check_same_tree(expected, found, where: str) -> None:
  """Refuses parameters of another network.

  Raises:
    CheckpointError: names the leaves that are missing, unexpected or of another shape.
  """
  expected = {path: tuple(leaf.shape) for path, leaf in trees.flat_leaves(expected).items()}
  found = {path: tuple(leaf.shape) for path, leaf in trees.flat_leaves(found).items()}
  rows = [
    f'  {path}: there {found.get(path, "absent")}, needed {expected.get(path, "absent")}'
    for path in sorted({*expected, *found})
    if expected.get(path) != found.get(path)
  ]
  if rows:
    more = [f'  ... and {len(rows) - 20} more'] if len(rows) > 20 else []
    raise checkpoints.CheckpointError(f'{where}: of another network:\n' + '\n'.join(rows[:20] + more))


def best_step(phase_folder, config) -> tuple[int, float] | None:
  """(step, metric) of the best checkpoint by `config`, the experiment's group `checkpoint`; None without one."""
  values = checkpoints.metrics(phase_folder, config.best) if config.get('best') else {}
  step = checkpoints.best_of(values, config.get('best_mode'))
  return None if step is None else (step, values[step])


def chosen_step(phase_folder, text: str, config) -> int | None:
  """The step that a flag asks for: a number, 'best' by `config` (the group `checkpoint`), or '' (None: the newest).

  Raises:
    CheckpointError: no checkpoint is the best.
    ValueError: it is none of these.
  """
  if text == 'best':
    best = best_step(phase_folder, config)
    if not best:
      why = f'none was saved with the metric {config.best}' if config.get('best') else 'config.checkpoint.best is empty'
      raise checkpoints.CheckpointError(f'{phase_folder}: no checkpoint is the best: {why}')
    return best[0]
  if text and not text.isdecimal():
    raise ValueError(f"--step={text}: must be a number or 'best'")
  return int(text) if text else None
