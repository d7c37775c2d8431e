"""ConvNeXt V2 (Woo et al. 2023), without its classifier."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.networks.frozen.efficientnet_lite0 import Depthwise
from pagoda_jax.networks.layers import Patches, zeros_init

KERNEL = 7  # side of the depthwise convolutions
EXPANSION = 4  # of a block's MLP


class ConvNeXtV2(nn.Module):
  """The last map, before the norm that the classifier begins with. The defaults are ConvNeXt V2-B.

  Attributes:
    depths, widths: blocks and channels of each stage; the first is at stride 4, each further one at twice the last's.
  """

  depths: tuple[int, ...] = (3, 3, 27, 3)
  widths: tuple[int, ...] = (128, 256, 512, 1024)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, H, W, 3], ImageNet-normalised -> [B, H/32, W/32, widths[-1]]."""
    for stage, (depth, width) in enumerate(zip(self.depths, self.widths)):
      if stage:
        x = _norm(f'stage{stage}_norm')(x)
      x = Patches(width, 2 if stage else 4, name=f'stage{stage}_patches')(x)
      if not stage:
        x = _norm('stage0_norm')(x)
      for index in range(depth):
        x = Block(name=f'stage{stage}_block{index}')(x)
    return x


class Block(nn.Module):
  """What is added to x [B, H, W, C]: depthwise convolution, norm and an MLP that normalises its responses."""

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    h = _norm('norm')(Depthwise(KERNEL, 1, use_bias=True, name='depthwise')(x))
    h = nn.gelu(nn.Dense(EXPANSION * width, name='mlp_in')(h), approximate=False)
    return x + nn.Dense(width, name='mlp_out')(ResponseNorm(name='response_norm')(h))


class ResponseNorm(nn.Module):
  """Global response normalisation (section 3.2 there): each channel by its size over the picture, as a share of the
  channels' mean size."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, H, W, C] -> the same shape."""
    scale, bias = (self.param(name, zeros_init, (x.shape[-1],)) for name in ('scale', 'bias'))
    size = jnp.sqrt(jnp.sum(x**2, axis=(1, 2), keepdims=True))
    return x + scale * (x * (size / (jnp.mean(size, axis=-1, keepdims=True) + 1e-6))) + bias


def _norm(name):
  return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)
