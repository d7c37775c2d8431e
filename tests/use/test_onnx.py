"""ONNX: what the converter is given is our generator, in any batch; its loader refuses damage; the whole conversion.

The conversion itself runs where $ONNX_VENV names an environment that `launch/onnx.sh` has made, as CI has none.
"""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import ROOT, pagoda
from test_generator import made_up_run

import pagoda_jax
from pagoda_jax.use import exported_loader, onnx_loader, to_onnx


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An exported generator that takes omega."""
  made = tmp_path_factory.mktemp('onnx')
  made_up_run(made / 'run', tiny.get_config('guided'), 'distill')
  assert pagoda('export', f'--workdir={made / "run"}', f'--output={made / "exported"}') == 0
  return made / 'exported'


def test_what_is_converted_draws_our_images_and_fills_symbolic_batches_by_broadcasting(folder):
  config, params, program = exported_loader.read(folder)
  generate, given = to_onnx.generator(config, params), to_onnx.arguments(config, 3)
  found, expected = jax.jit(generate)(*given), program(params, *given)
  assert np.abs(to_onnx.grey_levels(found) - to_onnx.grey_levels(expected)).max() <= 1
  ours = pagoda_jax.load(folder).of_noise(given[0], given[1], given[2])
  assert np.abs(to_onnx.grey_levels(found) - ours).max() <= 1
  batch, *_ = jax.export.symbolic_shape('B')
  shapes = [jax.ShapeDtypeStruct((batch, *each.shape[1:]), each.dtype) for each in given]
  traced = jax.make_jaxpr(generate)(*shapes)
  assert str(traced.out_avals[0].shape[0]) == 'B'


def test_its_loader_draws_what_the_model_draws_and_refuses_damage(tmp_path, monkeypatch):
  seen = []

  class Session:
    def __init__(self, model, providers):
      assert model == b'model' and providers == ['CPU']

    def run(self, names, given):
      seen.append(given)
      return [np.full((len(given['label']), 8, 8, 1), 0.5, np.float32)]

  fake = types.SimpleNamespace(InferenceSession=Session, get_available_providers=lambda: ['CPU'])
  monkeypatch.setitem(sys.modules, 'onnxruntime', fake)
  values = {'file': 'generator.onnx', 'sha256': onnx_loader.digest(b'model'), 'noise_shape': [4, 4, 1],
            'sigma_max': 80.0, 'default_omega': 1.0}
  described = tmp_path / 'onnx.json'
  described.write_text(json.dumps(values | {'seal': onnx_loader.seal(values)}))
  (tmp_path / 'generator.onnx').write_bytes(b'model')
  images = onnx_loader.load(tmp_path)([3, 5], seed=1)
  assert images.shape == (2, 8, 8, 1) and set(images.reshape(-1)) == {191}
  assert seen[0]['omega'].tolist() == [1, 1] and seen[0]['label'].dtype == np.int32
  assert seen[0]['noise'].shape == (2, 4, 4, 1) and 40 < seen[0]['noise'].std() < 120
  for content in (b'modem', b'mode', b''):
    (tmp_path / 'generator.onnx').write_bytes(content)
    with pytest.raises(ValueError, match='damaged'):
      onnx_loader.load(tmp_path)
  (tmp_path / 'generator.onnx').write_bytes(b'model')
  described.write_text(described.read_text().replace('80.0', '81.0'))
  with pytest.raises(ValueError, match='damaged'):
    onnx_loader.load(tmp_path)


def test_a_teacher_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'jax2onnx', types.SimpleNamespace())
  monkeypatch.setitem(sys.modules, 'onnxruntime', types.SimpleNamespace())
  monkeypatch.setattr(exported_loader, 'read', lambda folder: ({'kind': 'teacher'}, {}, None))
  with pytest.raises(ValueError, match='only one-step generators become ONNX'):
    to_onnx.main(tmp_path)


def test_the_converter_imports_nothing_that_its_environment_lacks():
  code = """import sys
for name in ('ml_collections', 'grain', 'clu', 'PIL', 'array_record', 'tensorflow_datasets'):
  sys.modules[name] = None
import pagoda_jax.use.to_onnx"""
  env = os.environ | {'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, env=env)


@pytest.mark.skipif('ONNX_VENV' not in os.environ, reason='needs $ONNX_VENV, an environment of launch/onnx.sh')
def test_the_conversion(folder, tmp_path):
  subprocess.run(['bash', ROOT / 'launch' / 'onnx.sh', folder], check=True)
  code = f'from load_onnx import load; import numpy as np; np.save({str(tmp_path / "x.npy")!r}, load(".")([3, 5, 7]))'
  python = os.path.join(os.environ['ONNX_VENV'], 'bin', 'python')
  subprocess.run([python, '-B', '-c', code], check=True, cwd=folder, env={})
  noise = np.float32(80) * np.random.default_rng(0).standard_normal((3, 8, 8, 1), np.float32)
  ours = pagoda_jax.load(folder).of_noise(jnp.asarray(noise), [3, 5, 7])
  assert np.abs(np.load(tmp_path / 'x.npy').astype(int) - ours).max() <= 1
