"""What follows from an experiment's config, and the words that it is told by."""

from ml_collections import ConfigDict

STAGES = ('autoencoder', 'teacher', 'invert', 'encode', 'guide', 'distill', 'grow')
GENERATOR_STAGES = ('distill', 'grow')
IMAGE_STAGES = ('teacher', 'distill', 'grow')  # whose networks draw images
TRAINED_STAGES = ('autoencoder', 'teacher', 'encode', 'guide', 'distill', 'grow')
# What the train steps measure and a checkpoint can be the best by.
GENERATOR_METRICS = ('loss', 'adversarial', 'weight', 'discriminator', 'logit_real', 'logit_fake', 'grad_norm',
                     'discriminator_grad_norm')
METRICS = {'autoencoder': ('loss', 'l1', 'kl', 'psnr', 'adversarial', 'weight', 'discriminator', 'logit_real',
                           'logit_fake', 'grad_norm', 'discriminator_grad_norm'),
           'teacher': ('loss', 'grad_norm'), 'encode': ('loss', 'grad_norm'),
           'guide': ('loss', 'grad_norm', 'omega_real', 'omega_real_std'),
           'distill': GENERATOR_METRICS, 'grow': GENERATOR_METRICS}
# Beside them, where the pairs have a discriminator of their own.
PAIRS_METRICS = tuple(f'pairs_{name}' for name in GENERATOR_METRICS if name not in ('loss', 'grad_norm'))


class ConfigError(ValueError):
  """A config that cannot be run; the message names the key, its value and the choices."""


def add_phase(config: ConfigDict, name: str, phase: ConfigDict) -> None:
  """Appends a phase to the experiment's order.

  Raises:
    ConfigError: it stands there already, under another name: a key changed in one would change in the other.
  """
  if same := [other for other in config.phases if config.phases[other] is phase]:
    raise ConfigError(f'config.phases.{name}: is the very object that config.phases.{same[0]} is, whose keys would '
                      'change with its own; call its constructor once more')
  with config.unlocked():
    config.phases[name] = phase
  config.order = (*config.order, name)


def microbatch(config: ConfigDict, name: str) -> int:
  """Most images of a phase that a device trains on at once; 0: its whole share of them."""
  own = config.phases[name].get('microbatch', -1)
  return config.microbatch if own == -1 else own


def has_guidance(config: ConfigDict) -> bool:
  """Whether an experiment's generators take the strength of guidance as an input."""
  return config.get('guidance', {}).get('law', 'none') != 'none'  # configs from before guidance have no such group


def has_text(config: ConfigDict) -> bool:
  """Whether an experiment's networks are conditioned on captions."""
  return bool(config.get('text', {}).get('encoder'))  # configs from before captions have no such group


def has_law_of_recaptions(config: ConfigDict) -> bool:
  """Whether captions written anew have a law of the strength of guidance of their own."""
  return has_guidance(config) and bool(config.guidance.get('recaptions', {}).get('law'))


def omega_varies(config: ConfigDict) -> bool:
  """Whether pictures have different strengths of guidance."""
  return has_guidance(config) and (config.guidance.law != 'constant' or has_law_of_recaptions(config))


def ema_names(phase: ConfigDict) -> tuple[str, ...]:
  """Names of the averages that a phase keeps of its weights; the first is what others read of it by default."""
  named = [f'{kind}_{value:.15g}' for kind in ('halflife', 'std') for value in phase.get(f'ema_{kind}', ())]
  return tuple(named) or ('ema',)


def learns_from_teacher(phase: ConfigDict) -> bool:
  """Whether a phase's pairs are the teacher's own images and their noise."""
  return phase.get('pairs') == 'teacher'


def phase_resolution(config: ConfigDict, name: str) -> int:
  """Side in pixels of the images that a phase works on."""
  phase = config.phases[name]
  return phase.get('resolution') or config.base_resolution


def metrics(phase: ConfigDict) -> tuple[str, ...]:
  """What the train step of a phase measures."""
  paired = phase.stage in GENERATOR_STAGES and phase.reconstruction_adversarial.weight > 0
  return METRICS[phase.stage] + (PAIRS_METRICS if paired else ())
