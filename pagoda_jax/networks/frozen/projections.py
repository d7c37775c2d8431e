"""Random projections of a frozen network's maps (Projected GANs, Sauer et al. 2021; StyleGAN-XL).

Cross-channel mixing (a random 1x1 convolution of each map), then cross-scale mixing (a random feature
pyramid from the coarsest map down). The random weights are drawn once and never trained.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.networks.frozen.deit import DeiT
from pagoda_jax.networks.frozen.efficientnet_lite0 import EfficientNetLite

# torch's default initialisation of convolutions, U(-1, 1) / sqrt(fan_in): the projections stay as drawn.
_kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
NORMALIZATION = {
    'efficientnet_lite': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    'deit': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class ProjectedFeatures(nn.Module):
  """Images -> the projected maps that the discriminator and the reconstruction distance see.

  Attributes:
    backbone: module: normalised images -> maps, finest first.
    mean: of each channel, for images in [0, 1] (NORMALIZATION has the published networks').
    deviation: the same.
    reassembly_widths: for a transformer, whose four maps are of one size: the channels of the four
      scales that they are brought to first. None for a convolutional backbone.
    widths: channels of the maps after cross-channel mixing.
    mixed_widths: channels after cross-scale mixing, that is of the results.
    input_size: images are resized bilinearly to this side, as the release does below 256 px (to 224);
      None to take them as they are.
    dtype: of the computation.
  """

  backbone: nn.Module
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  deviation: tuple[float, ...] = (0.5, 0.5, 0.5)
  reassembly_widths: tuple[int, int, int, int] | None = None
  widths: tuple[int, ...] = (64, 128, 256, 512)
  mixed_widths: tuple[int, ...] = (64, 64, 128, 256)
  input_size: int | None = 224
  dtype: Any = jnp.float32

  def setup(self):
    if self.reassembly_widths is not None:
      self.reassembly = Reassembly(self.reassembly_widths, self.dtype)
    self.projection = RandomProjection(self.widths, self.mixed_widths, self.dtype)

  def __call__(self, images: jax.Array) -> list[jax.Array]:
    """images [B, H, W, 3 or 1 (gray)] in [-1, 1], already augmented -> maps of `mixed_widths`, finest first."""
    return self.stages_of_features(self.preprocessed(images))['mixed']

  def preprocessed(self, images: jax.Array) -> jax.Array:
    """What enters the backbone: normalised, then resized to `input_size`."""
    images = ((images + 1) / 2 - jnp.array(self.mean)) / jnp.array(self.deviation)
    if self.input_size is not None:
      images = resize.resize(images, self.input_size, 'bilinear')
    return images

  def stages_of_features(self, x: jax.Array) -> dict[str, list[jax.Array]]:
    """Maps of preprocessed images: 'raw' of the backbone, 'channels' (cross-channel mixed), 'mixed'."""
    raw = self.backbone(x)
    if self.reassembly_widths is not None:
      raw = self.reassembly(raw)
    channels, mixed = self.projection(raw)
    return {'raw': raw, 'channels': channels, 'mixed': mixed}


class Reassembly(nn.Module):
  """Four token grids of one size -> four scales: x4 and x2 transposed convolutions, as it is, stride 2."""

  widths: tuple[int, int, int, int]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, grids: Sequence[jax.Array]) -> list[jax.Array]:
    """[B, h, w, C] each -> [B, 4h, 4w, widths[0]], [B, 2h, 2w, ...], [B, h, w, ...], [B, h/2, w/2, ...]."""
    kwargs = {'kernel_init': _kernel_init, 'dtype': self.dtype}
    maps = []
    for index, (grid, width) in enumerate(zip(grids, self.widths)):
      x = nn.Conv(width, (1, 1), name=f'project{index}', **kwargs)(grid)
      if index < 2:
        side = (4, 2)[index]
        x = nn.ConvTranspose(width, (side, side), (side, side), 'VALID', name=f'resample{index}', **kwargs)(x)
      if index == 3:
        x = nn.Conv(width, (3, 3), 2, ((1, 1), (1, 1)), name='resample3', **kwargs)(x)
      maps.append(x)
    return maps


class RandomProjection(nn.Module):
  """Cross-channel mixing to `widths`, then cross-scale mixing to `mixed_widths`."""

  widths: tuple[int, ...] = (64, 128, 256, 512)
  mixed_widths: tuple[int, ...] = (64, 64, 128, 256)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Maps finest first, each half the size of the last -> (channel-mixed, scale-mixed at twice the size).

    Raises:
      ValueError: as many maps as widths are needed, and mixed_widths[i + 1] must be widths[i].
    """
    if not len(maps) == len(self.widths) == len(self.mixed_widths) or self.mixed_widths[1:] != self.widths[:-1]:
      raise ValueError(f'{len(maps)} maps cannot be mixed to widths {self.widths}, then {self.mixed_widths}')
    channels = [self._pointwise(width, f'channels{i}')(x) for i, (x, width) in enumerate(zip(maps, self.widths))]
    mixed, above = [], None
    for index in reversed(range(len(maps))):
      x = channels[index] if above is None else channels[index] + above
      x = resize.resize(x, (2 * x.shape[1], 2 * x.shape[2]), 'bilinear', centers='align_corners')
      above = self._pointwise(self.mixed_widths[index], f'scales{index}')(x)
      mixed.insert(0, above)
    return channels, mixed

  def _pointwise(self, width, name):
    return nn.Conv(width, (1, 1), kernel_init=_kernel_init, dtype=self.dtype, name=name)


def backbone(options: dict, **fields) -> EfficientNetLite | DeiT:
  """The module of `options`; `fields` are its others, such as dtype."""
  kind = {'efficientnet_lite': EfficientNetLite, 'deit': DeiT}[options['architecture']]
  return kind(**{name: value for name, value in options.items() if name != 'architecture'}, **fields)


def projected(options: dict, attention_form: str = 'auto', **fields) -> ProjectedFeatures:
  """The module of `options`, with the backbone's published normalisation; `fields`: input_size, dtype."""
  mean, deviation = NORMALIZATION[options['backbone']['architecture']]
  dtype = {'dtype': fields['dtype']} if 'dtype' in fields else {}
  form = {'attention_form': attention_form} if options['backbone']['architecture'] == 'deit' else {}
  module = backbone(options['backbone'], **dtype, **form)
  return ProjectedFeatures(**(options | {'backbone': module}), mean=mean, deviation=deviation, **fields)


def options_of_backbone(backbone: dict, width: int = 64) -> dict:
  """`projected`'s arguments for StyleGAN-XL's projections of a backbone.

  The published files hold backbones only: the projections are drawn by `projected(...).init`, and the
  backbone then put in by `convert.random_projections.with_backbone`.

  Args:
    backbone: what convert.timm.options returns.
    width: channels of the finest map; the others have 2, 4 and 8 times as many before mixing scales.
  """
  reassembly = None
  if backbone['architecture'] == 'deit':
    reassembly = tuple(backbone['width'] // n for n in (8, 4, 2, 1))
  return {
      'backbone': backbone,
      'reassembly_widths': reassembly,
      'widths': (width, 2 * width, 4 * width, 8 * width),
      'mixed_widths': (width, width, 2 * width, 4 * width),
  }
