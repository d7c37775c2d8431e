"""Of what networks are conditioned on: captions, the network's inputs for them, the strength of guidance."""

import re

from pagoda_jax import config as configs
from pagoda_jax.validation.checks import check


def validate_text(config):
  text, data = config.text, config.data
  if not configs.has_text(config):
    check(not text.sha256, 'config.text.sha256', text.sha256, "must be '' while config.text.encoder is ''")
    return
  kind, _, place = text.encoder.partition(':')
  names = [*kind.split('.'), *place.split('.')]  # of a module:function
  check(place if kind in ('clip', 't5') else text.encoder == 'ngrams' or all(map(str.isidentifier, names)),
         'config.text.encoder', text.encoder, "must be '', clip:FOLDER, t5:FOLDER, ngrams or module:function")
  check(re.fullmatch('([0-9a-f]{64})?', text.sha256), 'config.text.sha256', text.sha256,
         "must be '' or the 64 hexadecimal digits of a SHA-256")
  check(kind != 't5' or text.pooled_width == text.width, 'config.text.pooled_width', text.pooled_width,
         f'must be config.text.width = {text.width}: T5 has no vector of the whole caption, the mean of its tokens is '
         'taken')
  check(data.num_classes == 0, 'config.data.num_classes', data.num_classes,
         f'must be 0 with captions (config.text.encoder = {text.encoder!r}): networks are told a label or a text')
  check(data.source == 'array_record', 'config.data.source', data.source,
         f"must be 'array_record' with captions (config.text.encoder = {text.encoder!r}): `pagoda prepare "
         '--text_encoder=...` stores their embeddings beside the pictures')


def validate_text_network(config):
  network, width = config.network, config.text.width
  keys = ('text_attention', 'text_channels', 'text_pool_heads')
  asked = {key: network[key] for key in keys if network[key] not in ('none', 0)}
  if not configs.has_text(config):
    for key, value in asked.items():
      check(False, f'config.network.{key}', value, "needs captions, and config.text.encoder is ''")
    check(network.form != 'deepfloyd', 'config.network.form', network.form,
           "is a network of captions, and config.text.encoder is ''")
    return
  check(network.form != 'edm2', 'config.network.form', network.form, 'has no input for captions (config.text.encoder)')
  check(not network.text_channels or network.text_attention != 'none', 'config.network.text_channels',
        network.text_channels, "must be 0 where config.network.text_attention is 'none': it is of tokens for attention")
  if network.form == 'deepfloyd':
    check(network.text_attention == 'added_kv', 'config.network.text_attention', network.text_attention,
           "must be 'added_kv' where config.network.form is 'deepfloyd'")
    check(network.text_pool_heads, 'config.network.text_pool_heads', 0,
           "must not be 0 where config.network.form is 'deepfloyd' (IF-I: 64)")
  sides = {config.base_resolution >> level for level in range(len(network.channel_mult))}
  check(network.text_attention == 'none' or network.mid_attention or sides & set(network.attention_resolutions),
         'config.network.text_attention', network.text_attention,
         'is where there is attention, and there is none: config.network.attention_resolutions and mid_attention')
  heads = network.text_pool_heads
  check(not heads or width % heads == 0, 'config.network.text_pool_heads', heads,
         f'must divide config.text.width = {width}')


def _validate_law(law, path):
  if law.law != 'constant':
    check(law.low < law.high, f'{path}.low', law.low, f'must be below {path}.high = {law.high}')
  if law.law == 'truncated_normal':
    check(law.low <= law.mean <= law.high, f'{path}.mean', law.mean,
           f'must lie between {path}.low = {law.low} and high = {law.high}')


def validate_guidance(config):
  law, measured = config.guidance, config.evaluation.guidance
  again = law.recaptions
  check(not again.law or (configs.has_guidance(config) and configs.has_text(config)), 'config.guidance.recaptions.law',
         again.law, "must be '' without captions (config.text.encoder) and guidance (config.guidance.law)")
  if not configs.has_guidance(config):
    check(not measured, 'config.evaluation.guidance', measured, "must be () while config.guidance.law = 'none'")
    return
  check(config.data.num_classes != 0 or configs.has_text(config), 'config.guidance.law', law.law,
         "must be 'none' without labels or captions to guide to: config.data.num_classes is 0")
  check(not measured or config.evaluation.samples, 'config.evaluation.guidance', measured,
         'must be () without config.evaluation.samples, how many to draw at each')
  # Recall looks at the third neighbour of each (evaluation/metrics/precision_recall.py).
  for key, count in (('evaluation.samples', config.evaluation.samples), ('data.holdout', config.data.holdout)):
    check(not measured or count >= 4, f'config.{key}', count,
           f'must be at least 4 with config.evaluation.guidance = {measured}: recall at each strength takes that many')
  _validate_law(law, 'config.guidance')
  if again.law:
    _validate_law(again, 'config.guidance.recaptions')
