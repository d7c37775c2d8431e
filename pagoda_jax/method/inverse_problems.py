"""Linear inverse problems: which noise makes the picture that this was measured of?

A generator G knows what pictures look like, so a measurement b = A x + error that leaves most of x open can be answered
by the noise z = sigma_max * w, w ~ N(0, I) of dimension d, that explains it (PaGoDA's training-free editing). For each
picture `objective` is minimised:

  ||A G(sigma_max w, y) - b||^2 / (2 error^2)  +  prior * (||w||^2 / 2 - (d - 1) ln ||w||)

The first term is the measurement's negative logarithmic likelihood with errors N(0, error^2). The second is that of
the norm ||w|| under the prior, which is chi-distributed: least at ||w|| = sqrt(d - 1), near which nearly all noise
lies; there it is set to 0. The density of w itself would pull it to 0, of which no generator was ever asked.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Measurement(NamedTuple):
  """The linear map A: channels mixed, then rows and columns of pixels, then some of the results left out.

  Attributes:
    sides: [m, S], applied to rows and to columns alike.
    mix: [C, c], of an image's channels.
    mask: [B or 1, m, m, 1], 1 where something was measured, 0 where not.
  """

  sides: jax.Array
  mix: jax.Array
  mask: jax.Array

  def __call__(self, images: jax.Array) -> jax.Array:
    """[B, m, m, c] of images [B, S, S, C]."""
    exact = jax.lax.Precision.HIGHEST
    return self.mask * jnp.einsum('ri,sj,bijk,kc->brsc', self.sides, self.sides, images, self.mix, precision=exact)


def whole(side: int, channels: int) -> Measurement:
  """All of the image."""
  return Measurement(np.eye(side, dtype=np.float32), np.eye(channels, dtype=np.float32), np.ones((1, 1, 1, 1), 'f'))


def gaussian_blur(side: int, sigma: float) -> np.ndarray:
  """[side, side]: a Gaussian of standard deviation sigma pixels; its part beyond a border lies on the border pixel."""
  offsets = np.arange(-int(np.ceil(4 * sigma)), int(np.ceil(4 * sigma)) + 1)
  weights = np.exp(-0.5 * (offsets / sigma) ** 2)
  matrix = np.zeros((side, side))
  for offset, weight in zip(offsets, weights / weights.sum()):
    np.add.at(matrix, (np.arange(side), np.clip(np.arange(side) + offset, 0, side - 1)), weight)
  return matrix.astype(np.float32)


def objective(generate: Callable, measure: Measurement, measured, w, error: float, prior: float):
  """(objective [B], images [B, S, S, C]); generate(w) -> images, w [B, R, R, C] of unit standard deviation."""
  images = generate(w)
  misfit = jnp.sum(jnp.square(measure(images) - measure.mask * measured), axis=(1, 2, 3)) / (2 * error**2)
  squared = jnp.sum(jnp.square(w), axis=(1, 2, 3))
  dimension = np.prod(w.shape[1:])
  likeliest = max(dimension - 1, 1)  # of the squared norm
  chi = (squared - likeliest) / 2 - (dimension - 1) / 2 * jnp.log(jnp.maximum(squared, 1e-12) / likeliest)
  return misfit + prior * chi, images


class Fit(NamedTuple):
  """How far the descent of every picture is."""

  w: jax.Array
  optimizer: optax.OptState
  best: jax.Array  # [B]: least objective so far
  best_w: jax.Array


def begin(w) -> Fit:
  """The state at w [B, R, R, C]."""
  return Fit(w, optax.adam(1.0).init(w), jnp.full(len(w), jnp.inf), w)


def descend(generate: Callable, measure: Measurement, measured, fit: Fit, steps: int, learning_rate, error,
            prior) -> Fit:
  """`steps` more of Adam; arguments as `objective`'s. Pictures do not see each other: Adam is one for each number.

  The learning rate, error and prior may be traced, so that one program serves all.
  """
  adam = optax.adam(learning_rate)

  def step(fit, _):
    def total(w):
      each, _ = objective(generate, measure, measured, w, error, prior)
      return each.sum(), each

    gradient, each = jax.grad(total, has_aux=True)(fit.w)
    better = each < fit.best
    best_w = jnp.where(better[:, None, None, None], fit.w, fit.best_w)
    update, optimizer = adam.update(gradient, fit.optimizer)
    best = jnp.where(better, each, fit.best)  # also after an objective that is no number
    return Fit(fit.w + update, optimizer, best, best_w), None

  return jax.lax.scan(step, fit, length=steps)[0]
