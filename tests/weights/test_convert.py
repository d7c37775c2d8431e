"""`pagoda convert` and what it is made of: file -> folder -> file, for every format."""

import dataclasses
import json
import os

import golden_tools
import ml_dtypes
import numpy as np
import pytest
import torch_writers as writers
from absl import flags
from flax import traverse_util

from pagoda_jax.cli import convert as command
from pagoda_jax.networks.text import clip, t5
from pagoda_jax.networks.unet import DEEPFLOYD, EDM2, EDM_ADM, GUIDED_ADM, GrownLevel
from pagoda_jax.runtime.files import file_digest
from pagoda_jax.weights import published
from pagoda_jax.weights.convert import folders, formats, torch_files
from pagoda_jax.weights.convert.mapping import ConversionError

# Small networks of every format: what its `leaves` lists the tensors of.
SMALL = {
  'edm': EDM_ADM | {
    'resolution': 8, 'channels': 64, 'channel_mult': (1, 1), 'num_blocks': 1, 'attention_resolutions': (4,),
    'num_classes': 3, 'augment_dim': 9,
  },
  'pagoda': GUIDED_ADM | {
    'resolution': 8, 'channels': 32, 'channel_mult': (1, 2), 'stem_channels': 32, 'num_blocks': 1,
    'attention_resolutions': (4,), 'channels_per_head': 16, 'num_classes': 3, 'grown': (GrownLevel(32, 1, False),),
  },
  'edm2': EDM2 | {
    'resolution': 8, 'channels': 64, 'channel_mult': (1, 2), 'num_blocks': 1, 'attention_resolutions': (4,),
    'num_classes': 3, 'embed_channels': 32,
  },
  'deepfloyd': DEEPFLOYD | {
    'resolution': 8, 'channels': 32, 'channel_mult': (1, 2), 'num_blocks': 1, 'attention_resolutions': (4,),
    'channels_per_head': 16, 'text_width': 24, 'text_attention': 'added_kv', 'text_channels': 32, 'text_pool_heads': 4,
  },
  'timm': {
    'architecture': 'deit', 'width': 16, 'depth': 1, 'head_channels': 8, 'mlp_width': 32, 'patch': 4, 'grid': 2,
    'distilled': True,
  },
  'clip_image': {
    'patch': 4, 'grid': 2, 'width': 64, 'layers': 1, 'heads': 1, 'mlp_width': 24, 'projection': 8,
    'activation': 'quick_gelu', 'epsilon': 1e-5,
  },
  'lpips': {'widths': (4, 8), 'depths': (1, 2)},
  'convnext': {'depths': (1, 2), 'widths': (4, 6)},
  'inception': {'classes': 8},
  'diffusers': {
    'channels': 3, 'latent_channels': 2, 'widths': (4, 8), 'blocks': 1, 'groups': 2, 'quant_conv': True,
    'post_quant_conv': True, 'mid_attention': True, 'attention_naming': 'to_q', 'attention_convolutions': False,
  },
  'stylegan_xl': {
    'widths': ((8, 8), (8,)), 'input_widths': (4, 6), 'logits_kernel': 4, 'num_classes': 5, 'embedding_width': 6,
    'projection_width': 3,
  },
}  # fmt: skip
SMALL['clip'] = clip.VIT_B_32 | {'vocabulary': 9, 'positions': 4, 'width': 64, 'layers': 2, 'heads': 1, 'mlp_width': 6,
                                 'projection': 5}
SMALL['t5'] = t5.SMALL | {'vocabulary': 9, 'width': 8, 'layers': 2, 'heads': 2, 'head_channels': 3, 'mlp_width': 6,
                          'buckets': 4}
SMALL['dinov2'] = SMALL['timm'] | {'distilled': False, 'layer_scale': True}
SMALL['siglip'] = SMALL['timm'] | {'distilled': False, 'class_token': False, 'approximate_gelu': True}
SMALL['random_projections'] = {
  'backbone': SMALL['timm'] | {'depth': 4}, 'reassembly_widths': (2, 3, 4, 5), 'widths': (4, 4, 6, 8),
  'mixed_widths': (4, 2, 3, 4),
}  # fmt: skip
# A tensor without a place here.
CARRIED = {
  'clip_image': 'text_model.final_layer_norm.bias',
  'edm': 'model.dec.8x8_up.conv0.resample_filter',
  'timm': 'head.weight',
  'dinov2': 'mask_token',
  'siglip': 'head.weight',
  'convnext': 'head.norm.weight',
  'clip': 'vision_model.pre_layrnorm.weight',
  't5': 'lm_head.weight',
  'lpips': 'scaling_layer.shift',
  'inception': 'Conv2d_1a_3x3.bn.num_batches_tracked',
  'stylegan_xl': 'mini_discs.0.main.0.main.1.num_batches_tracked',
  'random_projections': 'pretrained.model.head.weight',
}
# What the file does not tell.
ASKED = {
  'pagoda': {'resolution': 8, 'channels_per_head': 16, 'grown_num_blocks': 1, 'attention_order': 'legacy'},
  'deepfloyd': {'resolution': 8, 'channels_per_head': 16, 'text_pool_heads': 4},
  'timm': {'head_channels': 8},
  'dinov2': {'head_channels': 8},
  'siglip': {'head_channels': 8},
  'random_projections': {'head_channels': 8},
  'diffusers': {'groups': 2},
}


def state_dict_of(format):
  """A small state dict of the format, by the goldens' rule, with a buffer that has no place here."""
  leaves = formats.FORMATS[format].leaves(SMALL[format])
  theirs = {name: golden_tools.rule_tensor('', name, leaf.shape) for leaf in leaves for name in leaf.names}
  if format in CARRIED:
    theirs[CARRIED[format]] = np.full((1, 1, 2, 2), 7, np.float32 if format == 'edm' else np.int64)
  return theirs


def convert(*args):
  """Runs `pagoda convert` with these flags."""
  fv = flags.FlagValues()
  command.define_flags(fv)
  fv(['pagoda', *map(str, args)])
  return command.run(fv, [])


def as_flags(asked):
  return [f'--{name}={value}' for name, value in asked.items()]


def assert_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    assert actual[name].dtype == value.dtype and np.array_equal(actual[name], value), name


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


@pytest.mark.parametrize('format', formats.FORMATS)
def test_file_to_folder_to_file_is_bit_identical(format, tmp_path, capsys):
  theirs = state_dict_of(format)
  writers.save_zip(tmp_path / 'w.pt', theirs)
  asked = ASKED.get(format, {})
  convert(f'--input={tmp_path}/w.pt', f'--output={tmp_path}/d', *(f'--{name}={asked[name]}' for name in asked))
  assert f'format {format}, by the names' in capsys.readouterr().out
  variables, options = folders.load_converted(tmp_path / 'd')
  assert {name: options[name] for name in SMALL[format]} == SMALL[format]
  assert all(value.dtype == np.float32 for value in flat(variables['params']).values())
  convert(f'--input={tmp_path}/d', f'--output={tmp_path}/back.safetensors', '--to=torch')
  assert_equal(torch_files.read(tmp_path / 'back.safetensors').tensors, theirs)


def golden_configs(file):
  """The configs of a golden file; none where the folder lacks it."""
  return golden_tools.load(file)[1]['configs'] if (golden_tools.FOLDER / f'{file}.npz').exists() else {}


def golden_networks():
  """(format, config's json, what it does not tell) of every golden U-Net."""
  for file in ('edm_adm', 'edm_ddpmpp'):
    for name, config in golden_configs(file).items():
      yield pytest.param('edm', config, {}, id=f'{file}-{name}')
  for name, config in golden_configs('pagoda_unet').items():
    kwargs = config['kwargs']
    asked = {'resolution': kwargs['input_size'], 'grown_num_blocks': kwargs['num_res_blocks_high']}
    if kwargs['num_head_channels'] != -1:
      asked['channels_per_head'] = kwargs['num_head_channels']
    else:
      asked['num_heads'] = kwargs['num_heads']
    if 'params' in config:
      yield pytest.param('pagoda', config, asked, id=f'pagoda_unet-{name}')


@pytest.mark.parametrize('format, config, asked', list(golden_networks()))
def test_golden_weights_through_files(format, config, asked, tmp_path):
  theirs = golden_tools.rule_state_dict(config['params'], config['prefix'], config['gain'])
  with open(tmp_path / 'w.pt', 'wb') as file:
    writers.save_legacy(file, {'ema': theirs})
  direct = formats.from_state_dict(theirs, format, **asked)
  converted = formats.read_converted(tmp_path / 'w.pt', **asked)
  folders.write_converted(tmp_path / 'd', converted, {})
  again = folders.read_folder(tmp_path / 'd')
  assert_equal(flat(again.variables), flat(direct.variables))
  assert_equal(formats.to_state_dict(again), theirs)


def test_lpips_from_its_two_published_files(tmp_path):
  published_options = {'widths': (64, 128, 256, 512, 512), 'depths': (2, 2, 3, 3, 3)}
  leaves = formats.FORMATS['lpips'].leaves(published_options)
  theirs = {leaf.theirs: np.full(leaf.shape, number, np.float32) for number, leaf in enumerate(leaves)}
  linear = {name: value for name, value in theirs.items() if name.startswith('lin')}
  vgg = {f'features.{name.split(".", 2)[2]}': value for name, value in theirs.items() if name not in linear}
  vgg['classifier.0.bias'] = np.zeros(3, np.float32)
  writers.save_zip(tmp_path / 'vgg.pth', vgg)
  writers.save_zip(tmp_path / 'lin.pth', linear)
  with pytest.raises(ConversionError, match='one half of LPIPS.*--linear=lpips_vgg'):
    formats.read_converted(tmp_path / 'vgg.pth')
  converted = formats.read_converted(tmp_path / 'vgg.pth', linear=tmp_path / 'lin.pth')
  assert converted.options == published_options
  assert_equal(formats.to_state_dict(converted), theirs | {'classifier.0.bias': vgg['classifier.0.bias']})


@pytest.mark.parametrize('wrapper', ['model.', 'model.model.', 'module.', '_orig_mod.', 'module._orig_mod.model.'])
@pytest.mark.parametrize('format', ['edm', 'pagoda'])
def test_wrappers_prefixes_do_not_matter(wrapper, format, tmp_path):
  theirs = state_dict_of(format)
  writers.save_zip(tmp_path / 'w.pt', {wrapper + name: value for name, value in theirs.items()})
  for asked_format in ('', format):
    converted = formats.read_converted(tmp_path / 'w.pt', asked_format, **ASKED.get(format, {}))
    assert converted.format == format
    assert_equal(formats.to_state_dict(converted), theirs)


def test_one_network_out_of_several(tmp_path):
  theirs = state_dict_of('stylegan_xl')
  content = {f'discriminators.deit.{name}': value for name, value in theirs.items()}
  content['other.w'] = np.ones(1, np.float32)
  writers.save_zip(tmp_path / 'd.pt', content)
  converted = formats.read_converted(tmp_path / 'd.pt', prefix='discriminators.deit.')
  assert_equal(formats.to_state_dict(converted), theirs)
  with pytest.raises(ConversionError, match="begins with 'discs.'; they begin with discriminators.deit, other.w"):
    formats.read_converted(tmp_path / 'd.pt', prefix='discs.')


def test_half_precision_is_made_float32_and_said(tmp_path, capsys):
  theirs = state_dict_of('lpips')
  first, second = list(theirs)[:2]
  half = theirs | {first: theirs[first].astype(np.float16), second: theirs[second].astype(ml_dtypes.bfloat16)}
  writers.save_zip(tmp_path / 'w.pt', half)
  convert(f'--input={tmp_path}/w.pt', f'--output={tmp_path}/d')
  out = capsys.readouterr().out
  assert '1 tensors of float16 made float32' in out and '1 tensors of bfloat16 made float32' in out
  back = formats.to_state_dict(folders.read_folder(tmp_path / 'd'))
  assert_equal(back, half | {name: half[name].astype(np.float32) for name in (first, second)})


def test_nan_in_weights_is_a_warning_that_names_them(tmp_path, caplog):
  theirs = state_dict_of('lpips')
  theirs['lin1.model.1.weight'][0, 3] = np.nan
  writers.save_zip(tmp_path / 'w.pt', theirs)
  with caplog.at_level('WARNING'):
    formats.read_converted(tmp_path / 'w.pt')
  assert 'w.pt: NaN or infinite numbers in lin1.model.1.weight' in caplog.text


def test_other_architectures_are_shown_as_a_table(tmp_path):
  theirs = state_dict_of('pagoda')
  theirs['out.2.extra'] = theirs.pop('out.2.bias')
  theirs['time_embed.2.bias'] = theirs['time_embed.2.bias'][:5]
  writers.save_zip(tmp_path / 'w.pt', theirs)
  with pytest.raises(ConversionError) as error:
    formats.read_converted(tmp_path / 'w.pt', **ASKED['pagoda'])
  rows = [line.split() for line in str(error.value).splitlines()]
  assert ['missing', 'out.2.bias', '-', '(3,)', 'out_conv/bias'] in rows
  assert ['unexpected', 'out.2.extra', '(3,)', '-'] in rows
  assert ['other', 'shape', 'time_embed.2.bias', '(5,)', '(128,)', 'time_embed_1/bias'] in rows


@pytest.mark.parametrize('format, damaged', [
  ('timm', {'blocks.0.mlp.fc1.weight': None}),
  ('timm', {'pos_embed': np.float32(1)}),
  ('siglip', {'pos_embed': np.float32(1)}),
  ('siglip', {'blocks.0.mlp.fc1.weight': None}),
  ('convnext', {'stages.1.blocks.0.conv_dw.weight': np.float32(1)}),
  ('stylegan_xl', {'mini_discs.0.embed.weight': None}),
  ('diffusers', {'encoder.conv_in.weight': np.zeros(0, np.float32)}),
  ('pagoda', {'time_embed.0.weight': np.zeros((2, 2, 2), np.float32)}),
])  # fmt: skip
def test_tensors_that_options_are_read_from_are_missing_or_misshapen(format, damaged, tmp_path):
  tensors = {name: value for name, value in (state_dict_of(format) | damaged).items() if value is not None}
  torch_files.write_safetensors(tmp_path / 'w.safetensors', tensors)
  with pytest.raises(ConversionError, match=f'w.safetensors: no network of format {format}'):
    formats.read_converted(tmp_path / 'w.safetensors', format, **ASKED.get(format, {}))


# What a file that is nearly one of FDr's encoders says of itself.
NEARLY = {
  'convnext of the first version': ('convnext', {'stages.0.blocks.0.mlp.grn.weight': None}, 'of the first version'),
  'another kernel': ('convnext', {'stages.1.blocks.1.conv_dw.weight': np.zeros((6, 1, 5, 5), np.float32)},
                     r'other shape *stages.1.blocks.1.conv_dw.weight *\(6, 1, 5, 5\) *\(6, 1, 7, 7\)'),
  'a stage without its first block': ('convnext', {'stages.1.blocks.0.conv_dw.weight': None},
                                      r'unexpected *stages.1.downsample.0.weight'),
  'a layer scale': ('convnext', {'stages.0.blocks.0.gamma': np.zeros(4, np.float32)},
                    r'unexpected *stages.0.blocks.0.gamma'),
  'no bias': ('convnext', {'stages.0.blocks.0.mlp.grn.bias': None}, r'missing *stages.0.blocks.0.mlp.grn.bias'),
  'no pool': ('siglip', {'attn_pool.latent': None}, 'not a picture tower of SigLIP: no attn_pool.latent'),
  'two queries': ('siglip', {'attn_pool.latent': np.zeros((1, 2, 16), np.float32)}, r'other shape *attn_pool.latent'),
  'a class token': ('siglip', {'cls_token': np.zeros((1, 1, 16), np.float32)}, r'unexpected *cls_token'),
  'two class tokens': ('siglip', {'dist_token': np.zeros((1, 1, 16), np.float32),
                                  'pos_embed': np.zeros((1, 5, 16), np.float32)}, r'unexpected *dist_token'),
  'positions in no square': ('siglip', {'pos_embed': np.zeros((1, 6, 16), np.float32)},
                             r'other shape *pos_embed *\(1, 6, 16\) *\(1, 4, 16\)'),
  'heads that do not split': ('siglip', {'patch_embed.proj.weight': np.zeros((17, 3, 4, 4), np.float32)},
                              '17 channels do not split into heads of 8'),
}  # fmt: skip


@pytest.mark.parametrize('what', NEARLY)
def test_what_is_nearly_an_encoder_is_refused_by_the_tensors_name(what):
  format, changes, said = NEARLY[what]
  tensors = {name: value for name, value in (state_dict_of(format) | changes).items() if value is not None}
  with pytest.raises(ConversionError, match=said):
    formats.from_state_dict(tensors, format, **ASKED.get(format, {}))


def test_unknown_architecture_and_wrong_format(tmp_path):
  writers.save_zip(tmp_path / 'resnet.pt', {'layer1.0.conv1.weight': np.ones((2, 2, 3, 3), np.float32)})
  with pytest.raises(ConversionError, match='no known format.*layer1.0.conv1.weight'):
    formats.read_converted(tmp_path / 'resnet.pt')
  writers.save_zip(tmp_path / 'w.pt', state_dict_of('lpips'))
  with pytest.raises(ConversionError, match='model.enc'):
    formats.read_converted(tmp_path / 'w.pt', 'edm')
  with pytest.raises(ConversionError, match="no format 'keras'; there are edm"):
    formats.read_converted(tmp_path / 'w.pt', 'keras')


def test_asking_what_the_format_does_not_ask(tmp_path):
  writers.save_zip(tmp_path / 'w.pt', state_dict_of('lpips'))
  with pytest.raises(ConversionError, match='lpips does not ask for groups: its names and shapes tell everything'):
    formats.read_converted(tmp_path / 'w.pt', groups=3)


def test_what_was_assumed_is_said(tmp_path):
  writers.save_zip(tmp_path / 'w.pt', state_dict_of('pagoda'))
  notes = formats.read_converted(tmp_path / 'w.pt', resolution=8, grown_num_blocks=1, channels_per_head=16).notes
  assert 'assumed attention_order=flash, num_heads=0, which the file does not tell' in notes


def test_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
  converted = formats.from_state_dict(state_dict_of('lpips'), 'lpips')
  monkeypatch.setattr(folders, '_description', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    folders.write_converted(tmp_path / 'd', converted, {})
  assert list(tmp_path.iterdir()) == []


def test_folder_that_exists_is_left_alone(tmp_path):
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd' / 'mine').write_text('keep')
  writers.save_zip(tmp_path / 'w.pt', state_dict_of('lpips'))
  with pytest.raises(ConversionError, match='exists already'):
    convert(f'--input={tmp_path}/w.pt', f'--output={tmp_path}/d')
  assert (tmp_path / 'd' / 'mine').read_text() == 'keep'


def test_damaged_folder_is_an_error_that_says_where(tmp_path):
  folders.write_converted(tmp_path / 'd', formats.from_state_dict(state_dict_of('lpips'), 'lpips'), {})
  with pytest.raises(ConversionError, match='no converted.json'):
    folders.load_converted(tmp_path)
  for part in (tmp_path / 'd' / 'variables').rglob('*'):
    if part.is_file():
      part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
  with pytest.raises(ConversionError, match='d: damaged: variables/.* bytes instead of .*convert the published file'):
    folders.load_converted(tmp_path / 'd')
  (tmp_path / 'd' / 'converted.json').write_text('{')
  with pytest.raises(ConversionError, match='converted.json: damaged'):
    folders.load_converted(tmp_path / 'd')


def test_no_changed_byte_of_a_folder_is_used(tmp_path):
  """Orbax reads one in five flipped bytes as other numbers; a description without its seal, edited, as well."""
  converted = formats.from_state_dict(state_dict_of('lpips'), 'lpips')
  converted = dataclasses.replace(converted, carried={'extra': np.arange(3, dtype=np.float32)})
  folder = tmp_path / 'd'
  folders.write_converted(folder, converted, {})
  expected, paths = folders.read_description(folder), [path for path in folder.rglob('*') if path.is_file()]
  assert {path.name for path in paths} >= {'converted.json', 'carried.safetensors', 'manifest.ocdbt'}
  rng = np.random.default_rng(0)
  for path in paths:
    good = path.read_bytes()
    for place in {0, len(good) - 1, *rng.integers(0, len(good), 20).tolist()}:
      path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
      try:
        folders.read_folder(folder)
      except ConversionError as error:
        assert path.name in str(error) and 'convert the published file again' in str(error)
      else:  # white space
        assert path.name == 'converted.json' and folders.read_description(folder) == expected
    path.unlink()
    with pytest.raises(ConversionError, match=f'{path.name}: missing|no converted.json'):
      folders.read_folder(folder)
    path.write_bytes(good)
  values = json.loads((folder / 'converted.json').read_text())
  del values['seal']
  for content in (values | {'format': 'edm'}, [], '', 3):
    (folder / 'converted.json').write_text(json.dumps(content))
    with pytest.raises(ConversionError, match='converted.json: damaged.*convert the published file again'):
      folders.read_folder(folder)
  folders.write_converted(tmp_path / 'e', dataclasses.replace(converted, carried={}), {})
  (tmp_path / 'e' / 'carried.safetensors').write_bytes((folder / 'carried.safetensors').read_bytes())
  assert folders.read_folder(tmp_path / 'e').carried == {}  # no file that was not there


def test_source_is_recorded(tmp_path):
  writers.save_zip(tmp_path / 'w.pt', {'ema': state_dict_of('lpips'), 'step': 3})
  convert(f'--input={tmp_path}/w.pt', f'--output={tmp_path}/d', '--key=ema')
  source = json.loads((tmp_path / 'd' / 'converted.json').read_text())['source']
  digest = file_digest(tmp_path / 'w.pt')
  assert source == {'file': 'w.pt', 'sha256': digest, 'key': 'ema', 'prefix': ''}


def test_published_file_by_its_name(tmp_path, monkeypatch, caplog):
  entry = published.Published('small_lpips', 'x', 'https://x', 'w.pt', 'CC BY-NC 4.0', non_commercial=True)
  monkeypatch.setattr(published, 'REGISTRY', (entry,))
  writers.save_zip(tmp_path / 'w.pt', state_dict_of('lpips'))
  with caplog.at_level('WARNING'):
    convert('--input=small_lpips', f'--weights_dir={tmp_path}', f'--output={tmp_path}/d')
  assert 'CC BY-NC 4.0' in caplog.text and folders.is_converted(tmp_path / 'd')


def test_the_input_of_a_published_file_is_known(tmp_path, capsys):
  """By its name in the registry and by the file's; another resolution is refused."""
  writers.save_zip(tmp_path / 'pagoda_teacher_32.pt', state_dict_of('pagoda'))
  asked = '--grown_num_blocks=1', '--channels_per_head=16'
  for number, given in enumerate(('pagoda_teacher_32', tmp_path / 'pagoda_teacher_32.pt')):
    flags = f'--input={given}', f'--weights_dir={tmp_path}', f'--output={tmp_path}/{number}', *asked
    with pytest.raises(ConversionError, match=r'--resolution=64: pagoda_teacher_32 .*has an input of 32 px'):
      convert(*flags, '--resolution=64')
    convert(*flags)
    assert folders.read_description(tmp_path / str(number))['options']['resolution'] == 32


def test_ways_to_call_it_wrongly(tmp_path):
  output = f'--output={tmp_path}/d'
  (tmp_path / 'there').mkdir()
  (tmp_path / 'there' / folders.DESCRIPTION).touch()
  back = f'--input={tmp_path}/there', f'{output}.safetensors', '--to=torch'
  for arguments, said in (
    (('--input=/absent.pt', output), 'absent.pt: no such file'),
    ((f'--input={tmp_path}', output), 'is a directory'),
    ((f'--input={tmp_path}', output, '--to=torch'), 'writes a .safetensors file'),
    (('--input=/absent', f'{output}.safetensors', '--to=torch'), 'no such folder'),
    # What would have no effect.
    ((*back, '--key=ema'), '--key=ema: is of published files'),
    ((*back, '--num_heads=4'), '--num_heads=4: is of published files'),
    ((*back, '--step=4'), '--step=4: is of phases, and .*there holds converted weights'),
    (('--input=/absent.pt', output, '--step=4'), '--step=4: is of --to=torch'),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
      convert(*arguments)


def test_a_description_beside_the_weights_tells_what_they_do_not(tmp_path):
  """diffusers' config.json: taken, and refused where it is damaged, of another network, or not what is asked."""
  writers.save_zip(tmp_path / 'w.pt', state_dict_of('deepfloyd'))
  said = {'_class_name': 'UNet2DConditionModel', 'act_fn': 'gelu', 'sample_size': 8, 'attention_head_dim': 16,
          'addition_embed_type_num_heads': 4, 'norm_num_groups': 32, 'resnet_out_scale_factor': 1.0}
  beside = tmp_path / 'config.json'
  beside.write_text(json.dumps(said))
  options = formats.read_converted(tmp_path / 'w.pt').options
  assert {name: options[name] for name in SMALL['deepfloyd']} == SMALL['deepfloyd']
  with pytest.raises(ConversionError, match='text_pool_heads = 8: the file beside the weights says 4'):
    formats.read_converted(tmp_path / 'w.pt', text_pool_heads=8)
  for text, message in ((json.dumps(said | {'act_fn': 'silu'}), "json: not the first stage .* act_fn = 'silu', "),
                        (json.dumps(said | {'sample_size': True}), 'whole number in .1, 65535.: sample_size = True'),
                        (json.dumps(said | {'attention_head_dim': [16, 16]}), 'attention_head_dim = .16, 16.'),
                        ('{' * 10_000, 'config.json: not the description'), ('[]', 'no object'),
                        (' ' * 2**20 + '{}', 'longer than 1048576 bytes')):
    beside.write_text(text)
    with pytest.raises(ConversionError, match=message):
      formats.read_converted(tmp_path / 'w.pt')


@pytest.mark.parametrize('told, flag, expected', [
  ({'scaling_factor': 0.13025, 'norm_num_groups': 2}, '', (0.13025, 0.0, 2)),
  ({'scaling_factor': 0.3611, 'shift_factor': 0.1159, 'norm_num_groups': 2}, '', (0.3611, 0.1159, 2)),
  ({'scaling_factor': 0.3611, 'shift_factor': None, 'norm_num_groups': 4}, '--scaling_factor=2', (2.0, 0.0, 4)),
  ({}, '--groups=2', (1.0, 0.0, 2)),
])
def test_what_config_json_beside_an_autoencoder_tells(told, flag, expected, tmp_path, capsys):
  torch_files.write_safetensors(tmp_path / 'diffusion_pytorch_model.safetensors', state_dict_of('diffusers'))
  (tmp_path / 'config.json').write_text(json.dumps({'_class_name': 'AutoencoderKL', **told}))
  convert(f'--input={tmp_path}/diffusion_pytorch_model.safetensors', f'--output={tmp_path}/d', *filter(None, [flag]))
  said = capsys.readouterr().out
  assert f"config.autoencoder = c.autoencoder_network(weights='{tmp_path}/d', channels=2, widths=(4, 8)" in said
  _, options = folders.load_converted(tmp_path / 'd')
  assert (options['scaling_factor'], options['shift_factor'], options['groups']) == expected


@pytest.mark.parametrize('asked, said', [
  ({'scaling_factor': 0.0}, 'scaling_factor = 0, shift_factor = 0: must be finite, and scaling_factor above 0'),
  ({'scaling_factor': float('nan')}, 'scaling_factor = nan'), ({'scaling_factor': -0.2}, 'scaling_factor = -0.2'),
  ({'shift_factor': float('inf')}, 'shift_factor = inf'),
  ({'groups': 0}, 'groups = 0: must divide the widths 4, 8'), ({'groups': 3}, 'groups = 3: must divide'),
])
def test_factors_and_groups_that_mean_nothing_are_refused(asked, said):
  with pytest.raises(ConversionError, match=said):
    formats.from_state_dict(state_dict_of('diffusers'), 'diffusers', **({'groups': 2} | asked))


@pytest.mark.parametrize('content, said', [
  ('{', 'not the config of an AutoencoderKL'),
  ('{"_class_name": "AutoencoderKL", "scaling_factor": "x"}', 'not the config of an AutoencoderKL'),
  ('{"_class_name": "AutoencoderKL", "scaling_factor": 0}', 'not the config of an AutoencoderKL'),
  ('{"_class_name": "AutoencoderKL", "scaling_factor": NaN}', 'not the config of an AutoencoderKL'),
  ('{"_class_name": "AutoencoderKL", "norm_num_groups": 0}', 'not the config of an AutoencoderKL'),
  ('', 'a FIFO, no regular file'),
  ('{"_class_name": "AutoencoderKL", "latents_mean": [0, 1]}', 'normalises each channel by itself'),
])
def test_a_config_json_that_tells_nothing_sure_is_refused(content, said, tmp_path):
  torch_files.write_safetensors(tmp_path / 'w.safetensors', state_dict_of('diffusers'))
  if content:
    (tmp_path / 'config.json').write_text(content)
  else:
    os.mkfifo(tmp_path / 'config.json')  # for whose writer a reader would wait
  with pytest.raises(ConversionError, match=said):
    convert(f'--input={tmp_path}/w.safetensors', f'--output={tmp_path}/d', '--groups=2')
  assert not (tmp_path / 'd').exists()
