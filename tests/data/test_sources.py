"""Sources: what is stored is what is read, labels are checked, unreadable files are listed, held-out ones balanced."""

import importlib.util
import pathlib
import pickle
import shutil

import make_data
import numpy as np
import pytest
import tiny
from PIL import Image

from pagoda_jax import config as configs
from pagoda_jax import main, pipeline, validation
from pagoda_jax.data import fitting, folders, pictures, sources
from pagoda_jax.data import stream as streams
from pagoda_jax.training import workdir

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'pagoda_jax' / 'folders'


def settings(source, path='', **overrides):
  """`config.data` of small colour pictures."""
  group = configs.experiment().data
  group.update({'source': source, 'path': str(path), 'resolution': 8, 'num_classes': 3} | overrides)
  return group


def experiment(source, path='', **overrides):
  """The tiny experiment on another source."""
  config = tiny.get_config()
  config.data.update({'source': source, 'path': str(path), 'channels': 3, 'holdout': 0} | overrides)
  return config


def assert_shows(source, index, seed, label):
  record = pickle.loads(pickle.dumps(source))[index]
  np.testing.assert_array_equal(np.asarray(record['image'].convert('RGB')), make_data.pixels(seed))
  assert record['label'] == label
  return record


def test_class_folders_are_found_sorted_at_any_depth(tmp_path):
  make_data.write_class_folders(tmp_path / 'pictures')
  deeper = tmp_path / 'pictures' / 'cat' / 'more'
  deeper.mkdir()
  (deeper / '99.png').write_bytes(make_data.png(make_data.pixels(99)))
  for name in ('notes.txt', '.hidden.png'):  # neither is a picture
    (tmp_path / 'pictures' / name).write_text('x')
  source = folders.open_folder(tmp_path / 'pictures')
  assert source.class_names == make_data.CLASSES and len(source) == 13
  assert assert_shows(source, 4, 4, 1)['name'] == 'cat/00.png'
  assert assert_shows(source, 8, 99, 1)['name'] == 'cat/more/99.png'
  assert_shows(source, 12, 11, 2)


def test_a_folder_without_sub_folders_has_no_classes_and_a_mixed_one_is_refused(tmp_path):
  (tmp_path / 'one.png').write_bytes(make_data.png(make_data.pixels(0)))
  source = folders.open_folder(tmp_path)
  assert source.class_names == ()
  assert_shows(source, 0, 0, -1)
  make_data.write_class_folders(tmp_path)
  with pytest.raises(pictures.SourceError, match='one.png: lies beside the class folders bird, cat, dog'):
    folders.open_folder(tmp_path)


@pytest.mark.parametrize('labels, names, numbers', [
  (['red', 'blue', 'red'], ('blue', 'red'), [1, 0, 1]),
  ([0, 2, 2], ('0', '1', '2'), [0, 2, 2]),
  ([None, None, None], (), [-1, -1, -1]),
])
def test_captions_and_labels_of_a_captions_file(tmp_path, labels, names, numbers):
  rows = [{'file': f'{i}.png', 'caption': f'picture {i}'} | ({} if label is None else {'label': label})
          for i, label in enumerate(labels)]
  make_data.write_captions(tmp_path, rows)
  source = folders.open_folder(tmp_path)
  assert source.class_names == names
  for i, number in enumerate(numbers):
    assert assert_shows(source, i, i, number)['caption'] == f'picture {i}'


@pytest.mark.parametrize('line, expected', [
  ('{"file": "1.png"', 'line 2'),
  ('{"file": "1.png"}', "line 2.*'caption'"),
  ('{"file": "1.png", "caption": 7}', 'line 2: "caption" = 7: must be a string'),
  ('{"file": "1.png", "caption": "", "label": -3}', 'line 2: "label" = -3'),
  ('{"file": "1.png", "caption": "", "label": 0}', 'some labels are names and some are numbers'),
])
def test_a_bad_line_of_a_captions_file_is_named(tmp_path, line, expected):
  make_data.write_captions(tmp_path, [{'file': '0.png', 'caption': 'zero', 'label': 'zero'}])
  with (tmp_path / 'captions.jsonl').open('a') as file:
    file.write(line + '\n')
  with pytest.raises(pictures.SourceError, match=expected):
    folders.open_folder(tmp_path)


@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp', 'bmp', 'gif', 'tiff'])
def test_any_format_that_pillow_reads(tmp_path, ending):
  Image.new('RGB', (20, 16), (200, 30, 60)).save(tmp_path / f'picture.{ending}')
  image = folders.open_folder(tmp_path)[0]['image']
  np.testing.assert_allclose(pictures.picture(image, 8, 3), np.full((8, 8, 3), (200, 30, 60)), atol=4)


def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path):
  half = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
  half.paste((255, 0, 0, 255), (0, 0, 4, 8))
  half.save(tmp_path / 'a_transparent.png')
  turned = Image.new('RGB', (8, 8))
  turned.paste((0, 255, 0), (0, 0, 8, 4))  # above; the tag says: show it turned right by 90 degrees
  exif = Image.Exif()
  exif[0x0112] = 6
  turned.save(tmp_path / 'b_turned.png', exif=exif)
  Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / 'c_deep.png')
  transparent, upright, deep = (pictures.picture(folders.open_folder(tmp_path)[i]['image'], 8, 3) for i in range(3))
  assert transparent[0, 0].tolist() == [255, 0, 0] and transparent[0, 7].tolist() == [255, 255, 255]
  assert upright[0, 7].tolist() == [0, 255, 0] and upright[0, 0].tolist() == [0, 0, 0]
  assert deep[0, 0].tolist() == [156, 156, 156]  # of 155.6


def test_greys_of_16_bits_are_rounded_to_the_nearest_of_8():
  values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
  found = np.asarray(pictures.decode(make_data.png(values)), np.float64)
  assert np.abs(found - values / 257).max() <= 0.5 and found.mean() == 127.5


def damage(folder):
  """Three unreadable files: cut short, empty, and no picture at all."""
  Image.fromarray(make_data.pixels(1, 64)).save(folder / 'cat' / 'cut.jpg')
  content = (folder / 'cat' / 'cut.jpg').read_bytes()
  (folder / 'cat' / 'cut.jpg').write_bytes(content[: len(content) // 2])
  (folder / 'cat' / 'empty.png').write_bytes(b'')
  (folder / 'dog' / 'text.jpg').write_text('this is no picture')


def test_unreadable_files_are_listed_and_left_out(tmp_path, capsys):
  make_data.write_class_folders(tmp_path / 'pictures')
  before = folders.open_folder(tmp_path / 'pictures')
  damage(tmp_path / 'pictures')
  source = folders.open_folder(tmp_path / 'pictures', max_unreadable=0.25)
  printed = capsys.readouterr().err
  assert '3 of 15 pictures cannot be read and are left out' in printed
  for name in ('cat/cut.jpg: OSError', 'cat/empty.png: no format', 'dog/text.jpg: no format'):
    assert name in printed
  assert [entry.file for entry in source.entries] == [entry.file for entry in before.entries]
  assert source.digest == before.digest


def test_too_many_unreadable_files_are_an_error_that_lists_them(tmp_path):
  make_data.write_class_folders(tmp_path / 'pictures')
  damage(tmp_path / 'pictures')
  with pytest.raises(pictures.SourceError) as error:
    folders.open_folder(tmp_path / 'pictures', max_unreadable=0.1)
  for text in ('3 of 15', 'max_unreadable = 0.1', 'cat/cut.jpg', 'cat/empty.png', 'dog/text.jpg'):
    assert text in str(error.value)


def test_a_file_that_becomes_unreadable_is_named(tmp_path):
  make_data.write_class_folders(tmp_path / 'pictures')
  source = folders.open_folder(tmp_path / 'pictures')
  (tmp_path / 'pictures' / 'cat' / '01.png').write_bytes(b'gone')
  with pytest.raises(pictures.SourceError, match='cat/01.png: no format'):
    source[5]


def test_tfds_is_read_without_tensorflow(tmp_path):
  make_data.write_tfds(tmp_path, 'small_pictures', 7)
  source = sources.open_tfds('small_pictures', str(tmp_path))
  assert len(source) == 7 and source.class_names == make_data.CLASSES
  for i in (0, 5):
    assert_shows(source, i, i, i % 3)
  assert len(sources.open_tfds('small_pictures', str(tmp_path), 'train[2:5]')) == 3


def test_pictures_of_tfds_are_held_out_by_labels_alone_read_once(tmp_path, monkeypatch):
  """Of ImageNet and 50,000 held out, 800,000 pictures were decoded for their labels, for each part anew."""
  make_data.write_tfds(tmp_path, 'small_pictures', 12)
  looked, label = [], sources.TfdsSource.label
  monkeypatch.setattr(pictures, 'decode', lambda content: 1 / 0)
  monkeypatch.setattr(sources.TfdsSource, 'label', lambda self, i: looked.append(i) or label(self, i))
  data = experiment('tfds', tmp_path, name='small_pictures', holdout=3).data
  held, train = (sources.open_source(data, part).indices.tolist() for part in ('holdout', 'train'))
  assert sorted(held + train) == list(range(12)) and sorted(i % 3 for i in held) == [0, 1, 2]
  assert sorted(looked) == list(range(12))


@pytest.mark.parametrize('name, split, expected', [
  ('no_such_pictures', 'train', 'Dataset no_such_pictures not found'),
  ('small_pictures', 'test', "Unknown split 'test'"),
  ('mnist', 'train', 'not prepared as ArrayRecord.*download_and_prepare'),
])
def test_what_tfds_lacks_is_said(tmp_path, name, split, expected):
  make_data.write_tfds(tmp_path, 'small_pictures', 2)
  with pytest.raises(ValueError, match=expected):
    sources.open_tfds(name, str(tmp_path), split)


@pytest.mark.parametrize('old, new, expected', [
  ('array_record', 'tfrecord', 'not prepared as ArrayRecord.*download_and_prepare'),
  ('{', '', 'damaged or unreadable'),
])
def test_tfds_in_another_format_and_its_damaged_description_are_told_apart(tmp_path, old, new, expected):
  make_data.write_tfds(tmp_path, 'small_pictures', 2)
  (info,) = tmp_path.rglob('dataset_info.json')
  info.write_text(info.read_text().replace(old, new))
  with pytest.raises(sources.SourceError, match=expected):
    sources.open_tfds('small_pictures', str(tmp_path))


def test_a_damaged_tfds_record_is_named(tmp_path):
  make_data.write_tfds(tmp_path, 'small_pictures', 2)
  path = next(tmp_path.rglob('*.array_record-*'))
  content = bytearray(path.read_bytes())
  content[content.index(b'IDAT') + 9] ^= 1
  path.write_bytes(content)
  source = sources.open_tfds('small_pictures', str(tmp_path))
  with pytest.raises(pictures.SourceError, match='small_pictures/train/0: damaged record'):
    source[0]


def test_held_out_pictures_are_balanced_fixed_and_never_trained_on():
  labels = np.repeat([0, 1, 2, 3], [50, 4, 1, 30])
  held = sources.balanced_choice(labels, 12)
  assert np.array_equal(held, sources.balanced_choice(labels, 12))
  counts = np.bincount(labels[held], minlength=4)
  assert counts.sum() == 12 and counts[1] == 3 and counts[2] == 0 and abs(counts[0] - counts[3]) == 1
  with pytest.raises(pictures.SourceError, match='holdout = 82.*at most 81'):
    sources.balanced_choice(labels, 82)


@pytest.mark.parametrize('kind', ['folder', 'tfds', 'mnist'])
def test_every_source_is_split_into_training_and_held_out(tmp_path, kind):
  make_data.write_class_folders(tmp_path / 'folder')
  make_data.write_tfds(tmp_path / 'tfds', 'small_pictures', 12)
  config = settings(kind, tmp_path / kind, name='small_pictures', holdout=6)
  whole, train, held = (sources.open_source(group, part) for group, part in [
    (settings(kind, tmp_path / kind, name='small_pictures'), 'train'), (config, 'train'), (config, 'holdout')])
  names = [{source[i]['name'] for i in range(len(source))} for source in (whole, train, held)]
  assert names[1] | names[2] == names[0] and not names[1] & names[2] and len(names[2]) == 6
  labels = np.bincount([held[i]['label'] for i in range(6)])
  assert labels.max() <= 2
  assert train.digest != whole.digest


def test_labels_out_of_range_are_refused_naming_the_first(tmp_path):
  rows = [{'file': f'{i}.png', 'caption': '', 'label': label} for i, label in enumerate([0, 2, 5, 9])]
  make_data.write_captions(tmp_path, rows)
  config = experiment('folder', tmp_path, num_classes=5)
  with pytest.raises(pictures.SourceError, match=r'num_classes = 5: the picture 2.png has label 5 \(2 of 4'):
    fitting.settle(config)
  config.data.num_classes = 10
  fitting.settle(config)


def test_pictures_without_label_are_refused_where_there_are_classes(tmp_path):
  rows = [{'file': '0.png', 'caption': '', 'label': 'a'}, {'file': '1.png', 'caption': ''}]
  make_data.write_captions(tmp_path, rows)
  with pytest.raises(pictures.SourceError, match='the picture 1.png has no label'):
    fitting.settle(experiment('folder', tmp_path, num_classes=-1))
  fitting.settle(experiment('folder', tmp_path, num_classes=0))


def test_more_tfds_classes_than_the_config_has_are_refused(tmp_path):
  make_data.write_tfds(tmp_path, 'small_pictures', 3)
  with pytest.raises(pictures.SourceError, match='num_classes = 2: the source has 3 classes'):
    fitting.settle(experiment('tfds', tmp_path, name='small_pictures', num_classes=2))


def test_more_pictures_than_samples_can_be_graded_by_are_refused(monkeypatch):
  """A support vector machine of ImageNet's was begun when all phases had run."""
  config = experiment('mnist', channels=1, holdout=500, num_classes=10)
  config.evaluation.samples = 10
  fitting.settle(config)
  monkeypatch.setattr(fitting, 'MOST_BYTES', 8 * 4500 * config.data.resolution**2 - 1)
  with pytest.raises(pictures.SourceError, match='config.evaluation.samples = 10: .* all 4,500 .*must be 0'):
    fitting.settle(config)
  config.evaluation.samples = 0
  fitting.settle(config)


def test_hidden_labels_of_tfds_are_no_class(tmp_path):
  make_data.write_tfds(tmp_path, 'small_pictures', 3, label=lambda i: -1)
  for count in (3, -1):
    with pytest.raises(pictures.SourceError, match='small_pictures/train/0 has no label, .* 0 trains without'):
      fitting.settle(experiment('tfds', tmp_path, name='small_pictures', num_classes=count))
  fitting.settle(experiment('tfds', tmp_path, name='small_pictures', num_classes=0))


def test_classes_are_found_by_themselves(tmp_path):
  make_data.write_class_folders(tmp_path / 'classes')
  config = experiment('folder', tmp_path / 'classes', num_classes=-1)
  validation.validate(config, 8)
  fitting.settle(config)
  assert config.data.num_classes == 3 and config.phases.distill.discriminator.conditional
  (tmp_path / 'plain').mkdir()
  (tmp_path / 'plain' / '0.png').write_bytes(make_data.png(make_data.pixels(0)))
  config = experiment('folder', tmp_path / 'plain', num_classes=-1)
  fitting.settle(config)
  assert config.data.num_classes == 0 and not config.phases.grow_16.discriminator.conditional
  validation.validate(config, 8)


def test_figures_by_class_are_refused_where_the_source_turns_out_to_have_no_classes(tmp_path):
  (tmp_path / 'plain').mkdir()
  for i in range(8):
    (tmp_path / 'plain' / f'{i}.png').write_bytes(make_data.png(make_data.pixels(i)))
  config = experiment('folder', tmp_path / 'plain', num_classes=-1, holdout=2)
  config.evaluation.samples = 100
  validation.validate(config, 8)
  with pytest.raises(configs.ConfigError, match='evaluation.samples = 100: .*num_classes >= 2, not 0'):
    pipeline.run_experiment(config, tmp_path / 'work')
  assert not (tmp_path / 'work').exists()


def test_a_phase_does_not_go_on_with_other_pictures(tmp_path):
  make_data.write_class_folders(tmp_path / 'pictures')
  shutil.copytree(tmp_path / 'pictures', tmp_path / 'elsewhere')
  workdir.claim(tmp_path / 'work', experiment('folder', tmp_path / 'pictures', num_classes=3), 'teacher')
  moved = experiment('folder', tmp_path / 'elsewhere', num_classes=3)
  workdir.check_claim(tmp_path / 'work', moved, 'teacher')
  (tmp_path / 'elsewhere' / 'cat' / '00.png').unlink()
  sources.open_whole.cache_clear()
  sources.open_part.cache_clear()
  with pytest.raises(workdir.WorkdirError, match='config.data_sha256'):
    workdir.check_claim(tmp_path / 'work', moved, 'teacher')


def test_pictures_stored_too_small_are_refused():
  config = experiment('mnist', channels=1, num_classes=10, resolution=64)
  with pytest.raises(pictures.SourceError, match='resolution = 64.*stored at 32 px'):
    fitting.settle(config)


def test_worker_processes_read_the_same_batches(tmp_path):
  make_data.write_class_folders(tmp_path / 'pictures')
  both = [streams.Stream(settings('folder', tmp_path / 'pictures', workers=workers), 8, seed=1) for workers in (0, 2)]
  here, there = (stream.batches(4) for stream in both)
  for _ in range(4):
    expected, found = next(here), next(there)
    assert expected.keys() == found.keys()
    for key in expected:
      np.testing.assert_array_equal(found[key], expected[key])


@pytest.fixture(scope='module')
def folder_experiment():
  spec = importlib.util.spec_from_file_location('folder_experiment', ROOT / 'experiments' / 'folder.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_folder_experiment_grows_from_base_to_target(folder_experiment):
  config = folder_experiment.get_config('base=8,target=64,labels=no')
  validation.validate(config, 1)
  assert config.order == ('teacher', 'invert', 'distill', 'grow_16', 'grow_32', 'grow_64')
  assert (config.base_resolution, config.data.resolution, config.data.num_classes) == (8, 64, 0)
  for key, value in (('base_resolution', 32), ('data.resolution', 128), ('data.resolution', 32)):
    config = folder_experiment.get_config('base=8,target=64')
    config.update_from_flattened_dict({key: value})
    with pytest.raises(configs.ConfigError, match='resolution'):
      validation.validate(config, 1)


@pytest.mark.parametrize('variant, expected', [
  ('size=64', "'size=64' must be one of base=16"),
  ('base=12', 'base=12 must be 4, 8, 16'),
  ('base=16,target=16', 'target=16 must be base = 16 times 2, 4, 8'),
  ('target=x', 'target=x must be base'),
  ('labels=maybe', 'labels=maybe must be yes or no'),
])
def test_a_bad_variant_of_the_folder_experiment_is_explained(folder_experiment, variant, expected):
  with pytest.raises(configs.ConfigError, match=expected):
    folder_experiment.get_config(variant)


def test_the_command_line_says_what_is_wrong_with_a_variant(tmp_path, capsys):
  config = f'--config={ROOT / "experiments" / "folder.py"}:base=3'
  assert main.main(['run', config, f'--workdir={tmp_path / "work"}']) == 2
  printed = capsys.readouterr().err
  assert 'pagoda run: folder.py:base=3: base=3 must be 4, 8, 16' in printed and 'Traceback' not in printed
