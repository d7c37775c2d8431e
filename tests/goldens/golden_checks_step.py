"""Golden check of a whole train step: the original loop's generator turn and discriminator turn (pagoda_step).

What the step draws from its keys is given to it: noise by a stand-in for jax.random.normal, augmentations by the
networks' `feature_draws` and `distance_draws`.
"""

import functools
import math
import re
from unittest import mock

import golden_tools
import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_checks_frozen_networks import converted, discriminator_state_dict
from golden_checks_unets import pagoda_network

from pagoda_jax import config as configs
from pagoda_jax.method import augment, perception
from pagoda_jax.networks.discriminator import DiscriminatorEnsemble
from pagoda_jax.stages import distill, models, state
from pagoda_jax.weights.convert import mapping, random_projections, stylegan_xl

# Weights of the discriminator's blocks but their statistics. Activations near 0, where LeakyReLU bends, change slope if
# its maps move by a rounding: by 1e-5 of their size, gradients move by up to 1e-2; by 1e-4, up to 2.5e-2. The original
# in float32 and in float64 differ by up to 1.8e-2.
KINKED = re.compile(r'main\.\d\.main\.(0\.weight_orig|1\.(weight|bias))$')


def cases():
  """Yields (id, check)."""
  if golden_tools.exists('pagoda_step'):
    yield 'step-losses', check_losses
    for part in ('G', 'ema', 'D'):
      yield f'step-{part}', lambda part=part: check_changes(part)


def draws_of(arrays, meta, use):
  """{feature network: its augmentation's parameters} as `augment.draw` returns them."""
  def drawn(name):
    field = {key: arrays[f'draws/{use}/{name}/{key}'] for key in (
        'brightness', 'saturation', 'contrast', 'translation_x', 'translation_y', 'offset_x', 'offset_y')}
    return {key: field[key] for key in ('brightness', 'saturation', 'contrast')} | {
        'translation': np.stack([field['translation_x'], field['translation_y']], -1),
        'cutout': np.stack([field['offset_x'], field['offset_y']], -1),
    }

  return {name: drawn(name) for name in meta['backbones']}


class Players:
  """Generator, feature networks and discriminator with the golden's rule weights."""

  def __init__(self, meta):
    self.names = tuple(meta['backbones'])
    self.generator = pagoda_network(meta['generator'])
    self.heads, self.extractors, self.frozen, self.discriminator = {}, {}, {}, {}
    for name, entry in meta['backbones'].items():
      theirs = golden_tools.rule_state_dict(entry['F_params'], entry['F_prefix'], entry['F_gain'])
      network, self.frozen[name] = converted(random_projections, theirs, random_projections.options(theirs))
      self.extractors[name] = network  # resizes to 224 px, as the original does below 256
      theirs = discriminator_state_dict(entry)
      self.heads[name] = stylegan_xl.leaves(stylegan_xl.options(theirs))
      variables, _ = mapping.to_ours(theirs, self.heads[name], stylegan_xl.carried)
      for collection, tree in variables.items():
        self.discriminator.setdefault(collection, {})[name] = tree

  def networks(self, arrays, meta):
    """What the train step applies; the draws come in the order in which it asks for them."""
    size, policy = meta['image_size'], augment.POLICY
    features = perception.projected_view(self.extractors, size, policy)[1]
    distance = perception.projected_distance(self.extractors, size, policy)[1]
    turns = iter([draws_of(arrays, meta, 'G'), draws_of(arrays, meta, 'D')])
    return models.Networks(
        unet=self.generator.module, discriminator=DiscriminatorEnsemble(self.generator.module.num_classes),
        feature_draws=lambda rng, count: next(turns), features=features,
        distance_draws=lambda rng, count: draws_of(arrays, meta, 'distance'), distance=distance)

  def theirs(self, part, tree):
    """A tree of the generator's, its average's or the discriminator's shape under their names."""
    if part != 'D':
      return mapping.to_theirs(tree, self.generator.leaves)
    return {f'{name}.{key}': value for name, leaves in self.heads.items()
            for key, value in mapping.to_theirs({c: tree[c][name] for c in tree}, leaves).items()}

  def second_moments(self, part, params, nu):
    """The optimiser's second moments: one number a tensor."""
    tree = {'params': params} if part == 'D' else params
    ones = jax.tree.map(lambda x: np.ones_like(x), tree)
    if part != 'D':
      filled = {name: np.full_like(x, nu[f'G/{name}']) for name, x in self.theirs('G', ones).items()}
      return mapping.to_ours(filled, self.generator.leaves)[0]
    moments = {}
    for name, leaves in self.heads.items():
      trained = [leaf for leaf in leaves if leaf.ours.startswith('params/')]
      filled = {leaf.theirs: np.full(leaf.shape, nu[f'D/{name}.{leaf.theirs}'], np.float32) for leaf in trained}
      moments[name] = mapping.to_ours(filled, trained)[0]['params']
    return moments


@functools.cache
def stepped():
  """(players, state before, state after, metrics) of our step with the original's draws."""
  arrays, meta = golden_tools.load('pagoda_step')
  players = Players(meta)
  phase = configs.distill(
      steps=100, ema=meta['ema'], optimizer=configs.optimizer(name='radam', learning_rate=meta['lr']),
      discriminator_optimizer=configs.optimizer(name='radam', learning_rate=meta['lr_disc']))
  assert phase.adversarial.weight == meta['discriminator_weight'] and phase.adversarial.adaptive
  start = state.init_generator(players.generator.params, {}, players.discriminator, phase)

  def aged(opt_state, part, params):
    return optax.tree_utils.tree_set(opt_state, count=jnp.int32(meta['count']),
                                     nu=players.second_moments(part, params, meta['nu']))

  start = jax.device_get(start.replace(
      opt_state=aged(start.opt_state, 'G', start.params),
      discriminator_opt_state=aged(start.discriminator_opt_state, 'D', start.discriminator['params'])))
  batch = {'noise': arrays['G/z']}
  for turn, prefix in (('G', ''), ('D', 'real_')):
    batch |= {f'{prefix}image': arrays[f'{turn}/image'], f'{prefix}label': arrays[f'{turn}/label'].astype(np.int32)}
  step = jax.jit(distill.make_train_step(players.networks(arrays, meta), phase))
  noises = [jnp.asarray(arrays[f'{turn}/fake_noise']) for turn in 'GD']
  with jax.default_matmul_precision('highest'), mock.patch.object(jax.random, 'normal', side_effect=noises):
    after, metrics = jax.device_get(step(start, batch, {'features': players.frozen}, jax.random.key(0)))
  return players, start, after, metrics


def check_losses():
  metrics, theirs = stepped()[-1], golden_tools.load('pagoda_step')[1]['losses']
  np.testing.assert_allclose(metrics['loss'], theirs['G/decoder_recon_loss'], rtol=1e-4)
  weighted = metrics['adversarial'] * metrics['weight'] / 0.2
  np.testing.assert_allclose(weighted, theirs['G/discriminator_loss'], rtol=1e-3)
  np.testing.assert_allclose(metrics['discriminator'], theirs['D/discriminator_loss'], rtol=1e-4)


def check_changes(part):
  """Every tensor moved as the original's: its change to 1e-3 of its norm, by entries and by sums with random signs."""
  arrays, meta = golden_tools.load('pagoda_step')
  players, before, after, _ = stepped()
  pick = {'G': lambda s: s.params, 'ema': lambda s: s.ema, 'D': lambda s: s.discriminator}[part]
  old, new = (players.theirs(part, pick(s)) for s in (before, after))
  names = [key.removeprefix(f'change/{part}/') for key in arrays.files if key.startswith(f'change/{part}/')]
  assert sorted(new) == sorted(names)
  wrong = []
  for name in names:
    error, allowed = deviation(arrays[f'change/{part}/{name}'], old[name], new[name], meta, name)
    if f'{part.replace("ema", "G")}/{name}' in meta['cancelled']:
      kernel = next(k for k in (name[:-4] + 'weight', name[:-4] + 'weight_orig') if k in new)
      moved = np.sqrt(np.mean((new[kernel] - old[kernel]) ** 2))
      error, allowed = np.sqrt(np.mean((new[name] - old[name]) ** 2)), 1e-2 * moved
    elif part == 'D' and KINKED.search(name):
      allowed += 2e-2 * np.linalg.norm(arrays[f'change/D/{name}'][0])
    if error > allowed:
      wrong.append(f'{name}: {error:.1e}, allowed {allowed:.1e}')
  assert not wrong, '\n'.join(wrong)


def deviation(recorded, old, new, meta, name):
  """(largest deviation of a tensor's change, what is allowed), in the norm of the whole tensor."""
  change = new.astype(np.float64) - old
  if name.endswith(('label_emb.weight', 'embed.weight')):
    assert np.linalg.norm(np.delete(change, meta['rows'], 0)) == 0
    change = change[meta['rows']]
  flat = change.ravel()
  norm, sums, entries = recorded[0], recorded[1:5], recorded[5:]
  stride = max(1, math.ceil(flat.size / 256))
  stride += stride % 2 == 0  # so that a slice is not of few columns
  signs = np.random.default_rng(7).choice(np.array([-1.0, 1.0]), (4, flat.size))
  errors = [
      abs(np.linalg.norm(flat) - norm),
      np.sqrt(np.mean((signs @ flat - sums) ** 2)),  # on average the norm of all entries' deviations
      np.linalg.norm(flat[::stride] - entries) * np.sqrt(flat.size / entries.size),
  ]
  # A stored parameter is rounded, before and after.
  return max(errors), 1e-3 * norm + 1.2e-7 * np.linalg.norm(old)
