"""What `validate` refuses: each message names the key, its value and what would be right."""

import math
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest
import tiny
from ml_collections import ConfigDict
from runs import CONFIG, pagoda

from pagoda_jax import config as configs
from pagoda_jax import validation
from pagoda_jax.config import ladder
from pagoda_jax.method import perception
from pagoda_jax.stages import models, state
from pagoda_jax.validation import losses
from pagoda_jax.weights.convert import pagoda as pagoda_names


def set_key(key, value):
  def change(config):
    *path, last = key.split('.')
    group = config
    for part in path:
      group = group[part]
    with group.unlocked(), group.ignore_type():
      group[last] = value
  return change


BAD = [
  ('phases.distill.stepz', 3, ['config.phases.distill.stepz', 'did you mean steps']),
  ('data.sourse', 'x', ['config.data.sourse', 'did you mean source']),
  ('phases.teacher.steps', 0, ['config.phases.teacher.steps = 0', 'a whole number in [1, 1_000_000_000]']),
  ('phases.teacher.steps', 'many', ["config.phases.teacher.steps = 'many'", 'a whole number']),
  ('phases.teacher.batch_size', 12, ['config.phases.teacher.batch_size = 12', 'multiple of 8']),
  ('phases.grow_16.start', 'teacher', ["config.phases.grow_16.start = 'teacher'", 'distill']),
  ('phases.grow_16.resolution', 24, ['config.phases.grow_16.resolution = 24', '8', 'times 2, 4, 8']),
  ('phases.grow_16.resolution', 32, ['config.phases.grow_16.resolution = 32', 'config.data.resolution = 16']),
  ('phases.distill.noise', 'nowhere', ["config.phases.distill.noise = 'nowhere'", 'invert']),
  ('phases.distill.stage', 'shrink', ["'shrink'", 'teacher, invert, encode, guide, distill, grow']),
  ('phases.distill.reconstruction.distance', 'l3', ["'l3'", 'pixels']),
  ('phases.distill.discriminator.augment', ('sepia',), ["'sepia'", 'brightness']),
  ('phases.distill.optimizer.name', 'adan2', ["'adan2'", 'one of', 'radam']),
  ('phases.distill.pairs', 'noise', ["config.phases.distill.pairs = 'noise'", 'data, teacher']),
  ('phases.distill.pairs_fraction', 1.5, ['pairs_fraction = 1.5', '(0, 1]']),
  ('phases.invert.encoder', 'teacher', ["invert.encoder = 'teacher'", 'stage encode (none; add one of stage']),
  ('phases.distill.resolution', 24, ['distill.resolution = 24', 'must be 0 (config.base_resolution = 8), or']),
  ('phases.distill.resolution', 32, ['distill.resolution = 32', 'not exceed config.data.resolution = 16']),
  ('phases.invert.dtype', 'int8', ["'int8'", 'float32, float16']),
  ('order', ('teacher', 'invert', 'grow_16'), ['config.phases.grow_16.start', 'none; add one of stage distill']),
  ('order', ('teacher', 'distil'), ["'distil'", 'distill']),
  ('order', (), ['config.order', 'at least one phase']),
  ('mesh.data', 3, ['config.mesh', 'takes 3 devices, there are 8']),
  ('mesh.zero1', 3, ['config.mesh', '8 devices are no multiple of 3']),
  ('mesh.zero1', -1, ['config.mesh.zero1', 'must be a number of devices where config.mesh.data = -1']),
  ('base_resolution', 32, ['config.base_resolution = 32', 'config.data.resolution = 16']),
  ('data.num_classes', -2, ['config.data.num_classes = -2', '-1']),
  ('data.source', 'camera', ["config.data.source = 'camera'", 'mnist, folder, array_record, tfds']),
  ('data.source', 'folder', ["config.data.path = ''", 'source folder needs it']),
  ('data.source', 'tfds', ["config.data.name = ''", 'source tfds needs it']),
  ('data.path', 'photos', ["config.data.path = 'photos': must be '' where config.data.source is 'mnist'"]),
  ('data.split', 'test', ["config.data.split = 'test': must be 'train' where", 'it is of tfds alone']),
  ('data.verify', True, ['config.data.verify = True: must be False where', 'it is of array_record alone']),
  ('data.max_unreadable', 1.5, ['config.data.max_unreadable = 1.5', '[0, 1]']),
  ('data.resolution', 32, ['config.data.resolution = 32', 'must be 16', 'grow_16']),
  ('data.num_classes', 0, ['discriminator.conditional', 'num_classes is 0']),
  ('network.form', 'vdm', ["config.network.form = 'vdm'", 'edm, guided, ddpmpp, edm2']),
  ('network.decoder_channel_mult', (1, 2), ['config.network.decoder_channel_mult', 'must have 1 levels']),
  ('network.num_heads', -1, ['config.network.num_heads = -1', '[0, 1024]']),
  ('phases.distill.discriminator.features', 'vgg', ["'vgg'", 'pixels, projected']),
  ('phases.distill.discriminator.backbones', ('resnet50',), ["'resnet50'", 'tf_efficientnet_lite0']),
  ('phases.distill.discriminator.backbones', (), ['discriminator.backbones', 'at least one']),
  ('phases.distill.reconstruction.backbones', configs.BACKBONES * 2, ['reconstruction.backbones', 'twice']),
  ('phases.distill.reconstruction.augment', ('sepia',), ['reconstruction.augment', "'sepia'"]),
  ('phases.invert.teacher', '', ['config.phases.invert.teacher', 'or config.phases.invert.init_from a folder']),
  ('phases.distill.teacher', '', ['config.phases.distill.teacher', 'or config.phases.distill.init_from a folder']),
  ('phases.grow_16.start', '', ['config.phases.grow_16.start', 'or config.phases.grow_16.init_from a folder']),
  ('phases.distill.init_from', 'w', ["init_from = 'w'", "beside config.phases.distill.teacher = 'teacher'"]),
  ('phases.grow_16.init_from', 'w', ["init_from = 'w'", "beside config.phases.grow_16.start = 'distill'"]),
  ('phases.grow_16.init_levels', ((8, 1, False),), ['grow_16.init_levels', 'grow_16.init_from is empty']),
  ('network.dropout', 1.0, ['config.network.dropout = 1.0', '[0, 1)']),
  ('microbatch', -1, ['config.microbatch = -1', '[0, 1_000_000]']),
  ('remat', (16, 4), ['config.remat = (16, 4)', 'some of 8, 16,']),
  ('remat', 16, ['config.remat = 16', 'tuple']),
  ('attention', 'cudnn', ["config.attention = 'cudnn'", "bfloat16 alone, and config.precision is 'float32'"]),
  ('diffusion.sigma_min', 90.0, ['config.diffusion.sigma_min = 90.0', 'sigma_max = 80.0']),
  # Single keys out of their range.
  ('phases.teacher.optimizer.clip_norm', -1.0, ['clip_norm = -1.0', '[0, 1e9]']),
  ('phases.teacher.optimizer.weight_decay', 0.1, ["weight_decay = 0.1: must be 0 for 'radam'; adadelta,"]),
  ('phases.teacher.optimizer.b1', 2.0, ['b1 = 2.0', '[0, 1)']),
  ('phases.teacher.optimizer', configs.optimizer(name='sgd', b1=0.5),
   ["teacher.optimizer.b1 = 0.5: must be left at 0.9 for 'sgd'", 'adamw']),
  ('phases.distill.discriminator_optimizer', configs.optimizer(name='rmsprop', b2=0.9),
   ["discriminator_optimizer.b2 = 0.9: must be left at 0.999 for 'rmsprop'"]),
  ('phases.teacher.optimizer.warmup_steps', -1, ['warmup_steps = -1', '[0, ']),
  ('phases.teacher.optimizer.learning_rate', math.nan, ['learning_rate = nan', '(0, 100]']),
  ('phases.teacher.optimizer.name', 'clip', ["'clip'", 'one of']),
  ('phases.teacher.optimizer.name', 'chain', ["'chain'", 'one of']),
  ('phases.teacher.optimizer.name', 'lbfgs', ["'lbfgs'", 'one of']),
  ('phases.teacher.sample_levels', 0, ['sample_levels = 0', '[2, 10_000]']),
  ('phases.distill.batch_size', 10**9, ['batch_size = 1000000000', '[1, 1_000_000]']),
  ('phases.distill.reconstruction.weight', math.nan, ['weight = nan', '[0, 1e6]']),
  ('diffusion.rho', 0.0, ['rho = 0.0', '[0.1, 100]']),
  ('diffusion.sigma_data', 0.0, ['sigma_data = 0.0', '(0, 100]']),
  ('diffusion.sigma_max', math.inf, ['sigma_max = inf', '(0, 5000]']),
  ('network.channels', 0, ['network.channels = 0', '[2, ']),
  ('network.channels', -8, ['network.channels = -8', '[2, ']),
  ('network.channels', 9, ['network.channels = 9', 'a multiple of 2']),
  ('network.num_blocks', -1, ['network.num_blocks = -1', '[1, 64]']),
  ('network.channel_mult', (), ['channel_mult = ()', '1 to 10 values']),
  ('data.num_classes', 10**9, ['num_classes = 1000000000', '[-1, 1_000_000]']),
  ('evaluation.samples', -1, ['evaluation.samples = -1', 'or 0']),
  # Keys that do not go together.
  ('network.channel_mult', (1.3,), ['channel_mult = (1.3,)', '1.3 times config.network.channels = 8 is 10.4']),
  ('network.num_heads', 3, ['num_heads = 3', '8 channels at 8 px', 'into 3 attention heads']),
  ('phases.distill.reconstruction.scale_weights', (), ['scale_weights = ()', '1 to 10 values']),
  ('phases.distill.reconstruction.scale_weights', (0.0, 0), ['scale_weights = (0.0, 0)', 'not 0']),
  ('phases.distill.reconstruction.scale_weights', (1,) * 5, ['scale_weights = (1, 1, 1, 1, 1)', 'at most 4', '8 px']),
  ('phases.distill.discriminator.scales', 3, ['scales = 3', 'at most 2', '8 px']),
  ('phases.distill.discriminator.scales', 0, ['scales = 0', '[1, 10]']),
  ('phases.distill.adversarial.low', 11.0, ['adversarial.low = 11.0', 'adversarial.high = 10.0']),
  ('phases.grow_16.thaw', (8, 32), ['grow_16.thaw = (8, 32)', '32 must be', 'dec_8_block0 (output_blocks.0)']),
  ('phases.grow_16.thaw', ('enc_8_block0',), ["'enc_8_block0' must be", 'dec_8_block1 (output_blocks.1)']),
  ('phases.grow_16.thaw', (True,), ['grow_16.thaw = (True,)', 'each a resolution or']),
  ('phases.grow_16.update', 'both', ["'both'", 'joint, separate']),
  ('phases.grow_16.adversarial.weight', 0, ['grow_16.adversarial.weight = 0', "update = 'separate'"]),
  ('phases.grow_16.reconstruction_adversarial.low', 11, ['reconstruction_adversarial.low = 11', 'high = 10.0']),
  ('phases.grow_16.standardize_noise', True, ['grow_16.standardize_noise = True', 'must be False, as']),
  ('phases.teacher.optimizer', configs.optimizer(schedule='cosine', warmup_steps=4),
   ['optimizer.warmup_steps = 4', 'less than config.phases.teacher.steps = 4']),
  ('phases.teacher.optimizer', configs.optimizer(schedule='inverse_sqrt', warmup_steps=4, decay_from=3),
   ['optimizer.decay_from = 3', 'at least config.phases.teacher.optimizer.warmup_steps = 4']),
  ('phases.invert.start_ema', 'std_0.1', ["start_ema = 'std_0.1'", "'' or one of ema, the averages of teacher"]),
  ('phases.teacher.ema_std', (0.3,), ['ema_std = (0.3,)', '[0.001, 0.288]']),
  ('phases.teacher.ema_halflife', (5e5, 500_000), ['ema_halflife = (500000.0, 500000)', 'no average twice']),
  ('phases.teacher.augmentation.rate', 0.12, ['network.augment_dim = 0', 'must be 9', 'come out augmented']),
  ('phases.teacher.augmentation.transforms', ('shear',), ["transforms = ('shear',)", 'at least one of x_flip']),
  ('phases.a/b', configs.teacher(), ["config.phases = 'a/b'", 'letters']),
  ('phases.distill', 'distill', ["config.phases.distill = 'distill'", 'must be a phase']),
]


def refuses(config, key, value, expected):
  validation.validate(config, 8)
  set_key(key, value)(config)
  with pytest.raises(configs.ConfigError) as error:
    validation.validate(config, 8)
  for text in expected:
    assert text in str(error.value)


@pytest.mark.parametrize('key, value, expected', BAD, ids=[f'{key}={value!s:.20}' for key, value, _ in BAD])
def test_refuses(key, value, expected):
  refuses(tiny.get_config(), key, value, expected)


def test_a_phase_is_no_other_phases_very_object():
  """--config.phases.grow_32.steps would be that of grow_16 as well, and its resolution."""
  config = tiny.get_config()
  with pytest.raises(configs.ConfigError, match='config.phases.grow_32: is the very object that config.phases.grow_16'):
    configs.add_phase(config, 'grow_32', config.phases.grow_16)
  assert config == tiny.get_config()


def test_pairs_of_a_teacher_name_a_phase_that_inverts():
  config = tiny.get_config()
  config.phases.distill.pairs = 'teacher'
  refuses(config, 'phases.distill.noise', 'teacher', ["distill.noise = 'teacher'", 'stage invert (invert)'])


def test_noise_is_of_the_teacher_whose_images_or_generator_it_meets():
  config = tiny.get_config()
  for name, phase in (('other', configs.teacher(batch_size=8)), ('others', configs.invert(teacher='other'))):
    configs.add_phase(config, name, phase)
  config.order = ('teacher', 'other', 'invert', 'others', 'distill', 'grow_16')
  changed = config.copy_and_resolve_references()
  refuses(changed, 'phases.grow_16.noise', 'others', [
    "grow_16.noise = 'others': is of other, and distill knows that of teacher alone", "distill.noise = 'invert'"])
  changed.phases.distill.noise = 'others'  # a generator may begin as a copy of one teacher and learn another's noise
  refuses(changed, 'phases.distill.pairs', 'teacher', [
    "distill.noise = 'others': is of other, whose images", 'by teacher'])
  changed.phases.distill.teacher = 'other'
  validation.validate(changed, 8)


def test_a_host_inverts_by_itself_whatever_its_batch():
  config = tiny.get_config()
  config.phases.invert.batch_size = 12  # filled up to a multiple of the host's devices
  validation.validate(config, 8)


GUIDED_BAD = [
  ('guidance.law', 'gauss', ["config.guidance.law = 'gauss'", 'none, constant, uniform, truncated_normal']),
  ('guidance.low', 4.0, ['config.guidance.low = 4.0', 'below config.guidance.high = 4.0']),
  ('guidance.low', 5.0, ['config.guidance.low = 5.0', 'below config.guidance.high = 4.0']),
  ('guidance.high', math.nan, ['config.guidance.high = nan', '[0, 100]']),
  ('guidance.mean', -1.0, ['config.guidance.mean = -1.0', '[0, 100]']),
  ('guidance.std', -0.5, ['config.guidance.std = -0.5', '(0, 100]']),
  ('guidance.std', 0.0, ['config.guidance.std = 0.0', '(0, 100]']),
  ('guidance.law', 'none', ["config.phases.guide.stage = 'guide'", "config.guidance.law is 'none'"]),
  ('guidance.law', 'constant', ["config.phases.guide.stage = 'guide'", 'that varies']),
  ('phases.teacher.label_dropout', 0.0, ['config.phases.teacher.label_dropout = 0.0', 'must be above 0']),
  ('phases.teacher.label_dropout', 1.0, ['config.phases.teacher.label_dropout = 1.0', 'and below 1, 0.1 say']),
  ('phases.distill.guide', '', ["config.phases.distill.guide = ''", 'stage guide (guide)']),
  ('phases.distill.guide', 'teacher', ["config.phases.distill.guide = 'teacher'", 'stage guide (guide)']),
  ('phases.guide.teacher', '', ['config.phases.guide.teacher', 'or config.phases.guide.init_from a folder']),
  ('order', ('teacher', 'invert', 'distill', 'guide', 'grow_16'),
   ["config.phases.distill.guide = 'guide'", 'none; add one of stage guide']),
  ('evaluation.guidance', (1.0,), ['config.evaluation.guidance = (1.0,)', 'config.evaluation.samples']),
  ('evaluation.guidance', (math.nan,), ['config.evaluation.guidance = (nan,)', 'each a number in [0, 100]']),
  ('data.num_classes', 0, ["config.guidance.law = 'uniform'", 'without labels']),
  ('phases.distill.pairs', 'teacher', ["config.phases.distill.pairs = 'teacher'", "must be 'data' with guidance"]),
]


@pytest.mark.parametrize('key, value, expected', GUIDED_BAD, ids=[f'{k}={v!s:.20}' for k, v, _ in GUIDED_BAD])
def test_refuses_of_guidance(key, value, expected):
  refuses(tiny.get_config('guided'), key, value, expected)


def with_text(encoder='clip:weights/clip'):
  """The tiny experiment on captions instead of labels."""
  config = tiny.get_config()
  config.text.encoder = encoder
  config.data.update({'source': 'array_record', 'path': 'data/photos', 'num_classes': 0})
  config.phases.distill.discriminator.conditional = config.phases.grow_16.discriminator.conditional = False
  return config


TEXT_BAD = [
  *(('text.encoder', value, ['config.text.encoder = ', 'clip:FOLDER, t5:FOLDER, ngrams or module:function'])
    for value in ('clip', 'clip:', 'ngrams:', 'ngram', 'a:b:c', 'https://x/y', 'a..b:c', 'a:', ':f')),
  ('text.encoder', '', ["config.text.sha256 = 'aaaa", "must be '' while config.text.encoder is ''"]),
  ('text.encoder', 't5:weights/t5', ['config.text.pooled_width = 768', 'config.text.width = 512', 'mean of its']),
  ('text.sha256', 'A' * 64, ['config.text.sha256', '64 hexadecimal digits']),
  ('text.length', 0, ['config.text.length = 0', '[1, 4096]']),
  ('text.width', 0, ['config.text.width = 0', '[1, 16_384]']),
  ('network.form', 'edm2', ["config.network.form = 'edm2'", 'no input for captions']),
  ('network.form', 'deepfloyd', ["network.text_attention = 'none'", "must be 'added_kv'"]),
  ('network.text_attention', 'self', ["network.text_attention = 'self'", 'none, cross, added_kv']),
  ('network.text_pool_heads', 7, ['network.text_pool_heads = 7', 'must divide config.text.width = 512']),
  ('network.text_channels', 64, ['network.text_channels = 64', "must be 0 where config.network.text_attention is 'no"]),
  ('guidance.recaptions.law', 'uniform', ["guidance.recaptions.law = 'uniform'", "must be '' without"]),
  ('data.num_classes', 10, ['config.data.num_classes = 10', 'must be 0 with captions', 'a label or a text']),
  ('data.num_classes', -1, ['config.data.num_classes = -1', 'must be 0 with captions']),
  ('data.source', 'mnist', ["config.data.source = 'mnist'", "must be 'array_record'", '--text_encoder']),
]


@pytest.mark.parametrize('key, value, expected', TEXT_BAD, ids=[f'{k}={v!s:.20}' for k, v, _ in TEXT_BAD])
def test_refuses_of_text(key, value, expected):
  config = with_text()
  config.text.update({'width': 512, 'sha256': 'a' * 64})
  refuses(config, key, value, expected)


def test_encoders_of_text_and_guidance_by_captions_are_taken():
  for encoder in ('clip:weights/clip', 't5:a:b', 'ngrams', 'mine:encode', 'my.package:encode'):
    config = with_text(encoder)
    config.guidance.update({'law': 'constant', 'mean': 3.0})
    config.phases.teacher.label_dropout = 0.1
    validation.validate(config, 8)
  # Attention to captions needs attention; kinds of captions with laws of their own, an estimator.
  config.network.text_attention = 'cross'
  validation.validate(config, 8)
  config.network.mid_attention = False
  with pytest.raises(configs.ConfigError, match="text_attention = 'cross': is where there is attention, and there is "):
    validation.validate(config, 8)
  config.network.mid_attention = True
  config.guidance.recaptions.update({'law': 'truncated_normal', 'mean': 2.0, 'std': 3.0, 'low': 2.5, 'high': 10.0})
  with pytest.raises(configs.ConfigError, match='guidance.recaptions.mean = 2.0: must lie between .*low = 2.5'):
    validation.validate(config, 8)
  config.guidance.recaptions.low = 1.0
  with pytest.raises(configs.ConfigError, match="distill.guide = '': must be an earlier phase"):
    validation.validate(config, 8)


@pytest.mark.parametrize('key, value, said', [
  ('network.text_attention', 'cross', "text_attention = 'cross': needs captions, and config.text.encoder is ''"),
  ('network.text_pool_heads', 4, 'text_pool_heads = 4: needs captions'),
  ('network.text_channels', 64, 'text_channels = 64: needs captions'),
  ('network.form', 'deepfloyd', "form = 'deepfloyd': is a network of captions"),
])
def test_keys_of_captions_need_captions(key, value, said):
  config = tiny.get_config()
  set_key(key, value)(config)
  with pytest.raises(configs.ConfigError, match=said):
    validation.validate(config, 8)


def test_what_keys_that_exclude_each_other_must_be():
  config = tiny.get_config('guided')
  config.order = tuple(name for name in config.order if name != 'guide')
  with config.unlocked():
    del config.phases['guide']
  config.guidance.update({'law': 'constant', 'mean': 3.0})
  with pytest.raises(configs.ConfigError, match="distill.guide = 'guide': must be '' while .*law = 'constant'"):
    validation.validate(config, 8)
  config.phases.distill.guide = config.phases.grow_16.guide = ''
  validation.validate(config, 8)
  config.guidance.update({'law': 'truncated_normal', 'mean': 5.0})
  with pytest.raises(configs.ConfigError, match=r'guidance.mean = 5.0: must lie between .*low = 1.0 and high = 4.0'):
    validation.validate(config, 8)
  config = tiny.get_config()
  config.phases.distill.update({'pairs': 'teacher', 'pairs_fraction': 0.5})
  with pytest.raises(configs.ConfigError, match="distill.pairs_fraction = 0.5: must be 1 with .*pairs = 'teacher'"):
    validation.validate(config, 8)
  config = tiny.get_config()
  config.evaluation.update({'samples': 10, 'guidance': (1.0,)})
  with pytest.raises(configs.ConfigError, match="evaluation.guidance = .* config.guidance.law = 'none'"):
    validation.validate(config, 8)
  config = tiny.get_config('roads')  # keys of a solver, beside an encoder, would be without effect
  refuses(config, 'phases.encoded.num_levels', 3, ['encoded.num_levels = 3', "left at 40 with", "encoder = 'encode'"])
  config = with_text('')
  refuses(config, 'phases.teacher.label_dropout', 0.1, ['teacher.label_dropout = 0.1', 'must be 0 without labels or'])


FLAGS = ('mirror mid_attention clip_denoised add_noise store spectral_norm conditional adaptive scale_shift '
         'shard_frozen batches quant_conv post_quant_conv')
TEXTS = 'weights_dir teacher.init_from autoencoder.weights autoencoder.sha256'
TUPLES = ('ema_halflife ema_std remat augment init_levels thaw attention_resolutions decoder_channel_mult '
          'evaluation.guidance')
# What most keys cannot be, and the ends of the names of those that can.
HOSTILE = [
  (math.nan, ''),
  (math.inf, ''),
  (-math.inf, ''),
  (-1, 'num_classes workers mesh.data p_mean autoencoder.shift teacher.microbatch encode.microbatch guide.microbatch '
       'distill.microbatch grow_16.microbatch grow_32.microbatch autoencoder.microbatch'),
  (0, 'seed holdout workers max_unreadable stem_channels embed_channels num_heads augment_dim dropout warmup_steps b1 '
      'b2 clip_norm weight_decay ema ema_rampup rate p_mean p_std reconstruction.weight distill.adversarial.weight '
      'reconstruction_adversarial.weight mean low r1 r2 grow_16.num_blocks microbatch keep_every '
      'evaluation.samples clip_weight text_channels text_pool_heads recaptions.high scaling autoencoder.shift '
      'autoencoder.adversarial.weight kl_weight l1_weight adversarial_from distill.resolution distill.num_blocks '
      'grow_32.num_blocks grow_32.adversarial.weight'),
  (1.5, 'learning_rate clip_norm p_mean p_std weight mean std low high r1 r2 sigma_min sigma_max sigma_data rho '
        'scaling autoencoder.shift kl_weight l1_weight'),
  (1e30, ''),
  (10**9, 'seed steps warmup_steps decay_from clip_norm every_steps samples_every keep_every adversarial_from'),
  (10**400, ''),
  ('', f'{TEXTS} data.path data.name init_from start_ema best text.encoder invert.encoder encoded.teacher sha256 '
       'recaptions.law'),
  ('x', TEXTS),
  ('nan', TEXTS),
  ('\0', ''),
  ('x' * 5000, ''),
  (None, ''),
  (True, FLAGS),
  ((), TUPLES),
  ([], TUPLES),
  ({}, ''),
  ((0,), ''),
  ((0.5,), 'channel_mult decoder_channel_mult scale_weights'),  # half the channels: the ladder to 512 px has that
  ((-1,), ''),
  ((math.nan,), ''),
  (('x',), ''),
  ((None,), ''),
  ((True,), ''),
  (((),), ''),
]


def all_keys(group, path='config'):
  """(group, key, dotted name) of every key, groups too."""
  for key in list(group):
    yield group, key, f'{path}.{key}'
    if isinstance(group[key], ConfigDict):
      yield from all_keys(group[key], f'{path}.{key}')


def an_autoencoder():
  """An experiment that trains one."""
  config = configs.experiment(base_resolution=16)
  config.data.resolution = 16
  configs.add_phase(config, 'autoencoder', configs.autoencoder(
    batch_size=8, discriminator=configs.discriminator(conditional=False, scales=1)))
  return config


@pytest.mark.parametrize('make, of, never, also', [
  (lambda: tiny.get_config('guided'), '', (), {}),
  # Without guidance.
  (lambda: tiny.get_config('roads'), 'phases', ('encoded.teacher', 'encoded.init_from', 'encoded.add_noise'),
   {"''": 'guide', '0': 'label_dropout'}),
  (an_autoencoder, 'phases', ('conditional', 'r1', 'r2', 'clip_weight'), {}),  # are False and 0 for autoencoders
])
def test_every_key_of_every_stage_refuses_what_it_cannot_be(make, of, never, also):
  config = make()
  validation.validate(config, 8)
  wrong = []
  with config.unlocked():
    for group, key, name in list(all_keys(config[of], f'config.{of}') if of else all_keys(config)):
      good = group[key]
      for value, allowed in HOSTILE:
        del group[key]  # so that the ConfigDict neither converts the value nor refuses it
        group[key] = value
        said = ''
        try:
          validation.validate(config, 8)
        except configs.ConfigError as error:
          said = str(error)
        ends = [] if value and name.endswith(never) else [*allowed.split(), *also.get(repr(value), '').split()]
        if any(name.endswith(f'.{end}') for end in ends):
          expected = not said
        else:  # one line that names key, value and what would be right
          shown = repr(value)[:100]
          expected = name in said and (shown in said or value == {}) and 'must' in said and len(said) < 1000
          expected = expected and '\n' not in said
        if not expected:
          wrong.append(f'{name} = {value!r:.40}: {said[:300] or "accepted"}')
        del group[key]
        group[key] = good
  assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('override, said', [
  ('phases.distill.steps=1e3', 'flag --config.phases.distill.steps=1e3: must be a whole number'),
  ('phases.distill.optimizer.b1=x', 'flag --config.phases.distill.optimizer.b1=x: must be a number'),
  ('data.mirror=maybe', 'flag --config.data.mirror=maybe: must be true or false'),
  ('phases.grow_16.update=both', "config.phases.grow_16.update = 'both': must be one of joint, separate"),
  ('phases.distill.optimizer.b1=nan', 'config.phases.distill.optimizer.b1 = nan: must be a number in [0, 1)'),
  ('zzz=1', '--config.zzz: no such key zzz\n'),  # of which the name alone was said
  ('phases.new.stage=teacher', '--config.phases.new.stage: no such key new\n'),
  ('data.sourse=x', '--config.data.sourse: no such key sourse; did you mean source?'),
  ('phases.distill.steps.x=1', '--config.phases.distill.steps.x: no such key x\n'),
  ('network.channel_mult=x', "config.network.channel_mult = ('x',): must be a tuple of 1 to 10 values, each a number"),
])
def test_an_override_is_refused_with_what_would_be_right(override, said, capsys):
  assert pagoda('plan', CONFIG, '--topology=cpu:8', f'--config.{override}') in (1, 2)
  printed = capsys.readouterr().err
  assert said in printed and 'Traceback' not in printed


def test_figures_need_held_out_pictures_of_several_classes():
  config = tiny.get_config()
  config.evaluation.samples = 100
  for key, value in (('holdout', 1), ('num_classes', 1), ('num_classes', 0)):
    changed = config.copy_and_resolve_references()
    changed.phases.distill.discriminator.conditional = changed.phases.grow_16.discriminator.conditional = False
    validation.validate(changed, 8)
    changed.data[key] = value
    with pytest.raises(configs.ConfigError, match=f'evaluation.samples = 100: .* config.data.{key} >= 2, not {value}'):
      validation.validate(changed, 8)
  config.phases.grow_16.resolution = config.data.resolution = 256
  validation.validate(config, 8)  # of grey pictures: 65,536 numbers each
  config.data.channels = 3
  with pytest.raises(configs.ConfigError, match='evaluation.samples = 100: .* their 196,608 numbers .* of 309 GB: '):
    validation.validate(config, 8)  # which ended a finished run for want of memory
  config = tiny.get_config('guided')  # whose table tells recall, by third neighbours
  for samples, holdout, key in ((3, 4, 'evaluation.samples'), (4, 3, 'data.holdout'), (4, 4, '')):
    config.data.holdout = holdout
    config.evaluation.update({'samples': samples, 'guidance': (1.0,)})
    with pytest.raises(configs.ConfigError, match=f'{key} = 3: must be at least 4') if key else nullcontext():
      validation.validate(config, 8)


def test_projected_features_of_large_pictures_need_sides_that_halve_evenly():
  config = configs.experiment(base_resolution=272)
  config.network.update({'channel_mult': (1,), 'attention_resolutions': ()})
  config.data.resolution = 272
  configs.add_phase(config, 'teacher', configs.teacher())
  configs.add_phase(config, 'invert', configs.invert())
  configs.add_phase(config, 'distill', configs.distill(discriminator=configs.discriminator(conditional=False)))
  validation.validate(config)
  for group, key in (('reconstruction', 'distance'), ('discriminator', 'features')):
    changed = config.copy_and_resolve_references()
    changed.phases.distill[group][key] = 'projected'
    with pytest.raises(configs.ConfigError, match=f"{group}.{key} = 'projected': sees pictures of 272 px: .* of 32"):
      validation.validate(changed)
    changed.base_resolution = changed.data.resolution = 288
    validation.validate(changed)
  config = an_autoencoder()  # which compares its pictures at each of its sizes
  config.base_resolution = config.data.resolution = 272
  config.phases.autoencoder.sizes = 2
  config.phases.autoencoder.reconstruction.distance = 'projected'
  with pytest.raises(configs.ConfigError, match='sees pictures of 272 px'):
    validation.validate(config)
  assert losses.NATIVE_FROM == perception.NATIVE_FROM


def test_a_chain_of_growth_agrees_about_its_noise():
  config = tiny.get_config()
  for name in ('distill', 'grow_16'):
    config.phases[name].standardize_noise = True
  validation.validate(config, 8)
  config.phases.distill.standardize_noise = False
  with pytest.raises(configs.ConfigError, match='grow_16.standardize_noise = True: must be False'):
    validation.validate(config, 8)


def test_every_optimizer_on_the_list_updates_parameters_and_keeps_the_shapes_of_its_state():
  for name in configs.OPTIMIZERS:
    optimizer = state.make_optimizer(configs.optimizer(name=name, clip_norm=1.0, warmup_steps=2), 10)
    params = {'kernel': jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    before = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, before, params)
    assert updates == params and after == before, name


def test_weights_decay_by_what_is_asked_for_alone():
  """Without gradients an update depends on the parameters where they decay, and only there."""
  for decay in (0.0, 0.5):
    decaying = set()
    for name in configs.OPTIMIZERS:
      optimizer = state.make_optimizer(configs.optimizer(name=name, weight_decay=decay), 10)
      updates = [optimizer.update(jnp.zeros(3), optimizer.init(params), params)[0]
                 for params in (jnp.ones(3), 2 * jnp.ones(3))]
      if jnp.any(updates[0] != updates[1]):
        decaying.add(name)
    assert decaying == (set(configs.DECAYING) if decay else set()), decay


def test_moments_decay_as_is_asked_of_those_optimizers_that_are_said_to_have_them():
  moved = set()
  for name in configs.OPTIMIZERS:
    updates = []
    for b1, b2 in ((0.9, 0.999), (0.5, 0.999), (0.9, 0.5)):
      optimizer, params = state.make_optimizer(configs.optimizer(name=name, b1=b1, b2=b2), 10), jnp.ones(3)
      inner = optimizer.init(params)
      for size in (3.0, 1.0, -0.006):  # the last turns only what forgets the first two
        change, inner = optimizer.update(size * jnp.arange(1.0, 4.0), inner, params)
      updates.append(jnp.concatenate([change, *(jnp.ravel(leaf) for leaf in jax.tree.leaves(inner))]))
    if all(jnp.any(other != updates[0]) for other in updates[1:]):
      moved.add(name)
    else:
      assert all(jnp.array_equal(other, updates[0]) for other in updates[1:]), name
  assert moved == set(configs.OF_MOMENTS)


def test_a_schedule_is_one_of_steps_whatever_number_of_updates_each_makes():
  config = configs.optimizer(name='sgd', learning_rate=1.0, warmup_steps=2, schedule='cosine')
  rates = {}
  for updates in (1, 2):
    optimizer, params = state.make_optimizer(config, 6, updates), jnp.zeros(())
    inner, rates[updates] = optimizer.init(params), []
    for _ in range(6 * updates):
      change, inner = optimizer.update(jnp.ones(()), inner, params)
      rates[updates].append(-float(change))
  assert rates[2] == [rate for rate in rates[1] for _ in range(2)] and rates[1][:3] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize('init_levels, resolution', [((), 32), (((8, 0, False), (8, 3, True)), 128)])
def test_what_thaws_is_named_as_the_network_and_the_release_name_it(init_levels, resolution):
  """By levels, blocks and the release's numbers; the release of a base of four levels thaws blocks 9 and up."""
  config = tiny.get_config()
  config.base_resolution = 16
  config.network.update({'channel_mult': (1, 1, 1, 1), 'num_blocks': 3})
  phase = config.phases.grow_16
  phase.update({'resolution': resolution, 'num_blocks': 2, 'init_levels': init_levels})
  if init_levels:
    phase.start = ''
  unet = models.make_unet(config, 'grow_16')
  names = ladder.decoder_blocks(config, 'grow_16')
  assert list(names) == [block.name for block in unet.blocks()[2]]
  assert names == {block: pagoda_names.block_names(unet)[block][0] for block in names}
  new = [block for block in names if ladder.side_of(block) > ladder.start_resolution(config, 'grow_16')]
  assert len(new) == 3
  last = [block for block in names if ladder.side_of(block) == ladder.start_resolution(config, 'grow_16')]
  phase.thaw = tuple(f'output_blocks.{number}' for number in range(9, 16))
  released = ['dec_8_block1', 'dec_8_block2', 'dec_8_block3', 'dec_16_up', *(f'dec_16_block{i}' for i in range(4))]
  assert ladder.thawed_blocks(config, 'grow_16') == (*released, *new)
  phase.thaw = (16, 'dec_8_up')
  assert ladder.thawed_blocks(config, 'grow_16') == ('dec_8_up', 'dec_16_up', *released[4:], *new)
  phase.thaw = ()
  assert ladder.thawed_blocks(config, 'grow_16') == (*last, *new)


def test_a_microbatch_divides_every_devices_share_or_holds_it_whole():
  config = tiny.get_config()
  for most, devices in ((0, 1), (4, 1), (8, 1), (100, 1), (3, 4), (3, None)):
    config.microbatch = most
    validation.validate(config, devices)
  with pytest.raises(configs.ConfigError, match=r'microbatch = 3: must divide 8, .*batch_size = 8, as 2 and 4 do'):
    validation.validate(config, 1)
  config.phases.distill.microbatch = 4  # its own comes before the experiment's; the teacher has none
  with pytest.raises(configs.ConfigError, match=r'config.microbatch = 3: must divide 8, .*teacher.batch_size = 8'):
    validation.validate(config, 1)
  config.microbatch, config.phases.distill.microbatch = 4, 3
  with pytest.raises(configs.ConfigError, match=r'config.phases.distill.microbatch = 3: .*distill.batch_size = 8'):
    validation.validate(config, 1)
  assert [configs.microbatch(config, name) for name in ('teacher', 'distill')] == [4, 3]


def test_init_levels_are_three_numbers_each_and_count_as_resolution():
  config = tiny.get_config()
  config.phases.grow_16.update({'start': '', 'init_from': 'weights', 'init_levels': ((8, 1),)})
  with pytest.raises(configs.ConfigError, match=r'init_levels = \(\(8, 1\),\).*\(channels, num_blocks, scale_shift\)'):
    validation.validate(config, 8)
  config.phases.grow_16.init_levels = ((8, 1, False),)
  with pytest.raises(configs.ConfigError, match=r'grow_16.resolution = 16: must be 16 \(the resolution of weights\)'):
    validation.validate(config, 8)


def test_a_misspelt_key_in_an_experiment_file_is_refused_where_it_stands():
  with pytest.raises((KeyError, AttributeError), match='stepz'):
    configs.teacher(stepz=3)
