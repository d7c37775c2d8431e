"""Features with nothing downloaded: a small network trained on the reference's own pictures.

Where each picture has a label it is a classifier, elsewhere it tells two augmented views of a picture from those of
others (SimCLR, Chen et al. 2020). It is trained on one device, so that a mesh does not change it, and kept with its
digest: figures of two networks must not be compared.
"""

import hashlib
import io
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import traverse_util

from pagoda_jax.data import images as images_lib
from pagoda_jax.data import resize
from pagoda_jax.evaluation.encoders import Encoder
from pagoda_jax.evaluation.pictures import EvaluationError, Pictures
from pagoda_jax.method import augment
from pagoda_jax.runtime import distributed, randomness, trees
from pagoda_jax.runtime.files import replacing, user_cache
from pagoda_jax.runtime.progress import Progress

LARGEST_SIDE = 64  # larger pictures are averaged down to it
PICTURES = 20_000  # that it is trained on at most, drawn with a fixed seed
RECIPE = {'version': 1, 'steps': 400, 'batch_size': 128, 'learning_rate': 2e-3, 'temperature': 0.5, 'width': 64}
POLICY = {'labels': ('translation',), 'contrast': augment.POLICY}
DOMAIN = '/data-features'  # of random keys, with seed 0


class SmallNetwork(nn.Module):
  """Convolutions of stride 2 down to 4 px, then a layer of features, and `outputs` numbers of them."""

  outputs: int
  width: int = 64

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, S, S, C] in [-1, 1] -> (features [B, 2 * width], outputs [B, `outputs`])."""
    level = 0
    while x.shape[1] > 4 or not level:
      kernel, stride = (3, 3) if level else (5, 5), 2 if x.shape[1] > 4 else 1
      x = nn.Conv(2 * self.width if level else self.width, kernel, stride, name=f'conv{level}')(x)
      x = nn.relu(nn.GroupNorm(8, name=f'norm{level}')(x))
      level += 1
    features = nn.Dense(2 * self.width, name='features')(x.reshape(len(x), -1))
    return features, nn.Dense(self.outputs, name='outputs')(nn.relu(features))


def encoder(reference: Pictures, folder) -> Encoder:
  """The network of a reference's pictures, read from `folder` or trained and written there.

  Its outputs: 'features', and with labels 'logits'.

  Args:
    reference: pictures of a source, with labels or without.
    folder: for the file; None: the user's cache.

  Raises:
    EvaluationError: the reference has no source to learn from, or too few pictures.
    OSError: the file cannot be written.
  """
  if reference.source is None:
    raise EvaluationError('--features=data: learns from the pictures of a source, and the reference is a file; give '
                          '--reference=data, folder:PATH, tfds:NAME, array_record:PATH or mnist')
  if reference.count < 16:
    raise EvaluationError(f'--features=data: {reference.count} pictures are too few to learn from')
  classes = len(reference.source.class_names)
  by_labels = classes > 1 and _labelled(reference.source)
  kind, outputs = ('labels', classes) if by_labels else ('contrast', RECIPE['width'])
  size = (reference.height, reference.width, reference.channels)
  recipe = RECIPE | {'trained_by': kind, 'size': size, 'outputs': outputs, 'sha256_of_pictures': reference.described}
  name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
  path = epath.Path(folder or f'{user_cache()}/pagoda_jax') / 'data_features' / f'{name}.npz'

  def make():
    if _read(path) is None:
      _write(path, train(reference, kind, outputs))
    return _read(path)[1]

  digest = distributed.from_primary(f'features of {name}', make)
  found = _read(path)
  if found is None or found[1] != digest:
    raise EvaluationError(f'{path}: not there as the first process wrote it; its folder must be shared by all')
  network, wanted = SmallNetwork(outputs, RECIPE['width']), kind == 'labels'

  def apply(params, images):
    features, logits = network.apply({'params': params}, _prepared(images))
    return {'features': features, 'logits': logits} if wanted else {'features': features}

  described = {'network': 'data', 'trained_by': kind, 'sha256': digest, 'file': str(path)}
  return Encoder(apply, found[0], described)


def _labelled(source) -> bool:
  """Whether each picture has its label; -1 would be taken for the last class."""
  labels = source.all_labels
  return source[0]['label'] >= 0 if labels is None else bool(np.min(labels) >= 0)  # a split of tfds has all, or none


def _prepared(images):
  """uint8 -> [-1, 1], no larger than LARGEST_SIDE, square."""
  images, side = images_lib.normalize(images), min(LARGEST_SIDE, *images.shape[1:3])
  return resize.resize(images, side, 'area')


def train(reference: Pictures, kind: str, outputs: int) -> dict:
  """Parameters of a SmallNetwork: the same on every mesh."""
  numbers = np.arange(reference.count)
  if len(numbers) > PICTURES:
    numbers = np.sort(np.random.default_rng(0).choice(numbers, PICTURES, replace=False))
  network, key = SmallNetwork(outputs, RECIPE['width']), randomness.key_for(0, DOMAIN)
  with jax.default_device(jax.local_devices()[0]), jax.default_matmul_precision('highest'):
    pixels, labels = _loaded(reference, numbers)
    side = pixels.shape[1]
    params = jax.jit(network.init)(key, jnp.zeros((1, *pixels.shape[1:])))['params']
    optimizer = optax.adam(optax.cosine_decay_schedule(RECIPE['learning_rate'], RECIPE['steps']))

    def loss(params, images, labels, rng):
      outputs_of = lambda x: network.apply({'params': params}, x)[1]
      draws = [augment.draw(key, len(images), side, POLICY[kind]) for key in jax.random.split(rng)]
      first = outputs_of(augment.apply(images, draws[0]))
      if kind == 'labels':
        return optax.softmax_cross_entropy_with_integer_labels(first, labels).mean()
      return contrast(first, outputs_of(augment.apply(images, draws[1])), RECIPE['temperature'])

    @jax.jit
    def step(params, state, images, labels, rng):
      value, gradients = jax.value_and_grad(loss)(params, images, labels, rng)
      updates, state = optimizer.update(gradients, state)
      return optax.apply_updates(params, updates), state, value

    state, rng = optimizer.init(params), np.random.default_rng(1)
    progress = Progress('features of the data', RECIPE['steps'])
    for number in range(RECIPE['steps']):
      batch = rng.choice(len(pixels), RECIPE['batch_size'], replace=len(pixels) < RECIPE['batch_size'])
      images = _prepared(jnp.asarray(pixels[batch]))
      params, state, value = step(params, state, images, labels[batch], jax.random.fold_in(key, number))
      progress.update(number + 1, len(batch), {'loss': float(value)} if number % 20 == 0 else None)
    params = jax.device_get(params)
  if not np.isfinite(float(value)):
    raise EvaluationError(f'--features=data: training ended with a loss of {float(value)}')
  return params


def _loaded(reference, numbers):
  """(uint8 pictures at most LARGEST_SIDE px a side, labels), a part at a time."""
  parts = []
  for start in range(0, len(numbers), 256):
    parts.append(images_lib.to_uint8(_prepared(jnp.asarray(reference.read(numbers[start : start + 256])))))
  labels = reference.source.all_labels
  if labels is None:  # what only reading tells
    return np.concatenate(parts), np.array([reference.source[int(i)]['label'] for i in numbers])
  return np.concatenate(parts), np.asarray(labels)[numbers]


def contrast(first: jax.Array, second: jax.Array, temperature: float) -> jax.Array:
  """NT-Xent (SimCLR, eq. 1) of two views [B, C] of the same pictures."""
  both = jnp.concatenate([first, second])
  both = both / jnp.sqrt(jnp.sum(both**2, axis=1, keepdims=True) + 1e-8)
  similarity = both @ both.T / temperature - 1e9 * jnp.eye(len(both))
  partners = jnp.roll(jnp.arange(len(both)), len(first))
  return optax.softmax_cross_entropy_with_integer_labels(similarity, partners).mean()


def _write(path, params) -> None:
  buffer = io.BytesIO()
  flat = traverse_util.flatten_dict(params, sep='/')
  np.savez(buffer, **flat, sha256=np.array(trees.hashed(params).hexdigest()))
  with replacing(path) as file:
    file.write(buffer.getbuffer())


def _read(path) -> tuple[dict, str] | None:
  """(parameters, their digest) of a file; None where there is none that can be believed."""
  try:
    with path.open('rb') as file, np.load(file) as arrays:
      flat = {name: arrays[name] for name in arrays}
    digest = str(flat.pop('sha256'))
    params = traverse_util.unflatten_dict(flat, sep='/')
    if trees.hashed(params).hexdigest() != digest:
      raise ValueError('other numbers than its checksum')
    return params, digest
  except FileNotFoundError:
    return None
  except Exception as error:  # what damaged bytes lead NumPy's and zipfile's readers to; the file has a checksum
    distributed.say(f'{path}: damaged ({error}); made again')
    return None
