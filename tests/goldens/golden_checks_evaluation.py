"""Evaluation against the originals: DINOv2, how each package resizes for Inception, KID and the others' figures."""

import functools

import golden_tools
import numpy as np

from pagoda_jax.data import resize
from pagoda_jax.evaluation.metrics import inception_score, kid, precision_recall
from pagoda_jax.evaluation.sums import SHUFFLE_SEED
from pagoda_jax.networks.frozen.inception import InceptionV3
from pagoda_jax.weights.convert import dinov2, mapping


def cases():
  """(name, check) of this file."""
  if not golden_tools.exists('evaluation'):
    return []
  checks = [(f'dinov2 {side}', functools.partial(check_dinov2, side)) for side in (56, 70)]
  checks += [(f'inception resize {graph}', functools.partial(check_resize, graph))
             for graph in ('tensorflow', 'clean_fid')]
  checks += [('metrics of torch-fidelity', check_metrics)]
  return [(name, golden_tools.in_float32(check)) for name, check in checks]


def check_dinov2(side):
  """Features of 8-bit pictures, enlarged as Pillow does; at 56 px the position grid is reduced from 5 to 4."""
  arrays, meta = golden_tools.load('evaluation')
  meta, images = meta['dinov2'], arrays['dinov2/img_uint8']
  resized = np.asarray(resize.resize_as_pillow(images, side))
  np.testing.assert_array_equal(resized, arrays[f'dinov2/{side}/resized_uint8'])
  state_dict = golden_tools.rule_state_dict(meta['params'], meta['prefix'])
  options = dinov2.options(state_dict)
  assert options['grid'] == 5 and options['layer_scale']
  params, carried = mapping.to_ours(state_dict, dinov2.leaves(options), dinov2.carried)
  assert set(carried) == {'mask_token'}
  features = dinov2.network(options, input_size=side).apply(params, images)
  golden_tools.assert_close(features, arrays[f'dinov2/{side}/features'], 1e-4)


def check_resize(graph):
  """What enters Inception's first convolution, of torch-fidelity's and clean-fid's own functions."""
  arrays, _ = golden_tools.load('evaluation')
  images = golden_tools.load('inception_fid')[0]['s64/img_uint8'].astype(np.float32) / 127.5 - 1
  found = InceptionV3(graph=graph).apply({}, images, method='preprocessed')
  assert found.shape[1:] == (299, 299, 3)
  golden_tools.assert_close(found[:, ::13, ::13], arrays[f'resize/{graph}'], 2e-5)


def check_metrics():
  """KID with torch-fidelity's subsets, the Inception Score in order and shuffled, precision and recall."""
  arrays, _ = golden_tools.load('evaluation')
  samples, reference = arrays['metrics/samples'], arrays['metrics/reference']
  np.testing.assert_allclose(kid.kid(samples, reference, subsets=10, size=20), arrays['metrics/kid'], rtol=1e-5)
  found = precision_recall.precision_recall(reference, samples, k=3)
  np.testing.assert_allclose(found, arrays['metrics/precision_recall'], rtol=1e-6)
  probabilities = inception_score.softmax(arrays['metrics/logits'])
  for shuffle in (0, 1):
    order = np.random.RandomState(SHUFFLE_SEED).permutation(60) if shuffle else None
    splits = inception_score.Splits(inception_score.consecutive(60, 20, order), 8)
    for start in (0, 25):  # in two parts
      splits.add(start, probabilities[start : start + 25 if not start else 60])
    np.testing.assert_allclose(splits.score(), arrays[f'metrics/isc_shuffle{shuffle}'], rtol=1e-6)
