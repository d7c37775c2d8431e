"""Text encoders against transformers' code, from names of tensors and config.json to embeddings."""

import functools
import json
import pathlib
import tempfile

import golden_tools
import numpy as np
import text_files

from pagoda_jax.networks.text import t5
from pagoda_jax.weights import text_tokenizers
from pagoda_jax.weights.convert import formats


def cases():
  """(name, check) of this file."""
  if not golden_tools.exists('text_encoders'):
    return []
  checks = [(f'text {tag}', functools.partial(check_encoder, tag)) for tag in ('clip_quick', 'clip_gelu', 't5')]
  return [(name, golden_tools.in_float32(check)) for name, check in [*checks, ('text buckets', check_buckets),
                                                                ('text tokenizer', check_tokenizer)]]


def check_encoder(tag):
  """Embeddings of tokens, where there are some, and of whole texts; the end token is found by either convention."""
  arrays, meta = golden_tools.load('text_encoders')
  meta, format = meta[tag], tag.split('_')[0]
  state_dict = golden_tools.rule_state_dict(meta['params'], meta['prefix'])
  assert formats.detected(state_dict) == format
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / 'config.json').write_text(json.dumps(meta['config']))
    asked = formats.FORMATS[format].described(f'{folder}/model.safetensors')
  converted = formats.from_state_dict(state_dict, format, **asked)
  network = formats.FORMATS[format].network(converted.options)
  ids, mask = arrays[f'{tag}/ids'], arrays[f'{tag}/mask']
  tokens, whole = network.apply(converted.variables, ids, mask)
  golden_tools.assert_close(np.asarray(tokens)[mask], arrays[f'{tag}/tokens'][mask], 1e-4, 'tokens')
  golden_tools.assert_close(whole, arrays[f'{tag}/pooled'], 1e-4, 'the whole text')
  if tag == 'clip_quick':  # one text holds an id above the end token's
    largest, theirs = np.argmax(ids, 1), np.argmax(ids == meta['config']['eos_token_id'], 1)
    assert (largest != theirs).sum() == 1


def check_buckets():
  """Of every distance within 300 tokens, at the published numbers."""
  found = t5.position_buckets(np.arange(-300, 301), 32, 128)
  np.testing.assert_array_equal(found, golden_tools.load('text_encoders')[0]['buckets'])


def check_tokenizer():
  """CLIP's, of vocab.json and merges.txt."""
  said = golden_tools.load('text_encoders')[1]['clip_tokenizer']
  with tempfile.TemporaryDirectory() as folder:
    text_files.write_clip_tokenizer(pathlib.Path(folder))
    assert text_tokenizers.open_tokenizer(folder)(said['captions']) == said['ids']
