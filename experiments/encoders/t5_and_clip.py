"""Captions as DeepFloyd IF and PaGoDA's discriminator want them: T5-XXL's tokens, and CLIP ViT-L/14's vector.

  pagoda prepare ... --text_encoder=experiments.encoders.t5_and_clip:embed --text_length=77

from the root of the checkout. The published folders are named below. IF was trained with T5's outputs at all 77
places, so those of padding are kept, and no place is masked: 77 x 4096 numbers a caption, 631 kB in float16.
"""

import functools

import numpy as np

from pagoda_jax.weights import text_encoders

T5, CLIP = 't5:weights/t5_v1_1_xxl', 'clip:weights/clip_vit_l14'
LENGTH = 77  # of IF's captions, and the most that CLIP takes


class _Both:
  """A function of a list of texts, as config.text.encoder takes it; the weights are read at its first use."""

  @functools.cached_property
  def _encoders(self):
    return [text_encoders.open_encoder(name, LENGTH) for name in (T5, CLIP)]

  @property
  def sha256(self) -> str:
    """Of both encoders: part of the digest of what they embed."""
    return ' '.join(encoder.sha256 for encoder in self._encoders)

  def __call__(self, captions: list[str]) -> dict[str, np.ndarray]:
    """{'text': [N, 77, 4096], 'text_mask': [N, 77], all True, 'text_pooled': [N, 768]}; longer captions are cut."""
    t5, clip = self._encoders
    text = t5.embed(captions)[0]
    return {'text': text, 'text_mask': np.ones(text.shape[:2], bool), 'text_pooled': clip(captions)['text_pooled']}


embed = _Both()
