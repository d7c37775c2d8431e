"""The work directory: <phase>/{checkpoints/, metrics.jsonl, samples/, config.json}, and whose it is."""

import contextlib
import json
import os

from etils import epath
from ml_collections import ConfigDict

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import listing, noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.runtime import buckets, distributed
from pagoda_jax.runtime.files import read_to_compare, write_sealed
from pagoda_jax.training import checkpoints, claims, starts
from pagoda_jax.training.claims import WorkdirError

# What may differ between two runs of one phase: how long, on what, in which parts, and how much is written down.
# What lies at init_from is compared itself, by `check_inputs`; of what lies at autoencoder.weights, and of
# config.text.encoder, wherever its folder lies, the digest (sha256 beside them).
FREE_KEYS = ('steps', 'workers', 'path', 'init_from', 'max_unreadable', 'verify', 'weights', 'text.encoder',
             'microbatch')
# What each process of one run may have its own of: where things lie there, and how they are read.
OF_PROCESS = ('workers', 'path', 'init_from', 'max_unreadable', 'verify', 'weights', 'weights_dir', 'text.encoder')
# Ends of the names of keys that came later: what was computed before, by phases whose config.json lacks them. A phase
# stands there by its stage.
EARLIER = {
  'matmul_precision': 'default', 'evaluation.matmul_precision': 'highest',
  # Teachers had one average of constant decay, and no augmentation.
  'ema_halflife': [], 'ema_rampup': 0.05, 'ema_std': [], 'start_ema': '',
  # Networks were EDM's, and learning rates constant or a cosine.
  # Weights decayed by adamw, nadamw, adamaxw (1e-4) and lion (1e-3) as optax has it, which nobody had asked for.
  'uncertainty': False, 'decay_from': 35_000, 'weight_decay': 0.0,
  'rate': 0.0, 'transforms': list(configs.EDM_AUGMENTATIONS),
  # Generators had no guidance, the hinge loss, one update a step, one discriminator, and thawed as the paper does.
  'guide': '', 'loss': 'hinge', 'r1': 0.0, 'r2': 0.0, 'update': 'joint', 'thaw': [],
  'pairs': 'data',
  # Noise was a solver's, generators began at their teacher's resolution, and all pictures were cut from the originals.
  'encoder': '', 'downsampling': 'cut',
  'distill.resolution': 0, 'distill.channels': 192, 'distill.num_blocks': 2, 'distill.scale_shift': False,
  # Networks knew nothing of captions, nor captions of kinds.
  'clip_weight': 0.0, 'text_attention': 'none', 'text_channels': 0, 'text_pool_heads': 0,
  'recaptions.law': '', 'recaptions.mean': 1.0, 'recaptions.std': 1.0, 'recaptions.low': 1.0, 'recaptions.high': 4.0,
  # Networks worked on pictures.
  'reconstruction.space': 'latent', 'adversarial.space': 'latent', 'reconstruction_adversarial.space': 'latent',
  'reconstruction_adversarial.weight': 0.0, 'reconstruction_adversarial.adaptive': True,
  'reconstruction_adversarial.low': 0.01, 'reconstruction_adversarial.high': 10.0,
}
INVERTED_WITH = 'inverted_with'  # in inputs.json: which network made a generator phase's noise
SHARED_GROUPS = ('seed', 'data', 'base_resolution', 'network', 'diffusion', 'precision')


def upstream(config, name: str) -> list[str]:
  """The phases that `name` reads from, directly."""
  phase = config.phases[name]
  return [phase[key] for key in ('teacher', 'encoder', 'noise', 'guide', 'start') if phase.get(key)]


def identity(config, name: str) -> dict:
  """Flat key -> value of everything that decides what a phase computes."""
  names, queue = [], [name]
  while queue:
    names.append(queue.pop())
    queue += upstream(config, names[-1])
  values = {key: config[key] for key in SHARED_GROUPS} | {'phases': {n: config.phases[n] for n in names}}
  if configs.has_guidance(config) and config.phases[name].stage != 'teacher':  # it knows no strength; others have none
    values['guidance'] = config.guidance
  drawn = config.evaluation.get('matmul_precision', 'highest')
  if drawn != 'highest' and any(_learns_from_drawn(config.phases[n]) for n in names):
    values['evaluation'] = {'matmul_precision': drawn}
  if configs.has_text(config):
    values['text'] = config.text
  if spaces.is_latent(config):
    values['space'] = config.space
  if spaces.is_latent(config) or config.phases[name].stage == 'autoencoder':
    values['autoencoder'] = config.autoencoder
  sides = {config.base_resolution, *(configs.phase_resolution(config, n) for n in names)}
  values['data_sha256'] = streams.pictures_digest(config.data, sides)  # wherever the pictures lie
  return {
    key: value
    for key, value in _flat(json.loads(as_json(values)), 'config').items()
    if not key.endswith(tuple(f'.{free}' for free in FREE_KEYS))
  }


def _learns_from_drawn(phase) -> bool:
  """Whether a phase learns from images that its teacher draws."""
  return phase.stage == 'guide' or configs.learns_from_teacher(phase)


def as_json(values) -> str:
  """JSON of nested dicts and ConfigDicts."""
  return json.dumps(values, default=lambda x: x.to_dict() if isinstance(x, ConfigDict) else list(x))


def _flat(value, path):
  if isinstance(value, dict):
    return {k: v for key, child in value.items() for k, v in _flat(child, f'{path}.{key}').items()}
  return {path: value}


def check_claim(folder, config, name: str) -> None:
  """Refuses a folder that holds a phase of another experiment.

  Raises:
    WorkdirError: lists each key that differs; or config.json is damaged.
  """
  phase_folder = epath.Path(folder) / name
  if not (phase_folder / claims.FILE).exists():
    return
  if rows := _differences(claims.read_identity(phase_folder), identity(config, name)):
    raise WorkdirError(
      f'{phase_folder}: holds phase {name} of another experiment; what differs:\n' + '\n'.join(rows)
      + '\nUse another --workdir, or the config that the phase was made with.'
    )


def _differences(found: dict, wanted: dict) -> list[str]:
  absent = {key: value for key in {*wanted} - {*found} for end, value in EARLIER.items()
            if _by_stage(key, wanted).endswith(f'.{end}')}
  found = absent | found
  return [
    f'  {key}: there {found.get(key, "absent")!r}, here {wanted.get(key, "absent")!r}'
    for key in sorted({*found, *wanted})
    if found.get(key) != wanted.get(key)
  ]


def _by_stage(key: str, values: dict) -> str:
  """A key's name with the stage of its phase in the place of the phase's name."""
  root, *rest = key.split('.')
  if rest[:1] == ['phases']:
    rest[1] = values.get(f'{root}.phases.{rest[1]}.stage', rest[1])
  return '.'.join((root, *rest))


def check_apart(folder, config) -> None:
  """Refuses a work directory among the pictures, whose files would be counted among them when the run goes on.

  Raises:
    WorkdirError: it is.
  """
  data = config.data
  if data.source != 'folder' or os.path.lexists(os.path.join(data.path, listing.CAPTIONS)):
    return
  if buckets.is_in_bucket(folder):
    return
  photos, here = (os.path.realpath(os.path.expanduser(path)) for path in (data.path, folder))
  if photos == os.path.commonpath([photos, here]) and not listing.is_hidden(os.path.relpath(here, photos)):
    raise WorkdirError(f'{folder}: lies in config.data.path = {data.path!r}, and its grids and checkpoints would be '
                       'counted among the pictures there; use a --workdir beside it')


def check_same_everywhere(config, names, max_steps: int | None = None) -> None:
  """Refuses processes that were started with another config, other flags or other pictures than process 0.

  Also where one phase may go on with another value: processes that differ in steps, mesh or times to save would compute
  different programs, or wait for each other in vain.

  Raises:
    WorkdirError: lists each key that differs.
  """

  def mine():
    values = {key: value for key, value in _flat(json.loads(as_json(config)), 'config').items()
              if not key.endswith(tuple(f'.{own}' for own in OF_PROCESS))}
    pictures = {f'{name}: config.data_sha256': identity(config, name)['config.data_sha256'] for name in names}
    return values | pictures | {'phases': list(names), 'max_steps': max_steps}

  if rows := _differences(distributed.from_primary('config', mine), mine()):
    raise WorkdirError('this process was started with another config than process 0; what differs:\n'
                       + '\n'.join(rows))


def claim(folder, config, name: str) -> None:
  """Writes a phase's config.json, after `check_claim`."""
  check_claim(folder, config, name)
  phase_folder = epath.Path(folder) / name
  if not (phase_folder / claims.FILE).exists() and progress(folder, config, name):
    distributed.say(f'{name}: {phase_folder / claims.FILE} has gone; what is there is taken for this experiment\'s')
  claims.write(phase_folder, name, identity(config, name), json.loads(as_json(config)))


def read_config(folder) -> ConfigDict:
  """The experiment whose phases a work directory holds, as the newest config.json that has them all tells.

  Keys that came later are as they were before them.

  Raises:
    WorkdirError: there is none, or it is damaged.
  """
  folders = claims.phase_folders(folder)
  if not folders:
    raise WorkdirError(f'{folder}: no phase of any experiment there; start one with `pagoda run`')
  config = _completed(claims.fullest(claims.read(folders[0])['config'], folders), configs.experiment.table())
  for phase in config['phases'].values():
    _completed(phase, configs.PHASES[phase['stage']].table())
  return ConfigDict(config, sort_keys=False)


def _completed(values: dict, table: dict) -> dict:
  """The values, with those added that a table of config/ has and an earlier version had not."""
  for key, entry in table.items():
    if isinstance(entry, dict):
      values[key] = _completed(values.get(key, {}), entry)
    else:
      values.setdefault(key, EARLIER.get(key, entry[0]))
  return values


def progress(folder, config, name: str) -> int:
  """How far a phase has come: steps of its newest checkpoint, or pairs of a finished noise store; 0 for nothing.

  A store that a part has been lost of since is not finished: the invert phase makes that part anew.
  """
  phase_folder = epath.Path(folder) / name
  if config.phases[name].stage != 'invert':
    return max(checkpoints.finished_steps(phase_folder), default=0)
  if not (phase_folder / noise_store.MANIFEST).exists():
    return 0
  manifest = noise_store.read_manifest(phase_folder)
  return 0 if noise_store.lost_parts(phase_folder, manifest) else manifest['count']


def readable(folder, config, name: str) -> int:
  """As `progress`, of a phase that something else reads.

  Raises:
    CheckpointError: its newest checkpoint has gone, or whether it has is not known.
  """
  if config.phases[name].stage != 'invert':
    return checkpoints.newest_step(epath.Path(folder) / name) or 0
  return progress(folder, config, name)


def last_finished(folder, config) -> str:
  """The last phase in the order that has images to give.

  Raises:
    WorkdirError: none has a checkpoint yet.
    CheckpointError: as `readable`.
  """
  for name in reversed(config.order):
    if config.phases[name].stage in configs.IMAGE_STAGES and readable(folder, config, name):
      return name
  raise WorkdirError(f'{folder}: no phase there has a checkpoint yet; start one with `pagoda run`')


def image_phase(folder, name: str = ''):
  """(the experiment, a phase whose network draws images) of a work directory; '' takes the last that has a checkpoint.

  Raises:
    WorkdirError: there is no such phase, or nothing to draw from.
    CheckpointError: as `readable`.
  """
  config = read_config(folder)
  name = name or last_finished(folder, config)
  choices = [other for other in config.order if config.phases[other].stage in configs.IMAGE_STAGES]
  if name not in choices:
    raise WorkdirError(f'--phase={name}: must be one of {", ".join(choices)}')
  return config, name


def target(config, name: str, max_steps: int | None = None) -> int:
  """What `progress` reaches when the phase is finished; `max_steps` caps it for smoke runs."""
  phase = config.phases[name]
  if phase.stage != 'invert':
    return min(phase.steps, max_steps or phase.steps)
  pairs = len(streams.source_keys(config.data)[1])
  return min(pairs, max_steps * phase.batch_size) if max_steps else pairs


def check_inputs(folder, config, name: str) -> dict[str, int | str]:
  """Progress of each phase that `name` reads from, and the mark of what lies at its init_from.

  Raises:
    WorkdirError: one has nothing to read yet; or `name` had started from something else, or from the same
      phase before that went on; or inputs.json, which tells, is damaged; or it grows a generator of other noise.
    CheckpointError, StartError: as `readable`, `starts.input_of`.
  """
  inputs = {}
  for other in upstream(config, name):
    inputs[other] = readable(folder, config, other)
    if not inputs[other]:
      raise WorkdirError(_not_run(folder, config, name, other))
  init_from = config.phases[name].get('init_from')
  if init_from:
    inputs['init_from'] = starts.mark(init_from)
  noise = config.phases[name].get('noise')
  if noise:
    made_by = noise_store.made_by(noise_store.read_manifest(epath.Path(folder) / noise))
    inputs[INVERTED_WITH] = f'{noise} with {made_by}'
    if init_from and config.phases[name].stage == 'grow':
      _check_known(epath.Path(folder) / name, init_from, noise, made_by)
  path, sealed = epath.Path(folder) / name / 'inputs.json', False
  if progress(folder, config, name):
    before, sealed = _read_inputs(path, inputs)
    _check_same_inputs(path.parent, before, inputs, init_from)
  if not sealed:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, inputs)
  return inputs


def _check_known(folder, init_from, noise, made_by):
  """Refuses noise of another teacher than that whose noise the generator at init_from knows; encoders name none."""
  known = starts.input_of(init_from, INVERTED_WITH).split(' with ')[-1]
  if known != made_by and known.startswith('teacher ') and made_by.startswith('teacher '):
    raise WorkdirError(f'{folder}: the generator at init_from = {init_from!r} knows the noise of {known} alone, and '
                       f'phase {noise} is of {made_by}; must be a phase that inverts by the first')


def check_ahead(folder, config, names, max_steps: int | None = None) -> None:
  """Refuses what `check_inputs` would refuse of one of these phases when others had been run: before they are.

  That is a phase that starts from one which is neither there nor among them, and one to be taken beyond the step that
  another was made from, which could then not go on either.

  Raises:
    WorkdirError: names both.
    CheckpointError: as `readable`.
  """
  rows = []
  for name in names:
    before = {}
    if progress(folder, config, name):
      with contextlib.suppress(OSError, ValueError):  # what is damaged is named when its turn comes
        before, _ = read_to_compare(epath.Path(folder) / name / 'inputs.json')
    for other in upstream(config, name):
      if other not in names and not readable(folder, config, other):
        raise WorkdirError(_not_run(folder, config, name, other))
      made_from, wanted = before.get(other), target(config, other, max_steps)
      goes_on = other in names and progress(folder, config, other) < wanted
      if goes_on and isinstance(made_from, int) and made_from < wanted:
        rows.append(f'  {epath.Path(folder) / name}: made from {other} at step {made_from}, which is to go on to '
                    f'{wanted}')
  if rows:
    raise WorkdirError('This run would take phases beyond what others were made from:\n' + '\n'.join(rows)
                       + '\nLeave them at those steps, or delete the folders to make these phases again.')


def _read_inputs(path, inputs):
  """(what inputs.json tells, whether it is sealed), to be compared with `inputs`, which are taken if it has gone."""
  listed = ', '.join(f'{key}: {value}' for key, value in inputs.items()) or 'nothing'
  try:
    before, sealed = read_to_compare(path)
    if odd := [key for key in inputs if key != 'init_from' and type(before.get(key)) is not type(inputs[key])]:
      raise ValueError(f'it says nothing about {", ".join(odd)}')
    return before, sealed
  except FileNotFoundError:
    distributed.say(f'{path.parent.name}: {path} has gone; taken to be made from what is there now ({listed})')
    return inputs, False
  except (OSError, ValueError) as error:
    if buckets.is_away(path, error):
      raise
    raise WorkdirError(
      f'{path}: damaged ({error}): what {path.parent.name} was made from is not known. If from what is there now '
      f'({listed}), delete the file and start the same command again; otherwise delete {path.parent}'
    ) from None


def _not_run(folder, config, name, other) -> str:
  return (f'{epath.Path(folder) / other}: {_lacking(folder, config, other)}, and phase {name} starts from it; run '
          f'{other} first')


def _lacking(folder, config, name):
  path = epath.Path(folder) / name
  if config.phases[name].stage != 'invert' or not (path / noise_store.MANIFEST).exists():
    return 'nothing finished there'
  return f'damaged or missing: {", ".join(noise_store.lost_parts(path, noise_store.read_manifest(path)))}'


def _check_same_inputs(folder, before, inputs, init_from):
  teacher = inputs.get(INVERTED_WITH)
  if before.get(INVERTED_WITH) != teacher:
    raise WorkdirError(
      f'{folder}: read the noise of {before.get(INVERTED_WITH)}, and what is there now is {teacher}; '
      f'delete {folder} to make {folder.name} again'
    )
  for other, step in inputs.items():
    if other in ('init_from', INVERTED_WITH):
      continue
    if before[other] > step:
      raise WorkdirError(
        f'{folder}: was made from {other} at step {before[other]}, which is back at step {step}; run {other} first'
      )
    if before[other] != step:
      raise WorkdirError(
        f'{folder}: was made from {other} at step {before[other]}, which has gone on to step {step}; '
        f'delete {folder} to make {folder.name} again'
      )
  if not starts.same_mark(before.get('init_from'), inputs.get('init_from')):
    raise WorkdirError(
      f'{folder}: started from {before.get("init_from", "no init_from")}, and init_from = {init_from!r} is '
      f'{inputs.get("init_from", "empty")}; delete {folder} to make {folder.name} again'
    )
