"""EfficientNet-lite (Tan & Le 2019, without squeeze-excite and swish), as four feature maps.

The TensorFlow variant that timm calls tf_efficientnet_lite0: asymmetric 'SAME' padding, batch norm
with eps 1e-3, ReLU6. The defaults are lite0; the wider lite1..4 differ in `repeats` and `widths`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    x = nn.Conv(
        width,
        (self.kernel, self.kernel),
        self.stride,
        'SAME',
        feature_group_count=width,
        use_bias=False,
        dtype=self.dtype,
        name='depthwise',
    )(x)
    x = nn.relu6(frozen_norm(self.dtype, 'depthwise_norm')(x))
    x = nn.Conv(self.features, (1, 1), use_bias=False, dtype=self.dtype, name='project')(x)
    x = frozen_norm(self.dtype, 'project_norm')(x)
    return x + skip if x.shape == skip.shape else x


def frozen_norm(dtype, name: str) -> nn.BatchNorm:
  """Batch norm with stored statistics and the eps of TensorFlow's networks (also Inception's)."""
  return nn.BatchNorm(use_running_average=True, epsilon=1e-3, dtype=dtype, name=name)
