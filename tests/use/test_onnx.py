"""ONNX: what the converter is given is our generator, in any batch; its loader refuses damage; the whole conversion.

The conversion itself runs where $ONNX_VENV names an environment that `launch/onnx.sh` has made, as CI has none.
"""

import json
import os
import subprocess
import sys
import types

import captioned
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import ROOT, pagoda
from test_generator import made_up_run

import pagoda_jax
from pagoda_jax.use import exported_loader, onnx_loader, to_onnx


def config_of(kind):
  """A tiny experiment whose generators take omega: of labels, of captions, of captions as DeepFloyd IF takes them."""
  config = tiny.get_config('guided') if kind == 'labels' else captioned.config_of_digits()
  if kind == 'deepfloyd':
    config.network.update({'form': 'deepfloyd', 'text_attention': 'added_kv', 'text_pool_heads': 2})
  return config


@pytest.fixture(scope='module', params=['labels', 'captions', 'deepfloyd'])
def folder(request, tmp_path_factory):
  """An exported generator."""
  made = tmp_path_factory.mktemp('onnx')
  made_up_run(made / 'run', config_of(request.param), 'distill')
  assert pagoda('export', f'--workdir={made / "run"}', f'--output={made / "exported"}') == 0
  return made / 'exported'


def drawn_by_load(folder, given):
  """uint8 images of the model's inputs by our own network."""
  generator, count = pagoda_jax.load(folder), len(given['noise'])
  texts = {'text': {name: given[name] for name in to_onnx.TEXT}} if generator.takes_text else None
  return generator.of_noise(given['noise'], given.get('label', np.full(count, -1)), given['omega'], texts=texts)


def test_what_is_converted_draws_our_images_and_fills_symbolic_batches_by_broadcasting(folder):
  config, params, program = exported_loader.read(folder)
  generate, given = to_onnx.generator(config, params), to_onnx.arguments(config, 3)
  found, expected = jax.jit(generate)(*given.values()), program(params, *to_onnx.of_program(given))
  assert np.abs(to_onnx.grey_levels(found) - to_onnx.grey_levels(expected)).max() <= 1
  assert np.abs(to_onnx.grey_levels(found) - drawn_by_load(folder, given)).max() <= 1
  if config['text']:  # tokens count, and where there are none of them too
    other = given | {'text': np.roll(given['text'], 1, axis=1)}
    assert 'label' not in given and given['text_mask'].sum(1).tolist() == [4, 2, 0]
    assert np.any(np.asarray(jax.jit(generate)(*other.values())) != found)
  batch, *_ = jax.export.symbolic_shape('B')
  shapes = [jax.ShapeDtypeStruct((batch, *each.shape[1:]), each.dtype) for each in given.values()]
  traced = jax.make_jaxpr(generate)(*shapes)
  assert str(traced.out_avals[0].shape[0]) == 'B'


@pytest.fixture
def seen(tmp_path, monkeypatch):
  """What a stand-in for onnxruntime is given; the model beside tmp_path's onnx.json of `described_as`."""
  found = []

  class Session:
    def __init__(self, model, providers):
      assert model == b'model' and providers == ['CPU']

    def run(self, names, given):
      found.append(given)
      return [np.full((len(given['noise']), 8, 8, 1), 0.5, np.float32)]

  fake = types.SimpleNamespace(InferenceSession=Session, get_available_providers=lambda: ['CPU'])
  monkeypatch.setitem(sys.modules, 'onnxruntime', fake)
  (tmp_path / 'generator.onnx').write_bytes(b'model')
  return found


def describe(folder, **more):
  values = {'file': 'generator.onnx', 'sha256': onnx_loader.digest(b'model'), 'noise_shape': [4, 4, 1],
            'sigma_max': 80.0, 'default_omega': 1.0, 'num_classes': 10} | more
  (folder / 'onnx.json').write_text(json.dumps(values | {'seal': onnx_loader.seal(values)}))
  return folder / 'onnx.json'


def test_its_loader_draws_what_the_model_draws_and_refuses_damage(tmp_path, seen):
  described = describe(tmp_path)
  images = onnx_loader.load(tmp_path)([3, 5], seed=1)
  assert images.shape == (2, 8, 8, 1) and set(images.reshape(-1)) == {191}
  assert seen[0]['omega'].tolist() == [1, 1] and seen[0]['label'].dtype == np.int32
  assert seen[0]['noise'].shape == (2, 4, 4, 1) and 40 < seen[0]['noise'].std() < 120
  for label in (10, '10', -1, 1.5):  # of which the network would draw an image of no class
    with pytest.raises(ValueError, match=f'labels: {label} is no class; there are 0 to 9'):
      onnx_loader.load(tmp_path)([3, label])
  describe(tmp_path, default_omega=None)
  with pytest.raises(ValueError, match='omega = 2: the model takes no strength of guidance'):
    onnx_loader.load(tmp_path)([3], omega=2)
  describe(tmp_path)
  for content in (b'modem', b'mode', b''):
    (tmp_path / 'generator.onnx').write_bytes(content)
    with pytest.raises(ValueError, match='damaged'):
      onnx_loader.load(tmp_path)
  (tmp_path / 'generator.onnx').write_bytes(b'model')
  described.write_text(described.read_text().replace('80.0', '81.0'))
  with pytest.raises(ValueError, match='damaged'):
    onnx_loader.load(tmp_path)


def test_its_loader_takes_embeddings_of_captions_and_says_what_prompts_lack(tmp_path, seen):
  describe(tmp_path, text={'encoder': 'captioned:embed'})
  generate, texts = onnx_loader.load(tmp_path), dict(zip(to_onnx.TEXT, captioned.embed(['red flag', 'cat'])))
  assert generate(texts, omega=2).shape == (2, 8, 8, 1)
  (given,) = seen
  assert {*given} == {'noise', 'omega', *to_onnx.TEXT} and given['omega'].tolist() == [2, 2]
  assert given['text_mask'].dtype == bool and given['text'].dtype == np.float32
  np.savez(tmp_path / 'captions.npz', **texts)
  with np.load(tmp_path / 'captions.npz') as stored:
    generate(stored)
  np.testing.assert_array_equal(seen[1]['text_pooled'], texts['text_pooled'])
  for wrong in ('a text', ['red flag'], [3], {'text': texts['text']}):
    with pytest.raises(ValueError, match='text, text_mask, text_pooled, made of them by the encoder captioned:embed, '
                                         'which is not in the folder'):
      generate(wrong)


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
  described = json.loads((folder / 'onnx.json').read_text())
  given = {'label': np.array([3, 5, 7], np.int32)}
  if described['text']:
    given = dict(zip(to_onnx.TEXT, captioned.embed(['red flag', 'blue cat', ''])))
    np.savez(tmp_path / 'x.npz', **given)
  asked = 'np.load(sys.argv[1])' if described['text'] else '[3, 5, 7]'
  code = f'import sys; from load_onnx import load; import numpy as np; np.save(sys.argv[2], load(".")({asked}))'
  python = os.path.join(os.environ['ONNX_VENV'], 'bin', 'python')
  subprocess.run([python, '-B', '-c', code, tmp_path / 'x.npz', tmp_path / 'x.npy'], check=True, cwd=folder, env={})
  noise = np.float32(80) * np.random.default_rng(0).standard_normal((3, 8, 8, 1), np.float32)
  omegas = np.full(3, described['default_omega'], np.float32)
  ours = drawn_by_load(folder, {'noise': jnp.asarray(noise), 'omega': omegas} | given)
  assert np.abs(np.load(tmp_path / 'x.npy').astype(int) - ours).max() <= 1
