"""A small autoencoder of your own pictures: 64 px to latents of 16 x 16 x 4, and 32 px to 8 x 8 x 4.

  pagoda run --config=experiments/autoencoder_tiny.py --config.data.path=photos --workdir=runs/autoencoder

What it leaves in runs/autoencoder/autoencoder/weights is what `pagoda prepare --autoencoder` and
config.autoencoder.weights take, exactly as a published autoencoder's folder; experiments/latent_folder.py goes on.

It learns 64 px and 32 px in one step (`sizes=2`), as the teacher of latent_folder.py sees latents of 32 px pictures.
Loss: L1, squared differences at three scales, a light KL term; from step 300 on a discriminator's hinge loss.

Run on the 3,786 emoji of 64 px of the npm package emoji-datasource-twitter 16.0.0 (`npm pack`, then
package/img/twitter/64; the package is under the MIT licence, its pictures are Twemoji, copyright Twitter, Inc and
other contributors, CC BY 4.0; they are not shipped here), transparency over white, 200 held out: 1,000 steps, 2.2
passes. PSNR of the held-out pictures from their mean latents: 27.19 dB at 64 px, 22.59 dB at 32 px. Ten minutes of CPU
time. Latents have mean -0.637 and standard deviation 2.133 before scaling, and each is known to 0.027.
autoencoder_tiny.png: held-out pictures, what comes of them below.
"""

from pagoda_jax import config as c


def network(**differing):
  """The autoencoder, which experiments/latent_folder.py works on too."""
  return c.autoencoder_network(**{'channels': 4, 'widths': (12, 24, 48), 'blocks': 1, 'groups': 4,
                                  'mid_attention': False} | differing)


def get_config(variant: str = ''):
  """`variant`: ''."""
  if variant:
    raise c.ConfigError(f'autoencoder_tiny.py:{variant}: has no variants')
  config = c.experiment(base_resolution=64)
  config.data.update({'source': 'folder', 'path': 'images', 'resolution': 64, 'num_classes': 0, 'holdout': 200})
  config.autoencoder = network()
  config.checkpoint.update({'every_steps': 250, 'keep': 2})
  config.log.update({'every_steps': 25, 'samples_every': 250})
  c.add_phase(config, 'autoencoder', c.autoencoder(
    steps=1000, batch_size=16, ema=0.995, sizes=2,
    optimizer=c.optimizer(name='adam', learning_rate=2e-3, warmup_steps=50, schedule='cosine',
                          clip_norm=1.0),
    discriminator_optimizer=c.optimizer(name='adam', learning_rate=2e-4, b1=0.5),
    reconstruction=c.reconstruction(distance='pixels', weight=1.0),
    kl_weight=1e-4,
    discriminator=c.discriminator(conditional=False, channels=8, scales=1, augment=('translation', 'cutout')),
    adversarial=c.adversarial(weight=0.02, adaptive=False), adversarial_from=300,
  ))
  return config
