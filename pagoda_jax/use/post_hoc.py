"""An average of a teacher's weights that was not kept, found after training from those in its checkpoints (EDM2)."""

import jax
import numpy as np
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.method import ema
from pagoda_jax.networks import edm2
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints, workdir
from pagoda_jax.use import to_published
from pagoda_jax.weights.convert.formats import Converted

LARGEST_ERROR = 0.1  # of the profile; above, what comes out is another average than was asked for


class PostHocError(ValueError):
  """The checkpoints do not hold what the average could be made of; the message says what is missing."""


def average(phase_folder, std: float, step: int | None = None) -> tuple[Converted, dict]:
  """(the network with the average, where it came from) of a teacher phase.

  Args:
    phase_folder: WORKDIR/PHASE, of a phase with `ema_std`. All its whole checkpoints up to the newest are used:
      `config.checkpoint.keep_every` says how many there are.
    std: relative standard deviation of the average wanted.
    step: at which it shall end; None: the newest.

  Raises:
    PostHocError: the phase keeps no averages by power function, or its checkpoints are too few for that profile.
    ValueError: no power function has that std.
    CheckpointError, WorkdirError: there is no such phase or checkpoint, or one is damaged.
  """
  phase_folder = epath.Path(phase_folder)
  config = workdir.read_config(phase_folder.parent)
  phase = config.phases.get(phase_folder.name, {})
  if not phase.get('ema_std'):
    raise PostHocError(f'{phase_folder}: keeps no averages by power function; a teacher does with ema_std=(0.05, 0.1)')
  ema.exponent_of(std)
  steps = checkpoints.finished_steps(phase_folder)
  newest = checkpoints.newest_step(phase_folder)
  step = newest if step is None else step
  if newest is None or not 0 < step <= newest:
    raise PostHocError(f'{phase_folder}: no weights of step {step}; the newest checkpoint is of step {newest}')
  stored = [(at, kept) for at in steps for kept in phase.ema_std]
  factors, error = ema.post_hoc_weights([at for at, _ in stored], [kept for _, kept in stored], step, std)
  if error > LARGEST_ERROR:
    raise PostHocError(
      f'{phase_folder}: from the averages at steps {", ".join(map(str, steps))} of std '
      f'{", ".join(map(str, phase.ema_std))}, std = {std:g} at step {step} can be met to {error:.0%} only; more '
      'checkpoints (config.checkpoint.keep_every) or another std'
    )
  params = None
  names = dict(zip(phase.ema_std, configs.ema_names(phase)[len(phase.ema_halflife):]))
  first, *_ = configs.ema_names(phase)
  for at in steps:  # one in memory at a time
    state, _ = checkpoints.read_state(phase_folder, at, ('ema', 'other_emas'))
    for (when, kept), factor in zip(stored, factors):
      if when == at:
        tree = state['ema'] if names[kept] == first else state['other_emas'][names[kept]]
        part = jax.tree.map(lambda leaf, f=factor: f * leaf.astype(np.float64), tree)
        params = part if params is None else jax.tree.map(np.add, params, part)
  # The factors sum to about 1 only, and what is not trained is the same in all.
  chosen = lambda path, leaf, kept: (kept if path[-1].key in edm2.CONSTANTS else leaf).astype(np.float32)
  params = jax.tree_util.tree_map_with_path(chosen, params, state['ema'])
  unet = models.make_unet(config, phase_folder.name)
  said = f'phase {phase_folder.name}, std {std:g} at step {step}, of {len(stored)} averages; profile met to {error:.2g}'
  source = {'sha256': checkpoints.digest(params), 'phase': phase_folder.name, 'std': std, 'step': step, 'steps': steps}
  return Converted({'params': params}, to_published.options_of(unet), to_published.FORMATS[config.network.form],
                   notes=(said,)), source
