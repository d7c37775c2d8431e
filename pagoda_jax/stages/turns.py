"""A generator's turn and a discriminator's against each other: what a step of distillation and of growth is made of."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pagoda_jax.method import guidance, losses, microbatch
from pagoda_jax.networks import growth
from pagoda_jax.runtime import sharding
from pagoda_jax.stages.models import Networks
from pagoda_jax.stages.state import global_norm


@dataclasses.dataclass(frozen=True)
class Turns:
  """The turns of one step. `weights` is config.adversarial() of whom a discriminator judges, `cond` what images are of.

  Attributes:
    networks, frozen, parts: as distill.make_train_step and its step take them.
    optimizer: of discriminators.
    fixed: the generator's parameters that do not train.
  """

  networks: Networks
  optimizer: optax.GradientTransformation
  frozen: dict
  parts: int
  fixed: Any = None

  def generate(self, trained, noise, cond):
    """Images [B, H, W, C] of noise."""
    return self.networks.generate(growth.merge(trained, self.fixed), noise, cond)

  def fakes(self, trained, noise, cond, draws):
    """(images, what the feature networks make of them)."""

    def of_part(noise, cond, draws):
      images = self.generate(trained, noise, cond)
      return images, self.networks.features(self.frozen, images, draws)

    return microbatch.mapped(of_part, self.parts)(noise, cond, draws)

  def maps(self, images, draws):
    """What the feature networks make of images."""
    return self._in_parts(self.networks.features)(images, draws)

  def of_generator(self, trained, weights, discriminator, reals, noise, cond, draws):
    """(L_adv, its gradient, fakes, maps of reals if it saw any, the discriminator with its new statistics)."""
    real_maps = real_logits = None
    if weights.loss == 'relativistic':
      real_maps = self.maps(reals, draws)
      real_logits, statistics = self.networks.judge(discriminator, real_maps, cond)
      discriminator = {**discriminator, **statistics}
    (_, (loss, fakes, statistics)), grads = jax.value_and_grad(self._adversarial_loss, has_aux=True)(
      trained, weights, discriminator, noise, cond, draws, real_logits
    )
    return loss, sharding.split_as_parameters(grads), fakes, real_maps, {**discriminator, **statistics}

  def _adversarial_loss(self, trained, weights, discriminator, noise, cond, draws, real_logits):
    fakes = self.fakes(trained, noise, cond, draws)
    logits, statistics = self.networks.judge(discriminator, fakes[1], cond)
    if real_logits is None:
      loss = losses.hinge_generator(logits)
    else:
      loss = losses.relativistic_generator(real_logits, logits)
    if weights.clip_weight:
      apart = self._in_parts(self.networks.clip_distance)(fakes[0], guidance.text_of(cond))
      loss += weights.clip_weight * jnp.mean(apart)
    return factor_of_loss(weights) * loss, (loss, fakes, statistics)

  def of_discriminator(self, weights, discriminator, opt_state, reals, real_maps, real_cond, fakes, fake_cond, draws):
    """(the discriminator after an update, its optimiser's state, what was measured)."""
    real_maps = self.maps(reals, draws) if real_maps is None else real_maps

    def judged(variables, images, maps, cond, gamma):
      """(logits, updated statistics, gradient penalty or 0) of images, whose maps these are."""
      if not gamma:
        return *self.networks.judge(variables, maps, cond), 0.0
      judge = lambda images: self.networks.judge(variables, self.maps(images, draws), cond)
      return losses.with_gradient_penalty(judge, images)

    def loss_of(params):
      # What each of a step's passes does to the statistics is kept, in the release's order.
      variables = {**discriminator, 'params': params}
      fake_logits, after_fakes, r2 = judged(variables, *fakes, fake_cond, weights.r2)
      real_logits, after_reals, r1 = judged({**variables, **after_fakes}, reals, real_maps, real_cond, weights.r1)
      compared = losses.hinge_discriminator
      if weights.loss == 'relativistic':
        compared = losses.relativistic_discriminator
      loss = compared(real_logits, fake_logits) + weights.r1 / 2 * r1 + weights.r2 / 2 * r2
      return loss, (real_logits, fake_logits, after_reals, {'r1': r1, 'r2': r2})

    (loss, (real_logits, fake_logits, statistics, penalties)), grads = jax.value_and_grad(loss_of, has_aux=True)(
      discriminator['params']
    )
    grads = sharding.split_as_parameters(grads)
    updates, opt_state = self.optimizer.update(grads, opt_state, discriminator['params'])
    params = optax.apply_updates(discriminator['params'], updates)
    return {**discriminator, **statistics, 'params': params}, opt_state, {
      'discriminator': loss,
      'logit_real': jnp.mean(real_logits),
      'logit_fake': jnp.mean(fake_logits),
      **{name: value for name, value in penalties.items() if weights[name]},
      'discriminator_grad_norm': global_norm(grads),
    }

  def _in_parts(self, function):
    return microbatch.mapped(functools.partial(function, self.frozen), self.parts)


def factor_of_loss(config) -> float:
  """What an adversarial loss is multiplied by before its gradient is taken: its weight, where that is known.

  Of a plain sum of gradients, compilers for TPU sum each once over devices.
  """
  return 1.0 if config.adaptive else config.weight


def factor_of_gradient(config, weight):
  """What is left of the weight to multiply the gradient by."""
  return weight if config.adaptive else 1.0


def adversarial_weight(config, rec_grads, adv_grads) -> jax.Array:
  """lambda: the configured weight, times the ratio of last-layer gradient norms where adaptive."""
  if not config.adaptive:
    return jnp.float32(config.weight)
  block, layer, kernel = growth.last_layer(rec_grads)
  rec_norm, adv_norm = (jnp.linalg.norm(grads[block][layer][kernel]) for grads in (rec_grads, adv_grads))
  return losses.adaptive_weight(rec_norm, adv_norm, config.weight, config.low, config.high)
