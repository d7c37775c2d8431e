"""The autoencoder of latent space (Rombach et al. 2022): pictures to latents and back.

A phase of its own kind: the networks of the other stages then work on its latents, in another experiment. Its loss is
that of latent diffusion's first stage: L1 and a distance beside it, a light pull of the latents towards N(0, 1), and a
discriminator's hinge loss, which gives back the texture that the others average out.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from pagoda_jax.data.images import normalize
from pagoda_jax.method import losses, microbatch
from pagoda_jax.networks.pyramid import pixel_pyramid
from pagoda_jax.runtime import sharding
from pagoda_jax.stages.models import Networks
from pagoda_jax.stages.state import GeneratorState, global_norm, guarded, make_optimizer, mix, step_keys
from pagoda_jax.stages.turns import Turns


def make_train_step(networks: Networks, config, parts: int = 1):
  """The train step of an autoencoder: one update of it and one of its discriminator.

  Args:
    networks: networks.autoencoder is trained, networks.discriminator is its opponent.
    config: a phase made by config.autoencoder().
    parts: how many parts a batch is worked through in (microbatch.py): less memory, the same result. The
      autoencoder and the feature networks are; the discriminator sees whole batches, for their statistics.

  Returns:
    step(state: GeneratorState, batch, frozen, rng) -> (state, metrics). batch: 'image' [B, H, W, C] uint8 or floats in
    [-1, 1], 'label', which no one looks at. frozen: {'features': {name: variables}} of the frozen feature networks,
    without any, {}. rng: one typed key for the whole run. metrics: scalars, float32 but for the
    counts of skipped steps; psnr in dB, of the batch's pictures from sampled latents. A step with a number that is not
    finite leaves the state as it was, but for its counters.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)
  discriminator_optimizer = make_optimizer(config.discriminator_optimizer, config.steps)

  def step(state: GeneratorState, batch, frozen, rng):
    latent_key, distance_key, feature_key = step_keys(rng, state.step, 3)
    images = normalize(batch['image'])
    count = len(images)
    sizes = pixel_pyramid(images, config.sizes)
    distance_draws = networks.distance_draws(distance_key, count)
    draws = networks.feature_draws(feature_key, count)
    turns = Turns(networks, discriminator_optimizer, frozen, parts)

    def passed(params):
      """For each size of the pictures (mean, log variance, decoded sample)."""

      @jax.named_scope('autoencoder')
      def of_part(sizes, keys):
        found = []
        for size, small in enumerate(sizes):
          apply = functools.partial(networks.autoencoder.apply, {'params': params})
          mean, log_variance = apply(small, method='encode')
          noise = jax.vmap(lambda key, like, size=size: jax.random.normal(jax.random.fold_in(key, size), like.shape))
          latents = mean + jnp.exp(log_variance / 2) * noise(keys, mean)
          found.append((mean, log_variance, apply(latents, method='decode')))
        return found

      return microbatch.mapped(of_part, parts)(sizes, jax.random.split(latent_key, count))

    def infidelity(outputs):
      """What is lost of the pictures, the mean over sizes; and of the largest by itself what is measured."""
      total, rows = 0.0, []
      for small, (mean, log_variance, decoded) in zip(sizes, outputs):
        rows.append((jnp.mean(jnp.abs(decoded - small)), jnp.mean(kl(mean, log_variance))))
        total += config.l1_weight * rows[-1][0] + config.kl_weight * rows[-1][1]
        if config.reconstruction.weight:
          compared = microbatch.mapped(functools.partial(networks.distance, frozen), parts)
          total += config.reconstruction.weight * jnp.mean(compared(small, decoded, distance_draws))
      return total / len(sizes), rows[0]

    def deception(outputs):
      """How little the discriminator is taken in by the largest; what it saw, and its new statistics."""
      maps = turns.maps(outputs[0][2], draws)
      logits, statistics = networks.judge(state.discriminator, maps, {})
      return losses.hinge_generator(logits), (maps, statistics)

    # The autoencoder's turn: one forward pass, and a backward one of both losses together unless their ratio is asked.
    outputs, pulled_back = jax.vjp(passed, state.params)
    (loss, (of_l1, of_kl)), lost = jax.value_and_grad(infidelity, has_aux=True)(outputs)
    (adv, (fake_maps, statistics)), deceived = jax.value_and_grad(deception, has_aux=True)(outputs)
    weight = jnp.float32(config.adversarial.weight)
    if config.adversarial.adaptive:
      norms = [jnp.linalg.norm(pulled_back(each)[0]['decoder']['conv_out']['kernel']) for each in (lost, deceived)]
      weight = losses.adaptive_weight(*norms, weight, config.adversarial.low, config.adversarial.high)
    weight = jnp.where(state.step >= config.adversarial_from, weight, 0.0)
    (grads,) = sharding.split_as_parameters(pulled_back(jax.tree.map(lambda a, b: a + weight * b, lost, deceived)))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    # The discriminator's turn, on what it has just seen and on the pictures under the same draw of the augmentation.
    discriminator, d_opt_state, of_discriminator = turns.of_discriminator(
      config.adversarial, {**state.discriminator, **statistics}, state.discriminator_opt_state, images, None, {},
      (outputs[0][2], fake_maps), {}, draws
    )

    measured = {
      'loss': loss,
      'l1': of_l1,
      'kl': of_kl,
      'psnr': jnp.mean(psnr(outputs[0][2], images)),
      'adversarial': adv,
      'weight': weight,
      'grad_norm': global_norm(grads),
      **of_discriminator,
    }
    new = state.replace(params=params, opt_state=opt_state, ema=mix(state.ema, params, config.ema),
                        discriminator=discriminator, discriminator_opt_state=d_opt_state)
    state = guarded(measured, new, state)
    return state, measured | {'skipped_in_a_row': state.skipped, 'skipped': state.skipped_total}

  return step


def kl(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
  """KL divergence of N(mean, variance) from N(0, 1), [B], the mean over the latents' numbers."""
  return jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3)) / 2


def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio in dB of pictures [B, H, W, C], clipped to [-1, 1], [B]; at most 100."""
  error = jnp.mean(jnp.square(jnp.clip(images, -1, 1) - jnp.clip(others, -1, 1)), axis=(1, 2, 3)) / 4
  return -10 * jnp.log10(jnp.maximum(error, 1e-10))
