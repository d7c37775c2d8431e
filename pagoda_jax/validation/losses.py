"""Of the losses of a phase, and of what they see."""

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.validation.checks import check

CLIP_WIDTH = 768  # of the space that CLIP ViT-L/14 has pictures and captions in
NATIVE_FROM = 256  # pixels, from which projected features are of a picture's own size (method/perception.py)
HALVED_TO = 32  # pixels for one place of the coarsest of their maps, each of which must be half the one before


def validate_views(phase, path, compared, judged):
  """Of losses that compare pictures of some sides, the smallest last, and judge them at a side."""
  rec, disc = phase.reconstruction, phase.discriminator
  if rec.distance == 'pixels':
    weights = rec.scale_weights
    check(any(weights), f'{path}.reconstruction.scale_weights', weights, 'must have one that is not 0')
    most = _halvings(compared[-1], 1) + 1
    check(len(weights) <= most, f'{path}.reconstruction.scale_weights', weights,
           f'must be at most {most}: a picture of {compared[-1]} px is halved {most - 1} times')
  seen = [('reconstruction.distance', rec.distance, side) for side in compared]
  for key, kind, side in (*seen, ('discriminator.features', disc.features, judged)):
    check(kind != 'projected' or side < NATIVE_FROM or side % HALVED_TO == 0, f'{path}.{key}', kind,
           f'sees pictures of {side} px: from {NATIVE_FROM} px on that must be a multiple of {HALVED_TO}')
  if disc.features == 'pixels':
    check(judged >= 4, f'{path}.discriminator.features', disc.features, f'needs 4 px, and works on {judged}')
    most = _halvings(judged, 4) + 1
    check(disc.scales <= most, f'{path}.discriminator.scales', disc.scales,
           f'must be at most {most}: a picture of {judged} px is halved {most - 1} times down to 4 px or more')


def validate_losses(config, name):
  phase, path = config.phases[name], f'config.phases.{name}'
  rec, disc = phase.reconstruction, phase.discriminator
  adv, of_pairs = phase.adversarial, phase.reconstruction_adversarial
  compared, judged = (spaces.loss_side(config, name, key) for key in ('reconstruction', 'adversarial'))
  validate_views(phase, path, (compared,), judged)
  check(not disc.conditional or config.data.num_classes != 0 or configs.has_text(config),
         f'{path}.discriminator.conditional', disc.conditional,
         'must be False without labels or captions: config.data.num_classes is 0')
  for key, group in (('adversarial', adv), ('reconstruction_adversarial', of_pairs)):
    kind, width = config.text.encoder.partition(':')[0], config.text.pooled_width
    check(not group.clip_weight or (configs.has_text(config) and width == CLIP_WIDTH and kind not in ('t5', 'ngrams')),
           f'{path}.{key}.clip_weight', group.clip_weight,
           f'compares pictures with captions by CLIP ViT-L/14: config.text.encoder = {config.text.encoder!r} must give '
           f"its captions' vectors, of config.text.pooled_width = {CLIP_WIDTH}")
    check(group.low <= group.high, f'{path}.{key}.low', group.low,
           f'must not exceed {path}.{key}.high = {group.high}')
  check(rec.weight or adv.weight, f'{path}.reconstruction.weight', rec.weight,
         f'and {path}.adversarial.weight = {adv.weight}: one of them must not be 0')
  for key, weight in (('reconstruction', rec.weight or of_pairs.weight), ('adversarial', adv.weight)):
    check(weight or phase['update'] == 'joint', f'{path}.{key}.weight', weight,
           f"must not be 0 where {path}.update = 'separate': nothing would be left of that update")


def _halvings(side: int, least: int) -> int:
  """How often a picture's side can be halved evenly without falling below `least`."""
  times = 0
  while side % 2 == 0 and side // 2 >= least:
    side, times = side // 2, times + 1
  return times
