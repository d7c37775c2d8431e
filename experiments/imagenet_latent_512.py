"""ImageNet in one step at 512 px, in the latent space of Stable Diffusion's autoencoder: 32 x 32 latents, grown to 64.

  pagoda convert --input=sd_vae_ft_mse --output=weights/sd_vae
  pagoda prepare --source=folder:data/imagenet/train --output=data/imagenet_latents --resolutions=256,512 \\
    --autoencoder=weights/sd_vae
  pagoda run --config=experiments/imagenet_latent_512.py --workdir=runs/imagenet_latent

The teacher sees latents of 256 px pictures, 32 x 32 x 4; growth doubles the latents, and the autoencoder's decoder, 8
times larger, makes the pictures. Variants, after the colon, with commas between them:

  decoded    LPIPS and the projected discriminator of the pixel experiments, on pictures decoded inside the step. They
             need those experiments' published files (imagenet_64_to_512.py). '' compares and judges the latents
             themselves: nothing is decoded but sample grids
  stop=32    ends at 32 x 32 latents, 256 px

The latents take 16 + 66 KB a picture and as much for its mirror image: 210 GB.

The paper proposes this and did not do it: no figure is published, and none is known here. Unknown are: which of the two
variants is better, and whether a discriminator of latents alone is enough for 1000 classes;
the steps and learning rates, which are those of the pixel experiments; sigma_data = 1, which follows from latents of
unit variance, with p_mean and p_std as EDM has them for pixels (EDM2: -0.4 and 1.0 for latents, sigma_data 0.5); the
teacher's network, which is the pixel experiments' 64 px one. What the decoder loses bounds every figure: FID between
pictures and their reconstructions is to be measured first.

`pagoda plan --num_images=1281167`, '': memory of a device, a step, and in all

             --topology=v5e-256                        --topology=8xh100
  teacher    7.2 GB    52 ms   2,250 chip-hours       10.3 GB   220 ms   299 chip-hours
  invert     2.0 GB  2.43 s       27                   1.8 GB   394 ms     8.8
  distill    7.6 GB    63 ms     405                  10.1 GB    68 ms    14
  grow_64    2.9 GB    29 ms     184                   4.1 GB    51 ms    10

decoded: grow_64 on v5e-256: 5.2 GB (2 GB of activations at one image a chip, the decoder's blocks at 512 and 256 px
computed again), 305 ms, 1,950 chip-hours: decoder and feature networks at 512 px take 64 times the latents' arithmetic.

With 8 v5e distill takes 52 chip-hours: at one image a chip its parameters are most of a step.
The teacher takes 21.1 times fewer FLOPs an image than the same network on latents of 128.
"""

from pagoda_jax import config as c
from pagoda_jax.config import ladder

AUTOENCODER = 'weights/sd_vae'
LEVELS = (32, 64, 128)  # sides of latents: 256, 512 and 1024 px
VARIANTS = ('decoded',)


def get_config(variant: str = '', top: int = 64, path: str = 'data/imagenet_latents'):
  """`variant`: '' or some of decoded, stop=32, joined by commas; `top`: side of the largest latents."""
  chosen, stop = ladder.variant_options(variant, ('decoded',), tuple(side for side in LEVELS if side <= top))
  config = c.experiment(base_resolution=32, space='latent', autoencoder=c.autoencoder_network(weights=AUTOENCODER))
  config.data.update({'source': 'array_record', 'path': path, 'resolution': stop, 'channels': 3, 'num_classes': 1000,
                      'mirror': True, 'workers': 16})
  config.diffusion.sigma_data = 1.0  # latents have unit variance
  config.network = c.network(form='guided', channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
                             attention_resolutions=(16, 8), dropout=0.1)
  config.precision = 'bfloat16'
  config.microbatch = 1 if 'decoded' in chosen else 16
  # As EDM trains on ImageNet (Karras et al. 2022, appendix F): 2.5 G images.
  c.add_phase(config, 'teacher', c.teacher(
    steps=610_000, batch_size=4096, microbatch=64,
    optimizer=c.optimizer(name='adam', learning_rate=1e-4, warmup_steps=10_000_000 // 4096),
    ema_halflife=(50e6,),
  ))
  c.add_phase(config, 'invert', c.invert(batch_size=256, num_levels=40, clip_denoised=False))
  players = {
    'steps': 90_000,
    'batch_size': 256,
    'optimizer': c.optimizer(name='radam', learning_rate=8e-6),
    'discriminator_optimizer': c.optimizer(name='radam', learning_rate=2e-4),
    'reconstruction': c.reconstruction(distance='pixels', space='latent'),
    'discriminator': c.discriminator(channels=128, scales=2, augment=('translation', 'cutout')),
  }
  space = 'latent'
  if 'decoded' in chosen:
    space = 'decoded'
    players |= {
      'discriminator_optimizer': c.optimizer(name='radam', learning_rate=2e-3),
      'reconstruction': c.reconstruction(distance='lpips', space=space),
      'discriminator': c.discriminator(features='projected'),
    }
    # The decoder's blocks at full and half the pictures' side hold most of what a backward pass needs.
    config.remat = tuple(8 * stop >> level for level in (0, 1))
  c.add_phase(config, 'distill', c.distill(**players, adversarial=c.adversarial(weight=0.2, space=space)))
  start = 'distill'
  for side in LEVELS[1:]:
    if side <= stop:
      # The paper's growth: the highest level thaws. The weight is adaptive beside a distance of latents.
      c.add_phase(config, f'grow_{side}', c.grow(
        start=start, resolution=side, channels=192, num_blocks=2, **players,
        adversarial=c.adversarial(weight=1.0, adaptive=space == 'latent', space=space)))
      start = f'grow_{side}'
  return config
