"""Adversarial and reconstruction losses, and the weight between them.

Everything is computed and returned in float32, whatever the dtype of the network outputs. Distances
are per sample, [B]: the caller takes the mean over the global batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pagoda_jax.networks.frozen.maps import Features, check_pairs, unit_normalize


def hinge_discriminator(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
  """mean(relu(1 - real)) + mean(relu(1 + fake)); scalar, from logits of any shape."""
  real, fake = _float32(real_logits), _float32(fake_logits)
  return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))


def hinge_generator(fake_logits: jax.Array) -> jax.Array:
  """-mean(fake); scalar, from logits of any shape."""
  return -jnp.mean(_float32(fake_logits))


def relativistic_discriminator(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
  """mean(softplus(fake - real)): how little reals outdo the fakes beside them.

  The logistic loss of E f(D(G(z)) - D(x)), R3GAN's (Huang et al. 2024, section 2; Jolicoeur-Martineau 2018). Scalar,
  from logits of one shape: each is compared with the one in its place.

  Raises:
    ValueError: they are of two shapes.
  """
  check_pairs([real_logits], [fake_logits])
  return jnp.mean(jax.nn.softplus(_float32(fake_logits) - _float32(real_logits)))


def relativistic_generator(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
  """mean(softplus(real - fake)), the discriminator's with the players changed over."""
  return relativistic_discriminator(fake_logits, real_logits)


def with_gradient_penalty(judge: Callable[[jax.Array], tuple[jax.Array, Any]], images: jax.Array):
  """Logits, and how fast they change with the pixels: R1 of real images, R2 of fakes.

  E |grad_x D(x)|^2, which R3GAN (Huang et al. 2024, section 2; Mescheder et al. 2018) weighs gamma / 2.

  Args:
    judge: judge(images) -> (logits [B, n], anything).
    images: [B, H, W, C].

  Returns:
    (logits, what else judge returns, the penalty: the mean over images of the squared norm of the gradient of the
    image's mean logit, float32). Where a batch's images share statistics, the gradient is that of the sum over images.
  """

  def total(images):
    logits, rest = judge(images)
    return jnp.sum(jnp.mean(logits, axis=1)), (logits, rest)

  gradient, (logits, rest) = jax.grad(total, has_aux=True)(images)
  return logits, rest, jnp.sum(_float32(gradient) ** 2) / len(images)


def projected_distance(features_a: Features, features_b: Features) -> jax.Array:
  """Distance of two images in the projected discriminator's feature space (PaGoDA's release), [B].

  Per map: unit-normalised over channels, squared difference, mean over space, sum over channels;
  summed over the maps.

  Args:
    features_a: maps [B, H, W, C] of one or several feature networks, in a flat list; any sizes.
    features_b: the same maps of the other images.

  Raises:
    ValueError: the lists differ in length or in a map's shape.
  """
  check_pairs(features_a, features_b)
  squared = [(unit_normalize(a) - unit_normalize(b)) ** 2 for a, b in zip(features_a, features_b)]
  return sum(jnp.mean(jnp.sum(difference, axis=-1), axis=(1, 2)) for difference in squared)


def pixel_distance(
    images_a: jax.Array,
    images_b: jax.Array,
    scales: Mapping[int, float] | Sequence[int] = (1,),
    huber: float | None = None,
) -> jax.Array:
  """Difference of two image batches at several resolutions, [B]: for runs without feature networks.

  Args:
    images_a: [B, H, W, C].
    images_b: [B, H, W, C].
    scales: factors of average pooling, each dividing H and W; a mapping gives each a weight (else 1).
    huber: None for the mean squared difference, or the constant c of the pseudo-Huber distance
      sqrt(d^2 + c^2) - c of each pixel, also averaged.

  Returns:
    Sum over scales of weight * mean over pixels and channels.

  Raises:
    ValueError: shapes differ, or a scale does not divide them.
  """
  check_pairs([images_a], [images_b])
  if not isinstance(scales, Mapping):
    scales = {scale: 1.0 for scale in scales}
  difference = _float32(images_a) - _float32(images_b)
  total = jnp.zeros(len(difference), jnp.float32)  # jax_enable_x64 makes float64 the default
  for scale, weight in scales.items():
    pooled = _average_pooled(difference, scale)
    penalty = pooled**2 if huber is None else jnp.sqrt(pooled**2 + huber**2) - huber
    total += weight * jnp.mean(penalty, axis=(1, 2, 3))
  return total


def adaptive_weight(
    rec_norm: jax.Array,
    adv_norm: jax.Array,
    scale: float = 1.0,
    low: float = 0.01,
    high: float = 10.0,
    eps: float = 1e-4,
) -> jax.Array:
  """Weight of the adversarial loss, so that it pulls at the last layer about as hard as the other one.

  scale * clip(rec_norm / (adv_norm + eps), low, high): PaGoDA section 4.1 with the release's plain
  norms (the paper prints squares). Scalar float32, without gradient.

  Args:
    rec_norm: L2 norm of the reconstruction loss's gradient with respect to the last layer's weight.
    adv_norm: the same of the adversarial loss.
    scale: the fixed factor (0.2 when distilling).
    low: smallest ratio.
    high: largest ratio.
    eps: keeps the ratio finite.
  """
  ratio = _float32(rec_norm) / (_float32(adv_norm) + eps)
  return jax.lax.stop_gradient(scale * jnp.clip(ratio, low, high))


def weighting(snr: jax.Array, kind: str, sigma_data: float = 0.5) -> jax.Array:
  """Weight of the denoising loss at signal-to-noise ratio `snr` = 1 / sigma^2 (any shape), float32.

  Args:
    snr: positive.
    kind: 'karras_weight' is EDM's own (Karras et al. 2022, table 1; 'karras' is the same thing written
      in snr); 'snr', 'snr+1', 'truncated-snr', 'uniform', 'scaled_karras_weight' and 'sq-t-inverse'
      are the alternatives of the Consistency Models and PaGoDA code.
    sigma_data: standard deviation of the data.

  Raises:
    ValueError: another `kind`.
  """
  snr = _float32(snr)
  sigma = snr**-0.5
  weights = {
      'snr': lambda: snr,
      'snr+1': lambda: snr + 1,
      'karras': lambda: snr + 1 / sigma_data**2,
      'truncated-snr': lambda: jnp.maximum(snr, 5),
      'uniform': lambda: jnp.ones_like(snr),
      'karras_weight': lambda: (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2,
      'scaled_karras_weight': lambda: (sigma**2 + (sigma_data * (1 - sigma)) ** 2) / (sigma * sigma_data) ** 2,
      'sq-t-inverse': lambda: snr**-0.25,
  }
  if kind not in weights:
    raise ValueError(f'unknown weighting {kind!r}; choose from {tuple(weights)}')
  return weights[kind]()


def _average_pooled(images, factor):
  batch, height, width, channels = images.shape
  if height % factor or width % factor:
    raise ValueError(f'scale {factor} does not divide {height}x{width} images')
  blocks = images.reshape(batch, height // factor, factor, width // factor, factor, channels)
  return jnp.mean(blocks, axis=(2, 4))


def _float32(x):
  return jnp.asarray(x, jnp.float32)
