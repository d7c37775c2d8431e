"""EfficientNet-lite (Tan & Le 2019, without squeeze-excite and swish), as four feature maps.

The TensorFlow variant that timm calls tf_efficientnet_lite0: asymmetric 'SAME' padding, batch norm
with eps 1e-3, ReLU6. The defaults are lite0; the wider lite1..4 differ in `repeats` and `widths`.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.networks import chips

STAGES_OF_MAPS = (1, 2, 4, 6)  # at strides 4, 8, 16 and 32


class EfficientNetLite(nn.Module):
  """Maps after the stages that end strides 4, 8, 16 and 32; always in evaluation mode.

  Variables: 'params', and 'batch_stats' that is only read.
  """

  stem: int = 32
  repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
  widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
  expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
  kernels: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
  strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """x [B, H, W, 3], normalised with mean and deviation 0.5 -> maps [B, H/4, W/4, widths[1]], ..."""
    x = nn.Conv(self.stem, (3, 3), 2, 'SAME', use_bias=False, dtype=self.dtype, name='stem')(x)
    x = nn.relu6(frozen_norm(self.dtype, 'stem_norm')(x))
    maps = []
    stages = zip(self.repeats, self.widths, self.expansions, self.kernels, self.strides)
    for stage, (repeats, width, expansion, kernel, stride) in enumerate(stages):
      for index in range(repeats):
        block = InvertedResidual(
            width, expansion, kernel, stride if index == 0 else 1, self.dtype, name=f'stage{stage}_block{index}'
        )
        x = block(x)
      if stage in STAGES_OF_MAPS:
        maps.append(x)
    return maps


class InvertedResidual(nn.Module):
  """Expansion (absent when it is 1), depthwise convolution, linear projection; residual where shapes agree."""

  features: int
  expansion: int
  kernel: int
  stride: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    skip, width = x, x.shape[-1] * self.expansion
    if self.expansion != 1:
      x = nn.Conv(width, (1, 1), use_bias=False, dtype=self.dtype, name='expand')(x)
      x = nn.relu6(frozen_norm(self.dtype, 'expand_norm')(x))
    x = Depthwise(self.kernel, self.stride, self.dtype, name='depthwise')(x)
    x = nn.relu6(frozen_norm(self.dtype, 'depthwise_norm')(x))
    x = nn.Conv(self.features, (1, 1), use_bias=False, dtype=self.dtype, name='project')(x)
    x = frozen_norm(self.dtype, 'project_norm')(x)
    return x + skip if x.shape == skip.shape else x


class Depthwise(nn.Module):
  """A convolution of each channel by itself, padded as 'SAME'; sums are float32.

  On a CPU it is written as a sum of shifted products, for which XLA makes one loop: its convolution takes ten times as
  long there, and its gradient too.
  """

  kernel: int
  stride: int
  dtype: Any = jnp.float32
  use_bias: bool = False

  @nn.compact
  def __call__(self, x):
    side, width = self.kernel, x.shape[-1]
    kernel = self.param('kernel', nn.initializers.lecun_normal(), (side, side, 1, width)).astype(self.dtype)
    apply = shifted_products if chips.chip() == 'cpu' else depthwise_convolution
    y = apply(x.astype(self.dtype), kernel, self.stride)
    return y + self.param('bias', nn.initializers.zeros, (width,)).astype(self.dtype) if self.use_bias else y


def depthwise_convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """x [B, H, W, C] and kernel [K, K, 1, C] of one type -> [B, H/stride, W/stride, C], padded as 'SAME'."""
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=x.shape[-1]
  )


def shifted_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """The same as `depthwise_convolution`."""
  dtype, sides = x.dtype, x.shape[1:3]
  pads = jax.lax.padtype_to_pads(sides, kernel.shape[:2], (stride, stride), 'SAME')
  x = jnp.pad(x.astype(jnp.float32), [(0, 0), *pads, (0, 0)])
  kernel = kernel.astype(jnp.float32)
  ends = [-(-side // stride) * stride - stride + 1 for side in sides]
  total = 0.0
  for row, column in itertools.product(range(kernel.shape[0]), range(kernel.shape[1])):
    total += x[:, row : row + ends[0] : stride, column : column + ends[1] : stride] * kernel[row, column, 0]
  return total.astype(dtype)


def frozen_norm(dtype, name: str) -> nn.BatchNorm:
  """Batch norm with stored statistics and the eps of TensorFlow's networks (also Inception's)."""
  return nn.BatchNorm(use_running_average=True, epsilon=1e-3, dtype=dtype, name=name)
