"""Optional: the same pictures through torch-fidelity 0.4 and pytorch-fid, with the same random Inception-v3.

Runs where PAGODA_TORCH_PYTHON names a Python of an environment that has both (`pip install torch torchvision
torch-fidelity==0.4.0 pytorch-fid`); takes minutes.
"""

import json
import os
import pathlib
import subprocess

import golden_tools
import numpy as np
import published_files
import pytest
import torch_writers
from PIL import Image

from pagoda_jax.evaluation import evaluate

PYTHON = os.environ.get('PAGODA_TORCH_PYTHON')
SCRIPT = pathlib.Path(__file__).parent / 'torch_figures.py'
COUNT = 24


def pictures(seed, contrast):
  """Smooth coloured pictures, uint8 [COUNT, 64, 64, 3]."""
  rng = np.random.default_rng(seed)
  coarse = np.clip(128 + contrast * rng.standard_normal((COUNT, 6, 6, 3)), 0, 255).astype(np.uint8)
  return np.stack([np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BICUBIC)) for x in coarse])


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not PYTHON, reason='PAGODA_TORCH_PYTHON names no environment with torch-fidelity and pytorch-fid')
def test_figures_are_those_of_torch_fidelity_and_pytorch_fid(tmp_path, monkeypatch):
  _, meta = golden_tools.load('inception_fid')
  weights = golden_tools.rule_state_dict([p[:2] for p in meta['params']], meta['prefix'], meta['gain'])
  file = tmp_path / 'pt_inception-2015-12-05-6726825d.pth'
  torch_writers.save_zip(file, weights)
  published_files.unlocked(monkeypatch)
  for name, images in (('samples', pictures(0, 60)), ('reference', pictures(1, 80))):
    np.savez(tmp_path / f'{name}.npz', arr_0=images)
  subprocess.run([PYTHON, SCRIPT, tmp_path / 'samples.npz', tmp_path / 'reference.npz', file, tmp_path / 'torch.json'],
                 check=True, env={**os.environ, 'PYTHONPATH': ''})
  theirs = json.loads((tmp_path / 'torch.json').read_text())

  def ours(resize, metrics):
    asked = evaluate.Request(metrics, reference=str(tmp_path / 'reference.npz'), resize=resize, batch_size=8,
                             weights_dir=str(tmp_path))
    return evaluate.of_images(str(tmp_path / 'samples.npz'), asked)['metrics']

  found = ours('tensorflow', 'fid,is,kid,precision_recall')
  names = {'fid': 'frechet_inception_distance', 'kid': 'kernel_inception_distance_mean', 'is': 'inception_score_mean',
           'precision': 'precision', 'recall': 'recall'}
  rows = {name: (found[name], theirs['torch-fidelity'][key]) for name, key in names.items()}
  rows['fid, as pytorch-fid'] = ours('pytorch_fid', 'fid')['fid'], theirs['pytorch-fid']['fid']
  for name, (mine, other) in rows.items():
    print(f'{name:<22}{mine:<24.15g}{other:<24.15g}{abs(mine / other - 1) if other else mine:.1e}')
  for name, (mine, other) in rows.items():
    tolerance = 1e-4 if name.startswith(('fid', 'kid')) else 1e-6
    assert mine == pytest.approx(other, rel=tolerance, abs=0 if name.startswith('fid') else 1e-7), name
