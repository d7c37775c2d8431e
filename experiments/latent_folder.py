"""Your own pictures in one step, in the latent space of experiments/autoencoder_tiny.py: 32 px, grown to 64.

  pagoda run --config=experiments/autoencoder_tiny.py --config.data.path=photos --workdir=runs/autoencoder
  pagoda prepare --source=folder:photos --output=data/latents --resolutions=32,64 \\
    --autoencoder=runs/autoencoder/autoencoder/weights
  pagoda run --config=experiments/latent_folder.py --workdir=runs/latent

Run on the emoji of autoencoder_tiny.py, in its latents: teacher 800 steps of 64, 10 noise levels, distill and grow_16
300 steps of 32, on two busy cores (9, 3, 31 and 31 minutes). That is far too short for samples: they have
an emoji's colours, place and size, and are blurred; the inverted noise has a standard deviation of 70.6 instead of
80, of an under-trained teacher. Reconstructions of held-out pictures are at their place in shape and colour at 32 px,
and keep it when grown to 64 px. latent_folder.png: the first two rows of grow_16's samples; below, held-out pictures
(decoded means of their latents) above what one evaluation makes of their inverted noise.
"""

import importlib.util
import pathlib

from pagoda_jax import config as c

_PATH = pathlib.Path(__file__).parent / 'autoencoder_tiny.py'


def autoencoder():
  """The network that autoencoder_tiny.py trains."""
  spec = importlib.util.spec_from_file_location('autoencoder_tiny', _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.network(weights='runs/autoencoder/autoencoder/weights')


def get_config(variant: str = ''):
  """`variant`: ''."""
  if variant:
    raise c.ConfigError(f'latent_folder.py:{variant}: has no variants')
  config = c.experiment(base_resolution=8, space='latent', autoencoder=autoencoder())
  config.data.update({'source': 'array_record', 'path': 'data/latents', 'resolution': 16, 'num_classes': 0,
                      'holdout': 200})
  config.diffusion.sigma_data = 1.0  # latents have unit variance
  config.network = c.network(channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,),
                             channels_per_head=32)
  config.checkpoint.update({'every_steps': 250, 'keep': 2})
  config.log.update({'every_steps': 25, 'samples_every': 100, 'samples': 64})
  c.add_phase(config, 'teacher', c.teacher(
    steps=800, batch_size=64, ema=0.99,
    optimizer=c.optimizer(name='adam', learning_rate=2e-3, warmup_steps=20, schedule='cosine')))
  c.add_phase(config, 'invert', c.invert(num_levels=10, clip_denoised=False, add_noise=True, batch_size=256))
  players = {
    'steps': 300,
    'batch_size': 32,
    'ema': 0.99,
    'optimizer': c.optimizer(name='adam', learning_rate=1e-3, b1=0.5, schedule='cosine'),
    'discriminator_optimizer': c.optimizer(name='adam', learning_rate=1e-3, b1=0.5),
    # Latents have no colours to augment; as few steps as these do not over-fit the discriminator.
    'discriminator': c.discriminator(conditional=False, scales=1, augment=(), spectral_norm=False),
    'adversarial': c.adversarial(weight=0.3, adaptive=False),
  }
  c.add_phase(config, 'distill', c.distill(**players))
  c.add_phase(config, 'grow_16', c.grow(
    start='distill', resolution=16, channels=32, num_blocks=1,
    reconstruction=c.reconstruction(scale_weights=(0.2, 1.0, 1.0)), **players))
  return config
