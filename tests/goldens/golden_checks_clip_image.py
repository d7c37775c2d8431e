"""CLIP's picture tower against transformers' code, from names of tensors and config.json to embeddings."""

import json
import pathlib
import tempfile

import golden_tools
import jax
import numpy as np
from golden_tools import assert_close, in_float32, nchw, nhwc

from pagoda_jax.networks.frozen import clip_image as tower
from pagoda_jax.weights.convert import clip_image, formats


def cases():
  """(name, check) of this file."""
  return [('clip_image', in_float32(check_tower))] if golden_tools.exists('clip_image') else []


def check_tower():
  """Embeddings, and the gradient of their product with fixed numbers; of pictures of the tower's size."""
  arrays, meta = golden_tools.load('clip_image')
  theirs = golden_tools.rule_state_dict(meta['params'], meta['prefix'])
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / 'config.json').write_text(json.dumps(meta['config']))
    asked = clip_image.described(f'{folder}/model.safetensors')
  converted = formats.from_state_dict(theirs, 'clip_image', **asked)
  x = nhwc(np.random.default_rng(7).standard_normal((2, 3, 28, 28)).astype(np.float32))
  weights = np.random.default_rng(8).standard_normal((2, 24)).astype(np.float32)
  net = clip_image.network(converted.options)
  images = (x * np.float32(tower.DEVIATION) + np.float32(tower.MEAN)) * 2 - 1  # those whose normalisation gives x
  embeds, pull = jax.vjp(jax.jit(lambda images: net.apply(converted.variables, images)), images)
  assert_close(embeds, arrays['embeds'], 1e-4, 'embeddings')
  gradient = nchw(pull(weights)[0] * (2 * np.float32(tower.DEVIATION)))
  assert_close(gradient, arrays['input_grad'], 1e-3, 'input gradient')
