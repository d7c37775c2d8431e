"""Of each stage's phases, and of what stands in them: the default and the range of every key."""

from pagoda_jax.config.ranges import (
  BATCH,
  BLOCKS,
  MATMUL_PRECISION,
  MICROBATCH,
  STEPS,
  THAWED,
  WEIGHT,
  WIDTH,
  each,
  flag,
  integer,
  number,
  one_of,
  row,
  some_of,
  text,
)
from pagoda_jax.config.tables import group, keys

AUGMENTATIONS = ('brightness', 'saturation', 'contrast', 'translation', 'cutout')
# Of a teacher's training pictures (method/edm_augment.py), and how many labels tell the network of each.
TEACHER_AUGMENTATIONS = {
  'x_flip': 1, 'y_flip': 1, 'quarter_turn': 2, 'integer_translation': 2, 'scale': 1, 'rotation': 2, 'anisotropy': 2,
  'translation': 2, 'brightness': 1, 'contrast': 1, 'luma_flip': 1, 'hue': 2, 'saturation': 1,
}
EDM_AUGMENTATIONS = ('x_flip', 'y_flip', 'scale', 'rotation', 'anisotropy', 'translation')
SPACE = one_of('latent', 'decoded')  # in latent space, of what a loss sees: the latents, or pictures made of them
BACKBONES = ('tf_efficientnet_lite0', 'deit_base_distilled_patch16_224')
# Those of optax that take a learning rate and are told nothing but gradients and parameters: not lbfgs, which wants
# the loss, and no parts of optimisers, such as clip or chain.
OPTIMIZERS = ('adabelief', 'adadelta', 'adafactor', 'adagrad', 'adam', 'adamax', 'adamaxw', 'adamw', 'adan', 'amsgrad',
              'fromage', 'lamb', 'lars', 'lion', 'nadam', 'nadamw', 'novograd', 'radam', 'rmsprop', 'sgd', 'sign_sgd',
              'yogi')
OF_MOMENTS = ('adabelief', 'adam', 'adamax', 'adamaxw', 'adamw', 'adan', 'amsgrad', 'lamb', 'lion', 'nadam', 'nadamw',
              'novograd', 'radam', 'yogi')  # take b1 and b2
DECAYING = ('adadelta', 'adamaxw', 'adamw', 'adan', 'lamb', 'lars', 'lion', 'nadamw', 'novograd')  # take a weight decay


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
    'b1': (0.9, number('[0, 1)')),  # this and the next: of moments, of those that have both (adam, radam, lion ...)
    'b2': (0.999, number('[0, 1)')),
    'clip_norm': (0.0, number('[0, 1e9]')),  # largest global gradient norm; 0 = no clipping
    'weight_decay': (0.0, number('[0, 1]')),  # of those that take one (adamw, lion ...); PaGoDA has none
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
def autoencoder():
  """Before all others: an autoencoder of pictures of base_resolution, whose latents another experiment works on.

  L1 + reconstruction distance + KL + hinge. What it leaves in `weights` is what config.autoencoder.weights takes.
  """
  return {
    'stage': ('autoencoder', one_of('autoencoder')),
    'steps': (100_000, STEPS),
    'batch_size': (64, BATCH),
    'microbatch': (-1, MICROBATCH),
    'optimizer': group(optimizer, name='adam'),
    'discriminator_optimizer': group(optimizer, name='adam'),
    'ema': (0.999, number('[0, 1)')),
    'matmul_precision': ('default', MATMUL_PRECISION),
    # how many sizes of a picture it learns, each half the one before: growth begins at latents of small pictures
    'sizes': (1, integer('[1, 10]')),
    'l1_weight': (1.0, WEIGHT),
    'reconstruction': group(reconstruction),  # the distance beside L1
    'kl_weight': (1e-6, WEIGHT),  # of the mean over the latents' numbers
    'discriminator': group(discriminator, conditional=False),
    'adversarial': group(adversarial),
    'adversarial_from': (0, integer('[0, 1_000_000_000]')),  # steps that the discriminator learns alone first
  }


@keys
def teacher():
  """Stage 1, the diffusion teacher at the base resolution (EDM; METHOD: batch 4096, ln sigma ~ N(-1.2, 1.2^2))."""
  return {
    'stage': ('teacher', one_of('teacher')),
    'init_from': ('', text),  # folder to start from: of `pagoda convert`, or another run's phase (its EMA); '': afresh
    'steps': (100_000, STEPS),
    'batch_size': (4096, BATCH),
    'microbatch': (-1, MICROBATCH),
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
    # instead of both: a phase of stage encode, whose network takes the solver's place (one evaluation for each picture)
    'encoder': ('', text),
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
def encode():
  """An encoder x -> z that learns the noise of pictures, for a phase of stage invert to take in the solver's place.

  The authors' release has it beside the cached inversion. The teacher's network, which it begins as, with the picture
  as the state of the lowest noise level; its answer times sigma_max is the noise. E[(z' - z)^2 + |z' - z|], both over
  sigma_max, on the pairs of `noise`: as many as `pairs_fraction` says have to be inverted by the solver.
  """
  return {
    'stage': ('encode', one_of('encode')),
    'noise': ('invert', text),  # a phase of stage invert; without a store (`store`) each pair is made inside its step
    'pairs': ('data', one_of('data', 'teacher')),  # as in distill(); 'teacher' teaches it samples, not real pictures
    'pairs_fraction': (1.0, number('(0, 1]')),
    'steps': (50_000, STEPS),
    'batch_size': (256, BATCH),
    'microbatch': (-1, MICROBATCH),
    'optimizer': group(optimizer),
    'ema': (0.999, number('[0, 1)')),
    'matmul_precision': ('default', MATMUL_PRECISION),
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
    'microbatch': (-1, MICROBATCH),
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
    'space': ('latent', SPACE),
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
    # of 1 - cosine similarity of a fake and its caption by CLIP ViT-L/14, added to L_adv, whose weight it shares; for
    # captions whose vector is that CLIP's
    'clip_weight': (0.0, WEIGHT),
    'space': ('latent', SPACE),
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
    'microbatch': (-1, MICROBATCH),
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
    # of its images; 0: base_resolution, the teacher's. 2, 4, 8 times that: it begins as its teacher with new decoder
    # levels above, as grow() adds them, and all of it trains
    'resolution': (0, integer('[0, 8192]')),
    'channels': (192, WIDTH),  # this and the next two of those levels
    'num_blocks': (2, BLOCKS),
    'scale_shift': (False, flag),
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


PHASES = {'autoencoder': autoencoder, 'teacher': teacher, 'invert': invert, 'encode': encode, 'guide': guide,
          'distill': distill, 'grow': grow}
