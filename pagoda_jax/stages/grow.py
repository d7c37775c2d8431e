"""Stage 3: the generator grown to a higher resolution (PaGoDA, section 3.3).

Features flow on without an image in between: an up-sampling block and residual blocks follow the old
decoder, whose head is carried over. The new blocks' residual branches begin at zero, so the grown
network starts as the old features, nearest-up-sampled. Only the new blocks, the formerly
highest-resolution level and the head train.
"""

from pagoda_jax.networks import growth
from pagoda_jax.stages import distill

# The step is distillation's: the state's split into trained and fixed leaves makes the difference.
make_train_step = distill.make_train_step


def grown_params(new_params, old_params, old_resolution: int, new_resolution: int):
  """The generator at the start of a growth phase.

  Args:
    new_params: freshly initialised parameters at the new resolution.
    old_params: the generator to grow (its EMA).
    old_resolution, new_resolution: sides in pixels; new / old is 2, 4, 8, ...

  Returns:
    (trained, fixed, report): two trees that `networks.generator.merge` joins, and what was copied.
  """
  params, report = growth.grow_params(new_params, old_params)
  levels = [old_resolution]
  while levels[-1] < new_resolution:
    levels.append(2 * levels[-1])
  trained, fixed = growth.split_trainable(params, levels)
  return trained, fixed, report
