"""TensorBoard and Weights & Biases, where their packages are installed, under the names of metrics.jsonl.

Neither may cost a run: a writer that fails is left out from then on, with a warning. What it would have been given
stands in metrics.jsonl, samples/ and config.json.
"""

import json
import os
import secrets

import numpy as np
from absl import logging
from etils import epath

from pagoda_jax.runtime import buckets, distributed
from pagoda_jax.runtime.files import replacing

WANDB_ID = 'wandb_id.txt'  # in a phase's folder: a run that goes on is the same run there
PROJECT = 'pagoda_jax'  # where WANDB_PROJECT names none
_said = set()


class Writers:
  """All that are installed; those that are not are no fault."""

  def __init__(self, folder, step: int, config: dict):
    self._open = []
    for make in (TensorBoard, WandB):
      try:
        self._open.append(make(epath.Path(folder), step, config))
      except _NotWanted as reason:
        if str(reason) and str(reason) not in _said:
          _said.add(str(reason))
          distributed.say(str(reason))
      except Exception as error:  # of a library, of a network, of a broken installation
        _warn(make, error)

  def scalars(self, step: int, values: dict) -> None:
    self._each('scalars', step, {key: value for key, value in values.items() if isinstance(value, (int, float))})

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """[H, W, C] uint8, C 1 or 3."""
    self._each('image', step, name, image)

  def close(self) -> None:
    self._each('close')

  def _each(self, method, *args):
    for writer in list(self._open):
      try:
        getattr(writer, method)(*args)
      except Exception as error:
        self._open.remove(writer)
        _warn(type(writer), error)


class _NotWanted(Exception):
  """A writer that is not to be used; why, where that should be said."""


def _warn(writer, error):
  logging.warning('%s is left out from now on: %s; metrics.jsonl has it all', writer.__name__,
                  str(error) or type(error).__name__)


class TensorBoard:
  """Event files beside metrics.jsonl."""

  def __init__(self, folder, step, config):
    tensorboard = _imported('tensorboardX')
    # What a crash has undone is hidden, also where it came before the first checkpoint.
    self._writer = tensorboard.SummaryWriter(str(folder), purge_step=step + 1)
    self._writer.add_text('config', f'```json\n{_text(config)}\n```', step)

  def scalars(self, step, values):
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def image(self, step, name, image):
    self._writer.add_image(name, image, step, dataformats='HWC')

  def close(self):
    self._writer.close()


class WandB:
  """A run of Weights & Biases for each phase, in a group for each work directory.

  Only where somebody is logged in, or WANDB_MODE is offline: nothing waits for an answer at the terminal.
  """

  def __init__(self, folder, step, config):
    self._wandb = _imported('wandb')
    mode = os.environ.get('WANDB_MODE', 'online')
    if mode == 'disabled':
      raise _NotWanted
    if mode == 'online' and not _logged_in(self._wandb):
      raise _NotWanted('wandb is installed, but nobody is logged in: nothing goes to Weights & Biases (`wandb login`; '
                       'or WANDB_MODE=offline)')
    group = folder.parent.name or str(folder.parent)
    self._run = self._wandb.init(
      project=os.environ.get('WANDB_PROJECT') or PROJECT, group=group, name=f'{group}/{folder.name}',
      id=_wandb_id(folder, step), resume='allow', config={'config': _text(config)},
      dir=None if buckets.is_in_bucket(folder) else str(folder))
    # Its own counter only rises: a run that went back to a checkpoint would lose what it does anew.
    self._run.define_metric('*', step_metric='step')

  def scalars(self, step, values):
    self._run.log(values | {'step': step})

  def image(self, step, name, image):
    self._run.log({name: self._wandb.Image(image[..., 0] if image.shape[-1] == 1 else image), 'step': step})

  def close(self):
    self._run.finish()


def _logged_in(wandb) -> bool:
  try:
    return wandb.login(prompt=False)
  except TypeError:  # an older one, that can only ask at the terminal
    return bool(wandb.api.api_key)


def _imported(name):
  try:
    return __import__(name)
  except ImportError as error:
    if error.name == name:
      raise _NotWanted from None
    raise


def _text(config: dict) -> str:
  return json.dumps(config, indent=2)


def _wandb_id(folder, step) -> str:
  path = folder / WANDB_ID
  if step and path.exists():
    return path.read_text().strip()
  mark = secrets.token_hex(8)
  with replacing(path) as file:
    file.write(f'{mark}\n'.encode())
  return mark
