"""A tiny experiment in latent space: an autoencoder of random numbers, pictures, their latents."""

import pathlib

import jax
import make_data
import tiny
from runs import pagoda

from pagoda_jax import config as c
from pagoda_jax.stages import decoding
from pagoda_jax.weights import autoencoders
from pagoda_jax.weights.convert import folders
from pagoda_jax.weights.convert.formats import Converted

NETWORK = {'channels': 2, 'widths': (4, 8), 'blocks': 1, 'groups': 2}  # of factor 2


def write_autoencoder(folder, seed: int = 0, scaling: float = 2.0, shift: float = 0.25, image_channels: int = 3,
                      network=None) -> str:
  """A converted folder; returns its digest."""
  config = c.experiment(autoencoder=c.autoencoder_network(**(network or NETWORK)))
  config.data.channels = image_channels
  variables = jax.device_get(decoding.fresh_variables(config, jax.random.key(seed)))
  converted = Converted(variables, autoencoders.options(config, scaling, shift), autoencoders.FORMAT)
  folders.write_converted(folder, converted, {'file': 'random', 'sha256': str(seed)})
  return folders.read_description(folder)['variables_sha256']


def prepare(root, *flags, per_class: int = 4, name: str = 'latents') -> None:
  """root/photos, root/vae and root/latents: 12 pictures at 16 and 32 px, latents of 8 and 16."""
  if not (root / 'photos').exists():
    make_data.write_class_folders(root / 'photos', per_class)
  if not (root / 'vae').exists():
    write_autoencoder(root / 'vae')
  assert pagoda('prepare', f'--source=folder:{root / "photos"}', f'--output={root / name}', '--resolutions=16,32',
                '--shard_size=5', f'--autoencoder={root / "vae"}', *flags) == 0


def get_config(root):  # `root` may be the text after a colon of --config
  """tests/tiny.py on those latents: L_rec of decoded pictures when distilling, L_adv of decoded ones when growing."""
  root, config = pathlib.Path(root), tiny.get_config()
  config.data.update({'source': 'array_record', 'path': str(root / 'latents'), 'channels': 3, 'num_classes': 3,
                      'mirror': True, 'holdout': 3})
  config.space = 'latent'
  config.autoencoder = c.autoencoder_network(weights=str(root / 'vae'), **NETWORK)
  config.diffusion.sigma_data = 1.0
  config.phases.invert.update({'clip_denoised': False, 'batch_size': 8, 'shard_size': 8})
  for name in ('distill', 'grow_16'):
    config.phases[name].discriminator.augment = ('translation', 'cutout')
  config.phases.distill.reconstruction.space = 'decoded'
  grow = config.phases.grow_16
  grow.discriminator.augment = c.AUGMENTATIONS
  grow['update'], grow.reconstruction_adversarial.weight, grow.adversarial.space = 'joint', 0.0, 'decoded'
  return config


def get_autoencoder_config(root):
  """An experiment that trains that autoencoder, on pictures of 16 px and their halves."""
  config = c.experiment(base_resolution=16, autoencoder=c.autoencoder_network(**NETWORK))
  config.data.update({'source': 'folder', 'path': str(root / 'photos'), 'resolution': 16, 'holdout': 3, 'workers': 0})
  config.checkpoint.update({'every_steps': 2, 'keep': 10})
  config.log.update({'every_steps': 1, 'samples_every': 2})
  c.add_phase(config, 'autoencoder', c.autoencoder(
    steps=4, batch_size=8, sizes=2, ema=0.5, kl_weight=1e-2, optimizer=c.optimizer(name='adam', learning_rate=1e-2),
    discriminator=c.discriminator(conditional=False, channels=4, scales=1), adversarial_from=2,
    adversarial=c.adversarial(weight=0.5, adaptive=True)))
  return config
