"""Experiment configs: the defaults of every key, and what follows from them.

An experiment file calls `experiment()`, sets what differs and adds phases built by `teacher()`,
`invert()`, `distill()` and `grow()`. Keys that are not listed here do not exist: the dicts are
locked, and validation.py compares a config with these defaults once more.
"""

from ml_collections import ConfigDict

STAGES = ('teacher', 'invert', 'distill', 'grow')
GENERATOR_STAGES = ('distill', 'grow')
TRAINED_STAGES = ('teacher', 'distill', 'grow')
SOURCES = ('mnist', 'folder', 'array_record', 'tfds')
PRECISIONS = ('float32', 'bfloat16')
# Of float32 products: 'default' is the chip's (bfloat16 factors on TPU, TF32 on GPU), 'highest' is float32.
MATMUL_PRECISIONS = ('default', 'high', 'highest')
NOISE_DTYPES = ('float32', 'float16')
FORMS = ('edm', 'guided', 'ddpmpp')
DISTANCES = ('pixels', 'lpips', 'projected')
FEATURES = ('pixels', 'projected')
AUGMENTATIONS = ('brightness', 'saturation', 'contrast', 'translation', 'cutout')
# What the train steps measure and a checkpoint can be the best by.
GENERATOR_METRICS = ('loss', 'adversarial', 'weight', 'discriminator', 'logit_real', 'logit_fake', 'grad_norm',
                     'discriminator_grad_norm')
METRICS = {'teacher': ('loss', 'grad_norm'), 'distill': GENERATOR_METRICS, 'grow': GENERATOR_METRICS}
BACKBONES = ('tf_efficientnet_lite0', 'deit_base_distilled_patch16_224')


class ConfigError(ValueError):
  """A config that cannot be run; the message names the key, its value and the choices."""


def _locked(values: dict, overrides: dict) -> ConfigDict:
  config = ConfigDict(values, sort_keys=False).lock()
  with config.ignore_type():  # an int where the default is a float, a list for a tuple: validate() judges
    config.update(overrides)
  return config


def optimizer(**overrides) -> ConfigDict:
  """Any optimiser of optax by its name; `learning_rate` is reached after `warmup_steps`, then constant or cosine."""
  return _locked(
    {
      'name': 'radam',
      'learning_rate': 1e-4,
      'warmup_steps': 0,
      'schedule': 'constant',  # or 'cosine': falls to zero at the phase's last step
      'b1': 0.9,
      'b2': 0.999,
      'clip_norm': 0.0,  # largest global gradient norm; 0 = no clipping
    },
    overrides,
  )


def network(**overrides) -> ConfigDict:
  """The U-Net of the teacher, which the generator begins as a copy of (networks/unet.py explains each).

  For published weights, `pagoda convert` prints the values.
  """
  return _locked(
    {
      'form': 'edm',  # EDM's ADM; 'guided': guided-diffusion's and PaGoDA's ADM; 'ddpmpp': EDM's DDPM++
      'channels': 192,
      'channel_mult': (1, 2, 3, 4),  # highest resolution first
      'decoder_channel_mult': (),  # (): channel_mult
      'stem_channels': 0,  # of the first convolution; 0: as in the form's publications
      'embed_channels': 0,  # of the noise level's and label's embedding; 0: 4 * channels
      'num_blocks': 3,
      'attention_resolutions': (32, 16, 8),
      'mid_attention': True,
      'num_heads': 0,  # 0: by channels_per_head ('ddpmpp': one)
      'channels_per_head': 64,
      'augment_dim': 0,  # augmentation labels that published weights were trained with; always zero here
      'dropout': 0.0,
    },
    overrides,
  )


def teacher(**overrides) -> ConfigDict:
  """Stage 1, the diffusion teacher at the base resolution (EDM; METHOD: batch 4096, ln sigma ~ N(-1.2, 1.2^2))."""
  return _locked(
    {
      'stage': 'teacher',
      'init_from': '',  # folder to start from: of `pagoda convert`, or another run's phase (its EMA); '': afresh
      'steps': 100_000,
      'batch_size': 4096,
      'optimizer': optimizer(name='adam'),
      'ema': 0.9999,
      'label_dropout': 0.0,
      'p_mean': -1.2,
      'p_std': 1.2,
      'matmul_precision': 'default',
      'sample_levels': 18,  # sigma levels of the Heun sampler that draws the sample grids
    },
    overrides,
  )


def invert(**overrides) -> ConfigDict:
  """Data to noise by the probability-flow ODE, once for every image (and its mirror image).

  With `store` False nothing but the held-out pictures' noise is written: every phase that names this one as its
  `noise` inverts its batches inside its step, 2 (num_levels - 1) evaluations of the teacher for each pair. That
  takes time in place of the store's disk space, and gives the same pairs.
  """
  return _locked(
    {
      'stage': 'invert',
      'teacher': 'teacher',  # a phase; or '' with init_from
      'init_from': '',  # instead of `teacher`: folder of `pagoda convert`, or another run's phase (its EMA)
      'batch_size': 256,
      'num_levels': 40,
      'clip_denoised': True,
      'add_noise': False,  # to the image, of the lowest level; for images with pixels that never change
      'store': True,
      # The chip's default moves inversions of the MNIST teacher by 3 % of their rms on TPU, 0.4 % on GPU.
      'matmul_precision': 'highest',
      'dtype': 'float32',
      'shard_size': 8192,  # pairs per ArrayRecord shard, the unit that is redone after a crash
    },
    overrides,
  )


def reconstruction(**overrides) -> ConfigDict:
  """L_rec: the distance between a real image and the generator's answer to its inverted noise."""
  return _locked(
    {
      'distance': 'pixels',  # or 'lpips', 'projected': on published feature networks
      'scale_weights': (1.0, 1.0, 1.0),  # pixels: of the resolutions compared, each half the one before
      'backbones': BACKBONES,  # projected: the feature networks
      'augment': AUGMENTATIONS,  # projected: of both images, drawn anew for each feature network
      'weight': 1.0,
    },
    overrides,
  )


def discriminator(**overrides) -> ConfigDict:
  """The discriminator: which features it sees, its size, and the augmentation of what it sees."""
  return _locked(
    {
      'features': 'pixels',  # or 'projected': StyleGAN-XL's, on published feature networks
      'scales': 2,  # pixels: resolutions seen, each half the one before
      'channels': 64,  # pixels: of the first convolution
      'spectral_norm': True,  # pixels: bounds how fast the logits change; short runs learn faster without
      'backbones': BACKBONES,  # projected: the feature networks
      'conditional': True,
      'augment': AUGMENTATIONS,
    },
    overrides,
  )


def adversarial(**overrides) -> ConfigDict:
  """L_adv's weight: `weight`, times |grad L_rec| / |grad L_adv| at the last layer where `adaptive`."""
  return _locked({'weight': 0.2, 'adaptive': True, 'low': 0.01, 'high': 10.0}, overrides)


def _generator_phase(stage: str) -> dict:
  return {
    'stage': stage,
    'noise': 'invert',
    'steps': 90_000,
    'batch_size': 256,  # for each loss
    'optimizer': optimizer(learning_rate=8e-6),
    'discriminator_optimizer': optimizer(learning_rate=2e-3),
    'ema': 0.999,
    'matmul_precision': 'default',
    'reconstruction': reconstruction(),
    'discriminator': discriminator(),
    'adversarial': adversarial(),
    'pairs_fraction': 1.0,  # share of the store's pairs that L_rec sees
    'standardize_noise': False,  # scale inverted noise to mean 0, deviation sigma_max: for weak teachers
  }


def distill(**overrides) -> ConfigDict:
  """Stage 2, the one-step generator at the base resolution (METHOD: 0.2 x adaptive weight, RAdam)."""
  # Both as in invert(): the generator begins as a copy of that network.
  return _locked(_generator_phase('distill') | {'teacher': 'teacher', 'init_from': ''}, overrides)


def grow(**overrides) -> ConfigDict:
  """Stage 3, the generator `start` grown to `resolution` (new and last old blocks train).

  METHOD has a fixed weight of 1.0, beside feature distances. Beside 'pixels', the default here, that makes the
  adversarial gradient some 30 times L_rec's: the weight is adaptive.
  """
  defaults = _generator_phase('grow') | {
    'start': 'distill',  # a phase; or '' with init_from
    'init_from': '',  # instead of `start`: folder of `pagoda convert`, or another run's phase (its EMA)
    'init_levels': (),  # what that generator has above base_resolution: (channels, num_blocks, scale_shift) each
    'resolution': 0,
    'channels': 192,
    'num_blocks': 2,
    'scale_shift': False,
    'adversarial': adversarial(weight=1.0, adaptive=True),
  }
  return _locked(defaults, overrides)


PHASE_DEFAULTS = {'teacher': teacher, 'invert': invert, 'distill': distill, 'grow': grow}


def experiment(**overrides) -> ConfigDict:
  """A config with every top-level default and no phases yet."""
  return _locked(
    {
      'seed': 0,
      'order': (),
      'data': {
        'source': 'mnist',  # or 'folder', 'array_record' (what `pagoda prepare` writes), 'tfds'
        'path': '',  # the folder; tfds: its data_dir, '' for the default one
        'name': '',  # tfds: the data set, such as imagenet2012 or imagenet2012:5.1.0
        'split': 'train',  # tfds: which of its splits; the held-out images come out of it too
        'resolution': 32,  # the largest resolution that any phase reaches
        'channels': 3,
        'num_classes': 0,  # 0: unconditional; -1: as many as the source has
        'mirror': True,  # whether a mirror image is as good an image (not so for digits)
        'holdout': 0,  # images kept out of training, for evaluation
        'workers': 0,  # processes that decode and resize; 0: in the training process
        'max_unreadable': 0.01,  # folder: share of files that may be unreadable; they are listed and left out
        'verify': False,  # array_record: compare every shard with its checksum before training
      },
      'base_resolution': 64,
      'network': network(),
      'weights_dir': '',  # folder of published files, looked in before $PAGODA_WEIGHTS and the user cache
      'diffusion': {'sigma_min': 0.002, 'sigma_max': 80.0, 'sigma_data': 0.5, 'rho': 7.0},
      'phases': {},
      'precision': 'float32',
      'mesh': {'data': -1, 'fsdp': 1},
      # Three keys that change memory and time, not results; a run can go on with others.
      'microbatch': 0,  # most images that a device trains on at once; 0: its whole share of batch_size
      'remat': (),  # resolutions of U-Net blocks whose activations are computed again in the backward pass
      'shard_frozen': False,  # feature networks: split by the mesh's fsdp axis, not whole on every device
      'barrier_timeout': 1800,  # seconds that any host waits for another before it ends with a message naming it
      'checkpoint': {
        'every_steps': 1000,
        'keep': 3,  # the latest ones
        'keep_every': 0,  # also those of steps that this divides; 0: none besides
        'best': '',  # also the best by a metric of metrics.jsonl, such as 'loss': by its mean since the last save
        'best_mode': 'min',  # or 'max'
      },
      # batches: also writes which pictures each step saw, in their order, to batches.jsonl
      'log': {'every_steps': 50, 'samples_every': 1000, 'samples': 64, 'batches': False},
      # What the end-of-run summary measures of each phase's samples; 0 samples: nothing.
      # matmul_precision: of all images drawn, in sample grids and by `pagoda sample` too.
      'evaluation': {'samples': 0, 'components': 32, 'matmul_precision': 'highest'},
    },
    overrides,
  )


def add_phase(config: ConfigDict, name: str, phase: ConfigDict) -> None:
  """Appends a phase to the experiment's order."""
  with config.unlocked():
    config.phases[name] = phase
  config.order = (*config.order, name)


def phase_resolution(config: ConfigDict, name: str) -> int:
  """Side in pixels of the images that a phase works on."""
  phase = config.phases[name]
  return phase.resolution if phase.stage == 'grow' else config.base_resolution


def start_resolution(config: ConfigDict, name: str) -> int:
  """Side in pixels of the images of the generator that a growth phase grows."""
  phase = config.phases[name]
  return phase_resolution(config, phase.start) if phase.start else config.base_resolution << len(phase.init_levels)


def growth_chain(config: ConfigDict, name: str) -> list[ConfigDict]:
  """The growth phases from the base generator, or one from elsewhere, up to phase `name`, lowest resolution first."""
  chain = []
  while name and config.phases[name].stage == 'grow':
    chain.insert(0, config.phases[name])
    name = config.phases[name].start
  return chain
