"""A trained phase as a network of the published code."""

import dataclasses

from pagoda_jax import config as configs
from pagoda_jax.stages import models
from pagoda_jax.training import checkpoints, claims, workdir
from pagoda_jax.weights.convert.formats import Converted
from pagoda_jax.weights.convert.mapping import ConversionError

# What a config calls the network's form -> the published format with that arithmetic.
FORMATS = {'guided': 'pagoda', 'edm': 'edm', 'ddpmpp': 'edm', 'edm2': 'edm2', 'deepfloyd': 'deepfloyd'}


def read_phase(phase_folder, step: int | None = None, attention_order: str | None = None) -> Converted:
  """The EMA of a teacher or generator, ready for `formats.to_state_dict`.

  Args:
    phase_folder: WORKDIR/PHASE.
    step: of the checkpoint; None takes the newest.
    attention_order: that the published code will use, for the guided-diffusion form; None: 'flash'.

  Raises:
    ConversionError: no published code computes such a network.
    CheckpointError, WorkdirError: there is no such phase or no checkpoint in it.
  """
  phase_folder = claims.at_its_place(phase_folder)
  config = workdir.read_config(phase_folder.parent)
  if phase_folder.name not in config.phases or config.phases[phase_folder.name].stage not in configs.IMAGE_STAGES:
    raise ConversionError(f'{phase_folder}: neither a converted folder nor a phase with a network that draws images')
  unet = models.make_unet(config, phase_folder.name)
  form = config.network.form
  if form not in FORMATS or (form != 'guided' and unet.grown):
    raise ConversionError(f'no published code computes a {"grown " if unet.grown else ""}network of form {form!r}')
  if attention_order and form != 'guided':
    raise ConversionError(f'--attention_order={attention_order}: is of networks of form guided, and this one is of '
                          f'form {form}')
  if unet.omega_embedding:
    raise ConversionError('no published code computes a network with the strength of guidance as an input')
  params, step = checkpoints.read_generator(phase_folder, step)
  asked = {'attention_order': attention_order or 'flash'} if form == 'guided' else {}
  said = f', attention in the order {asked["attention_order"]}' if asked else ''
  return Converted(
    variables={'params': params},
    options=options_of(unet),
    format=FORMATS[form],
    leaves_asked=asked,
    notes=(f'phase {phase_folder.name} at step {step}{said}',),
  )


def options_of(unet) -> dict:
  """What makes the network again: the fields of its module, but for how it is trained and run."""
  left_out = ('parent', 'name', 'dtype', 'remat', 'dropout')
  return {f.name: getattr(unet, f.name) for f in dataclasses.fields(unet) if f.name not in left_out}
