"""As imagenet_latent_512.py, grown once more: 128 x 128 latents, 1024 px, from a teacher of 32 x 32 latents.

  pagoda prepare --source=folder:data/imagenet/train --output=data/imagenet_latents_1024 --resolutions=256,512,1024 \\
    --autoencoder=weights/sd_vae
  pagoda run --config=experiments/imagenet_latent_1024.py --workdir=runs/imagenet_latent_1024

Phases up to grow_64 are those of imagenet_latent_512.py, with its variants, its plan and what is unknown of it. Also:
most ImageNet pictures are smaller than 1024 px, and `pagoda prepare` says how many it enlarged; a set of large pictures
is the better one, with config.data.num_classes of its own. The latents of a picture take 16 + 66 + 262 KB, and as much
for its mirror image: 880 GB for ImageNet.

`pagoda plan --num_images=1281167`, '': memory of a device, a step, and in all

             --topology=v5e-256                        --topology=8xh100
  grow_128   5.5 GB    58 ms     371 chip-hours        8.9 GB   112 ms    22 chip-hours

The five phases: 400 EFLOP, 3,240 chip-hours, 12.6 hours on 256 v5e, or 354 chip-hours, 44 hours on 8 H100.
"""

import importlib.util
import pathlib

_PATH = pathlib.Path(__file__).parent / 'imagenet_latent_512.py'
VARIANTS = ('decoded',)


def get_config(variant: str = ''):
  """`variant`: '' or some of decoded, stop=32, stop=64, joined by commas."""
  spec = importlib.util.spec_from_file_location('imagenet_latent_512', _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant, top=128, path='data/imagenet_latents_1024')
