"""Prompts as a finished generator takes them."""

from collections.abc import Sequence

import numpy as np
from absl import logging

from pagoda_jax.weights import text_encoders


def encode(config, prompts: Sequence[str]) -> dict[str, np.ndarray]:
  """Embeddings of prompts by an experiment's encoder; '' is the empty caption, which stands for no text.

  Args:
    config: an experiment with captions; of a work directory, config.text.sha256 says which encoder it was trained on.
    prompts: the texts; of too long ones the end is left out, with a warning.

  Returns:
    {'text': [N, L, W] float32, 'text_mask': [N, L] bool, 'text_pooled': [N, P] float32}.

  Raises:
    TextEncoderError: the encoder is not the one that the networks were trained on, or as text_encoders.open_encoder.
  """
  text = config.text
  try:
    encoder = text_encoders.open_encoder(text.encoder, text.length, text.width, text.pooled_width)
  except text_encoders.TextEncoderError as error:
    raise text_encoders.TextEncoderError(f'{error} (encoder {text.encoder!r}: where it lies elsewhere, give '
                                         'text_encoder, --text_encoder of the commands)') from None
  text_encoders.check_same(text, encoder.sha256)
  found = encoder(prompts)
  if cut := [prompt for prompt, truncated in zip(prompts, found.pop('truncated')) if truncated]:
    more = f' and {len(cut) - 1} more' if cut[1:] else ''
    logging.warning('prompts: of %r%s only the first %d tokens are read', cut[0][:80], more, text.length)
  return found
