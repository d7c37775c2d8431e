"""EDM2's published networks (github NVlabs/edm2: state dict of its `Precond`)."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from pagoda_jax.networks.edm2 import LOGVAR_CHANNELS
from pagoda_jax.networks.unet import EDM2, UNet
from pagoda_jax.weights.convert import edm, mapping, unets
from pagoda_jax.weights.convert.mapping import ConversionError, Leaf, StateDict

QKV_AXES = 'hct'  # q, k and v of a channel lie side by side


def carried(name: str) -> bool:
  """Whether a tensor has no place in our network: the resampling filters, which are constant."""
  return name.endswith('.resample_filter')


def options(state_dict: StateDict, channels_per_head: int = 64) -> dict[str, Any]:
  """Fields of the `UNet` that a state dict is for; names and shapes determine the others but dropout.

  Raises:
    ConversionError: it is not a network of EDM2.
  """
  resolutions = sorted({int(found[1]) for name in state_dict if (found := re.match(r'unet\.enc\.(\d+)x', name))})[::-1]
  if not resolutions:
    raise ConversionError("not a network of EDM2's: no tensor is named unet.enc.*")
  top, lowest = (f'{resolution}x{resolution}' for resolution in (resolutions[0], resolutions[-1]))
  channels, in_channels = unets.shape(state_dict, f'unet.enc.{top}_conv.weight')[:2]
  widths = [unets.shape(state_dict, f'unet.enc.{r}x{r}_block0.conv_res0.weight')[0] for r in resolutions]
  return {
    **EDM2,
    'resolution': resolutions[0],
    'image_channels': in_channels - 1,  # a channel of ones besides
    'channels': channels,
    'channel_mult': tuple(unets.multiplier(width, channels) for width in widths),
    'embed_channels': unets.shape(state_dict, 'unet.emb_noise.weight')[0],
    'num_blocks': sum(bool(re.match(rf'unet\.enc\.{top}_block\d+\.conv_res0\.weight', name)) for name in state_dict),
    'attention_resolutions': tuple(r for r in resolutions if f'unet.enc.{r}x{r}_block0.attn_qkv.weight' in state_dict),
    'mid_attention': f'unet.dec.{lowest}_in0.attn_qkv.weight' in state_dict,
    'channels_per_head': channels_per_head,
    'num_classes': unets.width_if_present(state_dict, 'unet.emb_label.weight', axis=1),
  }


def leaves(options: Mapping[str, Any]) -> list[Leaf]:
  """Every tensor of the network that has these options, except grown levels, which EDM2 has no names for."""
  net = UNet(**options)
  top, width, last = f'{net.resolution}x{net.resolution}', net.embed_width, net.blocks()[2][-1].channels
  found = [
    *_fourier('unet.emb_fourier', 'embedding/fourier', net.stem_width),
    _dense('unet.emb_noise', 'embedding/noise', net.stem_width, width),
    _conv(f'unet.enc.{top}_conv', 'in_conv', net.image_channels + 1, net.stem_width),
    _conv('unet.out_conv', 'out_conv', last, net.image_channels),
    Leaf('unet.out_gain', 'out_gain', ()),
    *_fourier('logvar_fourier', 'logvar/fourier', LOGVAR_CHANNELS),
    _dense('logvar_linear', 'logvar/linear', LOGVAR_CHANNELS, 1),
  ]
  if net.num_classes:
    found.append(_dense('unet.emb_label', 'embedding/label', net.num_classes, width))
  names = edm.block_names(net)
  for block in itertools.chain(*net.blocks()):
    if block.name in names:
      found += _block(net, block, names[block.name].replace('model.', 'unet.', 1))
  return found


def _block(net, block, theirs):
  ours, width = block.name, block.channels
  yield Leaf(f'{theirs}.emb_gain', f'{ours}/embed_gain', ())
  yield _dense(f'{theirs}.emb_linear', f'{ours}/embed', net.embed_width, width)
  # A block of the encoder changes the width before its first convolution, one of the decoder in it.
  yield _conv(f'{theirs}.conv_res0', f'{ours}/conv_0', width if '.enc.' in theirs else block.in_channels, width)
  yield _conv(f'{theirs}.conv_res1', f'{ours}/conv_1', width, width)
  if block.skip_conv:
    yield _pointwise(f'{theirs}.conv_skip', f'{ours}/skip', block.in_channels, width, mapping.POINTWISE_2D)
  if block.heads:
    order = unets.qkv_order(QKV_AXES, width, block.heads)
    qkv = mapping.permuted(mapping.POINTWISE_2D, order)
    yield _pointwise(f'{theirs}.attn_qkv', f'{ours}/attention/qkv', width, 3 * width, qkv)
    yield _pointwise(f'{theirs}.attn_proj', f'{ours}/attention/out', width, width, mapping.POINTWISE_2D)


def _fourier(theirs, ours, channels):
  return [Leaf(f'{theirs}.{part}', f'{ours}/{part}', (channels,)) for part in ('freqs', 'phases')]


def _dense(theirs, ours, inputs, outputs):
  return Leaf(f'{theirs}.weight', f'{ours}/kernel', (outputs, inputs), mapping.LINEAR)


def _conv(theirs, ours, inputs, outputs):
  return Leaf(f'{theirs}.weight', f'{ours}/kernel', (outputs, inputs, 3, 3), mapping.CONV)


def _pointwise(theirs, ours, inputs, outputs, layout):
  return Leaf(f'{theirs}.weight', f'{ours}/kernel', (outputs, inputs, 1, 1), layout)
