"""A whole experiment that compiles in seconds: digits, 8 -> 16 px, the smallest networks."""

from pagoda_jax import config as c


def get_config(variant: str = ''):
  """variant: 'guided', or ''."""
  config = c.experiment(base_resolution=8)
  config.data.update({'source': 'mnist', 'resolution': 16, 'channels': 1, 'num_classes': 10, 'mirror': False,
                      'holdout': 500})
  config.network = c.network(channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=())
  config.log.update({'every_steps': 1, 'samples_every': 1000, 'samples': 10, 'batches': True})
  config.checkpoint.update({'every_steps': 2, 'keep': 10})
  players = {
    'batch_size': 8,
    'discriminator': c.discriminator(channels=8, scales=1),
    'optimizer': c.optimizer(learning_rate=1e-3),
    'steps': 4,
  }
  c.add_phase(config, 'teacher', c.teacher(steps=4, batch_size=8, optimizer=c.optimizer(learning_rate=1e-3)))
  if variant == 'guided':
    config.guidance.update({'law': 'uniform', 'low': 1.0, 'high': 4.0})
    config.phases.teacher.label_dropout = 0.1
    c.add_phase(config, 'guide', c.guide(
      steps=4, batch_size=8, sample_levels=2, optimizer=c.optimizer(learning_rate=1e-3)))
    players['guide'] = 'guide'
  c.add_phase(config, 'invert', c.invert(num_levels=3, batch_size=512, shard_size=1024))
  c.add_phase(config, 'distill', c.distill(**players))
  # As the release grows to 512 px: two updates a step, and a second discriminator.
  c.add_phase(config, 'grow_16', c.grow(resolution=16, channels=8, num_blocks=1, update='separate',
                                        reconstruction_adversarial=c.adversarial(weight=0.5), **players))
  return config
