"""The encoder x -> z, a network in the place of the ODE's solver (PaGoDA's release; the paper inverts).

One evaluation makes the noise of a picture that the solver takes 2 (num_levels - 1) for, once the encoder has learnt
from pairs of the solver's. Squared and absolute errors alike are least at one noise for each picture, so what the
solver's noise has beyond what the encoder can know of it is lost, and its deviation stays below the prior's until the
encoder has learnt it well: `invert` tells both, and `standardize_noise` scales what is left.
"""

import jax.numpy as jnp

from pagoda_jax.data.images import normalize
from pagoda_jax.stages import distill, gradients
from pagoda_jax.stages.models import Networks, check_sizes, condition_of
from pagoda_jax.stages.state import TeacherState, global_norm, guarded, make_optimizer, mix, step_keys, updated


def make_train_step(networks: Networks, config, parts: int = 1):
  """The train step of the encoder.

  Args:
    networks: networks.unet is trained.
    config: a phase made by config.encode().
    parts: how many parts a batch is worked through in (microbatch.py): less memory, the same result.

  Returns:
    step(state: TeacherState, batch, frozen, rng) -> (state, metrics). batch: 'image' [B, R, R, C] with 'noise'
    [B, R, R, C] and 'label' int32 [B], or what stands in their place where networks.invert or networks.draw are given;
    frozen, omega and captions too: as distill.make_train_step has them. rng: one typed key for the whole run. metrics:
    scalars, float32 but for the counts of skipped steps. A step with a number that is not finite leaves the state as it
    was, but for its counters.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)

  def losses_of(params, images, noise, cond):
    apart = networks.encode(params, images, cond) - noise / networks.sigma_max
    return jnp.mean(apart**2 + jnp.abs(apart), axis=(1, 2, 3))

  def step(state: TeacherState, batch, frozen, rng):
    check_sizes(networks, batch)
    images, noise = distill.pairs_of(networks, batch, frozen, step_keys(rng, state.step, 1)[0], parts)
    cond = condition_of(networks, batch) | distill.omega_of_pairs(networks, batch)
    loss, grads = gradients.mean_and_grad(losses_of, parts)(state.params, images, noise, cond)
    norm = global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = updated(networks.unet, state.params, updates)
    new = state.replace(params=params, opt_state=opt_state, ema=mix(state.ema, params, config.ema))
    state = guarded((loss, norm), new, state)
    return state, {'loss': loss, 'grad_norm': norm, 'skipped_in_a_row': state.skipped, 'skipped': state.skipped_total}

  return step


def make_invert_step(networks: Networks):
  """step(params, batch, null=None) -> noise [B, R, R, C], as invert.make_invert_step's, by an encoder's parameters."""

  def step(params, batch, null=None):
    del null  # the encoder is told the strength of guidance, and evaluated once
    cond = condition_of(networks, batch) | ({'omega': batch['omega']} if 'omega' in batch else {})
    return networks.sigma_max * networks.encode(params, normalize(batch['image']), cond)

  return step
