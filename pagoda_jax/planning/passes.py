"""What a step's passes through its networks take for their parameters, however few its images."""

from pagoda_jax import config as configs
from pagoda_jax.stages import models

# Of HBM for each parameter in each pass forward, in the one backward for its gradient and in the one for what it was
# given: what a turn of ADM-64's teacher takes on a v5e however few its images, 15 ms by XLA's count for it (two bytes
# are the parameter's own; the rest is that few images fill a chip's units badly). With it and times.MFU growth from 64
# to 128 px of one image a chip is 57 ms, and 65 by that count.
BYTES = 14


def evaluations(config, name: str) -> dict[str, int]:
  """How often a step of a phase evaluates the networks that others have trained, by their names in `frozen`; of stage
  invert, the one that makes the noise.

  A teacher draws in 2 N - 1 evaluations of N levels, and inverts in 2 (N - 1); a guided one's two states are one pass.
  """
  phase = config.phases[name]
  if phase.stage == 'guide':
    return {'teacher': 2 * phase.sample_levels - 1}
  solver = phase if phase.stage == 'invert' else config.phases[phase.noise] if phase.get('noise') else None
  found = {'guide': 1} if phase.get('guide') else {}
  if solver is None:
    return found
  if configs.learns_from_teacher(phase):
    return found | {'teacher': 2 * solver.num_levels - 1}
  return found | {'teacher': 1 if solver.encoder else 2 * (solver.num_levels - 1)}


def parameters(trained: dict, held: dict, losses: int, fresh: bool, evaluated: dict[str, int]) -> int:
  """Parameters, as often as a turn passes through them: trained ones forward and twice backward for each loss.

  Of a generator's step the feature networks are passed as often: by two pictures forward, by one of them backward.
  What is fixed before what is trained is passed forward alone; and fresh fakes are, once for each discriminator.

  Args:
    trained, held: trees that the step trains and only applies, by name.
    losses: how many of the generator, or of what is trained in its place.
    fresh: whether a discriminator's fakes are made by the generator just updated.
    evaluated: of which frozen networks how many passes are known (`evaluations`); the others are feature networks.
  """
  frozen = held['frozen']
  others = sum(often * models.count(frozen[part]) for part, often in evaluated.items() if part in frozen)
  held = held | {'frozen': {part: tree for part, tree in frozen.items() if part not in (*evaluated, 'null_text')}}
  counts = {part: models.count(tree) for part, tree in (trained | held).items()}
  fakes = fresh * (losses - 1)  # each loss but L_rec has a discriminator
  of_features = 3 * losses + fakes
  # A discriminator: in the generator's turn forward and backward, in its own both pictures forward and twice backward.
  often = {'params': 3 * losses + fakes, 'fixed': losses + fakes, 'frozen': of_features,
           'discriminator': 8, 'pairs_discriminator': 8}
  return others + sum(often[part] * count for part, count in counts.items())
