"""Figures of torch-fidelity 0.4 and pytorch-fid on the pictures of two .npz: test_agreement runs it in their Python.

python torch_figures.py SAMPLES.npz REFERENCE.npz WEIGHTS.pth OUT.json
"""

import json
import sys

import numpy as np
import torch

try:
  import torchvision  # noqa: F401
except RuntimeError:  # built for another torch: its compiled operators are missing, none of which is used here
  for name in [name for name in sys.modules if name.startswith('torchvision')]:
    del sys.modules[name]
  _operators = torch.library.Library('torchvision', 'DEF')
  for name in ('nms', 'qnms'):
    _operators.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')

import pytorch_fid.inception
from pytorch_fid import fid_score
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def main(samples, reference, weights, out):
  sets = [torch.from_numpy(np.load(path)['arr_0']).permute(0, 3, 1, 2) for path in (samples, reference)]
  network = FeatureExtractorInceptionV3('inception', ['2048', 'logits_unbiased'],
                                        feature_extractor_weights_path=weights)
  with torch.no_grad():
    (a, logits), (b, _) = ([torch.cat(parts) for parts in zip(*(network(x) for x in images.split(8)))]
                           for images in sets)
  statistics = [metric_fid.fid_features_to_statistics(x) for x in (a, b)]
  quiet = {'verbose': False}
  found = {'torch-fidelity': {
    **metric_fid.fid_statistics_to_metric(*statistics, verbose=False),
    **metric_kid.kid_features_to_metric(a, b, kid_subset_size=min(len(a), len(b)), **quiet),
    **metric_isc.isc_features_to_metric(logits, splits=1, shuffle=False),
    **metric_prc.prc_features_to_metric(a, b, **quiet),
  }}
  pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=False)
  network = pytorch_fid.inception.InceptionV3([3]).eval()
  moments = []
  with torch.no_grad():
    for images in sets:
      features = torch.cat([network(x.float() / 255)[0][:, :, 0, 0] for x in images.split(8)]).double().numpy()
      moments += [features.mean(0), np.cov(features, rowvar=False)]
  found['pytorch-fid'] = {'fid': float(fid_score.calculate_frechet_distance(*moments))}
  with open(out, 'w') as file:
    json.dump(found, file)


if __name__ == '__main__':
  main(*sys.argv[1:])
