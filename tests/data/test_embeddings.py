"""Embeddings of captions: stored once beside prepared pictures, the same in every batch; other encoders are refused."""

import json
import pickle
import shutil

import make_data
import numpy as np
import pytest
import tiny
from runs import pagoda

from pagoda_jax.data import embeddings, fitting, pictures, prepare, records, sources, texts
from pagoda_jax.data import stream as streams
from pagoda_jax.networks.text import ngrams
from pagoda_jax.runtime.interrupts import Interrupted
from pagoda_jax.training import workdir
from pagoda_jax.weights import text_encoders

LONG = 'many words ' * 5000
ROWS = [{'file': f'{i:02d}.png', 'caption': ['a red flag', '', LONG][i % 3]} for i in range(11)]
for row in ROWS[1::2]:
  row['recaption'] = [f'{row["file"]} anew', 'x']


def command(tmp_path, *flags, encoder='ngrams', output='data'):
  text = ['--text_length=6', '--text_width=8'] if encoder else []
  return pagoda('prepare', f'--source=folder:{tmp_path / "photos"}', f'--output={tmp_path / output}',
                '--resolutions=8,16', '--shard_size=4', '--workers=1', f'--text_encoder={encoder}', *text, *flags)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  sources.open_whole.cache_clear()
  sources.open_part.cache_clear()


@pytest.fixture
def photos(tmp_path):
  make_data.write_captions(tmp_path / 'photos', ROWS)
  return tmp_path


def with_text(tmp_path, **keys):
  config = tiny.get_config()
  config.text.update({'encoder': 'ngrams', 'length': 6, 'width': 8, 'pooled_width': 8} | keys)
  config.data.update({'source': 'array_record', 'path': str(tmp_path / 'data'), 'channels': 3, 'num_classes': 0,
                      'holdout': 2})
  config.phases.distill.discriminator.conditional = config.phases.grow_16.discriminator.conditional = False
  return config


def test_prepare_stores_every_caption_and_the_empty_one_once(photos, capsys):
  assert command(photos) == 0
  said = capsys.readouterr().out
  assert '21 captions embedded by ngrams, 3 of them truncated to 6 tokens, 4 empty' in said
  manifest = records.read_manifest(photos / 'data')
  assert manifest['text']['sha256'] == text_encoders.open_encoder('ngrams', 6, 8).sha256
  source = records.open_records(photos / 'data')
  for index, row in enumerate(ROWS):
    listed = [row['caption'], *row.get('recaption', [])]
    text, mask, pooled, _ = ngrams.embed(listed, 6, 8, 8)
    found = source.texts.captions(index)
    assert [int(caption['caption_kind']) for caption in found] == [0, 1, 1][: len(listed)]
    for place, caption in enumerate(found):
      np.testing.assert_array_equal(caption['text'], text[place].astype(np.float16))
      np.testing.assert_array_equal(caption['text_mask'], mask[place])
      np.testing.assert_array_equal(caption['text_pooled'], pooled[place].astype(np.float16))
  null = source.null_text()
  assert null.keys() == {'text', 'text_mask', 'text_pooled'} and null['text_mask'].sum() == 1
  np.testing.assert_array_equal(null['text'], source.texts.captions(1)[0]['text'])  # its caption is empty
  assert pagoda('prepare', '--verify', f'--output={photos / "data"}') == 0
  assert 'all whole' in capsys.readouterr().out


def test_a_key_draws_one_caption_for_ever_and_all_of_them_come(photos):
  command(photos)
  source = records.open_records(photos / 'data')
  again = pickle.loads(pickle.dumps(source))
  seen = {}
  for key in range(400):
    first, second = source.text(1, key), again.text(1, key)
    np.testing.assert_array_equal(first['text'], second['text'])
    seen.setdefault((int(first['caption_kind']), first['text'].tobytes()), []).append(key)
  assert len(seen) == 3 and all(90 < len(keys) < 180 for keys in seen.values())
  # Noise is stored by key, inverted beside one caption: another draw would be another run.
  assert [int(source.text(1, key)['caption_kind']) for key in range(12)] == FIXED_KINDS


FIXED_KINDS = [0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0]


def test_batches_have_the_embeddings_of_their_pictures(photos):
  """In the main process and in workers; real pictures have theirs; without config.text there are none."""
  command(photos)
  config = with_text(photos)
  fitting.settle(config)
  assert config.text.sha256 == text_encoders.open_encoder('ngrams', 6, 8).sha256
  config.data.update({'mirror': True, 'workers': 0})
  source, _ = streams.source_keys(config.data)

  class Noise:
    resolution = 8

    def __len__(self):
      return len(source)

    def pair(self, key):
      return {'noise': np.zeros((8, 8, 3), np.float32)}

  batch = next(streams.Stream(config.data, 16, 0, Noise(), text=True).batches(5))
  assert batch['text'].shape == (5, 6, 8) and batch['text'].dtype == np.float16
  assert batch['text_mask'].shape == (5, 6) and batch['text_pooled'].shape == (5, 8)
  assert batch['caption_kind'].shape == batch['real_caption_kind'].shape == (5,)
  for row, key in enumerate(batch['key']):
    expected = source.text(int(key) // 2, int(key))
    for name, value in expected.items():
      np.testing.assert_array_equal(batch[name][row], value)
    whole = source.whole.text(int(source.indices[int(key) // 2]), int(key))
    np.testing.assert_array_equal(expected['text'], whole['text'])
  alone = next(streams.Stream(config.data, 16, 0, text=True).batches(8))
  config.data.workers = 2
  helped = streams.Stream(config.data, 16, 0, text=True).batches(8)
  np.testing.assert_array_equal(alone['text'], next(helped)['text'])
  helped.close()
  config.data.workers = 0
  assert 'text' not in next(streams.Stream(config.data, 16, 0).batches(2))


def test_a_run_of_another_encoder_is_refused_naming_both(photos):
  command(photos)
  wrong = [({'encoder': 'clip:weights/clip'}, "by ngrams, and config.text.encoder is clip:weights/clip:\n  encoder"),
           ({'length': 7}, '\n  length: there 6, here 7'),
           ({'width': 16, 'pooled_width': 16}, 'width: there 8, here 16'),
           ({'sha256': 'a' * 64}, "sha256: there '")]
  for keys, said in wrong:
    with pytest.raises(pictures.SourceError) as error:
      fitting.settle(with_text(photos, **keys))
    assert said in str(error.value)
  plain = photos / 'plain'
  assert command(photos, encoder='', output='plain') == 0
  config = with_text(photos)
  config.data.path = str(plain)
  with pytest.raises(pictures.SourceError, match='plain: no embeddings of captions beside.*--text_encoder'):
    fitting.settle(config)


def test_another_encoder_does_not_go_on_in_a_folder(photos, capsys):
  command(photos)
  before = {path.name: path.read_bytes() for path in (photos / 'data').iterdir()}
  assert command(photos, '--text_length=7') == 1
  said = capsys.readouterr().err
  assert 'holds embeddings of captions by ngrams, and here is ngrams:\n  sha256' in said
  assert 'length: there 6, here 7' in said
  assert {path.name: path.read_bytes() for path in (photos / 'data').iterdir()} == before
  (photos / 'data' / 'text.json').write_text('{}')
  assert command(photos) == 1 and 'text.json: damaged' in capsys.readouterr().err


def test_embeddings_join_a_finished_folder_and_stay_when_it_is_prepared_again(photos):
  """The pictures are not touched; a lost shard of either kind is made anew, and alone."""
  assert command(photos, encoder='') == 0
  folder = photos / 'data'
  digest = records.open_records(folder).digest
  stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob('pictures*')}
  assert command(photos) == 0
  assert records.open_records(folder).digest == digest
  assert {path.name: path.stat().st_mtime_ns for path in folder.glob('pictures*')} == stamps
  whole = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert command(photos, encoder='') == 0
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
  for lost in ('text-00001-of-00003.array_record', 'text_null-00000-of-00001.json',
               'pictures_8px-00002-of-00003.array_record'):
    (folder / lost).unlink()
    if lost.startswith('text'):
      with pytest.raises(pictures.SourceError, match=f'damaged or missing: {lost}'):
        sources.open_whole.cache_clear()
        sources.open_part.cache_clear()
        fitting.settle(with_text(photos))
    assert command(photos) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_stopped_embedding_goes_on_to_the_same_bytes(photos, monkeypatch, tmp_path):
  command(photos, output='whole')
  whole = {path.name: path.read_bytes() for path in (photos / 'whole').glob('text*')}
  encode, calls = text_encoders.open_encoder('ngrams', 6, 8).embed, []

  def stopped(captions):
    calls.append(captions)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return encode(captions)

  encoder = text_encoders.Encoder('ngrams', text_encoders.open_encoder('ngrams', 6, 8).sha256, 6, 8, 8, stopped)
  source = prepare.open_input(f'folder:{photos / "photos"}')
  prepared = lambda: prepare.prepare(source, photos / 'data', records.Recipe((8, 16), 'png', 95), 4, 1, 0.0, encoder)
  with pytest.raises(Interrupted, match='embedding stopped; start the same command again to go on'):
    prepared()
  with pytest.raises(pictures.SourceError, match='no embeddings of captions'):
    fitting.settle(with_text(photos))
  sources.open_whole.cache_clear()
  sources.open_part.cache_clear()
  first = (photos / 'data' / 'text-00000-of-00003.array_record').stat().st_mtime_ns
  prepared()
  assert len(calls) == 5 and (photos / 'data' / 'text-00000-of-00003.array_record').stat().st_mtime_ns == first
  assert {path.name: path.read_bytes() for path in (photos / 'data').glob('text*')} == whole


def test_no_changed_byte_of_embeddings_is_used(photos):
  command(photos)
  folder = photos / 'data'
  source = records.open_records(folder)
  expected = [source.texts.captions(i)[0]['text'].tobytes() for i in range(len(source))]
  path = folder / 'text-00000-of-00003.array_record'
  whole = path.read_bytes()
  for at in range(0, len(whole), 97):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    records.shards.open_shard.cache_clear()
    for index in range(4):
      try:
        assert source.texts.captions(index)[0]['text'].tobytes() == expected[index]
      except pictures.SourceError as error:
        assert 'text-00000-of-00003.array_record' in str(error)
    with pytest.raises(pictures.SourceError, match='damaged or missing: text-00000-of-00003'):
      prepare.verify(folder)
    with pytest.raises(pictures.SourceError, match='damaged or missing: text-00000-of-00003'):
      records.open_records(folder, verify=True)
  path.write_bytes((folder / 'text-00001-of-00003.array_record').read_bytes())  # one under another's name
  records.shards.open_shard.cache_clear()
  with pytest.raises(pictures.SourceError, match='it is record 0 of shard 1'):
    source.texts.captions(0)


def test_pictures_without_captions_and_numbers_beyond_float16_are_named(photos, capsys, monkeypatch):
  make_data.write_class_folders(photos / 'classes', per_class=1)
  assert pagoda('prepare', f'--source=folder:{photos / "classes"}', f'--output={photos / "none"}',
                    '--resolution=8', '--workers=1', '--text_encoder=ngrams') == 1
  assert 'the picture bird/00.png has no caption to embed; captions come from' in capsys.readouterr().err
  assert not list((photos / 'none').glob('*.array_record'))  # it is said before the pictures are written
  monkeypatch.chdir(photos)
  (photos / 'huge_encoder.py').write_text(
    'import numpy as np\ndef encode(captions):\n  n = len(captions)\n'
    '  return np.full((n, 6, 2), 1e5), np.ones((n, 6), bool), np.ones((n, 2))\n')
  assert command(photos, '--text_width=0', encoder='huge_encoder:encode') == 1
  assert "huge_encoder:encode: text of the caption 'a red flag' is beyond what float16 holds" in capsys.readouterr().err
  assert command(photos, encoder='nothing') == 1
  assert 'must be clip:FOLDER, t5:FOLDER, ngrams or module:function' in capsys.readouterr().err


def test_a_work_directory_knows_its_encoder_wherever_that_lies(photos):
  command(photos)
  config = with_text(photos)
  fitting.settle(config)
  identity = workdir.identity(config, 'teacher')
  assert identity['config.text.sha256'] == config.text.sha256 and 'config.text.encoder' not in identity
  config.text.encoder = ''
  assert not any('text' in key for key in workdir.identity(config, 'teacher') if not key.startswith('config.network'))
  shutil.copytree(photos / 'data', photos / 'moved')
  moved = with_text(photos)
  moved.data.path = str(photos / 'moved')
  fitting.settle(moved)
  assert workdir.identity(moved, 'teacher') == identity


def test_records_of_before_there_were_embeddings_read_as_they_did(photos):
  """A manifest and records without any of it; what a program of then knows of a folder with it stays the same."""
  command(photos, encoder='')
  manifest = json.loads((photos / 'data' / 'manifest.json').read_text())
  assert 'text' not in manifest and manifest['format_version'] == records.SIDES_VERSION
  command(photos)
  after = json.loads((photos / 'data' / 'manifest.json').read_text())
  assert {key: value for key, value in after.items() if key not in ('text', 'seal')} == {
    key: value for key, value in manifest.items() if key != 'seal'}
  assert embeddings.kept(photos / 'data', after) == {'text': after['text']}
  assert texts.store_of('x', after['text']).sha256 == after['text']['sha256']
