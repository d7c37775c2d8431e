"""DiffAugment (Zhao et al. 2020): differentiable augmentation, the same draw for real and fake.

The order is fixed: brightness, saturation, contrast, translation, cutout. Values are never clipped.
"""

import jax
import jax.numpy as jnp

POLICY = ('brightness', 'saturation', 'contrast', 'translation', 'cutout')
TRANSLATION_RATIO = 0.125
CUTOUT_RATIO = 0.2


def draw(rng, batch: int, size: int | tuple[int, int], policy: tuple[str, ...] = POLICY) -> dict[str, jax.Array]:
  """Random parameters for `batch` images, to be applied to as many image batches as need the same draw.

  Args:
    rng: key.
    batch: number of images.
    size: side of the images, or (height, width); translation and cutout are in its pixels.
    policy: which of POLICY to draw.

  Returns:
    name -> array for each name of `policy`: brightness in [-0.5, 0.5), saturation in [0, 2), contrast
    in [0.5, 1.5), all float32 [batch]; translation (rows, columns that content moves up and left by)
    and cutout (row, column of the square's centre), int32 [batch, 2].

  Raises:
    ValueError: `policy` names something that is not in POLICY.
  """
  unknown = sorted(set(policy) - set(POLICY))
  if unknown:
    raise ValueError(f'unknown augmentation {unknown}; choose from {POLICY}')
  sides = (size, size) if isinstance(size, int) else tuple(size)
  # One key a name, whatever the policy: leaving an augmentation out does not change the others' draws.
  keys = dict(zip(POLICY, jax.random.split(rng, len(POLICY))))
  shift = jnp.array([_pixels(side, TRANSLATION_RATIO) for side in sides])
  # An even square has its centre between pixels, hence one place more.
  places = jnp.array([side + 1 - _pixels(side, CUTOUT_RATIO) % 2 for side in sides])
  samplers = {
      'brightness': lambda key: jax.random.uniform(key, (batch,), minval=-0.5, maxval=0.5),
      'saturation': lambda key: jax.random.uniform(key, (batch,), minval=0.0, maxval=2.0),
      'contrast': lambda key: jax.random.uniform(key, (batch,), minval=0.5, maxval=1.5),
      'translation': lambda key: jax.random.randint(key, (batch, 2), -shift, shift + 1),
      'cutout': lambda key: jax.random.randint(key, (batch, 2), 0, places),
  }
  return {name: samplers[name](keys[name]) for name in POLICY if name in policy}


def rescaled(params: dict[str, jax.Array], side: int, other: int) -> dict[str, jax.Array]:
  """A draw for images of `side` pixels as one for images of `other`: the same shares of their sides."""
  return {name: value * other // side if name in ('translation', 'cutout') else value for name, value in params.items()}


def apply(images: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
  """The augmented images [B, H, W, C], differentiable in `images`; does what `params` has an entry for.

  `params` is what `draw` returns for the same B and (H, W). Any number of channels; with one channel
  saturation does nothing.
  """
  functions = {
      'brightness': brightened,
      'saturation': saturated,
      'contrast': contrasted,
      'translation': translated,
      'cutout': cut_out,
  }
  for name in POLICY:
    if name in params:
      images = functions[name](images, params[name])
  return images


def brightened(images, amount):
  """images + amount; amount [B]."""
  return images + _per_image(amount, images)


def saturated(images, factor):
  """Each pixel's distance to its mean over channels times factor [B]."""
  mean = jnp.mean(images, axis=-1, keepdims=True)
  return (images - mean) * _per_image(factor, images) + mean


def contrasted(images, factor):
  """Distance to the image's mean times factor [B]."""
  mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
  return (images - mean) * _per_image(factor, images) + mean


def translated(images, shift):
  """out[row, column] = images[row + shift[0], column + shift[1]], zero where that is outside; shift [B, 2]."""
  for axis in (1, 2):
    size = images.shape[axis]
    index = jnp.arange(size) + shift[:, axis - 1, None]
    shape = [len(images), 1, 1, 1]
    shape[axis] = size
    inside = ((index >= 0) & (index < size)).reshape(shape)
    moved = jnp.take_along_axis(images, jnp.clip(index, 0, size - 1).reshape(shape), axis)
    images = jnp.where(inside, moved, 0)
  return images


def cut_out(images, centre):
  """Zero in a square of CUTOUT_RATIO of the side around centre [B, 2]; it may reach over the border."""
  inside = True
  for axis in (1, 2):
    size = images.shape[axis]
    square = _pixels(size, CUTOUT_RATIO)
    start = centre[:, axis - 1] - square // 2
    distance = jnp.arange(size) - start[:, None]
    shape = [len(images), 1, 1, 1]
    shape[axis] = size
    inside = inside & ((distance >= 0) & (distance < square)).reshape(shape)
  return jnp.where(inside, 0, images)


def _pixels(side: int, ratio: float) -> int:
  """Whole pixels in `ratio` of a side, rounded half up."""
  return int(side * ratio + 0.5)


def _per_image(values, images):
  return values.astype(images.dtype)[:, None, None, None]
