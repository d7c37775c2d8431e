"""A whole experiment that compiles in seconds: digits, 8 -> 16 px, the smallest networks."""

from pagoda_jax import config as c


def get_config(variant: str = ''):
  """variant: 'guided', 'text' (of captioned.py's pictures; config.data.path is still to be said), 'roads', or ''.

  'roads' are the authors' others: an encoder's noise, Haar bands, a generator above its teacher's resolution.
  """
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
  if variant == 'text':
    config.data.update({'source': 'array_record', 'num_classes': 0, 'holdout': 8})
    config.text.update({'encoder': 'captioned:embed', 'length': 4, 'width': 6, 'pooled_width': 5})
    config.network.text_attention = 'cross'
    config.guidance.recaptions.update({'law': 'truncated_normal', 'mean': 2.0, 'std': 3.0, 'low': 1.0, 'high': 10.0})
  if variant in ('guided', 'text'):
    config.guidance.update({'law': 'uniform', 'low': 1.0, 'high': 4.0})
    config.phases.teacher.label_dropout = 0.1
    c.add_phase(config, 'guide', c.guide(
      steps=4, batch_size=8, sample_levels=2, optimizer=c.optimizer(learning_rate=1e-3)))
    players['guide'] = 'guide'
  c.add_phase(config, 'invert', c.invert(num_levels=3, batch_size=16 if variant == 'text' else 512, shard_size=1024))
  if variant == 'roads':
    config.data.update({'resolution': 32, 'downsampling': 'haar'})
    config.phases.invert.store = False  # its pairs are made as they are learnt from
    c.add_phase(config, 'encode', c.encode(steps=4, batch_size=8, optimizer=c.optimizer(learning_rate=1e-3)))
    c.add_phase(config, 'encoded', c.invert(teacher='', encoder='encode', batch_size=512, shard_size=1024))
    players['noise'] = 'encoded'
    c.add_phase(config, 'distill', c.distill(resolution=16, channels=8, num_blocks=1, **players))
    c.add_phase(config, 'grow_32', c.grow(resolution=32, channels=8, num_blocks=1, **players))
    return config
  c.add_phase(config, 'distill', c.distill(**players))
  # As the release grows to 512 px: two updates a step, and a second discriminator.
  c.add_phase(config, 'grow_16', c.grow(resolution=16, channels=8, num_blocks=1, update='separate',
                                        reconstruction_adversarial=c.adversarial(weight=0.5), **players))
  return config
