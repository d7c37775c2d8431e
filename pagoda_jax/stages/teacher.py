"""Stage 1: the diffusion teacher at the base resolution (EDM, Karras et al. 2022)."""

import functools
import math

import jax
import jax.numpy as jnp

from pagoda_jax.data.images import normalize
from pagoda_jax.method import diffusion, edm_augment, guidance
from pagoda_jax.stages import gradients
from pagoda_jax.stages.models import Networks, condition_of
from pagoda_jax.stages.state import TeacherState, averaged, global_norm, guarded, make_optimizer, step_keys, updated


def make_train_step(networks: Networks, config, parts: int = 1):
  """The train step of the teacher.

  Args:
    networks: networks.unet is trained.
    config: a phase made by config.teacher().
    parts: how many parts a batch is worked through in (microbatch.py): less memory, the same result.

  Returns:
    step(state: TeacherState, batch, frozen, rng) -> (state, metrics). batch: 'image' [B, H, W, C] uint8 or floats in
    [-1, 1], 'label' int32 [B] where the data has classes, and with captions their embeddings, guidance.TEXT. frozen:
    {}, or with captions {'null_text': embeddings of the empty one}. rng: one typed key for the whole run. metrics:
    scalars, float32 but for the counts of skipped steps. A step with a number that is not finite leaves the state as it
    was, but for its counters.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)

  def step(state: TeacherState, batch, frozen, rng):
    # The first three are the same as of three keys: a run without augmentation is what it was before there was any.
    drop_key, loss_key, dropout_key, augment_key = step_keys(rng, state.step, 4)
    images, told = normalize(batch['image']), None
    cond = guidance.dropped(
      drop_key, condition_of(networks, batch), config.label_dropout, frozen.get('null_text'))
    if config.augmentation.rate:
      images, told = edm_augment.augmented(
        images, jax.random.split(augment_key, len(images)), config.augmentation.rate, config.augmentation.transforms)

    sigma, noise = diffusion.training_draws(loss_key, images.shape, config.p_mean, config.p_std)
    dropout_keys = jax.random.split(dropout_key, len(images))

    losses = functools.partial(losses_of, networks, config.uncertainty)
    loss, grads = gradients.mean_and_grad(losses, parts)(
      state.params, images, cond, told, sigma, noise, dropout_keys)
    norm = global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = updated(networks.unet, state.params, updates)
    new = state.replace(params=params, opt_state=opt_state, **averaged(state, params, config))
    state = guarded((loss, norm), new, state)
    return state, {'loss': loss, 'grad_norm': norm, 'skipped_in_a_row': state.skipped,
                   'skipped': state.skipped_total}

  return step


def losses_of(networks: Networks, uncertainty: bool, params, images, cond, told, sigma, noise, dropout_keys):
  """The loss of every picture, [B]: EDM's, or with `uncertainty` EDM2's (Karras et al. 2024, equation 21).

  That is the sum over the picture's values of error / e^u + u, where the network learns u of the noise level: least at
  u = ln of the mean error, so that no noise level has more of the gradients than another.
  """
  losses = diffusion.edm_loss(
    networks.denoise, params, images, cond, sigma, noise, networks.sigma_data,
    augment=told, dropout_keys=dropout_keys,
  )
  if not uncertainty:
    return losses
  logvar = networks.apply(params, None, jnp.log(sigma) / 4, {}, logvar_only=True)
  return losses / jnp.exp(logvar) + logvar * math.prod(images.shape[1:])
