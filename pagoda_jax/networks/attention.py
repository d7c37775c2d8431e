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


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, form: str = 'auto', mask: jax.Array | None = None
) -> jax.Array:
  """softmax(q k^T / sqrt(C)) v of each head.

  Args:
    q: [B, N, heads, C].
    k, v: [B, M, heads, C] each, of the same type.
    form: one of FORMS.
    mask: bool [B, M], which keys are attended to, one of them at least; None: all.

  Returns:
    [B, N, heads, C] of their type.

  Raises:
    ValueError: the form does not exist on the chip that the program is traced for, or for these heads.
  """
  chosen = chosen_form(form, chips.chip(), q)
  if chosen == 'cudnn':
    if mask is not None:  # the kernel takes one for every query
      mask = jnp.broadcast_to(mask[:, None, None], (len(q), 1, q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn')
  if chosen == 'flash':
    return over_devices(flash)(q, k, v, *(() if mask is None else (mask,)))
  with jax.named_scope(_scope(q)):
    logits = jnp.einsum('bqhc,bkhc->bhqk', q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
      logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum('bhqk,bkhc->bqhc', weights, v)


def _scope(q) -> str:
  kernels = ''.join(f'_{chip}_kernel' for chip in ('nvidia', 'tpu') if chosen_form('auto', chip, q) != 'xla')
  return f'attend{kernels}'


def in_kernel(scope: str, chip: str) -> bool:
  """Whether an operation of the XLA form, by the named scopes that it is in, is of those that a chip has a kernel for.

  So that a program traced elsewhere tells what the chip would keep in memory.
  """
  return f'_{chip}_kernel' in scope


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
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:  # the last: each device has its own images already
    return function

  def divided(*arrays):
    # A batch of one, as parameters are made with, is everybody's.
    each = PartitionSpec(mesh.axis_names) if arrays[0].shape[0] % mesh.size == 0 else PartitionSpec()
    return jax.shard_map(function, in_specs=each, out_specs=each, check_vma=False)(*arrays)

  return divided


def flash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
  """`attend` by JAX's Pallas kernel for TPUs, for any number of tokens; `interpret`: anywhere, slowly.

  Products of float32 factors are at `jax.default_matmul_precision`, in one pass or 'highest'; of bfloat16, exact.
  """
  (_, tokens, heads, width), keys = q.shape, k.shape[1]
  padded, padded_keys = (-(-count // LANES) * LANES for count in (tokens, keys))
  block, block_keys = (
    max(size for size in range(LANES, most + 1, LANES) if count % size == 0)
    for most, count in zip(BLOCKS, (padded, padded_keys))
  )
  blocks = kernels.BlockSizes(
    block_q=block, block_kv=block_keys, block_kv_compute=block_keys,
    block_q_dkv=block, block_kv_dkv=block_keys, block_kv_dkv_compute=block_keys,
    use_fused_bwd_kernel=True,
  )
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([masks.FullMask((padded, padded_keys))] * heads), block_sizes=blocks, head_shards=1,
    q_seq_shards=1, interpret=interpret,
  )
  # The scale is a power of two, or rounds q once; the logits are float32.
  heads_first = lambda x, count: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, count - x.shape[1]), (0, 0)))
  args = heads_first(q / math.sqrt(width), padded), heads_first(k, padded_keys), heads_first(v, padded_keys)
  if mask is None:
    segments = None
    if padded != tokens or padded_keys != keys:  # tokens see those of their own segment
      segments = kernels.SegmentIds(*(
        (jnp.arange(total) >= count).astype(jnp.int32) for total, count in ((padded, tokens), (padded_keys, keys))))
    attended = jax.vmap(functools.partial(kernel, segment_ids=segments))
  else:
    hidden = jnp.pad(~mask, ((0, 0), (0, padded_keys - keys)), constant_values=True).astype(jnp.int32)
    seen_by = (jnp.arange(padded) >= tokens).astype(jnp.int32)
    # Queries that are padding see what is hidden: no row of the softmax is empty where anything is.
    attended = jax.vmap(lambda q, k, v, hidden: kernel(q, k, v, segment_ids=kernels.SegmentIds(seen_by, hidden)))
    args = *args, hidden
  rough = jax.config.jax_default_matmul_precision in (None, 'default', 'fastest', 'bfloat16')
  precision = 'default' if rough or q.dtype != jnp.float32 else 'highest'
  return jnp.swapaxes(_at_precision(precision, attended)(*args)[:, :, :tokens], 1, 2)


def _at_precision(precision: str, function):
  """The function, and its gradient whenever that is traced, at a matmul precision."""
  at_precision = functools.partial(jax.default_matmul_precision, precision)

  @jax.custom_vjp
  def result(*args):
    with at_precision():
      return function(*args)

  def forward(*args):
    with at_precision():
      return jax.vjp(function, *args)

  def backward(gradient_of, cotangent):
    with at_precision():
      return gradient_of(cotangent)

  result.defvjp(forward, backward)
  return result
