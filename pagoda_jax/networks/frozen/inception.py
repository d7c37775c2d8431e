"""Inception-v3 as used for FID: the 2015 TensorFlow graph, with its deviations from the paper's network.

They are: average pools that leave the padding out of the mean, a max pool in the last block's pooling
branch, and 1008 logits of which metrics take the ones without bias. Modules are named as in
torchvision and pytorch-fid.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.networks.frozen.efficientnet_lite0 import frozen_norm

INPUT_SIZE = 299
GRAPHS = ('tensorflow', 'pytorch_fid', 'clean_fid')
SPATIAL = 7  # channels of Mixed_6d that sFID is of, as the ADM evaluator takes them


class InceptionV3(nn.Module):
  """Features for FID, logits for the Inception Score; always in evaluation mode.

  Attributes:
    classes: number of logits.
    graph: one of GRAPHS. 'tensorflow' for the numbers that papers report: legacy bilinear resize, then
      (uint8 - 128) / 128. 'pytorch_fid' for that package's: half-pixel bilinear resize of [-1, 1].
      'clean_fid' for that package's 'clean' mode: Pillow's bicubic resize of floats, then (x - 128) / 128.
      The weights are the same; the features are not, so statistics of two of them must not be mixed.
    dtype: of the computation. Where an accelerator multiplies float32 at a lower precision by default,
      published numbers need jax.default_matmul_precision('highest') around the call.
  """

  classes: int = 1008
  graph: str = 'tensorflow'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, Any]:
    """images [B, H, W, 3 or 1 (gray)] in [-1, 1] of any size.

    Returns:
      'features' [B, 2048] (pool3) and 'logits' [B, classes] without bias, float32; 'bias' [classes],
      to be added for the true logits; 'maps': after the two max pools and before Mixed_7a; 'spatial' [B, 2023]: the
      first channels of Mixed_6d (`mixed_6/conv` of the TensorFlow graph), row by row.
    """
    maps = [self._stem(self.preprocessed(images))]
    x = _BasicConv(80, 1, dtype=self.dtype, name='Conv2d_3b_1x1')(maps[0])
    x = _BasicConv(192, 3, padding='VALID', dtype=self.dtype, name='Conv2d_4a_3x3')(x)
    maps.append(_max_pool(x))
    deep, spatial = self._middle(maps[1])
    maps.append(deep)
    x = _Mixed7a(self.dtype, name='Mixed_7a')(maps[2])
    x = _Mixed7('average', self.dtype, name='Mixed_7b')(x)
    x = _Mixed7('max', self.dtype, name='Mixed_7c')(x)
    features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    # Not nn.Dense: metrics want the logits with and without the bias.
    kernel = self.param('fc_kernel', nn.initializers.lecun_normal(), (features.shape[-1], self.classes))
    bias = self.param('fc_bias', nn.initializers.zeros, (self.classes,))
    return {'features': features, 'logits': features @ kernel, 'bias': bias, 'maps': maps, 'spatial': spatial}

  def preprocessed(self, images: jax.Array) -> jax.Array:
    """What enters the first convolution, [B, 299, 299, 3]."""
    if self.graph == 'pytorch_fid':
      return _repeated_gray(resize.resize(images, INPUT_SIZE, 'bilinear'))
    if self.graph == 'tensorflow':
      pixels = resize.resize((images + 1) * 127.5, INPUT_SIZE, 'bilinear', centers='legacy')
      return _repeated_gray((pixels - 128) / 128)
    if self.graph == 'clean_fid':
      pixels = resize.resize((images + 1) * 127.5, INPUT_SIZE, 'bicubic', antialias=True)
      return _repeated_gray((jnp.clip(pixels, 0, 255) - 128) / 128)
    raise ValueError(f'unknown graph {self.graph!r}; choose from {GRAPHS}')

  def _stem(self, x):
    x = _BasicConv(32, 3, 2, 'VALID', self.dtype, name='Conv2d_1a_3x3')(x)
    x = _BasicConv(32, 3, padding='VALID', dtype=self.dtype, name='Conv2d_2a_3x3')(x)
    return _max_pool(_BasicConv(64, 3, dtype=self.dtype, name='Conv2d_2b_3x3')(x))

  def _middle(self, x):
    for letter, pooled in (('b', 32), ('c', 64), ('d', 64)):
      x = _Mixed5(pooled, self.dtype, name=f'Mixed_5{letter}')(x)
    x = _Mixed6a(self.dtype, name='Mixed_6a')(x)
    for letter, width in (('b', 128), ('c', 160), ('d', 160), ('e', 192)):
      x = _Mixed6(width, self.dtype, name=f'Mixed_6{letter}')(x)
      if letter == 'd':
        spatial = x[..., :SPATIAL].astype(jnp.float32).reshape(len(x), -1)
    return x, spatial


class _BasicConv(nn.Module):
  """Convolution without bias, batch norm, ReLU. 'SAME' is torch's symmetric padding for odd kernels."""

  features: int
  kernel: int | tuple[int, int]
  stride: int = 1
  padding: str = 'SAME'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
    x = nn.Conv(self.features, kernel, self.stride, self.padding, use_bias=False, dtype=self.dtype, name='conv')(x)
    return nn.relu(frozen_norm(self.dtype, 'bn')(x))


def _chain(x, dtype, *convolutions):
  """Convolutions one after the other, each (name, features, kernel[, stride, padding]); in a compact method."""
  for name, *arguments in convolutions:
    x = _BasicConv(*arguments, dtype=dtype, name=name)(x)
  return x


class _Mixed5(nn.Module):
  pooled: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    branches = [
        _chain(x, self.dtype, ('branch1x1', 64, 1)),
        _chain(x, self.dtype, ('branch5x5_1', 48, 1), ('branch5x5_2', 64, 5)),
        _chain(x, self.dtype, ('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3), ('branch3x3dbl_3', 96, 3)),
        _chain(_average_pool(x), self.dtype, ('branch_pool', self.pooled, 1)),
    ]
    return jnp.concatenate(branches, axis=-1)


class _Mixed6a(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x):
    last = ('branch3x3dbl_3', 96, 3, 2, 'VALID')
    branches = [
        _chain(x, self.dtype, ('branch3x3', 384, 3, 2, 'VALID')),
        _chain(x, self.dtype, ('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3), last),
        _max_pool(x),
    ]
    return jnp.concatenate(branches, axis=-1)


class _Mixed6(nn.Module):
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    width, row, column = self.width, (1, 7), (7, 1)
    double = (
        ('branch7x7dbl_1', width, 1),
        ('branch7x7dbl_2', width, column),
        ('branch7x7dbl_3', width, row),
        ('branch7x7dbl_4', width, column),
        ('branch7x7dbl_5', 192, row),
    )
    branches = [
        _chain(x, self.dtype, ('branch1x1', 192, 1)),
        _chain(x, self.dtype, ('branch7x7_1', width, 1), ('branch7x7_2', width, row), ('branch7x7_3', 192, column)),
        _chain(x, self.dtype, *double),
        _chain(_average_pool(x), self.dtype, ('branch_pool', 192, 1)),
    ]
    return jnp.concatenate(branches, axis=-1)


class _Mixed7a(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x):
    separable = (
        ('branch7x7x3_1', 192, 1),
        ('branch7x7x3_2', 192, (1, 7)),
        ('branch7x7x3_3', 192, (7, 1)),
        ('branch7x7x3_4', 192, 3, 2, 'VALID'),
    )
    branches = [
        _chain(x, self.dtype, ('branch3x3_1', 192, 1), ('branch3x3_2', 320, 3, 2, 'VALID')),
        _chain(x, self.dtype, *separable),
        _max_pool(x),
    ]
    return jnp.concatenate(branches, axis=-1)


class _Mixed7(nn.Module):
  pool: str
  dtype: Any

  @nn.compact
  def __call__(self, x):
    single = _chain(x, self.dtype, ('branch3x3_1', 384, 1))
    double = _chain(x, self.dtype, ('branch3x3dbl_1', 448, 1), ('branch3x3dbl_2', 384, 3))
    pooled = _average_pool(x) if self.pool == 'average' else _max_pool(x, stride=1, padding='SAME')
    branches = [
        _chain(x, self.dtype, ('branch1x1', 320, 1)),
        _chain(single, self.dtype, ('branch3x3_2a', 384, (1, 3))),
        _chain(single, self.dtype, ('branch3x3_2b', 384, (3, 1))),
        _chain(double, self.dtype, ('branch3x3dbl_3a', 384, (1, 3))),
        _chain(double, self.dtype, ('branch3x3dbl_3b', 384, (3, 1))),
        _chain(pooled, self.dtype, ('branch_pool', 192, 1)),
    ]
    return jnp.concatenate(branches, axis=-1)


def _average_pool(x):
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _max_pool(x, stride=2, padding='VALID'):
  return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _repeated_gray(x):
  return jnp.broadcast_to(x, (*x.shape[:-1], 3))
