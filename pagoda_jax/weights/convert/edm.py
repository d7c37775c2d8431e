"""EDM's published networks (github NVlabs/edm: state dict of `EDMPrecond`, `DhariwalUNet` or `SongUNet`)."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from pagoda_jax.networks.unet import EDM_ADM, EDM_DDPMPP, UNet
from pagoda_jax.weights.convert import mapping, unets
from pagoda_jax.weights.convert.mapping import ConversionError, Leaf, StateDict

QKV_AXES = 'hct'  # q, k and v of a channel lie side by side


def carried(name: str) -> bool:
  """Whether a tensor has no place in our network: the resampling filters, which are constant."""
  return name.endswith('.resample_filter')


def options(state_dict: StateDict) -> dict[str, Any]:
  """Fields of the `UNet` that a state dict is for; names and shapes determine all of them but dropout.

  Raises:
    ConversionError: it is not an ADM or DDPM++ network of EDM.
  """
  resolutions = sorted({int(found[1]) for name in state_dict if (found := re.match(r'model\.enc\.(\d+)x', name))})[::-1]
  if not resolutions:
    raise ConversionError("not a network of EDM's: no tensor is named model.enc.*")
  _refuse_ncsnpp(state_dict)
  top, lowest = (f'{resolution}x{resolution}' for resolution in (resolutions[0], resolutions[-1]))
  ddpmpp = f'model.dec.{top}_aux_conv.weight' in state_dict
  head = f'dec.{top}_aux_conv' if ddpmpp else 'out_conv'
  embed_channels, noise_channels = unets.shape(state_dict, 'model.map_layer0.weight')
  stem_channels, in_channels = unets.shape(state_dict, f'model.enc.{top}_conv.weight')[:2]
  # DDPM++ has one width for both; ADM's stem may be wider.
  channels = stem_channels if ddpmpp else noise_channels
  widths = [unets.shape(state_dict, f'model.enc.{r}x{r}_block0.conv0.weight')[0] for r in resolutions]
  return {
      **(EDM_DDPMPP if ddpmpp else EDM_ADM),
      'resolution': resolutions[0],
      'image_channels': unets.shape(state_dict, f'model.{head}.weight')[0],
      'in_channels': in_channels,
      'channels': channels,
      'channel_mult': tuple(unets.multiplier(width, channels) for width in widths),
      'stem_channels': stem_channels,
      'embed_channels': embed_channels,
      'num_blocks': sum(bool(re.match(rf'model\.enc\.{top}_block\d+\.conv0\.weight', name)) for name in state_dict),
      # Presence decides: below 64 channels EDM's ADM has 0 heads, that is, no attention.
      'attention_resolutions': tuple(r for r in resolutions if f'model.enc.{r}x{r}_block0.qkv.weight' in state_dict),
      'mid_attention': f'model.dec.{lowest}_in0.qkv.weight' in state_dict,
      'num_classes': unets.width_if_present(state_dict, 'model.map_label.weight', axis=1),
      'augment_dim': unets.width_if_present(state_dict, 'model.map_augment.weight', axis=1),
  }


def leaves(options: Mapping[str, Any]) -> list[Leaf]:
  """Every tensor of the network that has these options, except grown levels, which EDM has no names for."""
  net = UNet(**options)
  return [*_embedding_leaves(net), *_conv_leaves(net), *_residual_leaves(net)]


def block_names(net: UNet) -> dict[str, str]:
  """Our block name -> theirs, for all but grown blocks."""
  encoder, middle, decoder = net.blocks()
  side = {block.name: 'enc' for block in encoder} | {block.name: 'dec' for block in middle + decoder}
  names = {}
  for block in itertools.chain(encoder, middle, decoder):
    if block.resolution <= net.resolution:
      place = block.name.split('_')[-1]
      if block in middle:
        place = place.replace('block', 'in')
      names[block.name] = f'model.{side[block.name]}.{block.resolution}x{block.resolution}_{place}'
  return names


def _residual_leaves(net):
  layers = {'norm_0': 'norm0', 'conv_0': 'conv0', 'embed': 'affine', 'norm_1': 'norm1', 'conv_1': 'conv1',
            'skip': 'skip', 'attention/norm': 'norm2', 'attention/qkv': 'qkv', 'attention/out': 'proj'}
  names = block_names(net)
  found = []
  for block in itertools.chain(*net.blocks()):
    if block.name in names:
      theirs = {ours: f'{names[block.name]}.{layer}' for ours, layer in layers.items()}
      found += unets.block_leaves(net, block, theirs, QKV_AXES)
  return found


def _embedding_leaves(net):
  width = net.embed_width
  found = [
      *unets.linear('model.map_layer0', 'time_embed_0', net.channels, width),
      *unets.linear('model.map_layer1', 'time_embed_1', width, width),
  ]
  if net.augment_dim:
    shape = (net.channels, net.augment_dim)
    found.append(Leaf('model.map_augment.weight', 'augment_embed/kernel', shape, mapping.LINEAR))
  if net.num_classes and net.ddpmpp_embedding:
    found += unets.linear('model.map_label', 'label_embed', net.num_classes, net.channels)
  elif net.num_classes:
    found.append(Leaf('model.map_label.weight', 'label_embed/embedding', (width, net.num_classes), mapping.LINEAR))
  return found


def _conv_leaves(net):
  top = f'{net.resolution}x{net.resolution}'
  norm, conv = (f'dec.{top}_aux_norm', f'dec.{top}_aux_conv') if net.ddpmpp_embedding else ('out_norm', 'out_conv')
  last = net.blocks()[2][-1].channels
  return [
      *unets.conv(f'model.enc.{top}_conv', 'in_conv', net.in_channels or net.image_channels, net.stem_width, 3),
      *unets.norm(f'model.{norm}', 'out_norm', last),
      *unets.conv(f'model.{conv}', 'out_conv', last, net.image_channels, 3),
  ]


def _refuse_ncsnpp(state_dict):
  for name, value in state_dict.items():
    if name == 'model.map_noise.freqs' or re.search(r'_aux_(down|skip|residual|up)\.', name):
      raise ConversionError(f'an NCSN++ network of EDM, which is not supported: it has {name}')
    if carried(name) and value.shape[-2:] != (2, 2):
      raise ConversionError(f'{name} has shape {value.shape}; only the filter [1, 1] of ADM and DDPM++ is supported')
