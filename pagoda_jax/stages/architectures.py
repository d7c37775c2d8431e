"""What decides which network a U-Net is: to tell two apart, and to write one down as config keys."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pagoda_jax import config
from pagoda_jax.networks import unet as unets
from pagoda_jax.networks.unet import UNet

# What each published form of the U-Net sets; `config.network` has the rest.
FORMS = {'edm': unets.EDM_ADM, 'guided': unets.GUIDED_ADM, 'ddpmpp': unets.EDM_DDPMPP,
         'edm2': unets.EDM2, 'deepfloyd': unets.DEEPFLOYD}
UNKNOWN_ENCODER = 'unknown'  # of captions for a network whose weights alone are known
# Fields that a form decides, num_heads aside, which a config may set.
_FORM_FIELDS = tuple(dict.fromkeys(
  field for form in FORMS.values() for field in form if field != 'num_heads'
))
# Where a config says what these fields are; all others are under config.network.
_KEYS = {
  'resolution': 'config.base_resolution',
  'image_channels': 'config.data.channels, of latents config.autoencoder.channels',
  'num_classes': 'config.data.num_classes',
  'omega_embedding': 'config.guidance.law',
  'text_width': 'config.text.width',
  'text_pooled_width': 'config.text.pooled_width',
  'estimator': 'stage of the phase',
  'grown': 'channels, num_blocks and scale_shift of the growth phases',
} | dict.fromkeys(_FORM_FIELDS, 'config.network.form')
_NETWORK_KEYS = ('channels', 'channel_mult', 'decoder_channel_mult', 'stem_channels', 'embed_channels', 'num_blocks',
                 'attention_resolutions', 'mid_attention', 'num_heads', 'channels_per_head', 'augment_dim',
                 'text_attention', 'text_channels', 'text_pool_heads')
_ALWAYS_SAID = ('channels', 'channel_mult', 'num_blocks', 'attention_resolutions')


def effective(unet: UNet) -> dict[str, Any]:
  """The fields that decide what a network computes, with what defaults stand for written out."""
  levels = {unet.resolution >> level for level in range(len(unet.channel_mult))}
  fields = ('resolution', 'image_channels', 'num_classes', 'text_width', 'text_pooled_width', *_NETWORK_KEYS,
            *_FORM_FIELDS, 'omega_embedding', 'estimator', 'grown')
  return {field: getattr(unet, field) for field in fields} | {
    'in_channels': unet.in_channels or unet.image_channels,
    'decoder_channel_mult': unet.decoder_channel_mult or unet.channel_mult,
    'stem_channels': unet.stem_width,
    'embed_channels': unet.embed_width,
    'text_channels': 'none' if unet.text_attention == 'none' else unet.text_channels or unet.embed_width,
    'attention_resolutions': tuple(sorted(levels & set(unet.attention_resolutions), reverse=True)),
    'channels_per_head': 'any' if unet.num_heads else unet.channels_per_head,
  }


def differences(theirs: UNet, ours: UNet) -> list[str]:
  """One line for each field in which two networks differ, under the key that a config has for it."""
  there, here = effective(theirs), effective(ours)
  return [
    f'{_KEYS.get(field, f"config.network.{field}")} ({field}): there {there[field]!r}, in the config {here[field]!r}'
    for field in there
    if there[field] != here[field]
  ]


def fields_of(network: Mapping[str, Any]) -> dict[str, Any]:
  """The `UNet` fields that a `config.network` stands for, its form's among them."""
  own = dict(network)
  form = own.pop('form')
  # The published forms other than EDM's ADM have a first convolution of `channels`, whatever the first level has.
  own['stem_channels'] = own['stem_channels'] or (0 if form in ('edm', 'edm2') else own['channels'])
  own['num_heads'] = own['num_heads'] or FORMS[form].get('num_heads', 0)
  return {**FORMS[form], **own}


def network_keys(unet: UNet) -> dict[str, Any]:
  """Those keys of `config.network` that are not as the others, or defaults, make them.

  What no config can say (a form of nobody's, say) is left to `differences` to find.
  """
  wanted = effective(unet)
  form = next((name for name, fields in FORMS.items() if _is_of(unet, fields)), 'edm')
  network = {'form': form} | {key: wanted[key] for key in _ALWAYS_SAID}
  plain = config.network(**network).to_dict()
  for key in _NETWORK_KEYS:
    # Said only where the value that follows from what is said already is another one.
    said = effective(UNet(resolution=unet.resolution, **fields_of({**plain, **network})))
    if said[key] != wanted[key]:
      network[key] = wanted[key]
  return network


def config_lines(options: Mapping[str, Any]) -> list[str]:
  """Python lines that make an experiment's network the one of these `UNet` options; as `network_keys`."""
  unet = UNet(**options)
  network = network_keys(unet)
  lines = [f'config.text.update({_text_of(unet)!r})  # and config.text.encoder: what embeds the captions'
           ] if unet.text_width else []
  lines += [
    f'config.base_resolution = {unet.resolution}',
    f"config.data.update({{'channels': {unet.image_channels}, 'num_classes': {unet.num_classes}}})",
    f'config.network = c.network({", ".join(f"{key}={value!r}" for key, value in network.items())})',
  ]
  if unet.grown:
    lines.append(f'init_levels={tuple(map(tuple, unet.grown))!r},  # of the grow phase that starts from it')
  return lines


def experiment_of(unet: UNet, name: str, phase) -> ConfigDict:
  """An experiment without data of one phase, of stage teacher or grow, which is to draw with a network.

  Args:
    unet: the network; as `network_keys`.
    name: of the phase.
    phase: what config.teacher() or config.grow() has made; of a grow phase, `init_levels` and `resolution` are set.
  """
  side = unet.resolution << len(unet.grown)
  experiment = config.experiment(base_resolution=unet.resolution, network=config.network(**network_keys(unet)))
  experiment.data.update({'resolution': side, 'num_classes': unet.num_classes})
  experiment.data.channels = unet.image_channels
  if unet.text_width:
    experiment.text.update({'encoder': UNKNOWN_ENCODER} | _text_of(unet))
  if phase.stage == 'grow':
    phase.update({'start': '', 'init_levels': tuple(map(tuple, unet.grown)), 'resolution': side})
  config.add_phase(experiment, name, phase)
  return experiment


def _text_of(unet: UNet) -> dict[str, int]:
  """Keys of `config.text`; where the network takes no vector of a whole caption, its width is that of a token."""
  return {'width': unet.text_width, 'pooled_width': unet.text_pooled_width or unet.text_width}


def text_fields_of(experiment) -> dict[str, int]:
  """The `UNet` fields that an experiment's `config.text` stands for; {} without captions."""
  if not config.has_text(experiment):
    return {}
  text, pools = experiment.text, experiment.network.text_pool_heads
  return {'text_width': text.width, 'text_pooled_width': 0 if pools else text.pooled_width}


def _is_of(unet: UNet, form: Mapping[str, Any]) -> bool:
  plain = UNet()
  return all(getattr(unet, field) == form.get(field, getattr(plain, field)) for field in _FORM_FIELDS)
