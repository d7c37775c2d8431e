"""A phase's state at step 0: made of what it starts from, or its shapes alone."""

import functools

import jax
import numpy as np

from pagoda_jax import config as configs
from pagoda_jax.config import ladder
from pagoda_jax.networks import growth
from pagoda_jax.stages import decoding, grow, models, state
from pagoda_jax.training import starts
from pagoda_jax.weights import frozen_weights


def init_teacher(config, folder, name: str, networks, key) -> tuple[state.TeacherState, str]:
  """The teacher's state at step 0: fresh parameters, or those at init_from; and which, in words."""
  phase = config.phases[name]
  if phase.init_from:
    params, where = starts.read_start(config, folder, name)
    return state.init_teacher(state.copy(params), phase), f'starts from {where}'
  return state.init_teacher(models.init_unet(networks.unet, key), phase), 'starts afresh'


def init_autoencoder(config, name: str, networks, frozen, key) -> tuple[state.GeneratorState, str]:
  """The state at step 0 of an autoencoder and its discriminator; said in words."""
  key, discriminator_key = jax.random.split(key)
  params = models.run_once(functools.partial(decoding.fresh_variables, config), key)['params']
  discriminator = models.init_discriminator(networks, frozen, config.base_resolution, discriminator_key)
  return state.init_generator(params, {}, discriminator, config.phases[name]), 'starts afresh'


def init_as_teacher(networks, phase, teacher_params, what: str, key) -> tuple[state.TeacherState, str]:
  """The state at step 0 of an estimator or an encoder: what it shares with the teacher is copied; said in words."""
  params, report = models.grown(networks.unet, teacher_params, key)
  return state.init_teacher(state.copy(params), phase), f'starts from {what}: {report.counts}'


def init_generator(config, folder, name: str, networks, frozen, key) -> tuple[state.GeneratorState, str]:
  """The generator's state at step 0: a copy of the teacher, or the generator before it, grown; said in words."""
  phase = config.phases[name]
  resolution = configs.phase_resolution(config, name)
  generator_key, discriminator_key = jax.random.split(key)
  params, where = starts.read_start(config, folder, name)
  fixed = {}
  if phase.stage == 'distill' and (networks.law is not None or networks.unet.grown):
    # The input for omega is new, and does nothing yet; levels above the teacher's begin as growth's do.
    params, report = models.grown(networks.unet, params, generator_key)
    where = f'{where}: {report}' if networks.unet.grown else where
  if phase.stage == 'distill' and networks.unet.ddpm_levels and not starts.begins_as_generator(phase):
    # The teacher's answer is noise, and the generator's shall be the picture: it begins as grey.
    params = params | {'out_conv': jax.tree.map(np.zeros_like, params['out_conv'])}
    where = f'{where}, its last convolution as zeros'
  if phase.stage == 'grow':
    params, fixed, report = grow.grown_params(networks.unet, params, ladder.thawed_blocks(config, name), generator_key)
    where = f'{where}, grown: {report}'
    if networks.unet.ddpm_levels and phase.init_from and not starts.begins_as_generator(phase):
      where += ("\nthese weights are taken for a generator's, as nothing in them tells: a teacher of form 'deepfloyd', "
                'which answers with noise, is to be distilled before it grows')
  discriminator = models.init_discriminator(networks, frozen, resolution, discriminator_key)
  discriminator, embedding = frozen_weights.with_class_embedding(config, name, discriminator)
  of_pairs = None
  if phase.reconstruction_adversarial.weight:
    of_pairs = models.init_discriminator(networks, frozen, resolution, jax.random.fold_in(discriminator_key, 1))
    of_pairs, _ = frozen_weights.with_class_embedding(config, name, of_pairs)
  begun = state.init_generator(state.copy(params), state.copy(fixed), discriminator, phase, of_pairs)
  return begun, '\n'.join(filter(None, (f'starts from {where}', embedding)))


def shapes(config, name: str, networks, frozen):
  """Shapes of what the functions above make: no file is read, nothing is computed.

  Args:
    config, name: experiment and phase.
    networks: `models.build` of it.
    frozen: the phase's frozen networks, or their shapes.
  """

  def begin(params):
    side, discriminator = configs.phase_resolution(config, name), None
    if networks.discriminator is not None:
      discriminator = models.init_discriminator(networks, frozen, side, jax.random.key(0))
    return begun(config, name, params, discriminator)

  return jax.eval_shape(begin, params_shapes(config, name))


def begun(config, name: str, params, discriminator):
  """The state at step 0 of a phase that trains, from all parameters of its U-Net and the discriminator's variables."""
  phase, fixed = config.phases[name], {}
  if phase.stage in ('teacher', 'encode', 'guide'):
    return state.init_teacher(params, phase)
  if phase.stage == 'grow':
    params, fixed = growth.split_trainable(params, ladder.thawed_blocks(config, name))
  paired = 'reconstruction_adversarial' in phase and phase.reconstruction_adversarial.weight
  of_pairs = state.copy(discriminator) if paired else None
  return state.init_generator(params, fixed, discriminator, phase, of_pairs)


def params_shapes(config, name: str):
  """Shapes of all parameters of a phase's U-Net, or of the autoencoder that it trains."""
  if config.phases[name].stage == 'autoencoder':
    return decoding.variables_shapes(config)['params']
  return models.unet_shapes(models.make_unet(config, name))
