"""DINOv2 (Oquab et al. 2023): the class token of a vision transformer, as FD-DINOv2 is of (Stein et al. 2023)."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pagoda_jax.data import resize
from pagoda_jax.networks.frozen import dino, projections


class DINOv2(nn.Module):
  """8-bit images -> features.

  Attributes:
    options: of the transformer, as convert.dinov2.options finds them in its file.
    input_size: images are resized to this side as dgm-eval does it: Pillow's bicubic filter, in 8 bits.
    resized_positions: as in DeiT.
    dtype: of the computation.
    attention_form: one of attention.FORMS.
  """

  options: Mapping[str, Any]
  input_size: int = 224
  resized_positions: Callable[[jax.Array, int, int], jax.Array] = dino.bicubic_positions
  dtype: Any = jnp.float32
  attention_form: str = 'auto'

  def setup(self):
    self.backbone = projections.backbone(
      self.options, resized_positions=self.resized_positions, dtype=self.dtype, attention_form=self.attention_form)
    self.norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32)

  def __call__(self, images: jax.Array) -> jax.Array:
    """images uint8 [B, H, W, 3 or 1 (gray)] -> the class token after the last norm, [B, width] float32."""
    pixels = resize.resize_as_pillow(images, self.input_size)
    mean, deviation = projections.NORMALIZATION['deit']
    return self.features((pixels / 255 - jnp.array(mean)) / jnp.array(deviation))

  def features(self, x: jax.Array) -> jax.Array:
    """The same of what enters the transformer: [B, H, W, 3], normalised, sides a multiple of the patch's."""
    return self.norm(self.backbone.tokens(x)[-1][:, 0].astype(jnp.float32))
