"""ImageNet in one step at 64, 128, 256 and 512 px, from a teacher that never saw more than 64.

  pagoda prepare --source=folder:data/imagenet/train --output=data/imagenet512 --resolutions=64,128,256,512
  pagoda run --config=experiments/imagenet_64_to_512.py:published --workdir=runs/imagenet

Variants, after the colon, with commas between them:

  published      no teacher is trained: `invert` and `distill` start from the EDM network of the Consistency Models
                 release (`edm_imagenet64_ema.pt`, 296 M parameters; for research, not for commercial deployment)
  next           a recipe of later papers: EDM2's teacher (S, 280 M parameters; with `published` its published one),
                 a discriminator on DINO's tokens with StyleGAN-T's heads, R3GAN's relativistic loss with R1 and R2,
                 LPIPS. No figure of it is published: ours to find out
  stop=64        ends at 64 px (or 128 or 256) instead of 512
  lpips          LPIPS as reconstruction distance, as the paper has it, in place of the projected features of the
                 authors' scripts

Before the first run:

1. `data/imagenet/train` is a folder of 1000 folders, one a class, in the order of the labels. `pagoda prepare` cuts
   every resolution out of the original picture, as the references for FID were.
2. Put the published files where `pagoda weights list` looks; `pagoda weights path NAME` says of each where it comes
   from and where it goes: tf_efficientnet_lite0, deit_base_distilled_patch16_224 and, for the class embedding,
   in_embeddings_tf_efficientnet_lite0 (lpips: also vgg16 and lpips_vgg; next: dino_vits16, vgg16, lpips_vgg).
3. published: convert the teacher, once:
     pagoda convert --input=edm_imagenet64_ema --output=weights/edm_imagenet64
   (next: `pagoda convert --input=edm2_img64_s --output=weights/edm2_img64_s`)

Published (Kim et al. 2024), one evaluation an image, without guidance, FID-50k: 1.21 at 64 px (recall 0.63), 1.48 at
128, 1.56 at 256 (IS 259.6), 1.80 at 512. Theirs took one node of 8 H100 up to 256 px and 64 A100 at 512 px.

`pagoda plan`: memory of a chip (16 GB on v5e, 95 on v5p, 80 on H100), a step, and in all

                  v5e-256                       v5p-64 (32 chips)               8xh100
  teacher     9.9 GB  121 ms   5,260 h   11.1 GB  343 ms  1,860 h   10.8 GB  945 ms   1,280 h
  invert      3.0 GB  9.47 s     105 h    3.0 GB 4.01 s      45 h    2.3 GB 1.43 s      32 h
  distill     9.1 GB  100 ms     641 h   12.1 GB  131 ms    104 h   11.9 GB  317 ms     64 h
  grow_128    3.7 GB   59 ms     378 h    5.4 GB  111 ms     89 h    5.3 GB  275 ms     55 h
  grow_256    4.5 GB   84 ms     538 h    8.5 GB  207 ms    166 h    8.3 GB  498 ms    100 h
  grow_512    7.3 GB  210 ms   1,350 h   10.9 GB  672 ms    538 h   12.0 GB 1.62 s     324 h

h: hours of one chip. Inversion: 1.28 M pictures and their mirror images, 64 a chip at once (H100: 32). Of more images a
chip than a v5e's 16 GB hold at once (`microbatch`: the teacher 16, 512 px two, others four) each part passes through
the parameters anew; chips of more memory are faster with larger parts. At one image a chip most of distill and of
grow_128 is parameters: 32 v5e (`--config.mesh.zero1=32`) take 272 h, 64 v5e (`zero1=64`) 269 h. On v5e set
launch/xla_flags.sh: without it two to four images at once take a block of the U-Net two to three times as long.
`--aot`: v5e's compiler took 807 s and 22 GB of memory for grow_512 on 256 chips: 8.81 GB a chip, 10.5 TFLOP
an image (11.7 before it optimises) and 860 MB of sums a step.
"""

from pagoda_jax import config as c
from pagoda_jax.config import ladder

TEACHER, NEXT_TEACHER = 'weights/edm_imagenet64', 'weights/edm2_img64_s'
LEVELS = (64, 128, 256, 512)
VARIANTS = ('published,stop=64,lpips', 'next,stop=64', 'next,stop=128')


def get_config(variant: str = ''):
  """`variant`: '' or some of published, next, stop=64, lpips, joined by commas."""
  chosen, stop = ladder.variant_options(variant, ('published', 'next', 'lpips'), LEVELS)
  config = c.experiment(base_resolution=64)
  config.data.update({'source': 'array_record', 'path': 'data/imagenet512', 'resolution': stop,
                      'channels': 3, 'num_classes': 1000, 'mirror': True, 'workers': 16})
  config.network = c.network(form='guided', channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
                             attention_resolutions=(32, 16, 8))
  config.precision = 'bfloat16'
  config.microbatch = 4
  if 'next' in chosen:
    return modern(config, 'published' in chosen, stop)
  teacher = {'teacher': '', 'init_from': TEACHER}
  if 'published' not in chosen:
    # EDM's for ImageNet (Karras et al. 2022, appendix F): 2.5 G images, learning rate 1e-4 reached after 10 M images,
    # half-life of the EMA 50 M images, dropout 0.1, no augmentation.
    config.network.dropout = 0.1
    c.add_phase(config, 'teacher', c.teacher(
      steps=610_000, batch_size=4096, microbatch=16,
      optimizer=c.optimizer(name='adam', learning_rate=1e-4, warmup_steps=10_000_000 // 4096),
      ema_halflife=(50e6,),
    ))
    teacher = {'teacher': 'teacher'}
  c.add_phase(config, 'invert', c.invert(**teacher, batch_size=256, num_levels=40))
  players = {
    'noise': 'invert',
    'steps': 90_000,  # at 64 px the released one is from about here; of the others nothing is published
    # The paper's. The scripts have 96 at 64 px, 256 at 128, 360 at 256 and 512 at 512: a pod slice of 256 chips takes
    # neither 96 nor 360, and 512 doubles the dearest phase.
    'batch_size': 256,
    'optimizer': c.optimizer(name='radam', learning_rate=8e-6),
    'discriminator_optimizer': c.optimizer(name='radam', learning_rate=2e-3),
    'ema': 0.999,
    # the scripts' distance; LPIPS is the paper's
    'reconstruction': c.reconstruction(distance='lpips' if 'lpips' in chosen else 'projected'),
    # below 256 px pictures are resized to 224 for the feature networks, from there on they come at their own size
    'discriminator': c.discriminator(features='projected'),
  }
  c.add_phase(config, 'distill', c.distill(**teacher, **players, adversarial=c.adversarial(weight=0.2)))
  # As the scripts grow. The paper has a fixed weight of 1.0, one update a step and one discriminator at every rung,
  # and thaws the highest level alone: 11.5, 4.9 and 3.3 M parameters where the scripts train 27.2, 29.6 and 30.4 M.
  separate = {'update': 'separate', 'adversarial': c.adversarial(weight=1.0, adaptive=False)}
  rungs = {
    128: {'adversarial': c.adversarial(weight=1.0)},
    256: separate,
    # halved: decoder multipliers (0.5, 1, 1, 1, 2, 3, 4); the scripts' (0.5, 1, 1, 1, 1, 2, 4) fit a 32 px base alone
    512: separate | {'channels': 96, 'reconstruction_adversarial': c.adversarial(weight=0.5), 'microbatch': 2},
  }
  start, blocks = 'distill', 16  # of the 64 px decoder: four levels of four
  for side, rung in rungs.items():
    if side <= stop:
      c.add_phase(config, f'grow_{side}', c.grow(**players | {
        'start': start,
        'resolution': side,
        'channels': 192,
        'num_blocks': 2,
        'thaw': tuple(f'output_blocks.{block}' for block in range(9, blocks)),
      } | rung))
      start, blocks = f'grow_{side}', blocks + 3
  return config


def modern(config, published: bool, stop: int):
  """What `next` makes of an experiment without phases."""
  config.microbatch = 1  # of images whose penalties are differentiated once more
  config.network = c.network(form='edm2', channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
                             attention_resolutions=(16, 8))
  teacher = {'teacher': '', 'init_from': NEXT_TEACHER}
  if not published:
    # EDM2's for S at 64 px (Karras et al. 2024, table 6, and its train_edm2.py).
    c.add_phase(config, 'teacher', c.teacher(
      steps=524_288, batch_size=2048, microbatch=4, p_mean=-0.8, p_std=1.6, uncertainty=True, ema_std=(0.05, 0.1),
      optimizer=c.optimizer(name='adam', learning_rate=0.01, b2=0.99, schedule='inverse_sqrt', decay_from=35_000,
                            warmup_steps=4_883),
    ))
    teacher = {'teacher': 'teacher'}
  c.add_phase(config, 'invert', c.invert(**teacher, batch_size=256, num_levels=40))
  # The penalties differentiate DINO once more than the hinge loss does: memory and time of a step grow by that. Their
  # size depends on the features; 1 is a beginning.
  adversarial = {'loss': 'relativistic', 'r1': 1.0, 'r2': 1.0}
  players = {
    'noise': 'invert',
    'steps': 90_000,
    'batch_size': 256,
    'optimizer': c.optimizer(name='adam', learning_rate=2e-4, b1=0.0, b2=0.99),
    'discriminator_optimizer': c.optimizer(name='adam', learning_rate=2e-4, b1=0.0, b2=0.99),
    'ema': 0.999,
    'reconstruction': c.reconstruction(distance='lpips'),
    'discriminator': c.discriminator(features='dino'),
    'adversarial': c.adversarial(weight=0.2, **adversarial),
  }
  start = 'distill'
  c.add_phase(config, start, c.distill(**teacher, **players))
  for side in LEVELS[1:]:
    if side <= stop:
      # The paper's growth: the highest level thaws, the weight is 1 and fixed. Levels of 128 channels fill the lanes of
      # a TPU's matrix units, which EDM's 192 do not.
      c.add_phase(config, f'grow_{side}', c.grow(**players | {
        'start': start, 'resolution': side, 'channels': 128, 'num_blocks': 2,
        'adversarial': c.adversarial(weight=1.0, adaptive=False, **adversarial),
      }))
      start = f'grow_{side}'
  return config
