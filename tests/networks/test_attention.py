"""The forms of attention: one function of their arguments, and each chip's own where it helps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from network_tools import CPU, H100, V5E, on

from pagoda_jax.networks import attention, chips
from pagoda_jax.networks.frozen.deit import TransformerBlock
from pagoda_jax.networks.layers import QKV
from pagoda_jax.runtime import sharding

PLAIN = functools.partial(attention.attend, form='xla')


def with_gradients(attend):
  """(q, k, v) -> output and the gradients of its product with a fixed array."""
  def run(*arrays):
    output, transposed = jax.vjp(attend, *arrays)
    cotangent = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape).astype(output.dtype)
    return output, *transposed(cotangent)
  return run


# Fewer tokens than a block; several blocks; three blocks of keys, the last one not full.
@pytest.mark.parametrize('tokens, dtype, tolerance', [
  (66, jnp.float32, 1e-5), (384, jnp.float32, 1e-5), (1150, jnp.float32, 1e-5), (200, jnp.bfloat16, 2e-2),
])
def test_the_tpu_kernel_agrees_with_plain_operations(tokens, dtype, tolerance):
  arrays = jax.random.normal(jax.random.key(0), (3, 1, tokens, 2, 64))
  arrays = (arrays * jnp.array([3, 1, 1]).reshape(3, 1, 1, 1, 1)).astype(dtype)  # some weights near 1
  kernel = functools.partial(attention.flash, interpret=True)
  for ours, plain in zip(*(jax.jit(with_gradients(attend))(*arrays) for attend in (kernel, PLAIN))):
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
    assert np.sqrt(np.mean((ours - plain) ** 2)) <= tolerance * np.sqrt(np.mean(plain**2))


@pytest.mark.parametrize('device, tokens, dtype, width, form', [
  (CPU, 4096, 'float32', 64, 'xla'),
  (CPU, 4096, 'bfloat16', 64, 'xla'),
  (V5E, 1024, 'float32', 64, 'flash'),
  (V5E, 1026, 'bfloat16', 64, 'flash'),
  (V5E, 256, 'bfloat16', 64, 'xla'),
  (H100, 198, 'bfloat16', 64, 'cudnn'),
  (H100, 64, 'bfloat16', 64, 'xla'),
  (H100, 1024, 'float32', 64, 'xla'),
  (H100, 1024, 'bfloat16', 256, 'xla'),
  (('gfx942', 'gpu'), 1024, 'bfloat16', 64, 'xla'),
])
def test_auto_chooses_by_chip_tokens_and_type(device, tokens, dtype, width, form):
  with on(device):
    chip = chips.chip()
  assert attention.chosen_form('auto', chip, jax.ShapeDtypeStruct((2, tokens, 2, width), dtype)) == form


@pytest.mark.parametrize('device, form, dtype, width, said', [
  (CPU, 'cudnn', 'bfloat16', 64, "'cudnn' is a kernel of NVIDIA GPUs, and this program is for cpu"),
  (V5E, 'cudnn', 'bfloat16', 64, "'cudnn' is a kernel of NVIDIA GPUs, and this program is for tpu"),
  (CPU, 'flash', 'float32', 64, "'flash' is a kernel of TPUs, and this program is for cpu"),
  (H100, 'flash', 'bfloat16', 64, "'flash' is a kernel of TPUs, and this program is for nvidia"),
  (H100, 'cudnn', 'float32', 64, 'bfloat16 or float16, not in float32'),
  (H100, 'cudnn', 'bfloat16', 20, 'heads of 8, 16, ... or 128 channels, not of 20'),
])
def test_a_form_that_is_not_there_is_refused(device, form, dtype, width, said):
  q = jax.ShapeDtypeStruct((2, 64, 2, width), dtype)
  with on(device), pytest.raises(ValueError, match=said):
    jax.eval_shape(functools.partial(attention.attend, form=form), q, q, q)


def lowered(platform, dtype, tokens=1024, form='auto'):
  q = jax.ShapeDtypeStruct((8, tokens, 2, 64), dtype)
  run = with_gradients(functools.partial(attention.attend, form=form))
  return jax.jit(run).trace(q, q, q).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('count', [1, 8])
def test_on_a_tpu_no_logits_are_in_memory(count):
  with on(V5E, count):
    text = lowered('tpu', jnp.bfloat16)
    assert '1024x1024' not in text and text.count('@tpu_custom_call') == 2
    assert f'tensor<{8 // count}x2x1024x64xbf16>' in text  # each device its own images
    assert '1024x1024xf32' in lowered('tpu', jnp.bfloat16, form='xla')


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('dtype, asked, taken', [
  # Mosaic knows no products of three passes, and refuses bfloat16 factors at 'highest': they need one pass.
  ('float32', 'default', 'DEFAULT'), ('float32', 'bfloat16', 'DEFAULT'), ('float32', 'float32', 'HIGHEST'),
  ('float32', 'high', 'HIGHEST'), ('float32', 'highest', 'HIGHEST'),
  ('bfloat16', 'default', 'DEFAULT'), ('bfloat16', 'high', 'DEFAULT'), ('bfloat16', 'highest', 'DEFAULT'),
])
def test_on_a_tpu_products_are_of_a_precision_that_kernels_have(dtype, asked, taken, masked):
  q, mask = jax.ShapeDtypeStruct((8, 1024, 2, 64), dtype), jnp.ones((8, 1024), bool) if masked else None
  with on(V5E), jax.default_matmul_precision(asked):
    text = str(jax.make_jaxpr(with_gradients(functools.partial(attention.attend, mask=mask)))(q, q, q))
  products = re.findall(r'dot_general\[.*?\n *\]', text, re.DOTALL)
  assert len(products) >= 7 and all(f'precision=(Precision.{taken}' in product for product in products)


def test_on_a_gpu_it_is_cudnns(monkeypatch):
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)  # of a library not here
  with on(H100):
    text = lowered('cuda', jnp.bfloat16, tokens=198)
    assert '198x198' not in text and '__cudnn$fmhaSoftmax(' in text and '__cudnn$fmhaSoftmaxBackward' in text
    assert 'cudnn' not in lowered('cuda', jnp.bfloat16, tokens=198, form='xla')


def test_queries_keys_and_values_are_parts_of_one_layer():
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  layer = QKV(heads=2)
  params = layer.init(jax.random.key(1), x)['params']
  params['bias'] = jax.random.normal(jax.random.key(2), (24,))
  assert jax.tree.map(jnp.shape, params) == {'kernel': (8, 24), 'bias': (24,)}
  expected = (np.asarray(x) @ np.asarray(params['kernel']) + np.asarray(params['bias'])).reshape(2, 5, 3, 2, 4)
  for index, part in enumerate(layer.apply({'params': params}, x)):
    np.testing.assert_allclose(part, expected[:, :, index], rtol=1e-5, atol=1e-6)


def test_the_feature_network_takes_the_same_forms():
  block = TransformerBlock(64, 256, jnp.bfloat16)
  x = jax.ShapeDtypeStruct((1, 1026, 128), jnp.bfloat16)  # of a picture of 512 px
  with on(V5E):
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    plain, kernel = (
      str(jax.make_jaxpr(block.clone(attention_form=form).apply)(variables, x)) for form in ('xla', 'auto'))
  assert 'pallas_call' in kernel and '1026,1026' not in kernel
  assert 'pallas_call' not in plain and '1026,1026' in plain


def test_each_device_works_on_its_own_images():
  """With gradients, over a mesh of virtual devices; a batch that does not divide is everybody's."""
  mesh = sharding.make_mesh(fsdp=2)
  kernel = functools.partial(attention.flash, interpret=True)
  with jax.set_mesh(mesh):
    for count in (mesh.size, 1):
      arrays = jax.random.normal(jax.random.key(0), (3, count, 130, 1, 8))
      where = sharding.batch_sharding(mesh) if count > 1 else sharding.replicated(mesh)
      placed = [jax.device_put(x, where) for x in arrays]
      divided = jax.jit(with_gradients(attention.over_devices(kernel)))(*placed)
      for ours, plain in zip(divided, jax.jit(with_gradients(PLAIN))(*arrays)):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert divided[0].sharding.is_fully_replicated and mesh.size > 1
