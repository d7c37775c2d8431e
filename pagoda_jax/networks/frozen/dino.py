"""DINO ViT-S/16 (Caron et al. 2021), as the tokens that StyleGAN-T's discriminator sees (Sauer et al. 2023)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.networks.frozen import projections


class DINO(nn.Module):
  """Images -> the patches' tokens at some depths of the transformer, to each the class token added.

  Attributes:
    options: of the transformer, as timm.options finds them in its file.
    taps: after how many blocks; 0: the embedded patches, with their positions. StyleGAN-T's by default.
    input_size: images are resized bilinearly to this side, None to take them as they are. StyleGAN-T takes all with
      224 px, larger ones by averaging or as crops.
    dtype: of the computation.
    attention_form: one of attention.FORMS.
  """

  options: Mapping[str, Any]
  taps: tuple[int, ...] = (0, 3, 6, 9, 12)
  input_size: int | None = 224
  dtype: Any = jnp.float32
  attention_form: str = 'auto'

  def setup(self):
    self.backbone = projections.backbone(
      self.options, resized_positions=bicubic_positions, dtype=self.dtype, attention_form=self.attention_form)

  def __call__(self, images: jax.Array) -> list[jax.Array]:
    """images [B, H, W, 3 or 1 (gray)] in [-1, 1], already augmented -> [B, N, width] for each of `taps`, row by row."""
    mean, deviation = projections.NORMALIZATION['deit']
    images = ((images + 1) / 2 - jnp.array(mean)) / jnp.array(deviation)
    if self.input_size is not None:
      images = resize.resize(images, self.input_size, 'bilinear')
    sequences = self.backbone.tokens(images)
    return [with_readout(sequences[tap]) for tap in self.taps]


def with_readout(tokens: jax.Array) -> jax.Array:
  """[B, 1 + N, C] -> [B, N, C]: the first token added to the others; in float32, as its gradient sums over them."""
  return (tokens[:, 1:] + tokens[:, :1].astype(jnp.float32)).astype(tokens.dtype)


def bicubic_positions(grid: jax.Array, height: int, width: int) -> jax.Array:
  """The position grid [h, w, C] of images of another size, as DINO's own code makes it.

  It asks torch for a tenth of a token more than it takes, so that its rounding cannot lose one, and torch samples at
  the scale that it was asked for.
  """
  if grid.shape[:2] == (height, width):
    return grid
  rows, columns = (
    jnp.asarray(resize.resize_matrix(old, new, 'bicubic', scale=(new + 0.1) / old), grid.dtype)
    for old, new in zip(grid.shape, (height, width))
  )
  return jnp.einsum('hi,wj,ijc->hwc', rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
