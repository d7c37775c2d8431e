"""MNIST digits, 8 -> 16 -> 32 px: the whole method in minutes, on two CPU cores.

  bash launch/local.sh --config=experiments/mnist.py --workdir=runs/mnist

Two quiet cores of an AMD EPYC, from a fresh clone with nothing compiled: 6 min 11 s, 40 s of it set-up. At 32 px 92.8 %
of the samples are recognised as their class (real held-out digits: 96.6 %) and the Frechet distance is 1.9 times that
of the held-out digits; 93.1 % at 8 px (teacher 87.1 %, real 94.0 %).

`pagoda plan --config=experiments/mnist.py --topology=v5e-8 --aot`: XLA's compiler for TPU v5e, float32, per phase the
FLOPs per image as written (compiled), HBM per chip in all (state as stored on the chip, temporary, program), what a
chip sends in a step, and the seconds of the compilation on two busy cores:

  teacher    86.9 M (89.7 M)   33.6 MB (21.8,   0, 11.8)    5.4 MB of all-reduce    36 s
  invert      521 M  (522 M)   22.2 MB ( 5.5, 5.7, 11.1)    nothing                 23 s
  distill     216 M  (221 M)   45.0 MB (22.8,   0, 22.2)    6.1 MB of all-reduce    52 s
  grow_16     368 M  (454 M)   45.3 MB (18.2,   0, 27.1)    5.1 MB of all-reduce   126 s
  grow_32     604 M  (771 M)   64.1 MB (17.0,   0, 47.1)    4.5 MB of all-reduce   170 s

With `--topology=8xh100`, XLA's compiler for GPUs (no GPU here; cuDNN's scratch memory not known, FLOPs not counted):
memory per GPU in all (arguments, temporary), what a GPU sends in a step, a step's fusions + calls of cuDNN + of cuBLAS,
and the seconds of the compilation on two busy cores:

  teacher      22.2 MB (12.4,  9.7)    5.4 MB of all-reduce     720 +  80 +  31    30 s
  invert       11.5 MB ( 3.1,  8.4)    nothing                1,794 + 486 + 126     7 s
  distill      27.5 MB (13.4, 14.1)    6.1 MB of all-reduce   1,191 + 223 +  48    54 s
  grow_16      22.4 MB (12.1, 10.3)    5.1 MB of all-reduce     873 + 197 +  16    35 s
  grow_32      28.4 MB (11.1, 17.3)    4.5 MB of all-reduce     781 + 195 +  16    22 s

27.5 TFLOP in all; teacher at 8 px: 19.3x fewer FLOPs per image than at 32 px (18.9x without its attention).

`experiments/mnist.py:guided`: classifier-free guidance at 8 px, of the teacher and of the one-step generator. Its
table, at the end of the run, is in the README. 29.5 TFLOP in training (teacher 4.5, invert 4.7, guide 12.8, distill
7.6) and some 14 in drawing the teacher's guided samples for it.
"""

from pagoda_jax import config as c

VARIANTS = ('guided',)  # that tests/test_experiments.py runs too


def get_config(variant: str = ''):
  """variant: 'guided' for classifier-free guidance, otherwise ''."""
  if variant not in ('', 'guided'):
    raise ValueError(f"experiments/mnist.py:{variant}: must be experiments/mnist.py or experiments/mnist.py:guided")
  if variant:
    return guided()
  config = c.experiment(base_resolution=8)
  config.data.update({
    'source': 'mnist', 'resolution': 32, 'channels': 1, 'num_classes': 10, 'mirror': False, 'holdout': 500,
  })
  config.network = c.network(channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=())
  # Lower levels were hardly trained (ln sigma ~ N(-1.2, 1.2^2)), and 8-bit pixels have steps of 0.008.
  config.diffusion.sigma_min = 0.02
  config.log.update({'every_steps': 20, 'samples_every': 200, 'samples': 100})
  config.checkpoint.every_steps = 200
  config.evaluation.samples = 2000

  c.add_phase(config, 'teacher', c.teacher(
    steps=800,
    batch_size=64,
    optimizer=c.optimizer(name='adam', learning_rate=2e-3, warmup_steps=20, schedule='cosine'),
    ema=0.99,
  ))
  c.add_phase(config, 'invert', c.invert(num_levels=10, add_noise=True, batch_size=256, shard_size=1024))
  players = {
    'batch_size': 32,
    'ema': 0.99,
    'optimizer': c.optimizer(name='adam', learning_rate=1e-3, b1=0.5, schedule='cosine'),
    'discriminator_optimizer': c.optimizer(name='adam', learning_rate=1e-3, b1=0.5),
    # A few epochs do not over-fit the discriminator: what holds it back in long runs only slows it here.
    'discriminator': c.discriminator(channels=64, spectral_norm=False, augment=()),
    'adversarial': c.adversarial(weight=0.06, adaptive=False),
  }
  # A strong adversarial loss makes the class plainer than the teacher's samples show it.
  c.add_phase(config, 'distill', c.distill(
    steps=700, **(players | {'batch_size': 48, 'adversarial': c.adversarial(weight=2.0, adaptive=False)}),
  ))
  # The inverted noise knows the 8 px image: finer pixels are compared with little weight, or the
  # generator would paint their average.
  c.add_phase(config, 'grow_16', c.grow(
    start='distill', resolution=16, channels=32, num_blocks=1, steps=400,
    reconstruction=c.reconstruction(scale_weights=(0.05, 1.0, 1.0)), **players,
  ))
  c.add_phase(config, 'grow_32', c.grow(
    start='grow_16', resolution=32, channels=32, num_blocks=0, steps=450,
    reconstruction=c.reconstruction(scale_weights=(0.02, 0.1, 1.0, 1.0)),
    **(players | {'discriminator': c.discriminator(channels=32, spectral_norm=False, augment=())}),
  ))
  return config


def guided():
  """Digits of 8 px: a teacher with guidance, and the one-step generator that takes its strength as an input."""
  config = c.experiment(base_resolution=8)
  config.data.update({
    'source': 'mnist', 'resolution': 8, 'channels': 1, 'num_classes': 10, 'mirror': False, 'holdout': 500,
  })
  config.network = c.network(channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=())
  config.diffusion.sigma_min = 0.02
  config.guidance.update({'law': 'uniform', 'low': 1.0, 'high': 4.0})
  config.log.update({'every_steps': 20, 'samples_every': 200, 'samples': 100})
  config.checkpoint.every_steps = 200
  config.evaluation.update({'samples': 2000, 'guidance': (1.0, 2.0, 4.0)})

  c.add_phase(config, 'teacher', c.teacher(
    steps=800,
    batch_size=64,
    optimizer=c.optimizer(name='adam', learning_rate=2e-3, warmup_steps=20, schedule='cosine'),
    ema=0.99,
    label_dropout=0.1,
  ))
  c.add_phase(config, 'invert', c.invert(num_levels=10, add_noise=True, batch_size=256, shard_size=1024))
  c.add_phase(config, 'guide', c.guide(
    steps=300, batch_size=64, sample_levels=6, ema=0.98,
    optimizer=c.optimizer(name='adam', learning_rate=1e-3, warmup_steps=20, schedule='cosine'),
  ))
  c.add_phase(config, 'distill', c.distill(
    guide='guide', steps=700, batch_size=48, ema=0.99,
    optimizer=c.optimizer(name='adam', learning_rate=1e-3, b1=0.5, schedule='cosine'),
    discriminator_optimizer=c.optimizer(name='adam', learning_rate=1e-3, b1=0.5),
    discriminator=c.discriminator(channels=64, spectral_norm=False, augment=()),
    # Held back: what the discriminator makes of omega is not what guidance is (pagoda_jax/README.md).
    adversarial=c.adversarial(weight=0.05),
  ))
  return config
