"""Experiment configs: every key, its default and its range, and what follows from them.

An experiment file calls `experiment()`, sets what differs and adds phases built by `teacher()`,
`invert()`, `encode()`, `guide()`, `distill()`, `grow()` and `autoencoder()`. Keys that are not listed in experiments.py
and phases.py do not exist: the dicts are locked, and pagoda_jax/validation compares a config with these tables once
more.

Each function there returns a table {key: (default, range)}; `@keys` (tables.py) makes of it what an experiment file
calls: `optimizer(learning_rate=1e-3)` is a locked ConfigDict of the defaults and of what differs. A range says
what one key may be by itself (ranges.py); what several keys must be together stands in pagoda_jax/validation.
"""

from pagoda_jax.config.experiments import autoencoder_network, experiment, network
from pagoda_jax.config.facts import (
  GENERATOR_STAGES,
  IMAGE_STAGES,
  STAGES,
  TRAINED_STAGES,
  ConfigError,
  add_phase,
  ema_names,
  has_guidance,
  has_law_of_recaptions,
  has_text,
  learns_from_teacher,
  metrics,
  microbatch,
  omega_varies,
  phase_resolution,
)
from pagoda_jax.config.phases import (
  AUGMENTATIONS,
  BACKBONES,
  DECAYING,
  EDM_AUGMENTATIONS,
  OF_MOMENTS,
  OPTIMIZERS,
  PHASES,
  TEACHER_AUGMENTATIONS,
  adversarial,
  augmentation,
  autoencoder,
  discriminator,
  distill,
  encode,
  grow,
  guide,
  invert,
  optimizer,
  reconstruction,
  teacher,
)
