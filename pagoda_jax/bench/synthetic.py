"""Random numbers in place of pictures, noise and weights: what a program is measured with where no run has left any."""

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.networks import chips
from pagoda_jax.planning import programs
from pagoda_jax.stages import models
from pagoda_jax.training import first_state


def weights(shapes, seed: int = 0):
  """A tree of NumPy arrays of the shapes of parameters: sizes at which activations neither vanish nor overflow.

  Matrices and kernels are normal with variance 1 / fan-in, vectors (biases, scales, variances) one.
  """
  rng = np.random.default_rng(seed)

  def leaf(shape):
    if len(shape.shape) < 2 or not jnp.issubdtype(shape.dtype, jnp.floating):
      return np.ones(shape.shape, shape.dtype)
    fan_in = np.prod(shape.shape[:-1])
    return (rng.standard_normal(shape.shape, np.float32) / np.float32(np.sqrt(fan_in))).astype(shape.dtype, copy=False)

  return jax.tree.map(leaf, shapes)


def batch(config, program: programs.Program, seed: int = 0) -> dict[str, np.ndarray]:
  """A batch of a program: random pictures, classes and texts, noise of the prior."""
  rng, classes = np.random.default_rng(seed), config.data.num_classes

  def values(name, like):
    shape = like.shape
    if name.endswith('image') and like.dtype == np.uint8:
      return rng.integers(0, 256, shape, np.uint8)
    if name.endswith('label'):
      return rng.integers(0, classes, shape, np.int32) if classes else np.full(shape, -1, np.int32)
    if name == 'key':
      return np.arange(shape[0], dtype=np.int32)
    if name.endswith('caption_kind'):
      return np.zeros(shape, np.int32)
    if name.endswith('text_mask'):
      return np.ones(shape, bool)
    if name == 'omega':
      return np.full(shape, models.law_of(config).nearest(1.0), np.float32)
    scale = config.diffusion.sigma_max if name == 'noise' else 1.0  # latents, embeddings
    return (scale * rng.standard_normal(shape, np.float32)).astype(like.dtype)

  return {name: values(name, leaf) for name, leaf in program.batch.items()}


def state(config, name: str, program: programs.Program):
  """The state that a program of phase `name` begins with, as host arrays."""
  if not program.trains:
    return weights(program.state)
  discriminator = weights(getattr(program.state, 'discriminator', None), seed=1)
  with chips.on_cpu():  # what is made here shall not count as memory of the step
    params = weights(first_state.params_shapes(config, name))
    return jax.device_get(first_state.begun(config, name, params, discriminator))
