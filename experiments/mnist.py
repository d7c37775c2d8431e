"""MNIST digits, 8 -> 16 -> 32 px: the whole method in minutes, on two CPU cores."""

from pagoda_jax import config as c


def get_config(variant: str = ''):
  """`variant`: '' or 'long'."""
  config = c.experiment(base_resolution=8)
  config.data.update({'source': 'mnist', 'resolution': 32, 'channels': 1, 'num_classes': 10, 'mirror': False,
                      'holdout': 500})
  config.network = c.network(channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=())
  config.log.update({'every_steps': 20, 'samples_every': 10000, 'samples': 100})
  config.diffusion.sigma_min = 0.02
  config.checkpoint.every_steps = 1000
  config.evaluation.samples = 2000
  c.add_phase(config, 'teacher', c.teacher(steps=800, batch_size=128, optimizer=c.optimizer(name='adam', learning_rate=2e-3, warmup_steps=20, schedule='cosine'), ema=0.99))
  c.add_phase(config, 'invert', c.invert(num_levels=16, add_noise=True))
  gan = dict(batch_size=64, discriminator=c.discriminator(channels=32, augment=('brightness','contrast','translation','cutout')), ema=0.98,
    optimizer=c.optimizer(learning_rate=4e-4), discriminator_optimizer=c.optimizer(learning_rate=2e-3))
  c.add_phase(config, 'distill', c.distill(steps=300, **gan))
  c.add_phase(config, 'grow_16', c.grow(start='distill', resolution=16, channels=32, num_blocks=1, steps=250, **gan))
  c.add_phase(config, 'grow_32', c.grow(start='grow_16', resolution=32, channels=32, num_blocks=1, steps=200, **gan))
  return config
