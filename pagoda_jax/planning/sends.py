"""What the devices of a mesh send each other in a step, by rule."""

from typing import NamedTuple

from pagoda_jax.planning.parts import Parted

# How often gradients are summed over the devices. Both of a generator's losses sum theirs apart where the ratio of
# their norms is the adversarial weight; so do the discriminator's two passes where each normalises its kernels anew.
_SUMS = {'autoencoder': {'params': 1, 'discriminator': 1},
         **dict.fromkeys(('teacher', 'encode', 'guide'), {'params': 1}),
         'distill': {'params': 2, 'discriminator': 2, 'pairs_discriminator': 2}}
_SUMS['grow'] = _SUMS['distill']
# How often arrays that are split over 'fsdp' are gathered, others once: for a forward pass, which a generator's two
# losses share, and for every backward pass; once more for fresh fakes, by the generator just updated. The
# discriminator's arrays are normalised anew in each of its three passes.
_GATHERS = {'autoencoder': {'params': 2, 'discriminator': 4},
            **dict.fromkeys(('teacher', 'encode', 'guide'), {'params': 2}),
            'distill': {'params': 3, 'discriminator': 6, 'pairs_discriminator': 6}}
_GATHERS['grow'] = _GATHERS['distill']


class Sends(NamedTuple):
  """How often a phase's step sends what.

  Attributes:
    sums, gathers: how often which gradients are summed over the devices; how often which split arrays are gathered.
    renewals: how often parameters of which each device has updated a share are gathered, where more than once.
    own_losses: of the sums of 'params' those of losses that belong to one image each (gradients.mean_and_grad).
    joined: of which parts XLA adds gradients before it sums them over the devices, as no weight between them depends
      on those sums.
  """

  sums: dict[str, int]
  gathers: dict[str, int]
  renewals: dict[str, int]
  own_losses: int
  joined: set[str]

  def bytes(self, trained: dict[str, Parted], sent: dict[str, Parted], parts: int) -> float:
    """Bytes that a device sends in a step.

    Args:
      trained: by part, in float32.
      sent: by part, in the computation's type, with what is only applied.
      parts: in which a batch is worked through.
    """
    total = sum(self.gathers.get(part, 1) * tree.gathered for part, tree in sent.items())
    total += sum(self.renewals.get(part, 1) * tree.renewed for part, tree in trained.items())
    sums, joined = dict(self.sums), self.joined
    if 'params' in sums:
      # Where parameters are whole on a device it sums the gradients of images' own losses itself, in float32, and XLA
      # takes other losses' sums out of the loop over a batch's parts. The discriminator sees whole batches.
      params = trained['params']
      apart = parts > 1 or params.mesh['zero1'] > 1
      if apart:
        joined = joined - {'params'}
      if params.mesh['fsdp'] > 1:
        sums['params'] *= parts
      elif apart:
        total += self.own_losses * params.summed(('zero1',))
        sums['params'] -= self.own_losses
        if parts > 1:
          total += sums.pop('params') * params.summed(())
    total += sum(trained[part].summed(('fsdp',)) for part in joined if part in trained and sums.pop(part, 0))
    return total + sum(sums.get(part, 0) * tree.summed(('fsdp',)) for part, tree in sent.items())


def of_phase(phase, pairs: bool, fresh: bool) -> Sends:
  """Of a phase's settings.

  Args:
    phase: of any stage.
    pairs: whether it has a second discriminator, of pairs.
    fresh: whether a discriminator's fakes are made by the generator just updated.
  """
  sums, gathers, joined = dict(_SUMS.get(phase.stage, {})), dict(_GATHERS.get(phase.stage, {})), set()
  # Fresh fakes are of the generator just updated; L_adv too has a forward pass of its own where updates are separate.
  again = fresh + (phase.get('update') == 'separate')
  if again:
    gathers['params'] += again
  if pairs:  # a further loss of the generator's
    sums['params'] += 1
    gathers['params'] += 1
  if phase.stage in ('distill', 'grow'):
    weights = [phase.adversarial] + [phase.reconstruction_adversarial] * pairs
    if phase['update'] == 'joint' and not any(weight.adaptive for weight in weights):
      joined.add('params')
    if not phase.discriminator.spectral_norm:
      joined.update(('discriminator', 'pairs_discriminator'))
  return Sends(sums, gathers, {'params': 1 + again}, int(phase.stage != 'autoencoder'), joined)
