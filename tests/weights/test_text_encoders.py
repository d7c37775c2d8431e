"""Encoders of captions: from folders of published files, hashed n-grams, a user's function; and what is refused."""

import importlib
import json
import os
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest
import text_files

from pagoda_jax import config as configs
from pagoda_jax.networks.text import clip, ngrams, t5
from pagoda_jax.use import text as use_text
from pagoda_jax.weights import text_encoders, text_tokenizers
from pagoda_jax.weights.convert import formats, torch_files
from pagoda_jax.weights.convert.mapping import ConversionError
from pagoda_jax.weights.text_encoders import TextEncoderError

CAPTIONS = ['', 'a red flag', 'the smiling cat, two blue birds and one red cat']


@pytest.fixture(autouse=True)
def opened_anew():
  text_encoders.open_encoder.cache_clear()


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """Folders of a CLIP tower and a T5 in several files."""
  folder = tmp_path_factory.mktemp('published')
  text_files.write_encoder(folder / 'clip', 'clip')
  text_files.write_encoder(folder / 't5', 't5', shards=3)
  return folder


@pytest.mark.parametrize('kind, widths', [('clip', (32, 24)), ('t5', (16, 16))])
def test_a_published_folder_embeds_captions_whatever_their_company(kind, widths, published, tmp_path):
  """Length, batch and the way the weights are split into files change nothing; too long captions keep their end."""
  name = f'{kind}:{published / kind}'
  encoder = text_encoders.open_encoder(name, 12)
  assert (encoder.width, encoder.pooled_width) == widths
  found = encoder(CAPTIONS)
  assert found['text'].shape == (3, 12, widths[0]) and found['text_pooled'].shape == (3, widths[1])
  assert list(found['truncated']) == [False, False, True]
  lengths = found['text_mask'].sum(1)
  assert lengths[0] == {'clip': 2, 't5': 1}[kind] and lengths[2] == 12
  assert not found['text'][~found['text_mask']].any()
  assert (found['text_mask'] == (np.arange(12) < lengths[:, None])).all()
  short = text_encoders.open_encoder(name, int(lengths[1]))
  assert short.sha256 != encoder.sha256
  alone = short(CAPTIONS[1:2])
  assert not alone['truncated'][0]
  np.testing.assert_allclose(alone['text'][0], found['text'][1, : lengths[1]], atol=1e-5)
  np.testing.assert_allclose(alone['text_pooled'][0], found['text_pooled'][1], atol=1e-5)
  many = encoder(CAPTIONS[1:2] * 300)  # more than one batch
  assert many['text'].shape[0] == 300 and not np.ptp(many['text_pooled'], axis=0).max() > 1e-5
  assert encoder([])['text'].shape == (0, 12, widths[0])
  text_files.write_encoder(tmp_path / 'again', kind, shards=2)
  again = text_encoders.open_encoder(f'{kind}:{tmp_path / "again"}', 12)(CAPTIONS)
  np.testing.assert_array_equal(again['text'], found['text'])


@pytest.mark.parametrize('kind', ['clip', 't5'])
def test_the_digest_is_of_weights_config_tokenizer_and_length_and_not_of_the_place(kind, published, tmp_path):
  folder = tmp_path / 'text_encoder_2'
  shutil.copytree(published / kind, folder)
  config = configs.experiment()
  config.text.update({'encoder': f'{kind}:{folder}', 'sha256': 'a' * 64})

  def digest(length=8):
    config.text.length = length
    with pytest.raises(TextEncoderError, match='is another than the one') as error:
      text_encoders.check(config)
    return re.search('this encoder .SHA-256 ([0-9a-f]{64})', str(error.value))[1]

  before = digest()
  assert before == text_encoders.open_encoder(f'{kind}:{published / kind}', 8).sha256
  config.text.sha256 = before
  text_encoders.check(config)
  config.text.sha256 = 'a' * 64
  assert digest(9) != before
  tokenizer = tmp_path / 'tokenizer_2'  # as diffusers lays it out
  tokenizer.mkdir()
  for file in ('vocab.json', 'merges.txt', 'spiece.model'):
    if (folder / file).exists():
      (folder / file).rename(tokenizer / file)
  assert digest() == before
  seen = {before}
  for path in sorted(folder.iterdir()) + sorted(tokenizer.iterdir()):
    if path.name.endswith('.sha256.json'):  # which keeps them
      continue
    whole = path.read_bytes()
    if path.name == 'config.json':
      key = {'clip': 'num_attention_heads', 't5': 'relative_attention_max_distance'}[kind]
      path.write_text(json.dumps(json.loads(whole) | {key: 8}))
    else:
      path.write_bytes(whole + b'\n' if 'index' in path.name else whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, (1e9, 1e9))  # digests are kept by size and time of change, to the second
    assert (changed := digest()) not in seen, path
    seen.add(changed)
    path.write_bytes(whole)
    assert digest() == before


def broken(folder, fault):
  """One fault of a folder; CLIP's."""
  if fault == 'no weights':
    (folder / 'model.safetensors').unlink()
  elif fault == 'no config':
    (folder / 'config.json').unlink()
  elif fault == 'a device for a config':
    (folder / 'config.json').unlink()
    (folder / 'config.json').symlink_to(os.devnull)
  elif fault == 'no tokenizer':
    (folder / 'merges.txt').unlink()
  elif fault == 'damaged tokenizer':
    (folder / 'vocab.json').write_bytes((folder / 'vocab.json').read_bytes()[:-9])
  elif fault == 'damaged tokenizer.json':
    (folder / 'tokenizer.json').write_text('{}')
  elif fault == 'cut short':
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-4])
  elif fault == 'another tokenizer':
    vocabulary = text_files.clip_vocabulary()
    vocabulary['<|endoftext|>'] = len(vocabulary) + 7
    (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  elif fault == 'NaN':
    tensors = {key: np.array(value) for key, value in torch_files.read(folder / 'model.safetensors').tensors.items()}
    tensors['text_projection.weight'][0, 0] = np.nan
    (folder / 'model.safetensors').unlink()
    torch_files.write_safetensors(folder / 'model.safetensors', tensors)
  else:
    said = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(said | fault))


@pytest.mark.parametrize('fault, said', [
  ('no weights', 'clip: no weights in it; a published text encoder has model.safetensors'),
  ('no config', 'config.json: missing'),
  ('no tokenizer', 'no tokenizer; the published folders have tokenizer.json, or vocab.json and merges.txt, or spiece'),
  ('damaged tokenizer', 'vocab.json: damaged, or no tokenizer'),
  ('damaged tokenizer.json', 'tokenizer.json: damaged, or no tokenizer'),
  ('cut short', 'model.safetensors: truncated or corrupted'),
  ('another tokenizer', 'its tokenizer knows 532 tokens or more, its weights 524: they do not belong together'),
  ('NaN', 'model.safetensors: NaN or infinite numbers in text_projection.weight'),
  ({'hidden_act': 'relu'}, "hidden_act = 'relu': CLIP towers have quick_gelu or gelu"),
  ({'num_attention_heads': 'two'}, "config.json: \"num_attention_heads\" = 'two': must be a number"),
  ({'num_attention_heads': 5}, '32 channels do not split into 5'),
  ({'num_attention_heads': -4}, "config.json: \"num_attention_heads\" = '-4': must be a number above 0"),
  ({'layer_norm_eps': float('nan')}, "config.json: \"layer_norm_eps\" = 'nan': must be a number above 0"),
  ({'model_type': 'siglip_text_model'}, "of a network of kind 'siglip_text_model', not clip or clip_text_model"),
  ('a device for a config', 'config.json: not the description of a network: a device, no regular file'),
])
def test_faults_of_a_folder_are_named(fault, said, published, tmp_path):
  shutil.copytree(published / 'clip', tmp_path / 'clip')
  broken(tmp_path / 'clip', fault)
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    text_encoders.open_encoder(f'clip:{tmp_path / "clip"}', 8)(['a'])
  assert said in str(error.value)


def test_what_an_encoder_cannot_be_asked(published, monkeypatch):
  name = f'clip:{published / "clip"}'
  for asked, said in (((13,), 'config.text.length = 13: .* takes at most 12 tokens'),
                      ((8, 31), 'config.text.width = 31: must be 32, which clip:'),
                      ((8, 32, 32), 'config.text.pooled_width = 32: must be 24')):
    with pytest.raises(TextEncoderError, match=said):
      text_encoders.open_encoder(name, *asked)
  with pytest.raises(TextEncoderError, match='nowhere: no such folder'):
    text_encoders.open_encoder(f'clip:{published / "nowhere"}', 8)
  with pytest.raises(ValueError, match='not a T5 encoder'):
    text_encoders.open_encoder(f't5:{published / "clip"}', 8)
  encoder = text_encoders.open_encoder(name, 8)
  for caption, said in ((3, "'3': a caption must be text"), ('a\udc80', 'no Unicode text .character 1')):
    with pytest.raises(TextEncoderError, match=said):
      encoder(['a', caption])
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(text_tokenizers.TokenizerError, match=r'needs the package tokenizers; pip install "pagoda_jax'):
    text_tokenizers.open_tokenizer(published / 'clip')


def test_t5s_tokens_are_sentencepieces_and_one_that_ends_them(tmp_path):
  """Of a model whose pieces have known places: T5's padding 0, end 1 and unknown 2, then words that it was given."""
  import sentencepiece
  words = ['\u2581red', '\u2581flag', '\u2581cat']  # as the package marks where a word begins
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text_files.SENTENCES), model_prefix=str(tmp_path / 'spiece'), vocab_size=40,
    hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, user_defined_symbols=words)
  tokenize = text_tokenizers.open_tokenizer(tmp_path)
  assert tokenize(['', 'red flag', '  red \t cat flag\n', 'red \u2603 cat']) == [
    [1], [3, 4, 1], [3, 5, 4, 1], [3, *tokenize(['\u2603'])[0][:-1], 5, 1]]
  assert 2 in tokenize(['\u2603'])[0]
  ids, mask, truncated = text_tokenizers.padded(tokenize(['red', 'red flag cat red']), 3)
  assert ids.tolist() == [[3, 1, 0], [3, 4, 1]] and mask.sum(1).tolist() == [2, 3]
  assert truncated.tolist() == [False, True]


def test_openclips_own_form_is_refused_with_what_to_take_instead():
  for prefix in ('', 'text.'):
    with pytest.raises(ConversionError, match="OpenCLIP's or OpenAI's own .* take transformers' form, model.safet"):
      formats.FORMATS['clip'].options({f'{prefix}transformer.resblocks.0.attn.in_proj_weight': np.zeros((3, 1))})


MODULE = '''
import numpy as np
calls = []
def encode(captions):
  calls.append(list(captions))
  text = np.array([[[len(c), i, 1] for i in range(4)] for c in captions], np.float32).reshape(len(captions), 4, 3)
  return {'text': text, 'text_mask': np.ones((len(captions), 4), int), 'text_pooled': text[:, 0, :2]}
class Space:
  def of(change):
    def encode_so(captions):
      return change(encode(captions))
    return encode_so
  tuple_of = of(lambda d: tuple(d.values()))
  lacking = of(lambda d: None)
  short = of(lambda d: d | {'text': d['text'][:, :3]})
  fewer = of(lambda d: d | {'text_pooled': d['text_pooled'][:1]})
  whole = of(lambda d: d | {'text': d['text'].astype(int)})
  halves = of(lambda d: d | {'text_mask': d['text_mask'] * 0.5})
  blind = of(lambda d: d | {'text_mask': d['text_mask'] * 0})
  infinite = of(lambda d: d | {'text_pooled': d['text_pooled'] + np.inf})
  number = 3
'''


def test_a_function_of_the_users(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'my_encoder.py').write_text(MODULE)
  importlib.invalidate_caches()
  encoder = text_encoders.open_encoder('my_encoder:encode', 4)
  found = encoder(['', 'four'])
  np.testing.assert_array_equal(found['text'][:, :, 0], [[0] * 4, [4] * 4])
  assert found['text_mask'].dtype == bool and found['text'].dtype == np.float32 and encoder.pooled_width == 2
  again = text_encoders.open_encoder('my_encoder:Space.tuple_of', 4)(['x'])
  np.testing.assert_array_equal(again['text'][0, 0], [1, 0, 1])
  for name, said in (('lacking', 'gave a NoneType; must give'), ('short', r'gave text .2, 3, 3.*must give text .2, 4'),
                     ('fewer', r'text_pooled \(1, 2\)'), ('whole', 'gave text of int64'), ('halves', 'a text_mask of'),
                     ('blind', 'without tokens'), ('number', 'a int; must be a function'),
                     ('nothing', "has no attribute 'nothing'"), ('infinite', 'text_pooled of the caption .four. hol')):
    with pytest.raises(TextEncoderError, match=said):
      text_encoders.open_encoder(f'my_encoder:Space.{name}', 4)(['four'])
  with pytest.raises(TextEncoderError, match="No module named 'my_encoders'"):
    text_encoders.open_encoder('my_encoders:encode', 4)
  before = encoder.sha256
  (tmp_path / 'my_encoder.py').write_text(MODULE + '# changed\n')
  monkeypatch.delitem(sys.modules, 'my_encoder')
  importlib.invalidate_caches()
  text_encoders.open_encoder.cache_clear()
  importlib.import_module('linecache').clearcache()
  assert text_encoders.open_encoder('my_encoder:encode', 4).sha256 != before


def test_hashed_ngrams_are_fixed_and_near_where_letters_are_shared():
  embed = lambda *captions, length=8: ngrams.embed(list(captions), length, 64, 96)
  text, mask, pooled, truncated = embed('', 'A red flag', 'red FLAGS', 'smiling cat', 'one 2 three four five six seven')
  assert mask.sum(1).tolist() == [1, 4, 3, 3, 8] and not truncated.any() and not text[~mask].any()
  cosine = lambda a, b: pooled[a] @ pooled[b] / np.linalg.norm(pooled[a]) / np.linalg.norm(pooled[b])
  assert cosine(1, 2) > 0.3 > cosine(1, 3)
  np.testing.assert_allclose([(text[mask] ** 2).mean(), (pooled**2).mean()], 1, atol=0.2)
  assert embed('one two three four five six seven eight')[3].all()
  np.testing.assert_array_equal(embed('caf\u00e9', 'RED')[2], embed('cafe\u0301', 'red')[2])
  assert not np.array_equal(*embed('red cat', 'cat red')[2])
  # Of this version for ever: stores of embeddings and trained networks hold to it.
  np.testing.assert_allclose(embed('a red flag')[2][0, :4], FIXED, atol=1e-6)


FIXED = [0.344154, 1.364775, -0.385217, 0.265385]


def test_prompts_are_encoded_by_the_encoder_that_the_networks_were_trained_on():
  config = configs.experiment()
  config.text.update({'encoder': 'ngrams', 'length': 5, 'width': 8, 'pooled_width': 6})
  found = use_text.encode(config, ['a red flag', ''])
  assert {name: array.shape for name, array in found.items()} == {
    'text': (2, 5, 8), 'text_mask': (2, 5), 'text_pooled': (2, 6)}
  config.text.sha256 = text_encoders.open_encoder('ngrams', 5, 8, 6).sha256
  np.testing.assert_array_equal(use_text.encode(config, ['a red flag', ''])['text'], found['text'])
  config.text.length = 6
  with pytest.raises(TextEncoderError, match="'ngrams': this encoder .SHA-256 [0-9a-f]{64}. is another than"):
    use_text.encode(config, ['a'])
  with pytest.raises(TextEncoderError, match='is another than the one that made the embeddings'):
    text_encoders.check(config)


@pytest.mark.parametrize('name, known', [
  ('clip:/home/somebody/weights/clip/', 'clip:clip'), ('t5:~/t5-xxl', 't5:t5-xxl'), ('clip:weights/clip', ''),
  ('clip:gs://bucket/clip', ''), ('ngrams', ''), ('captioned:embed', ''),
])
def test_what_is_handed_on_names_no_folder_of_this_machine(name, known):
  assert text_encoders.name_elsewhere(name) == (known or name)


def test_an_encoder_that_lies_elsewhere_can_be_told(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = configs.experiment()
  config.text.encoder = 'clip:clip'
  with pytest.raises(TextEncoderError, match='clip: no such folder.* give text_encoder, --text_encoder of'):
    use_text.encode(config, ['a'])


@pytest.mark.parametrize('network, count', [
  (clip.CLIPText(**clip.VIT_L_14), 123_060_480 + 768**2), (clip.CLIPText(**clip.VIT_B_32), 63_165_952 + 512**2),
  (t5.T5Encoder(**t5.XXL), 4_762_310_656),
])
def test_published_sizes(network, count):
  """Parameters, as the published files hold them; CLIP's with its projection."""
  ids = jax.ShapeDtypeStruct((1, 7), 'int32'), jax.ShapeDtypeStruct((1, 7), 'bool')
  shapes = jax.eval_shape(network.init, jax.random.key(0), *ids)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_t5s_tokens_beside_clips_vector(published, tmp_path, monkeypatch):
  """What experiments/text_64_to_512.py embeds captions by: T5's outputs at all places, those of padding too."""
  both = importlib.import_module('experiments.encoders.t5_and_clip')
  names = {'t5': f't5:{published / "t5"}', 'clip': f'clip:{published / "clip"}'}

  def opened(length=12):
    for key, value in (('T5', names['t5']), ('CLIP', names['clip']), ('LENGTH', length), ('embed', both._Both())):
      monkeypatch.setattr(both, key, value)
    text_encoders.open_encoder.cache_clear()
    return text_encoders.open_encoder('experiments.encoders.t5_and_clip:embed', length)

  encoder = opened()
  found = encoder(CAPTIONS)
  alone = {kind: text_encoders.open_encoder(name, 12)(CAPTIONS) for kind, name in names.items()}
  assert (encoder.width, encoder.pooled_width) == (16, 24) and found['text_mask'].all()
  there = alone['t5']['text_mask']
  np.testing.assert_array_equal(found['text'][there], alone['t5']['text'][there])
  assert 0 < there.sum() < there.size and np.abs(found['text'][~there]).min(1).max() > 0
  np.testing.assert_array_equal(found['text_pooled'], alone['clip']['text_pooled'])
  # Another one of either makes another encoder.
  digests = {encoder.sha256}
  for kind, key in (('clip', 'num_attention_heads'), ('t5', 'relative_attention_max_distance')):
    folder = pathlib.Path(shutil.copytree(published / kind, tmp_path / kind))
    path, was = folder / 'config.json', names[kind]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 8}))
    names[kind] = f'{kind}:{folder}'
    digests.add(opened().sha256)
    names[kind] = was
  assert len(digests) == 3 and opened().sha256 in digests
