"""Stage 2: the one-step generator at the base resolution (PaGoDA, section 3.1).

L = L_rec + lambda * L_adv. L_rec compares a real image with the generator's answer to its inverted
noise; L_adv compares other real images with what the generator makes of noise from the prior.

With guidance (config.guidance) both players take its strength omega as an input: a pair's is the one that it was
inverted with, a fake's is drawn from the law, and a real image's is estimated (stages/guide.py).
"""

import functools

import jax
import jax.numpy as jnp
import optax

from pagoda_jax.data.images import normalize
from pagoda_jax.method import losses, microbatch
from pagoda_jax.networks import growth
from pagoda_jax.stages import guide
from pagoda_jax.stages.models import Networks
from pagoda_jax.stages.state import GeneratorState, guarded, make_optimizer, mix, step_keys


def make_train_step(networks: Networks, config, parts: int = 1):
  """The train step of a generator: one update of the generator and one of the discriminator.

  The generator's gradients are taken on the pairs, the discriminator's on the other real images and on fakes:
  by `config.fakes` 'fresh' ones, of new noise through the generator just updated (PaGoDA's release), or 'shared'
  ones, which the generator's loss was taken on, with what the feature networks made of them. By `config.adversarial`
  `loss` 'relativistic' (R3GAN) each fake is judged beside a real image of its class, under one draw of the augmentation
  for both turns; its `r1` and `r2` weigh gradient penalties on reals and fakes.

  Args:
    networks: networks.unet is the generator; networks.discriminator its opponent.
    config: a phase made by config.distill() or config.grow().
    parts: how many parts a batch is worked through in (microbatch.py): less memory, the same result. The
      generator and the feature networks are; the discriminator sees whole batches, for their statistics.

  Returns:
    step(state: GeneratorState, batch, frozen, rng) -> (state, metrics). batch: 'image' [B, H, W, C] with
    'noise' [B, h, w, C] (standard deviation near sigma_max, h x w the base resolution) and 'label' int32
    [B]; 'real_image' [B, H, W, C] with 'real_label' [B]. Images are uint8 or floats in [-1, 1]. Where
    networks.invert is given, 'base_image' [B, h, w, C] and 'key' int32 [B] stand in place of 'noise'. With
    guidance: 'omega' [B] of the pairs, beside 'noise'; and where H > h 'real_base_image' [B, h, w, C]. frozen:
    {'features': {name: variables}} of the frozen feature networks (frozen_weights.load), without any, {};
    {'teacher': params} for networks.invert and networks.draw, with which the pairs' images are not looked at; and
    {'guide': params} for networks.estimate.
    rng: one typed key for the whole run. metrics: float32 scalars. A step with a number that is not
    finite leaves the state as it was, but for its counters.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)
  discriminator_optimizer = make_optimizer(config.discriminator_optimizer, config.steps)
  relativistic = config.adversarial.loss == 'relativistic'
  # A known weight goes into its loss: of a plain sum of gradients, compilers for TPU sum each once over devices.
  fixed = 1.0 if config.adversarial.adaptive else config.adversarial.weight

  def step(state: GeneratorState, batch, frozen, rng):
    keys = step_keys(rng, state.step, 7)
    reals = normalize(batch['real_image'])
    cond, real_cond = {'label': batch['label']}, {'label': batch['real_label']}
    images, noise = pairs_of(networks, batch, frozen, keys[6])
    pair_cond, real_cond = cond | omega_of_pairs(networks, batch), real_cond | omega_of_reals(networks, batch, frozen)
    prior_cond = real_cond if relativistic else cond | omega_of_fakes(networks, keys[5], 0, len(images))

    def generate(trained, noise, cond):
      return networks.generate(growth.merge(trained, state.fixed), noise, cond)

    def prior(key):
      return networks.sigma_max * jax.random.normal(key, noise.shape)

    def distances(trained, images, noise, cond, draws):
      return networks.distance(frozen, images, generate(trained, noise, cond), draws)

    def fakes_of(trained, noise, cond, draws):
      images = generate(trained, noise, cond)
      return images, networks.features(frozen, images, draws)

    def maps_of(images, draws):
      return microbatch.mapped(functools.partial(networks.features, frozen), parts)(images, draws)

    def adversarial_loss(trained, draws, real_logits):
      fakes = microbatch.mapped(functools.partial(fakes_of, trained), parts)(prior(keys[1]), prior_cond, draws)
      logits, _ = networks.judge(state.discriminator, fakes[1], prior_cond)
      loss = losses.relativistic_generator(real_logits, logits) if relativistic else losses.hinge_generator(logits)
      return fixed * loss, (loss, fakes)

    def judged(variables, images, maps, cond, gamma):
      """(logits, updated statistics, gradient penalty or 0) of images, whose maps these are."""
      if not gamma:
        return *networks.judge(variables, maps, cond), 0.0
      return losses.with_gradient_penalty(lambda x: networks.judge(variables, maps_of(x, draws), cond), images)

    def discriminator_loss(params):
      # The running statistics of both passes are kept.
      variables, weights = {**state.discriminator, 'params': params}, config.adversarial
      real_logits, after_real, r1 = judged(variables, reals, real_maps, real_cond, weights.r1)
      fake_logits, after_both, r2 = judged({**variables, **after_real}, fakes, fake_maps, fake_cond, weights.r2)
      loss_of = losses.relativistic_discriminator if relativistic else losses.hinge_discriminator
      loss = loss_of(real_logits, fake_logits) + weights.r1 / 2 * r1 + weights.r2 / 2 * r2
      return loss, (real_logits, fake_logits, after_both, {'r1': r1, 'r2': r2})

    rec, rec_grads = microbatch.mean_and_grad(distances, parts)(
      state.params, images, noise, pair_cond, networks.distance_draws(keys[0], len(images))
    )
    draws, real_maps, real_logits = networks.feature_draws(keys[2], len(images)), None, None
    if relativistic:
      real_maps = maps_of(reals, draws)
      real_logits, _ = networks.judge(state.discriminator, real_maps, real_cond)
    (_, (adv, (fakes, fake_maps))), adv_grads = jax.value_and_grad(adversarial_loss, has_aux=True)(
      state.params, draws, real_logits
    )
    weight = adversarial_weight(config.adversarial, rec_grads, adv_grads)
    factor = weight if config.adversarial.adaptive else 1.0
    grads = jax.tree.map(lambda r, a: config.reconstruction.weight * r + factor * a, rec_grads, adv_grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    fake_cond = prior_cond
    if config.fakes == 'fresh':
      fake_cond = real_cond
      if not relativistic:
        fake_cond = real_cond | omega_of_fakes(networks, keys[5], 1, len(reals))
        draws = networks.feature_draws(keys[4], len(reals))
      fakes, fake_maps = microbatch.mapped(functools.partial(fakes_of, params), parts)(
        prior(keys[3]), fake_cond, draws
      )
    if not relativistic:  # the augmentation's draw is the same for real and fake
      real_maps = maps_of(reals, draws)
    (d_loss, (real_logits, fake_logits, statistics, penalties)), d_grads = jax.value_and_grad(
      discriminator_loss, has_aux=True
    )(state.discriminator['params'])
    updates, d_opt_state = discriminator_optimizer.update(
      d_grads, state.discriminator_opt_state, state.discriminator['params']
    )
    d_params = optax.apply_updates(state.discriminator['params'], updates)

    norm, d_norm = optax.global_norm(grads), optax.global_norm(d_grads)
    new = state.replace(
      params=params,
      opt_state=opt_state,
      ema=mix(state.ema, params, config.ema),
      discriminator={**statistics, 'params': d_params},
      discriminator_opt_state=d_opt_state,
    )
    state = guarded((rec, adv, d_loss, norm, d_norm), new, state)
    return state, {
      'loss': rec,
      'adversarial': adv,
      'weight': weight,
      'discriminator': d_loss,
      'logit_real': jnp.mean(real_logits),
      'logit_fake': jnp.mean(fake_logits),
      **{name: value for name, value in penalties.items() if config.adversarial[name]},
      'grad_norm': norm,
      'discriminator_grad_norm': d_norm,
      'skipped_in_a_row': state.skipped,
      'skipped': state.skipped_total,
    }

  return step


def pairs_of(networks: Networks, batch, frozen, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """L_rec's pairs, constants: images [B, H, W, C] in [-1, 1] and the noise [B, h, w, C] that shall make them.

  The noise is what the batch brings, or inverted by the teacher here and now; where networks.draw is given, it is of
  the prior, and the images are what the teacher makes of it.
  """
  images = normalize(batch['image'])
  if networks.draw is not None:
    noise = networks.sigma_max * jax.random.normal(key, images.shape)
    return jax.lax.stop_gradient(networks.draw(frozen['teacher'], noise, {'label': batch['label']})), noise
  if networks.invert is None:
    return images, batch['noise']
  return images, jax.lax.stop_gradient(networks.invert(frozen['teacher'], batch | {'image': batch['base_image']}))


def omega_of_pairs(networks: Networks, batch) -> dict[str, jax.Array]:
  """{'omega': [B]} that the batch's pictures were, or are here and now, inverted with; {} without guidance."""
  if networks.law is None:
    return {}
  return {'omega': batch['omega'] if networks.omega_of_keys is None else networks.omega_of_keys(batch['key'])}


def omega_of_fakes(networks: Networks, rng, place: int, count: int) -> dict[str, jax.Array]:
  """{'omega': [count]} drawn from the law; {} without guidance. `place` tells the draws of one step apart."""
  if networks.law is None:
    return {}
  return {'omega': networks.law.draw(jax.random.fold_in(rng, place), (count,))}


def omega_of_reals(networks: Networks, batch, frozen) -> dict[str, jax.Array]:
  """{'omega': [B]} that the batch's other real images look like; {} without guidance."""
  if networks.law is None:
    return {}
  images = normalize(batch.get('real_base_image', batch['real_image']))
  return {'omega': guide.estimated(networks, frozen, images, batch['real_label'])}


def adversarial_weight(config, rec_grads, adv_grads) -> jax.Array:
  """lambda: the configured weight, times the ratio of last-layer gradient norms where adaptive."""
  if not config.adaptive:
    return jnp.float32(config.weight)
  block, layer, kernel = growth.last_layer(rec_grads)
  rec_norm, adv_norm = (jnp.linalg.norm(grads[block][layer][kernel]) for grads in (rec_grads, adv_grads))
  return losses.adaptive_weight(rec_norm, adv_norm, config.weight, config.low, config.high)
