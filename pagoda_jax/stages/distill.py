"""Stage 2: the one-step generator at the base resolution (PaGoDA, section 3.1).

L = L_rec + lambda * L_adv. L_rec compares a real image with the generator's answer to its inverted
noise; L_adv compares other real images with what the generator makes of noise from the prior.

With guidance (config.guidance) both players take its strength omega as an input: a pair's is the one that it was
inverted with, a fake's is drawn from the law, and a real image's is estimated (stages/guide.py).
"""

import functools

import jax

from pagoda_jax.data.images import normalize
from pagoda_jax.method import microbatch
from pagoda_jax.stages import gradients, guide
from pagoda_jax.stages.models import Networks, check_sizes, condition_of
from pagoda_jax.stages.state import GeneratorState, global_norm, guarded, make_optimizer, mix, step_keys, updated
from pagoda_jax.stages.turns import Turns, adversarial_weight, factor_of_gradient


def make_train_step(networks: Networks, config, parts: int = 1):
  """The train step of a generator: one update of the generator and one of each discriminator.

  The generator's gradients are taken on the pairs, the discriminator's on the other real images and on fakes:
  by `config.fakes` 'fresh' ones, of new noise through the generator just updated (PaGoDA's release), or 'shared'
  ones, which the generator's loss was taken on, with what the feature networks made of them. By `config.adversarial`
  `loss` 'relativistic' (R3GAN) each fake is judged beside a real image of its class, under one draw of the augmentation
  for both turns; its `r1` and `r2` weigh gradient penalties on reals and fakes, and its `clip_weight` the distance of
  fakes and their captions in the generator's loss. The discriminator of the pairs (where
  `config.reconstruction_adversarial` has a weight) compares their images with the reconstructions in the same way.

  By `config.update` the generator's gradients are applied 'joint'ly; or in 'separate' updates, as the release does from
  256 px on: one by what is taken on the pairs, then one by the gradient that L_adv has there. Both share the
  optimiser's moments and move the average.

  Args:
    networks: networks.unet is the generator; networks.discriminator its opponent.
    config: a phase made by config.distill() or config.grow().
    parts: how many parts a batch is worked through in (microbatch.py): less memory, the same result. All
      networks are but the discriminators, which see whole batches, for their statistics.

  Returns:
    step(state: GeneratorState, batch, frozen, rng) -> (state, metrics). batch: 'image' [B, H, W, C] with
    'noise' [B, h, w, C] (standard deviation near sigma_max, h x w the base resolution) and 'label' int32
    [B]; 'real_image' [B, H, W, C] with 'real_label' [B]. Images are uint8 or floats in [-1, 1]. Where
    networks.invert is given, 'base_image' [B, h, w, C] and 'key' int32 [B] stand in place of 'noise'. With
    guidance: 'omega' [B] of the pairs, beside 'noise'; and where H > h 'real_base_image' [B, h, w, C]. With captions
    their embeddings, guidance.TEXT, of both, as 'text' and 'real_text', and 'caption_kind' where kinds have laws of
    their own. frozen:
    {'features': {name: variables}} of the frozen feature networks (frozen_weights.load), without any, {};
    {'teacher': params} for networks.invert and networks.draw, with which the pairs' images are not looked at; and
    {'guide': params} for networks.estimate; with captions {'null_text': embeddings of the empty one}.
    rng: one typed key for the whole run. metrics: scalars, float32 but for the counts of skipped steps. A
    step with a number that is not finite leaves the state as it was, but for its counters.
  """
  separate = config['update'] == 'separate'  # config.update is a method of every ConfigDict
  paired = config.reconstruction_adversarial.weight > 0
  optimizer = make_optimizer(config.optimizer, config.steps, updates=2 if separate else 1)
  discriminator_optimizer = make_optimizer(config.discriminator_optimizer, config.steps)
  relativistic = config.adversarial.loss == 'relativistic'

  def step(state: GeneratorState, batch, frozen, rng):
    check_sizes(networks, batch)
    keys = step_keys(rng, state.step, 9)
    reals = normalize(batch['real_image'])
    cond, real_cond = condition_of(networks, batch), condition_of(networks, batch, 'real_')
    kinds, real_kinds = batch.get('caption_kind'), batch.get('real_caption_kind')
    images, noise = pairs_of(networks, batch, frozen, keys[8], parts)
    pair_cond = cond | omega_of_pairs(networks, batch)
    real_cond = real_cond | omega_of_reals(networks, batch, frozen, parts)
    prior_cond = real_cond if relativistic else cond | omega_of_fakes(networks, keys[5], 0, len(images), kinds)
    turns = Turns(networks, discriminator_optimizer, frozen, parts, state.fixed)

    def prior(key):
      return networks.sigma_max * jax.random.normal(key, noise.shape)

    def distances(trained, images, noise, cond, draws):
      return networks.distance(frozen, images, turns.generate(trained, noise, cond), draws)

    # The generator's turn: on the pairs,
    player = state.params, state.opt_state, state.ema
    rec, rec_grads = gradients.mean_and_grad(distances, parts)(
      state.params, images, noise, pair_cond, networks.distance_draws(keys[0], len(images))
    )
    grads = jax.tree.map(lambda r: config.reconstruction.weight * r, rec_grads)
    of_pairs, applied = {}, []
    if paired:
      pair_weights, pair_draws = config.reconstruction_adversarial, networks.feature_draws(keys[6], len(images))
      pair_adv, pair_grads, pair_fakes, pair_maps, pair_opponent = turns.of_generator(
        state.params, pair_weights, state.pairs_discriminator, images, noise, pair_cond, pair_draws
      )
      pair_weight = adversarial_weight(pair_weights, rec_grads, pair_grads)
      grads = added(grads, pair_grads, factor_of_gradient(pair_weights, pair_weight))
      of_pairs = {'adversarial': pair_adv, 'weight': pair_weight}
    if separate:
      player, applied = advanced(networks.unet, optimizer, config.ema, player, grads), [grads]
    # then on noise from the prior.
    draws = networks.feature_draws(keys[2], len(images))
    adv, adv_grads, fakes, real_maps, opponent = turns.of_generator(
      player[0], config.adversarial, state.discriminator, reals, prior(keys[1]), prior_cond, draws
    )
    weight = adversarial_weight(config.adversarial, rec_grads, adv_grads)
    factor = factor_of_gradient(config.adversarial, weight)
    grads = jax.tree.map(lambda a: factor * a, adv_grads) if separate else added(grads, adv_grads, factor)
    params, opt_state, ema = advanced(networks.unet, optimizer, config.ema, player, grads)

    # The discriminators' turn. The augmentation's draw is the same for real and fake.
    fake_cond = prior_cond
    if config.fakes == 'fresh':
      fake_cond = real_cond
      if not relativistic:
        fake_cond = real_cond | omega_of_fakes(networks, keys[5], 1, len(reals), real_kinds)
        draws = networks.feature_draws(keys[4], len(reals))
      fakes = turns.fakes(params, prior(keys[3]), fake_cond, draws)
    discriminator, d_opt_state, measured = turns.of_discriminator(
      config.adversarial, opponent, state.discriminator_opt_state, reals, real_maps, real_cond, fakes, fake_cond, draws
    )
    pairs_discriminator, pairs_opt_state = state.pairs_discriminator, state.pairs_discriminator_opt_state
    if paired:
      if config.fakes == 'fresh':
        if pair_weights.loss != 'relativistic':
          pair_draws = networks.feature_draws(keys[7], len(images))
        pair_fakes = turns.fakes(params, noise, pair_cond, pair_draws)
      pairs_discriminator, pairs_opt_state, of_pairs_discriminator = turns.of_discriminator(
        pair_weights, pair_opponent, pairs_opt_state, images, pair_maps, pair_cond, pair_fakes, pair_cond, pair_draws
      )
      of_pairs |= of_pairs_discriminator

    measured = {
      'loss': rec,
      'adversarial': adv,
      'weight': weight,
      'grad_norm': global_norm([*applied, grads]),
      **measured,
      **{f'pairs_{name}': value for name, value in of_pairs.items()},
    }
    new = state.replace(
      params=params,
      opt_state=opt_state,
      ema=ema,
      discriminator=discriminator,
      discriminator_opt_state=d_opt_state,
      pairs_discriminator=pairs_discriminator,
      pairs_discriminator_opt_state=pairs_opt_state,
    )
    state = guarded(measured, new, state)
    return state, measured | {'skipped_in_a_row': state.skipped, 'skipped': state.skipped_total}

  return step


def advanced(unet, optimizer, decay: float, player, grads):
  """(parameters, optimiser's state, moving average) after one update by the gradients."""
  params, opt_state, ema = player
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = updated(unet, params, updates)
  return params, opt_state, mix(ema, params, decay)


def added(grads, others, factor):
  """grads + factor * others."""
  return jax.tree.map(lambda g, o: g + factor * o, grads, others)


def pairs_of(networks: Networks, batch, frozen, key: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
  """L_rec's pairs, constants: images [B, H, W, C] in [-1, 1] and the noise [B, h, w, C] that shall make them.

  The noise is what the batch brings, or inverted by the teacher here and now; where networks.draw is given, it is of
  the prior, and the images are what the teacher makes of it. The teacher works through the batch in so many parts.
  """
  images, cond, null = normalize(batch['image']), condition_of(networks, batch), frozen.get('null_text')
  if networks.draw is not None:
    noise = networks.sigma_max * jax.random.normal(key, images.shape)
    draw = lambda noise, cond: networks.draw(frozen['teacher'], noise, cond, null)
    return jax.lax.stop_gradient(microbatch.mapped(draw, parts)(noise, cond)), noise
  if networks.invert is None:
    return images, batch['noise']
  invert = lambda seen: networks.invert(frozen['teacher'], seen, null)
  told = {name: batch[name] for name in ('key', 'caption_kind') if name in batch}
  seen = cond | told | {'image': batch['base_image']}
  return images, jax.lax.stop_gradient(microbatch.mapped(invert, parts)(seen))


def omega_of_pairs(networks: Networks, batch) -> dict[str, jax.Array]:
  """{'omega': [B]} that the batch's pictures were, or are here and now, inverted with; {} without guidance."""
  if networks.law is None:
    return {}
  if networks.omega_of_keys is None:
    return {'omega': batch['omega']}
  return {'omega': networks.omega_of_keys(batch['key'], batch.get('caption_kind'))}


def omega_of_fakes(networks: Networks, rng, place: int, count: int, kinds=None) -> dict[str, jax.Array]:
  """{'omega': [count]} drawn from the law; {} without guidance. `place` tells the draws of one step apart."""
  if networks.law is None:
    return {}
  return {'omega': networks.law.draw(jax.random.fold_in(rng, place), (count,), kinds)}


def omega_of_reals(networks: Networks, batch, frozen, parts: int) -> dict[str, jax.Array]:
  """{'omega': [B]} that the batch's other real images look like; {} without guidance."""
  if networks.law is None:
    return {}
  images = normalize(batch.get('real_base_image', batch['real_image']))
  estimated = microbatch.mapped(functools.partial(guide.estimated, networks, frozen), parts)
  return {'omega': estimated(images, condition_of(networks, batch, 'real_'))}
