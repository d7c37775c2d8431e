"""The estimator omega_phi(x, c), for the adversarial loss with guidance (PaGoDA, section 5).

A real pair of picture and class has no strength of guidance; the discriminator's real triples are
p_data(x, c) p(omega | x, c), the fakes' p_data(c) pi(omega) p(x | c, omega). omega_phi is trained on the teacher's own
guided samples, of classes of the data and strengths of the law, by E||omega - omega_phi(x_hat(z, c, omega), c)||^2:
its optimum is the posterior's mean. The strength is regressed as it is, no logarithm of it: it enters the networks so.

The samples are drawn inside the step, each for one update. A pool of them would cost less where it is gone through
several times, and would be one more store to write, to check and to go on with after a crash; the whole phase is a
small part of a run as it is, and the estimator cannot learn its pool by heart.
"""

import functools

import jax
import jax.numpy as jnp

from pagoda_jax.data.images import normalize
from pagoda_jax.method import microbatch
from pagoda_jax.stages import gradients
from pagoda_jax.stages.models import Networks, condition_of
from pagoda_jax.stages.state import TeacherState, global_norm, guarded, make_optimizer, mix, step_keys, updated


def make_train_step(networks: Networks, config, parts: int = 1):
  """The train step of the estimator.

  Args:
    networks: networks.unet is trained; networks.draw makes the teacher's samples.
    config: a phase made by config.guide().
    parts: how many parts a batch is worked through in (microbatch.py): less memory, the same result.

  Returns:
    step(state: TeacherState, batch, frozen, rng) -> (state, metrics). batch: 'label' int32 [B] or captions' embeddings
    (guidance.TEXT), of which samples are drawn, and 'image' [B, R, R, C], the real pictures, which are only measured.
    frozen: {'teacher': params}, with captions also 'null_text'. rng: one typed key for the whole run. metrics: scalars,
    float32 but for the counts of skipped steps; omega_real and omega_real_std are mean and deviation of what the EMA
    says of the real pictures. A step with a number that is not finite leaves the state as it was, but for its counters.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)

  def step(state: TeacherState, batch, frozen, rng):
    noise_key, omega_key = step_keys(rng, state.step, 2)
    cond = condition_of(networks, batch)
    reals = normalize(batch['image'])
    noise = networks.sigma_max * jax.random.normal(noise_key, reals.shape)
    omegas = networks.law.draw(omega_key, reals.shape[:1], batch.get('caption_kind'))

    def losses_of(params, noise, cond, omegas):
      # A sample depends on no parameter of the estimator: no gradient is taken of it.
      images = networks.draw(frozen['teacher'], noise, cond | {'omega': omegas}, frozen.get('null_text'))
      images = images if networks.latent else as_pictures(images)
      return (omegas - networks.estimate(params, images, cond)) ** 2

    loss, grads = gradients.mean_and_grad(losses_of, parts)(state.params, noise, cond, omegas)
    norm = global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = updated(networks.unet, state.params, updates)
    new = state.replace(params=params, opt_state=opt_state, ema=mix(state.ema, params, config.ema))
    found = microbatch.mapped(functools.partial(networks.estimate, state.ema), parts)(reals, cond)
    state = guarded((loss, norm), new, state)
    return state, {'loss': loss, 'grad_norm': norm, 'omega_real': jnp.mean(found), 'omega_real_std': jnp.std(found),
                   'skipped_in_a_row': state.skipped, 'skipped': state.skipped_total}

  return step


def as_pictures(images: jax.Array) -> jax.Array:
  """Samples as pictures are stored: within [-1, 1], of 256 grey levels. What is left of their noise tells nothing."""
  return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5) / 127.5 - 1


def estimated(networks: Networks, frozen, images, cond) -> jax.Array:
  """omega [B] of real pictures [B, R, R, C] in [-1, 1], in the law's range; a constant to whoever learns from it."""
  if networks.estimate is None:  # the strength is constant
    return jnp.full(len(images), networks.law.mean, jnp.float32)
  found = networks.estimate(frozen['guide'], images, cond)
  return jax.lax.stop_gradient(jnp.clip(found, *networks.law.ends))
