"""ImageNet in one step from 32 to 512 px, from a teacher that never saw more than 32: four rungs above the base.

  pagoda prepare --source=folder:data/imagenet/train --output=data/imagenet512 --resolutions=32,64,128,256,512
  pagoda run --config=experiments/imagenet_32_to_512.py:published --workdir=runs/imagenet32

Variants, after the colon, with commas between them:

  published      no teacher is trained: `invert` and `distill` start from the teacher of PaGoDA's release
                 (`pagoda_teacher_32.pt`)
  stop=32        ends at 32 px (or 64, 128, 256) instead of 512
  lpips          LPIPS as reconstruction distance, as the paper has it, in place of the projected features of the
                 authors' scripts

Before the first run: pictures and feature networks as imagenet_64_to_512.py says, and with `published`, once:

  pagoda convert --input=pagoda_teacher_32 --output=weights/pagoda_teacher_32

Published (Kim et al. 2024), one evaluation an image, without guidance: FID-50k 0.79 at 32 px. Of what grows from it
no figure and no script is published: what the rungs take is what the release's scripts take for a 64 px base.

`pagoda plan`, as in imagenet_64_to_512.py:

                  v5e-256                       v5p-64 (32 chips)               8xh100
  teacher     9.6 GB   82 ms   3,560 h   12.5 GB  168 ms    909 h   11.8 GB  455 ms    617 h
  invert      2.7 GB  4.61 s      51 h    2.7 GB 1.91 s      21 h    2.4 GB  726 ms     16 h
  distill    10.8 GB  105 ms     673 h   13.4 GB   99 ms     79 h   13.2 GB  245 ms     49 h
  grow_64     3.8 GB   51 ms     327 h    4.7 GB   69 ms     55 h    4.9 GB  178 ms     36 h
  grow_128    4.1 GB   62 ms     398 h    5.7 GB  109 ms     88 h    5.7 GB  273 ms     55 h
  grow_256    5.2 GB  106 ms     675 h    9.8 GB  276 ms    221 h    9.6 GB  660 ms    132 h
  grow_512    8.5 GB  279 ms   1,780 h   12.9 GB  926 ms    741 h   14.1 GB 2.22 s     443 h
"""

from pagoda_jax import config as c
from pagoda_jax.config import ladder

TEACHER = 'weights/pagoda_teacher_32'
LEVELS = (32, 64, 128, 256, 512)
VARIANTS = ('published,stop=32', 'published,stop=64,lpips')


def get_config(variant: str = ''):
  """`variant`: '' or some of published, stop=32, lpips, joined by commas."""
  chosen, stop = ladder.variant_options(variant, ('published', 'lpips'), LEVELS)
  config = c.experiment(base_resolution=32)
  config.data.update({'source': 'array_record', 'path': 'data/imagenet512', 'resolution': stop,
                      'channels': 3, 'num_classes': 1000, 'mirror': True, 'workers': 16})
  config.network = c.network(form='guided', channels=256, channel_mult=(1, 2, 4), num_blocks=3,
                             attention_resolutions=(16, 8))
  config.precision = 'bfloat16'
  # As many images at once as fit 16 GB; the teacher and 512 px have their own.
  config.microbatch = 4
  teacher = {'teacher': '', 'init_from': TEACHER}
  if 'published' not in chosen:
    # The paper's batch; the rest as EDM trains at 64 px (Karras et al. 2022, appendix F), see imagenet_64_to_512.py.
    config.network.dropout = 0.1
    c.add_phase(config, 'teacher', c.teacher(
      steps=610_000, batch_size=4096, microbatch=32,
      optimizer=c.optimizer(name='adam', learning_rate=1e-4, warmup_steps=10_000_000 // 4096),
      ema_halflife=(50e6,),
    ))
    teacher = {'teacher': 'teacher'}
  c.add_phase(config, 'invert', c.invert(**teacher, batch_size=256, num_levels=40))
  players = {
    'noise': 'invert',
    'steps': 90_000,  # of the release's 64 px generator; for a base of 32 px nothing is published
    'batch_size': 256,
    'optimizer': c.optimizer(name='radam', learning_rate=8e-6),
    'discriminator_optimizer': c.optimizer(name='radam', learning_rate=2e-3),
    'ema': 0.999,
    'reconstruction': c.reconstruction(distance='lpips' if 'lpips' in chosen else 'projected'),
    # below 256 px pictures are resized to 224 for the feature networks, from there on they come at their own size
    'discriminator': c.discriminator(features='projected'),
  }
  c.add_phase(config, 'distill', c.distill(**teacher, **players, adversarial=c.adversarial(weight=0.2)))
  separate = {'update': 'separate', 'adversarial': c.adversarial(weight=1.0, adaptive=False)}
  rungs = {
    64: {'adversarial': c.adversarial(weight=1.0)},
    128: {'adversarial': c.adversarial(weight=1.0)},
    256: separate,
    # decoder multipliers (0.5, 1, 1, 1, 1, 2, 4), which the release's code has
    512: separate | {'channels': 128, 'reconstruction_adversarial': c.adversarial(weight=0.5), 'microbatch': 2},
  }
  start, thawed = 'distill', (32,)
  for side, rung in rungs.items():
    if side <= stop:
      c.add_phase(config, f'grow_{side}', c.grow(**players | {
        'start': start,
        'resolution': side,
        'channels': 256,  # the last level's of the base: the head is carried over only if the width stays
        'num_blocks': 2,
        # The last level of the base and what has grown since, nearly what blocks 9 and up are of a 64 px base; the
        # paper thaws the highest level alone.
        'thaw': thawed,
      } | rung))
      start, thawed = f'grow_{side}', (*thawed, side)
  return config
