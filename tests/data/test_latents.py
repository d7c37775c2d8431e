"""Latents as `pagoda prepare --autoencoder` writes them; runs on them are in training/test_latent_run.py."""

import gc
import weakref

import numpy as np
from PIL import Image

from pagoda_jax.data import latents, prepare, records


class Originals:
  """Pictures far larger than what is cut of them; `alive` are those that somebody still holds."""

  class_names, all_labels, digest, resolution = (), None, 'originals', None

  def __init__(self):
    self.alive = weakref.WeakValueDictionary()

  def __len__(self):
    return 12

  def __getitem__(self, index):
    image = Image.new('RGB', (40, 7 if index == 3 else 32), (index, 0, 0))
    self.alive[index] = image
    return {'image': image, 'label': -1, 'name': str(index), 'caption': f'picture {index}'}


def test_no_original_is_held_while_its_batch_is_encoded(tmp_path):
  source, held = Originals(), []

  def encode(images):
    gc.collect()
    held.append(len(source.alive))
    mean = images[:, ::2, ::2, :1].astype(np.float32)
    return mean, np.ones_like(mean)

  encoder = latents.Encoder(encode, '0' * 64, factor=2, channels=1, image_channels=3)
  recipe = prepare.latent_recipe((8,), encoder, mirror=True)
  manifest = prepare.prepare(source, tmp_path / 'data', recipe, 8, 1, 0.0, autoencoder=encoder)
  assert held == [0, 0] and manifest['count'] == 12 and manifest['enlarged'] == 1
  stored = records.open_records(str(tmp_path / 'data'))
  assert [stored[i]['name'] for i in range(12)] == [str(i) for i in range(12)] and stored[5]['caption'] == 'picture 5'
  assert (stored[5]['image'].mean == 5).all()
