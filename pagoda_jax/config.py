"""Experiment configs: the default and the range of every key, and what follows from them.

An experiment file calls `experiment()`, sets what differs and adds phases built by `teacher()`,
`invert()`, `guide()`, `distill()` and `grow()`. Keys that are not listed here do not exist: the dicts are
locked, and validation.py compares a config with these tables once more.

Each function returns a table {key: (default, range)}; `@keys` makes of it what an experiment file calls:
`optimizer(learning_rate=1e-3)` is a locked ConfigDict of the defaults and of what differs. A range says
what one key may be by itself (ranges.py); what several keys must be together stands in validation.py.
"""

from ml_collections import ConfigDict

from pagoda_jax.ranges import (
  BATCH,
  BLOCKS,
  DEVICES,
  MATMUL_PRECISION,
  OMEGA,
  SIDE,
  STEPS,
  THAWED,
  WEIGHT,
  WIDTH,
  Range,
  each,
  flag,
  integer,
  number,
  one_of,
  row,
  some_of,
  text,
)
from pagoda_jax.tables import group, keys

STAGES = ('teacher', 'invert', 'guide', 'distill', 'grow')
GENERATOR_STAGES = ('distill', 'grow')
IMAGE_STAGES = ('teacher', 'distill', 'grow')  # whose networks draw images
TRAINED_STAGES = ('teacher', 'guide', 'distill', 'grow')
AUGMENTATIONS = ('brightness', 'saturation', 'contrast', 'translation', 'cutout')
# Of a teacher's training pictures (method/edm_augment.py), and how many labels tell the network of each.
TEACHER_AUGMENTATIONS = {
  'x_flip': 1, 'y_flip': 1, 'quarter_turn': 2, 'integer_translation': 2, 'scale': 1, 'rotation': 2, 'anisotropy': 2,
  'translation': 2, 'brightness': 1, 'contrast': 1, 'luma_flip': 1, 'hue': 2, 'saturation': 1,
}
EDM_AUGMENTATIONS = ('x_flip', 'y_flip', 'scale', 'rotation', 'anisotropy', 'translation')
# What the train steps measure and a checkpoint can be the best by.
GENERATOR_METRICS = ('loss', 'adversarial', 'weight', 'discriminator', 'logit_real', 'logit_fake', 'grad_norm',
                     'discriminator_grad_norm')
METRICS = {'teacher': ('loss', 'grad_norm'), 'guide': ('loss', 'grad_norm', 'omega_real', 'omega_real_std'),
           'distill': GENERATOR_METRICS, 'grow': GENERATOR_METRICS}
# Beside them, where the pairs have a discriminator of their own.
PAIRS_METRICS = tuple(f'pairs_{name}' for name in GENERATOR_METRICS if name not in ('loss', 'grad_norm'))
LAWS = ('constant', 'uniform', 'truncated_normal')  # of the strength of guidance
BACKBONES = ('tf_efficientnet_lite0', 'deit_base_distilled_patch16_224')
# Those of optax that take a learning rate and are told nothing but gradients and parameters: not lbfgs, which wants
# the loss, and no parts of optimisers, such as clip or chain.
OPTIMIZERS = ('adabelief', 'adadelta', 'adafactor', 'adagrad', 'adam', 'adamax', 'adamaxw', 'adamw', 'adan', 'amsgrad',
              'fromage', 'lamb', 'lars', 'lion', 'nadam', 'nadamw', 'novograd', 'radam', 'rmsprop', 'sgd', 'sign_sgd',
              'yogi')


class ConfigError(ValueError):
  """A config that cannot be run; the message names the key, its value and the choices."""


@keys
def optimizer():
  """An optimiser of optax; `learning_rate` is reached after `warmup_steps`, and what follows is its schedule."""
  return {
    'name': ('radam', one_of(*OPTIMIZERS)),
    'learning_rate': (1e-4, number('(0, 100]')),
    'warmup_steps': (0, integer('[0, 1_000_000_000]')),
    # cosine: falls to zero at the phase's last step; inverse_sqrt: from step `decay_from` on by 1/sqrt(step) (EDM2,
    # whose weights of fixed magnitude learn as fast in the end as at first)
    'schedule': ('constant', one_of('constant', 'cosine', 'inverse_sqrt')),
    'decay_from': (35_000, integer('[1, 1_000_000_000]')),
    'b1': (0.9, number('[0, 1)')),
    'b2': (0.999, number('[0, 1)')),
    'clip_norm': (0.0, number('[0, 1e9]')),  # largest global gradient norm; 0 = no clipping
  }


@keys
def network():
  """The U-Net of the teacher, which the generator begins as a copy of (networks/unet.py explains each).

  For published weights, `pagoda convert` prints the values.
  """
  return {
    # EDM's ADM; 'guided': guided-diffusion's and PaGoDA's ADM; 'ddpmpp': EDM's DDPM++; 'edm2': EDM2's
    'form': ('edm', one_of('edm', 'guided', 'ddpmpp', 'edm2')),
    'channels': (192, integer('[2, 16_384]', multiple_of=2)),  # even: sines and cosines of the noise level
    'channel_mult': ((1, 2, 3, 4), each(number('(0, 64]'), 1, 10)),  # highest resolution first
    'decoder_channel_mult': ((), each(number('(0, 64]'), 0, 10)),  # (): channel_mult
    'stem_channels': (0, integer('[0, 16_384]')),  # of the first convolution; 0: as in the form's publications
    'embed_channels': (0, integer('[0, 65_536]')),  # of the noise level's and label's embedding; 0: 4 * channels
                                                    # ('edm2': of the widest level)
    'num_blocks': (3, integer('[1, 64]')),
    'attention_resolutions': ((32, 16, 8), each(SIDE)),
    'mid_attention': (True, flag),
    'num_heads': (0, integer('[0, 1024]')),  # 0: by channels_per_head ('ddpmpp': one)
    'channels_per_head': (64, WIDTH),
    # augmentation labels: as many as a teacher's augmentation has (9 of EDM's), or as published weights were trained
    # with; zero but in a teacher's training
    'augment_dim': (0, integer('[0, 1024]')),
    'dropout': (0.0, number('[0, 1)')),
  }


@keys
def augmentation():
  """EDM's augmentation of a teacher's pictures, told to the network by labels (Karras et al. 2022, appendix F.2)."""
  return {
    # chance of each transform (an x_flip's is 1/2); 0: none at all. EDM: 0.12 to 0.15 on 10 to 70 thousand pictures
    'rate': (0.0, number('[0, 1]')),
    'transforms': (EDM_AUGMENTATIONS, some_of(*TEACHER_AUGMENTATIONS, at_least=1)),
  }


@keys
def teacher():
  """Stage 1, the diffusion teacher at the base resolution (EDM; METHOD: batch 4096, ln sigma ~ N(-1.2, 1.2^2))."""
  return {
    'stage': ('teacher', one_of('teacher')),
    'init_from': ('', text),  # folder to start from: of `pagoda convert`, or another run's phase (its EMA); '': afresh
    'steps': (100_000, STEPS),
    'batch_size': (4096, BATCH),
    'optimizer': group(optimizer, name='adam'),
    'ema': (0.9999, number('[0, 1)')),  # decay a step, where neither of the next but one is given
    # Averages by half-life, in images, and after them by power function of a relative standard deviation (EDM2).
    # The first of all is the one that later phases and `pagoda sample` take.
    'ema_halflife': ((), each(number('[1, 1e14]'), 0, 10)),
    'ema_rampup': (0.05, number('[0, 1]')),  # largest half-life as a share of the images seen; 0: no ramp-up
    'ema_std': ((), each(number('[0.001, 0.288]'), 0, 10)),
    'augmentation': group(augmentation),
    'label_dropout': (0.0, number('[0, 1]')),
    # 'edm2' networks: learns how large the loss is at each noise level, and divides by it (EDM2, equation 21)
    'uncertainty': (False, flag),
    'p_mean': (-1.2, number('[-10, 10]')),
    'p_std': (1.2, number('[0, 5]')),
    'matmul_precision': ('default', MATMUL_PRECISION),
    'sample_levels': (18, integer('[2, 10_000]')),  # sigma levels of the Heun sampler that draws the sample grids
  }


@keys
def invert():
  """Data to noise by the probability-flow ODE, once for every image (and its mirror image).

  With `store` False nothing but the held-out pictures' noise is written: every phase that names this one as its
  `noise` inverts its batches inside its step, 2 (num_levels - 1) evaluations of the teacher for each pair. That
  takes time in place of the store's disk space, and gives the same pairs.
  """
  return {
    'stage': ('invert', one_of('invert')),
    'teacher': ('teacher', text),  # a phase; or '' with init_from
    'start_ema': ('', text),  # which average of the phase it reads ('halflife_500000', 'std_0.1'); '': its first
    'init_from': ('', text),  # instead of `teacher`: folder of `pagoda convert`, or another run's phase (its EMA)
    'batch_size': (256, BATCH),
    'num_levels': (40, integer('[2, 10_000]')),
    'clip_denoised': (True, flag),
    'add_noise': (False, flag),  # to the image, of the lowest level; for images with pixels that never change
    'store': (True, flag),
    # The chip's default moves inversions of the MNIST teacher by 3 % of their rms on TPU, 0.4 % on GPU.
    'matmul_precision': ('highest', MATMUL_PRECISION),
    'dtype': ('float32', one_of('float32', 'float16')),
    'shard_size': (8192, integer('[1, 1_000_000]')),  # pairs in an ArrayRecord shard, which is redone after a crash
  }


@keys
def guide():
  """The estimator omega_phi(x, c): which strength of guidance a picture of a class looks like.

  A U-Net encoder with one output, which begins as the teacher's, trained on the teacher's own guided samples of known
  omega. With it the discriminator is given real pictures beside a strength.
  """
  return {
    'stage': ('guide', one_of('guide')),
    'teacher': ('teacher', text),  # a phase; or '' with init_from
    'start_ema': ('', text),  # this and the next as in invert()
    'init_from': ('', text),
    'steps': (10_000, STEPS),
    'batch_size': (256, BATCH),
    'optimizer': group(optimizer, name='adam'),
    'ema': (0.999, number('[0, 1)')),
    'matmul_precision': ('default', MATMUL_PRECISION),
    'sample_levels': (12, integer('[2, 10_000]')),  # sigma levels of the Heun sampler that draws what it learns from
  }


@keys
def reconstruction():
  """L_rec: the distance between a real image and the generator's answer to its inverted noise."""
  return {
    'distance': ('pixels', one_of('pixels', 'lpips', 'projected')),  # the latter two on published feature networks
    # pixels: of the resolutions compared, each half the one before
    'scale_weights': ((1.0, 1.0, 1.0), each(WEIGHT, 1, 10)),
    'backbones': (BACKBONES, some_of(*BACKBONES, at_least=1)),  # projected: the feature networks
    # projected: of both images, drawn anew for each feature network
    'augment': (AUGMENTATIONS, some_of(*AUGMENTATIONS)),
    'weight': (1.0, WEIGHT),
  }


@keys
def discriminator():
  """The discriminator: which features it sees, its size, and the augmentation of what it sees."""
  return {
    # on published feature networks: projected is StyleGAN-XL's; dino StyleGAN-T's, on tokens of DINO ViT-S/16
    'features': ('pixels', one_of('pixels', 'projected', 'dino')),
    'scales': (2, integer('[1, 10]')),  # pixels: resolutions seen, each half the one before
    'channels': (64, integer('[1, 4096]')),  # pixels: of the first convolution
    'spectral_norm': (True, flag),  # pixels: bounds how fast the logits change; short runs learn faster without
    'backbones': (BACKBONES, some_of(*BACKBONES, at_least=1)),  # projected: the feature networks
    'conditional': (True, flag),
    'augment': (AUGMENTATIONS, some_of(*AUGMENTATIONS)),
  }


@keys
def adversarial():
  """L_adv, and its weight: `weight`, times |grad L_rec| / |grad L_adv| at the last layer where `adaptive`."""
  return {
    # hinge is the paper's; relativistic R3GAN's (Huang et al. 2024, section 2): a fake against a real of its class
    'loss': ('hinge', one_of('hinge', 'relativistic')),
    # gamma of its gradient penalties in the discriminator's loss: gamma / 2 times the mean squared gradient of an
    # image's mean logit with respect to its pixels, on reals (r1) and on fakes (r2)
    'r1': (0.0, WEIGHT),
    'r2': (0.0, WEIGHT),
    'weight': (0.2, WEIGHT),
    'adaptive': (True, flag),
    'low': (0.01, WEIGHT),
    'high': (10.0, WEIGHT),
  }


def _generator_phase(stage: str) -> dict:
  return {
    'stage': (stage, one_of(stage)),
    'noise': ('invert', text),
    'guide': ('', text),  # phase of the estimator of omega; '': without guidance, or with a constant one
    'steps': (90_000, STEPS),
    'batch_size': (256, BATCH),  # for each loss
    'optimizer': group(optimizer, learning_rate=8e-6),
    'discriminator_optimizer': group(optimizer, learning_rate=2e-3),
    'ema': (0.999, number('[0, 1)')),
    'matmul_precision': ('default', MATMUL_PRECISION),
    # that the discriminator learns from: 'fresh' from the updated generator, or 'shared' with the generator's loss
    'fakes': ('fresh', one_of('fresh', 'shared')),
    'reconstruction': group(reconstruction),
    'discriminator': group(discriminator),
    'adversarial': group(adversarial),
    # of a second discriminator, of pictures and their reconstructions (release at 512 px: 0.5, adaptive); 0: none
    'reconstruction_adversarial': group(adversarial, weight=0.0),
    # 'joint': one update by the sum of all gradients; 'separate' (release from 256 px on): by those taken on the pairs,
    # then by L_adv's
    'update': ('joint', one_of('joint', 'separate')),
    'pairs_fraction': (1.0, number('(0, 1]')),  # share of the store's pairs that L_rec sees
    # scale inverted noise to mean 0, deviation sigma_max: for weak teachers
    'standardize_noise': (False, flag),
  }


@keys
def distill():
  """Stage 2, the one-step generator at the base resolution (METHOD: 0.2 x adaptive weight, RAdam)."""
  return _generator_phase('distill') | {
    # Both as in invert(): the generator begins as a copy of that network.
    'teacher': ('teacher', text),
    'start_ema': ('', text),
    'init_from': ('', text),
    # what L_rec compares: 'data', real images and their inverted noise (PaGoDA); 'teacher', the teacher's multi-step
    # images and the noise of the prior that it made them from (noise-to-data distillation), made inside the step
    'pairs': ('data', one_of('data', 'teacher')),
  }


@keys
def grow():
  """Stage 3, the generator `start` grown to `resolution` (the new blocks, the head and what `thaw` says train).

  METHOD has a fixed weight of 1.0, beside feature distances. Beside 'pixels', the default here, that makes the
  adversarial gradient some 30 times L_rec's: the weight is adaptive.
  """
  return _generator_phase('grow') | {
    'start': ('distill', text),  # a phase; or '' with init_from
    'init_from': ('', text),  # instead of `start`: folder of `pagoda convert`, or another run's phase (its EMA)
    # what that generator has above base_resolution, lowest resolution first
    'init_levels': ((), each(row(channels=WIDTH, num_blocks=BLOCKS, scale_shift=flag), 0, 10)),
    'resolution': (0, integer('[0, 8192]')),  # 0: still to be said
    'channels': (192, WIDTH),
    'num_blocks': (2, BLOCKS),
    'scale_shift': (False, flag),
    # of the decoder that it starts from: resolutions of levels, blocks ('dec_32_block1') or the release's numbers
    # ('output_blocks.9'); (): the level of the highest resolution, as in the paper. The release: output_blocks.9 and up
    'thaw': ((), each(THAWED)),
    'adversarial': group(adversarial, weight=1.0),
  }


PHASES = {'teacher': teacher, 'invert': invert, 'guide': guide, 'distill': distill, 'grow': grow}


@keys
def experiment():
  """A config with every top-level default and no phases yet."""
  return {
    'seed': (0, integer('[0, 4_294_967_295]')),
    'order': ((), each(text)),
    'data': {
      # array_record: what `pagoda prepare` writes
      'source': ('mnist', one_of('mnist', 'folder', 'array_record', 'tfds')),
      'path': ('', text),  # the folder; tfds: its data_dir, '' for the default one
      'name': ('', text),  # tfds: the data set, such as imagenet2012 or imagenet2012:5.1.0
      'split': ('train', text),  # tfds: which of its splits; the held-out images come out of it too
      'resolution': (32, SIDE),  # the largest resolution that any phase reaches
      'channels': (3, one_of(1, 3)),  # grey or RGB
      'num_classes': (0, integer('[-1, 1_000_000]')),  # 0: unconditional; -1: as many as the source has
      'mirror': (True, flag),  # whether a mirror image is as good an image (not so for digits)
      'holdout': (0, integer('[0, 10_000_000]')),  # images kept out of training, for evaluation
      # processes that decode and resize; 0: in the training process; -1: for a folder, as many as cores can be spared
      'workers': (-1, integer('[0, 256]', also=-1)),
      # folder: share of files that may be unreadable; they are listed and left out
      'max_unreadable': (0.01, number('[0, 1]')),
      'verify': (False, flag),  # array_record: compare every shard with its checksum before training
    },
    'base_resolution': (64, SIDE),
    'network': group(network),
    'weights_dir': ('', text),  # folder of published files, looked in before $PAGODA_WEIGHTS and the user cache
    'diffusion': {
      'sigma_min': (0.002, number('(0, 5000]')),
      'sigma_max': (80.0, number('(0, 5000]')),  # noise is stored as float16 too, which ends at 65504
      'sigma_data': (0.5, number('(0, 100]')),
      'rho': (7.0, number('[0.1, 100]')),
    },
    # The strength omega of classifier-free guidance that pictures are inverted with, and that generators take as an
    # input: drawn for each picture. 1 is none; without a law ('none') networks know nothing of it.
    'guidance': {
      'law': ('none', one_of('none', *LAWS)),
      'mean': (1.0, OMEGA),  # of 'constant', and of 'truncated_normal' before it is cut
      'std': (1.0, number('(0, 100]')),  # of 'truncated_normal' before it is cut
      'low': (1.0, OMEGA),  # of 'uniform' and 'truncated_normal'
      'high': (4.0, OMEGA),
    },
    'phases': ({}, Range('a group of phases', lambda value: isinstance(value, ConfigDict))),
    'precision': ('float32', one_of('float32', 'bfloat16')),
    'mesh': {'data': (-1, DEVICES), 'fsdp': (1, DEVICES)},  # -1: all remaining devices
    # Four keys that change memory and time, not results; a run can go on with others.
    # most images that a device trains on at once; 0: its whole share of batch_size
    'microbatch': (0, integer('[0, 1_000_000]')),
    # resolutions of U-Net blocks whose activations are computed again in the backward pass
    'remat': ((), each(SIDE)),
    # how attention is computed, in U-Nets and feature networks: networks/attention.py
    'attention': ('auto', one_of('auto', 'xla', 'cudnn', 'flash')),
    'shard_frozen': (False, flag),  # feature networks: split by the mesh's fsdp axis, not whole on every device
    # seconds that any host waits for another before it ends with a message naming it
    'barrier_timeout': (1800, integer('[1, 1_000_000]')),
    'checkpoint': {
      'every_steps': (1000, STEPS),
      'keep': (3, integer('[1, 1_000_000]')),  # the latest ones
      'keep_every': (0, integer('[0, 1_000_000_000]')),  # also those of steps that this divides; 0: none besides
      'best': ('', text),  # also the best by a metric of metrics.jsonl, such as 'loss': by its mean since the last save
      'best_mode': ('min', one_of('min', 'max')),
    },
    'log': {
      'every_steps': (50, STEPS),
      'samples_every': (1000, STEPS),
      'samples': (64, integer('[1, 10_000]')),
      'batches': (False, flag),  # also writes which pictures each step saw, in their order, to batches.jsonl
    },
    # What the end-of-run summary measures of each phase's samples; 0 samples: nothing.
    'evaluation': {
      'samples': (0, integer('[2, 1_000_000]', also=0)),
      'components': (32, integer('[1, 4096]')),
      'guidance': ((), each(OMEGA, 0, 10)),  # strengths to measure teacher and generators at besides
      # of all images drawn, in sample grids and by `pagoda sample` too
      'matmul_precision': ('highest', MATMUL_PRECISION),
    },
  }


def add_phase(config: ConfigDict, name: str, phase: ConfigDict) -> None:
  """Appends a phase to the experiment's order."""
  with config.unlocked():
    config.phases[name] = phase
  config.order = (*config.order, name)


def has_guidance(config: ConfigDict) -> bool:
  """Whether an experiment's generators take the strength of guidance as an input."""
  return config.get('guidance', {}).get('law', 'none') != 'none'  # configs from before guidance have no such group


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
  return phase.resolution if phase.stage == 'grow' else config.base_resolution


def metrics(phase: ConfigDict) -> tuple[str, ...]:
  """What the train step of a phase measures."""
  paired = phase.stage in GENERATOR_STAGES and phase.reconstruction_adversarial.weight > 0
  return METRICS[phase.stage] + (PAIRS_METRICS if paired else ())
