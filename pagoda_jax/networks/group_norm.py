"""Group normalisation (Wu and He 2018) and what follows it in a block: scale, shift and an activation."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from pagoda_jax.networks import chips

# Of every nonlinearity of a U-Net; 'gelu' is the exact one.
ACTIVATIONS = {'': lambda x: x, 'silu': nn.silu, 'gelu': lambda x: nn.gelu(x, approximate=False)}


class GroupNorm(nn.GroupNorm):
  """`nn.GroupNorm`, then scale and shift of each image, then an activation."""

  @nn.compact
  def __call__(self, x: jax.Array, scale=None, shift=None, activation: str = '') -> jax.Array:
    """act(norm(x) (1 + scale) + shift) of x [B, ..., C]; scale and shift float32 [B, 1, 1, C], or None: neither."""
    if self.dtype != jnp.bfloat16 or chips.chip() != 'nvidia':
      y = super().__call__(x)
      y = y if scale is None else y * (1 + scale) + shift
      return ACTIVATIONS[activation](y).astype(self.dtype)
    shape = len(x), x.shape[-1]
    gamma = jnp.broadcast_to(self.param('scale', self.scale_init, shape[1:], self.param_dtype), shape)
    beta = jnp.broadcast_to(self.param('bias', self.bias_init, shape[1:], self.param_dtype), shape)
    if scale is not None:
      factor = 1 + scale.reshape(shape)
      gamma, beta = gamma * factor, beta * factor + shift.reshape(shape)
    rows = x.reshape(len(x), -1, x.shape[-1]).astype(self.dtype)
    return normalized(rows, gamma, beta, self.num_groups, self.epsilon, activation).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalized(x, gamma, beta, groups: int, epsilon: float, activation: str) -> jax.Array:
  """act(gamma norm(x) + beta) of x [B, N, C], in float32 and rounded to x's type, in the passes that GPUs are best at.

  With the sums of each channel's values and squares, all before act is one factor a and one summand b a channel and
  image. The backward pass needs two sums a channel more, of dy act' and of x dy act', and of the maps keeps x alone.

  Args:
    gamma, beta: float32 [B, C].
    groups: that C is split into; mean and variance are a group's.
    activation: of ACTIVATIONS.
  """
  return _forward(x, gamma, beta, groups, epsilon, activation)[0]


def _forward(x, gamma, beta, groups, epsilon, activation):
  values = x.astype(jnp.float32)
  sums = values.sum(1), (values * values).sum(1)
  a, b = _factors(*sums, gamma, beta, x.shape[1], groups, epsilon)
  return ACTIVATIONS[activation](values * a[:, None] + b[:, None]).astype(x.dtype), (x, sums, gamma, beta)


def _backward(groups, epsilon, activation, kept, dy):
  x, sums, gamma, beta = kept
  factors = functools.partial(_factors, places=x.shape[1], groups=groups, epsilon=epsilon)
  (a, b), pull = jax.vjp(factors, *sums, gamma, beta)
  values, of_channels = x.astype(jnp.float32), lambda v: v[:, None]
  slope, = jax.vjp(ACTIVATIONS[activation], values * of_channels(a) + of_channels(b))[1](dy.astype(jnp.float32))
  d_sum, d_square, d_gamma, d_beta = pull(((slope * values).sum(1), slope.sum(1)))
  dx = slope * of_channels(a) + of_channels(d_sum) + 2 * of_channels(d_square) * values
  return dx.astype(x.dtype), d_gamma, d_beta


normalized.defvjp(_forward, _backward)


def _factors(total, squares, gamma, beta, places: int, groups: int, epsilon: float):
  """(a, b), [B, C] each, with gamma norm(x) + beta = a x + b, of sums over all places of each channel."""
  batch, channels = total.shape
  size = channels // groups
  mean, square = (v.reshape(batch, groups, size).sum(-1) / (places * size) for v in (total, squares))
  inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + epsilon)
  mean, inverse = (jnp.repeat(v, size, axis=1) for v in (mean, inverse))
  return gamma * inverse, beta - gamma * mean * inverse
