"""Stage 1: the diffusion teacher at the base resolution (EDM, Karras et al. 2022)."""

import jax
import jax.numpy as jnp
import optax

from pagoda_jax import diffusion
from pagoda_jax.data import normalize
from pagoda_jax.models import Networks
from pagoda_jax.state import TeacherState, all_finite, guarded, make_optimizer, mix, step_keys


def make_train_step(networks: Networks, config):
  """The train step of the teacher.

  Args:
    networks: networks.unet is trained.
    config: a phase made by config.teacher().

  Returns:
    step(state: TeacherState, batch, frozen, rng) -> (state, metrics). batch: 'image' [B, H, W, C] uint8
    or floats in [-1, 1], 'label' int32 [B] where the data has classes. frozen is unused ({}). rng: one
    typed key for the whole run. metrics: float32 scalars. A step whose loss or gradient is not finite
    leaves the state as it was, but for its counters.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)

  def step(state: TeacherState, batch, frozen, rng):
    del frozen
    drop_key, loss_key, dropout_key = step_keys(rng, state.step, 3)
    images = normalize(batch['image'])
    labels = dropped_labels(drop_key, batch['label'], config.label_dropout)

    def loss_of(params):
      return diffusion.edm_loss(
        networks.denoise, params, images, {'label': labels}, loss_key, config.p_mean, config.p_std,
        networks.sigma_data, train=True, rngs={'dropout': dropout_key},
      )

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    norm = optax.global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(params=params, opt_state=opt_state, ema=mix(state.ema, params, config.ema))
    state = guarded(all_finite(loss, norm), new, state)
    return state, {'loss': loss, 'grad_norm': norm, 'skipped_in_a_row': state.skipped,
                   'skipped': state.skipped_total}

  return step


def dropped_labels(rng: jax.Array, labels: jax.Array, rate: float) -> jax.Array:
  """Labels [B], each replaced by -1 (no label) with probability `rate`, for classifier-free guidance."""
  if rate == 0:
    return labels
  return jnp.where(jax.random.bernoulli(rng, rate, labels.shape), -1, labels)
