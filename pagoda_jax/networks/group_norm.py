"""Group normalisation (Wu and He 2018) and what follows it in a block: scale, shift and an activation."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from pagoda_jax.networks import chips
from pagoda_jax.networks.place_sums import place_sums

# Of every nonlinearity of a U-Net; 'gelu' is the exact one.
ACTIVATIONS = {'': lambda x: x, 'silu': nn.silu, 'gelu': lambda x: nn.gelu(x, approximate=False)}


class GroupNorm(nn.GroupNorm):
  """`nn.GroupNorm`, then scale and shift of each image, then an activation."""

  @nn.compact
  def __call__(self, x: jax.Array, scale=None, shift=None, activation: str = '', bias=None) -> jax.Array:
    """act(norm(x + bias) (1 + scale) + shift) of x [B, ..., C].

    Args:
      scale, shift: float32 [B, 1, 1, C], or None: neither.
      activation: of ACTIVATIONS.
      bias: float32 [C], of the convolution that x comes from (`layers.BareConv`); None: x has it.
    """
    if self.dtype != jnp.bfloat16 or chips.chip() != 'nvidia':
      x = x if bias is None else (x + bias).astype(x.dtype)
      y = super().__call__(x)
      y = y if scale is None else y * (1 + scale) + shift
      return ACTIVATIONS[activation](y).astype(self.dtype)
    shape = len(x), x.shape[-1]
    whole = lambda v: jnp.broadcast_to(v, shape)
    gamma = whole(self.param('scale', self.scale_init, shape[1:], self.param_dtype))
    beta = whole(self.param('bias', self.bias_init, shape[1:], self.param_dtype))
    if scale is not None:
      factor = 1 + scale.reshape(shape)
      gamma, beta = gamma * factor, beta * factor + shift.reshape(shape)
    bias = whole(jnp.float32(0) if bias is None else bias)
    rows = x.reshape(len(x), -1, x.shape[-1]).astype(self.dtype)
    return normalized(rows, bias, gamma, beta, self.num_groups, self.epsilon, activation).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def normalized(x, bias, gamma, beta, groups: int, epsilon: float, activation: str) -> jax.Array:
  """act(gamma norm(x + bias) + beta) of x [B, N, C], in float32 and rounded to x's type, in the passes that GPUs are
  best at.

  With the sums of each channel's values and squares, all before act is one factor a and one summand b a channel and
  image. The backward pass needs two sums a channel more, of dy act' and of x dy act', and of the maps keeps x alone.
  The bias's gradient follows from these sums.

  Args:
    bias, gamma, beta: float32 [B, C].
    groups: that C is split into; mean and variance are a group's.
    activation: of ACTIVATIONS.
  """
  return _forward(x, bias, gamma, beta, groups, epsilon, activation)[0]


def _forward(x, bias, gamma, beta, groups, epsilon, activation):
  def terms(x, bias):
    values = x.astype(jnp.float32) + bias
    return values, values * values

  sums = place_sums(terms, (x,), (bias,))
  a, b = _factors(*sums, gamma, beta, x.shape[1], groups, epsilon)
  y = ACTIVATIONS[activation]((x.astype(jnp.float32) + bias[:, None]) * a[:, None] + b[:, None]).astype(x.dtype)
  return y, (x, bias, sums, gamma, beta)


def _backward(groups, epsilon, activation, kept, dy):
  x, bias, sums, gamma, beta = kept
  places = x.shape[1]
  factors = functools.partial(_factors, places=places, groups=groups, epsilon=epsilon)
  (a, b), pull = jax.vjp(factors, *sums, gamma, beta)
  b = b + a * bias  # of what is kept, the convolution's result without it

  def terms(x, dy, a, b):
    slope = _slope(x, dy, a, b, activation)
    return slope, slope * x.astype(jnp.float32)

  dy_sum, x_dy_sum = place_sums(terms, (x, dy), (a, b))
  d_sum, d_square, d_gamma, d_beta = pull((x_dy_sum + bias * dy_sum, dy_sum))
  d_bias = a * dy_sum + places * d_sum + 2 * d_square * sums[0]
  of_channels = lambda v: v[:, None]
  dx = (_slope(x, dy, of_channels(a), of_channels(b), activation) * of_channels(a)
        + of_channels(d_sum + 2 * d_square * bias) + of_channels(2 * d_square) * x.astype(jnp.float32))
  return dx.astype(x.dtype), d_bias, d_gamma, d_beta


normalized.defvjp(_forward, _backward)


def _slope(x, dy, a, b, activation):
  """dy act'(a x + b) in float32."""
  return dy.astype(jnp.float32) * DERIVATIVES[activation](x.astype(jnp.float32) * a + b)


def _gelu_derivative(z):
  """Phi(z) + z phi(z), Phi within 1e-7 (Abramowitz and Stegun, 7.1.26)."""
  density = jnp.exp(-0.5 * z * z)
  t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(z))
  powers = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
  tail = 0.5 * density * t * powers
  return jnp.where(z > 0, 1 - tail, tail) + z * density / math.sqrt(2 * math.pi)


def _silu_derivative(z):
  s = 1 / (1 + jnp.exp2(z * (-1 / math.log(2))))  # the exponential of 2 is one operation of a GPU
  return s * (1 + z * (1 - s))


# In operations that Triton has, which has no error function, and few: they bound the kernel of the sums.
DERIVATIVES = {'': jnp.ones_like, 'silu': _silu_derivative, 'gelu': _gelu_derivative}


def _factors(total, squares, gamma, beta, places: int, groups: int, epsilon: float):
  """(a, b), [B, C] each, with gamma norm(x) + beta = a x + b, of sums over all places of each channel."""
  batch, channels = total.shape
  size = channels // groups
  mean, square = (v.reshape(batch, groups, size).sum(-1) / (places * size) for v in (total, squares))
  inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + epsilon)
  mean, inverse = (jnp.repeat(v, size, axis=1) for v in (mean, inverse))
  return gamma * inverse, beta - gamma * mean * inverse
