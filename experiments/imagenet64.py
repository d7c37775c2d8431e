"""ImageNet at 64 px from the published teacher: invert, then distil to a one-step generator.

PaGoDA's base generator with the paper's settings. No teacher is trained: `invert` and `distill` start
from `edm_imagenet64_ema.pt`, the EDM network of the Consistency Models release (296 M parameters; for
research, not for commercial deployment).

1. Put the published files where `pagoda weights list` looks; `pagoda weights path NAME` says of each
   where it comes from and where it goes: edm_imagenet64_ema, tf_efficientnet_lite0,
   deit_base_distilled_patch16_224 and, for the class embedding, in_embeddings_tf_efficientnet_lite0
   (variant `lpips`: also vgg16 and lpips_vgg).
2. Convert the teacher, once:
     pagoda convert --input=edm_imagenet64_ema --output=weights/edm_imagenet64
   If the converted file shall lie elsewhere, give --config.phases.invert.init_from=D and
   --config.phases.distill.init_from=D.
3. Run it; `data/imagenet/train` is a folder of 1000 folders, one a class, in the order of the labels:
     pagoda run --config=experiments/imagenet64.py --workdir=runs/imagenet64 --config.data.path=data/imagenet/train
   `--config=experiments/imagenet64.py:lpips` takes LPIPS as reconstruction distance (the paper) in place
   of the projected features (the authors' scripts).

Hardware: 296 M parameters with RAdam and EMA are 4.7 GB of state in float32; activations at 4 images a
device a few GB more. The paper's batch of 256 for each loss asks for a pod slice or several accelerators
(--config.mesh.fsdp=N shards the state); `--config.precision=bfloat16` halves the activations.
Inversion is 2.6 M pairs of 78 evaluations each, 126 GB of noise in float32 (`--config.phases.invert.dtype=float16`
halves it). `--config.phases.invert.store=False` stores none: each step then inverts its own batch, 78 evaluations of
the teacher a pair in every epoch. Expected (paper): FID-50k 1.21 at one evaluation an image.

`pagoda plan --config=experiments/imagenet64.py --topology=v5e-256 --num_images=1281167`, float32, by rule and estimate:

  invert     16.4 TFLOP a pair (78 evaluations)   5.7 GB of 16 per chip   489 chip-hours (products in float32)
  distill    1.78 TFLOP an image                  9.6 GB of 16 per chip   430 chip-hours; 5.2 GB sent a step and chip

At one image a chip a step of distill takes 67 ms: 27 of arithmetic at 33 % of the peak, 26 of collectives, 14 of
update; 13 % MFU. Recommended: 64 chips with --config.mesh.fsdp=2, 4 images a chip: 149 ms a step, 239 chip-hours,
3.7 hours.

With `--aot`, XLA's compiler for TPU v5e, HBM per chip in all (arguments, temporary, program), what a chip sends in a
step, and the minutes of the compilation on two busy cores (of CPU time). Invert was compiled with its results gathered,
which it no longer does:

  invert     16.5 TFLOP a pair     5.55 GB (1.21, 4.13, 0.19)   9.44 MB of all-gather    28 (9)
  distill    2.11 TFLOP an image   9.34 GB (5.57, 3.37, 0.40)   5.13 GB of all-reduce    31 (19)

On 8xh100 with `--config.precision=bfloat16`, by XLA's compiler for GPUs without one (12 minutes on two busy cores):
distill takes 46.1 GB a GPU (5.45 arguments, 40.6 temporary; cuDNN's scratch memory not known) for 32 images each, and
sends 2.47 GB of all-reduce; 10,953 fusions, 1,361 calls of cuDNN and 1,012 of cuBLAS a step.

With `--target=512` the last line reads: teacher at 64 px: 308.1x fewer FLOPs per image than at 512 px (attention on the
same levels; 66.8x without attention).

Shown to run (`pytest -m full_size`): random weights of full size, float32, batch 1, two CPU cores: two steps of distill
in 474 s (nearly all compilation) and 14.5 GiB with projected features, 271 s and 14.9 GiB with LPIPS.
"""

from pagoda_jax import config as c

VARIANTS = ('lpips',)
TEACHER = 'weights/edm_imagenet64'


def get_config(variant: str = ''):
  """`variant`: 'projected' (or '') or 'lpips', the reconstruction distance."""
  distance = variant or 'projected'
  config = c.experiment(base_resolution=64)
  config.data.update({'source': 'folder', 'path': 'data/imagenet/train', 'resolution': 64, 'channels': 3,
                      'num_classes': 1000, 'mirror': True, 'workers': 16})
  config.network = c.network(form='guided', channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
                             attention_resolutions=(32, 16, 8))
  c.add_phase(config, 'invert', c.invert(teacher='', init_from=TEACHER, batch_size=256, num_levels=40))
  c.add_phase(config, 'distill', c.distill(
    teacher='',
    init_from=TEACHER,
    noise='invert',
    steps=90_000,
    batch_size=256,
    optimizer=c.optimizer(name='radam', learning_rate=8e-6),
    discriminator_optimizer=c.optimizer(name='radam', learning_rate=2e-3),
    ema=0.999,
    reconstruction=c.reconstruction(distance=distance),
    discriminator=c.discriminator(features='projected'),
    adversarial=c.adversarial(weight=0.2, adaptive=True, low=0.01, high=10.0),
  ))
  return config
