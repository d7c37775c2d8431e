"""Attention of U-Nets and transformers, in the form that suits the chip: the same numbers but for rounding.

Logits, their softmax and the sums of all products are float32 in every form. In bfloat16 the factors of products are
bfloat16, the softmax's among them: the XLA form rounds the weights, 'flash' and 'cudnn' round them before they are
divided by their sum.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from pagoda_jax.networks import chips

# 'xla': plain operations, anywhere; the logits [B, heads, N, N] go through memory and are kept for the backward pass.
# 'cudnn': NVIDIA's kernel, in bfloat16 and float16; 'flash': JAX's Pallas kernel for TPUs. They keep no logits.
# 'auto': one of them, by the chip, the number of tokens and the type; README.md says by which figures.
FORMS = ('auto', 'xla', 'cudnn', 'flash')
FLASH_FROM = 1024  # tokens
CUDNN_FROM = 128
CUDNN_WIDEST = 128  # channels of a head, on every GPU that has the kernel
LANES = 128  # the TPU kernel's blocks are whole multiples of this many tokens
BLOCKS = (512, 1024)  # most queries, and keys, of a block of the TPU kernel


def attend(q: jax.Array, k: jax.Array, v: jax.Array, form: str = 'auto') -> jax.Array:
  """softmax(q k^T / sqrt(C)) v of each head.

  Args:
    q, k, v: [B, N, heads, C] each, of one type.
    form: one of FORMS.

  Returns:
    [B, N, heads, C] of their type.

  Raises:
    ValueError: the form does not exist on the chip that the program is traced for, or for these heads.
  """
  chosen = chosen_form(form, chips.chip(), q)
  if chosen == 'cudnn':
    return jax.nn.dot_product_attention(q, k, v, implementation='cudnn')
  if chosen == 'flash':
    return over_devices(flash)(q, k, v)
  logits = jnp.einsum('bqhc,bkhc->bhqk', q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1])).astype(v.dtype)
  return jnp.einsum('bhqk,bkhc->bqhc', weights, v)


def chosen_form(form: str, chip: str, q) -> str:
  """What `form` means on a chip for queries of the shape and type of q; see `attend`."""
  _, tokens, _, width = q.shape
  misfit = ''
  if chip != 'nvidia':
    misfit = f'is a kernel of NVIDIA GPUs, and this program is for {chip}'
  elif q.dtype not in (jnp.bfloat16, jnp.float16):
    misfit = f'computes in bfloat16 or float16, not in {q.dtype}'
  elif width % 8 or width > CUDNN_WIDEST:
    misfit = f'takes heads of 8, 16, ... or {CUDNN_WIDEST} channels, not of {width}'
  if form == 'auto':
    if chip == 'tpu' and tokens >= FLASH_FROM:
      return 'flash'
    return 'cudnn' if not misfit and tokens >= CUDNN_FROM else 'xla'
  if form == 'cudnn' and misfit:
    raise ValueError(f"attention 'cudnn' {misfit}: take 'auto' or 'xla'")
  if form == 'flash' and chip != 'tpu':
    raise ValueError(f"attention 'flash' is a kernel of TPUs, and this program is for {chip}: take 'auto' or 'xla'")
  return form


def over_devices(function):
  """function(*arrays) of batches, each device of the mesh that is set working on its own images.

  XLA divides its own operations among devices, and not a kernel's.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function

  def divided(*arrays):
    # A batch of one, as parameters are made with, is everybody's.
    each = PartitionSpec(mesh.axis_names) if arrays[0].shape[0] % mesh.size == 0 else PartitionSpec()
    return jax.shard_map(function, in_specs=each, out_specs=each, check_vma=False)(*arrays)

  return divided


def flash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
  """`attend` by JAX's Pallas kernel for TPUs, for any number of tokens; `interpret`: anywhere, slowly."""
  _, tokens, heads, width = q.shape
  padded = -(-tokens // LANES) * LANES
  queries, keys = (
    max(size for size in range(LANES, most + 1, LANES) if padded % size == 0) for most in BLOCKS
  )
  blocks = kernels.BlockSizes(
    block_q=queries, block_kv=keys, block_kv_compute=keys,
    block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=keys,
    use_fused_bwd_kernel=True,
  )
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([masks.FullMask((padded, padded))] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1,
    interpret=interpret,
  )
  if padded != tokens:  # tokens see those of their own segment
    segment = (jnp.arange(padded) >= tokens).astype(jnp.int32)
    kernel = functools.partial(kernel, segment_ids=kernels.SegmentIds(segment, segment))
  # The scale is a power of two, or rounds q once; the logits are float32.
  heads_first = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))
  result = jax.vmap(kernel)(heads_first(q / math.sqrt(width)), heads_first(k), heads_first(v))
  return jnp.swapaxes(result[:, :, :tokens], 1, 2)
