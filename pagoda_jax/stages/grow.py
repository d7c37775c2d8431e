"""Stage 3: the generator grown to a higher resolution (PaGoDA, section 3.3).

Features flow on without an image in between: an up-sampling block and residual blocks follow the old
decoder, whose head is carried over. The new blocks' residual branches begin at zero, so the grown
network starts as the old features, nearest-up-sampled. Only the new blocks, the head and what the
config thaws train: in the paper the formerly highest-resolution level.
"""

from pagoda_jax.networks import growth
from pagoda_jax.stages import distill, models

# The step is distillation's: the state's split into trained and fixed leaves makes the difference.
make_train_step = distill.make_train_step


def grown_params(unet, old_params, thaw, rng):
  """The generator at the start of a growth phase.

  Args:
    unet: the grown generator.
    old_params: parameters of the generator to grow (its EMA).
    thaw: the decoder's blocks that train, new ones included (ladder.thawed_blocks).
    rng: of the new leaves.

  Returns:
    (trained, fixed, report): two trees that `networks.growth.merge` joins, and what was copied.
  """
  params, report = models.grown(unet, old_params, rng)
  trained, fixed = growth.split_trainable(params, thaw)
  return trained, fixed, report
