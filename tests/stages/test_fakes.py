"""Where the discriminators' fakes come from and which gradients are applied when, on players of one number each."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagoda_jax import config as c
from pagoda_jax.method import perception
from pagoda_jax.stages import distill, state

RNG = jax.random.key(3)
PLACE = ('dec_8_block0', 'conv_1', 'kernel')  # the last layer, at which adaptive weights are taken


def scale_of(params):
  return params[PLACE[0]][PLACE[1]][PLACE[2]]


# The generator scales its noise; a logit is an image's mean times the discriminator's number.
NETWORKS = types.SimpleNamespace(
  unet=types.SimpleNamespace(magnitude_preserving=False),
  sigma_max=80.0,
  invert=None,
  draw=None,
  law=None,
  generate=lambda params, noise, cond: scale_of(params) * noise / 80,
  distance=lambda frozen, a, b, draws: jnp.mean((a - b) ** 2, (1, 2, 3)),
  distance_draws=lambda rng, count: {},
  features=lambda frozen, images, draws: images,
  feature_draws=lambda rng, count: {},
  judge=lambda variables, maps, cond: (variables['params']['w'] * maps.mean((1, 2, 3))[:, None], {}),
)


def batch_of_four():
  rng = np.random.default_rng(0)
  batch = {'image': rng.normal(size=(4, 8, 8, 1)).astype(np.float32), 'label': np.zeros(4, np.int32),
           'noise': 80 * rng.normal(size=(4, 8, 8, 1)).astype(np.float32)}
  return batch | {'real_image': batch['image'], 'real_label': batch['label']}


def begun(phase, of_pairs=None):
  params = {PLACE[0]: {PLACE[1]: {PLACE[2]: jnp.float32(0.5)}}}
  return state.init_generator(params, {}, {'params': {'w': jnp.float32(1)}}, phase, of_pairs)


def one_step(fakes, networks=NETWORKS, frozen=None, **changes):
  phase = c.distill(fakes=fakes, **changes, optimizer=c.optimizer(name='sgd', learning_rate=1.0))
  return jax.jit(distill.make_train_step(networks, phase))(begun(phase), batch_of_four(), frozen or {}, RNG)


def test_a_second_discriminator_is_given_where_there_is_to_be_one_and_only_there():
  for weight, given, said in ((0.5, None, 'weight = 0.5: .* must be the variables of a second'),
                              (0.0, {'params': {}}, 'weight = 0.0: .* must be None')):
    with pytest.raises(ValueError, match=said):
      begun(c.distill(reconstruction_adversarial=c.adversarial(weight=weight)), given)


def test_shared_fakes_are_those_of_the_generators_loss():
  _, metrics = one_step('shared')
  assert float(metrics['logit_fake']) == pytest.approx(-float(metrics['adversarial']), rel=1e-6)


def test_fresh_fakes_are_other_noise_through_the_generator_just_updated():
  after, metrics = one_step('fresh')
  noise = jax.random.normal(state.step_keys(RNG, jnp.int32(0), 9)[3], (4, 8, 8, 1))
  assert abs(float(scale_of(after.params)) - 0.5) > 0.1
  assert float(metrics['logit_fake']) == pytest.approx(float(scale_of(after.params) * noise.mean()), rel=1e-5)
  assert float(metrics['logit_fake']) != pytest.approx(-float(metrics['adversarial']), rel=1e-2)


def test_pairs_of_the_teacher_are_what_it_makes_of_the_steps_own_noise():
  draw = lambda params, noise, cond, null: params * noise / 80
  _, metrics = one_step('fresh', types.SimpleNamespace(**vars(NETWORKS) | {'draw': draw}), {'teacher': jnp.float32(2)})
  noise = jax.random.normal(state.step_keys(RNG, jnp.int32(0), 9)[8], (4, 8, 8, 1))
  assert float(metrics['loss']) == pytest.approx(float(jnp.mean((1.5 * noise) ** 2)), rel=1e-5)  # 2 there, 0.5 here


@pytest.mark.parametrize('fakes', ['fresh', 'shared'])
def test_r3gans_losses_and_penalties_on_players_of_one_number(fakes):
  after, metrics = one_step(fakes, adversarial=c.adversarial(loss='relativistic', r1=3.0, r2=5.0))
  logits = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32).mean(1, keepdims=True)
  noise = {key: jax.random.normal(state.step_keys(RNG, jnp.int32(0), 9)[key], (4, 8, 8, 1)) for key in (1, 3)}
  of = lambda scale, key: scale * np.asarray(noise[key]).mean((1, 2, 3))[:, None]
  softplus = lambda x: np.log1p(np.exp(x)).mean()
  assert float(metrics['adversarial']) == pytest.approx(softplus(logits - of(0.5, 1)), rel=1e-5)
  made = of(float(scale_of(after.params)), 3) if fakes == 'fresh' else of(0.5, 1)
  for name in ('r1', 'r2'):  # the judge's gradient is 1 / 64 at each of 64 pixels
    assert float(metrics[name]) == pytest.approx(1 / 64, rel=1e-6)
  penalties = 3 / 2 / 64 + 5 / 2 / 64
  assert float(metrics['discriminator']) == pytest.approx(softplus(made - logits) + penalties, rel=1e-5)
  slope = np.mean((made - logits) / (1 + np.exp(logits - made))) + 2 * penalties  # by the judge's number, which is 1
  assert float(metrics['discriminator_grad_norm']) == pytest.approx(abs(slope), rel=1e-4)


@pytest.mark.parametrize('fakes', ['fresh', 'shared'])
def test_r3gan_on_pairs_against_autodiff_in_float64(fakes):
  """A judge of two logits, each linear and quadratic in the pixels: what both players are told, and how they move."""
  weights = c.adversarial(weight=0.5, adaptive=False, loss='relativistic', r1=3.0, r2=5.0)
  phase = c.distill(
    fakes=fakes, optimizer=c.optimizer(name='sgd', learning_rate=0.2), reconstruction_adversarial=weights,
    discriminator_optimizer=c.optimizer(name='sgd', learning_rate=0.1),
    adversarial=c.adversarial(weight=0.0, adaptive=False))

  def judge(variables, maps, cond):
    rows, params = maps.reshape(len(maps), -1), variables['params']
    logits = rows @ params['linear'] + jnp.sum(rows**2, axis=1, keepdims=True) * params['quadratic'] / 2
    return logits, {}

  rng, batch = np.random.default_rng(1), batch_of_four()
  params = {'linear': np.float32(0.3 * rng.standard_normal((64, 2))), 'quadratic': np.float32(rng.standard_normal(2))}
  networks = types.SimpleNamespace(**vars(NETWORKS) | {'judge': judge})
  trained = begun(phase, {'params': params}).params
  start = state.init_generator(trained, {}, {'params': params}, phase, {'params': params})
  after, metrics = jax.jit(distill.make_train_step(networks, phase))(jax.device_put(start), batch, {}, RNG)

  with jax.enable_x64(True):
    images, noise = (jnp.asarray(batch[key], jnp.float64) for key in ('image', 'noise'))
    exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    made = lambda scale: scale * noise / 80
    logits = lambda params, x: judge({'params': params}, x, None)[0]
    apart = lambda params, x: logits(params, images) - logits(params, x)

    def of_generator(scale):
      return jnp.mean((made(scale) - images) ** 2) + 0.5 * jnp.mean(jnp.log1p(jnp.exp(apart(exact, made(scale)))))

    def penalty(params, x):
      """By forward differentiation, picture by picture."""
      slopes = jax.vmap(jax.jacfwd(lambda image: jnp.mean(logits(params, image[None]))))(x)
      return jnp.mean(jnp.sum(slopes**2, axis=(1, 2, 3)))

    def of_judge(params, x):
      compared = jnp.mean(jnp.log1p(jnp.exp(-apart(params, x))))
      return compared + 3 / 2 * penalty(params, images) + 5 / 2 * penalty(params, x)

    moved = 0.5 - 0.2 * jax.grad(of_generator)(0.5)
    seen = made(moved if fakes == 'fresh' else 0.5)
    loss, slope = jax.value_and_grad(of_judge)(exact, seen)
    told = {'adversarial': jnp.mean(jnp.log1p(jnp.exp(apart(exact, made(0.5))))), 'discriminator': loss,
            'r1': penalty(exact, images), 'r2': penalty(exact, seen)}
    moved, seen, slope, told = jax.device_get((moved, seen, slope, told))
  assert abs(moved - 0.5) > 1e-2 and abs(told['r1'] / told['r2'] - 1) > 0.1
  assert float(scale_of(after.params)) == pytest.approx(moved, rel=1e-5)
  for name, value in told.items():
    assert float(metrics[f'pairs_{name}']) == pytest.approx(value, rel=1e-5), name
  by_hand = params['linear'].mean(1) + params['quadratic'].mean() * seen.reshape(4, 64)
  assert float(metrics['pairs_r2']) == pytest.approx(np.mean(np.sum(by_hand**2, axis=1)), rel=1e-5)
  for name, value in params.items():
    np.testing.assert_allclose(
      after.pairs_discriminator['params'][name] - value, -0.1 * slope[name], rtol=1e-4, atol=1e-5)


def test_penalties_stand_beside_the_hinge_loss_too():
  plain, weighed = (one_step('fresh', adversarial=c.adversarial(r1=r1))[1] for r1 in (0.0, 3.0))
  assert 'r1' not in plain and 'r2' not in weighed
  assert float(weighed['discriminator'] - plain['discriminator']) == pytest.approx(3 / 2 / 64, rel=1e-3)


def test_a_fixed_weight_is_the_adaptive_one_whose_ratio_is_held_at_1():
  """The one is a factor of the loss, the other of its gradient."""
  weightings = [{'weight': 2.5, 'adaptive': False}, {'weight': 2.5, 'low': 1.0, 'high': 1.0}]
  (fixed, known), (held, measured) = (
    one_step('fresh', adversarial=c.adversarial(**weights)) for weights in weightings)
  assert abs(float(scale_of(fixed.params)) - 0.5) > 0.01
  assert float(scale_of(fixed.params)) == pytest.approx(float(scale_of(held.params)), rel=1e-6)
  for name, value in known.items():
    assert float(value) == pytest.approx(float(measured[name]), rel=1e-6), name


class Adam:
  """Adam and a moving average of one number, by their definitions."""

  def __init__(self, value, rate, decay):
    self.value, self.ema, self.rate, self.decay = value, value, rate, decay
    self.first = self.second = self.count = 0

  def move(self, gradient):
    self.count += 1
    self.first = 0.9 * self.first + 0.1 * gradient
    self.second = 0.999 * self.second + 0.001 * gradient**2
    first, second = self.first / (1 - 0.9**self.count), self.second / (1 - 0.999**self.count)
    self.value -= self.rate * first / (np.sqrt(second) + 1e-8)
    self.ema = self.decay * self.ema + (1 - self.decay) * self.value


@pytest.mark.parametrize('fakes', ['fresh', 'shared'])
@pytest.mark.parametrize('update', ['joint', 'separate'])
def test_updates_and_the_pairs_discriminator_against_the_same_by_hand(update, fakes):
  """Separate: what is taken on the pairs moves the generator first, and L_adv's gradient is taken there."""
  phase = c.distill(
    update=update, fakes=fakes, ema=0.9, optimizer=c.optimizer(name='adam', learning_rate=0.01),
    discriminator_optimizer=c.optimizer(name='sgd', learning_rate=0.1), adversarial=c.adversarial(weight=0.3),
    reconstruction=c.reconstruction(weight=2.0), reconstruction_adversarial=c.adversarial(weight=0.5),
  )
  # Of the scale's square, so that a gradient tells where it was taken.
  networks = types.SimpleNamespace(**vars(NETWORKS) | {
    'generate': lambda params, noise, cond: scale_of(params) ** 2 * noise / 80})
  start, batch = begun(phase, {'params': {'w': jnp.float32(0.7)}}), batch_of_four()
  step = jax.jit(distill.make_train_step(networks, phase))
  after, metrics = step(start, batch, {}, RNG)

  keys = state.step_keys(RNG, jnp.int32(0), 8)
  draw = lambda key: np.asarray(jax.random.normal(key, (4, 8, 8, 1)), np.float64)
  images, noise = batch['image'].astype(np.float64), batch['noise'].astype(np.float64) / 80
  scale = Adam(0.5, 0.01, 0.9)
  begin = scale.value
  rec_gradient = np.mean(2 * (begin**2 * noise - images) * noise) * 2 * begin
  pair_gradient = -0.7 * noise.mean() * 2 * begin
  weight = lambda config, gradient: config * np.clip(abs(rec_gradient) / (abs(gradient) + 1e-4), 0.01, 10)
  of_pairs = 2 * rec_gradient + weight(0.5, pair_gradient) * pair_gradient
  if update == 'separate':
    scale.move(of_pairs)
    of_pairs = 0
  between = scale.value
  gradient = -draw(keys[1]).mean() * 2 * between
  scale.move(of_pairs + weight(0.3, gradient) * gradient)
  assert float(scale_of(after.params)) == pytest.approx(scale.value, rel=1e-5)
  assert float(scale_of(after.ema)) == pytest.approx(scale.ema, rel=1e-5)
  assert int(after.opt_state[0].count) == (2 if update == 'separate' else 1)
  assert float(metrics['pairs_weight']) == pytest.approx(weight(0.5, pair_gradient), rel=1e-4)
  assert float(metrics['weight']) == pytest.approx(weight(0.3, gradient), rel=1e-4)

  # Each discriminator learns by the hinge from its own reals and fakes; all logits here lie between -1 and 1.
  made = scale.value if fakes == 'fresh' else begin
  assert float(metrics['pairs_logit_fake']) == pytest.approx(0.7 * made**2 * noise.mean(), rel=1e-4)
  assert float(after.pairs_discriminator['params']['w']) == pytest.approx(
    0.7 - 0.1 * (made**2 * noise.mean() - images.mean()), rel=1e-5)
  fake = scale.value**2 * draw(keys[3]).mean() if fakes == 'fresh' else between**2 * draw(keys[1]).mean()
  assert float(after.discriminator['params']['w']) == pytest.approx(1 - 0.1 * (fake - images.mean()), rel=1e-5)

  # A number that is not finite in the second update undoes the first one too.
  broken = start.replace(discriminator={'params': {'w': jnp.float32(np.nan)}})
  skipped, _ = step(broken, batch, {}, RNG)
  assert int(skipped.skipped) == 1 and float(scale_of(skipped.params)) == float(scale_of(skipped.ema)) == begin
  assert int(skipped.opt_state[0].count) == 0 and float(skipped.pairs_discriminator['params']['w']) == np.float32(0.7)


def test_the_distance_of_fakes_and_their_captions_is_part_of_the_adversarial_loss():
  """Here of an image's mean, where the discriminator's loss is minus that mean: at weight 1 nothing is left."""
  networks = types.SimpleNamespace(**vars(NETWORKS) | {
    'clip_distance': lambda frozen, images, cond: jnp.mean(images, (1, 2, 3))})
  for weight in (1.0, 3.0):
    plain, measured = (one_step('shared', networks, adversarial=c.adversarial(clip_weight=w, adaptive=False))[1]
                       for w in (0.0, weight))
    np.testing.assert_allclose(measured['adversarial'], (1 - weight) * plain['adversarial'], rtol=1e-5, atol=1e-7)


def test_clips_distance_is_one_less_the_cosine():
  tower = types.SimpleNamespace(apply=lambda variables, images: variables * images[:, 0, 0])
  cond = {'text_pooled': jnp.array([[2.0, 0], [0, 3], [-1, 0], [1, 1]])}
  images = jnp.tile(jnp.array([1.0, 0]), (4, 2, 2, 1))
  found = perception.clip_distance(tower)({'features': {perception.CLIP_NAME: 5.0}}, images, cond)
  np.testing.assert_allclose(found, [0, 1, 2, 1 - 0.5**0.5], atol=1e-6)
