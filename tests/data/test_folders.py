"""A folder of pictures: other contents are other pictures, and whatever lies in it is read rightly or named."""

import hashlib
import io
import json
import os
import pathlib
import shutil
import socket
import struct

import make_data
import numpy as np
import pytest
import tiny
from PIL import Image

from pagoda_jax import main
from pagoda_jax.data import captions, fitting, folders, listing, pictures, prepare, records, sources
from pagoda_jax.training import workdir


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'pagoda_jax' / 'folders'


@pytest.fixture
def photos(tmp_path):
  make_data.write_class_folders(tmp_path / 'photos')
  return tmp_path / 'photos'


def experiment(path, **overrides):
  """The tiny experiment on a folder, as a new process sees it."""
  sources.open_whole.cache_clear()
  sources.open_part.cache_clear()
  config = tiny.get_config()
  config.data.update({'source': 'folder', 'path': str(path), 'channels': 3, 'holdout': 0, 'num_classes': 0} | overrides)
  return config


def write_black_and_white(folder):
  """Two files of equal size and time."""
  folder.mkdir(exist_ok=True)
  for name, color in (('a', 'black'), ('b', 'white')):
    Image.new('RGB', (8, 8), color).save(folder / f'{name}.bmp')
    os.utime(folder / f'{name}.bmp', (1e9, 1e9))


def swap_names(a, b):
  a.rename(a.with_name('c'))
  b.rename(a)
  a.with_name('c').rename(b)


def swap_contents(a, b):
  first, second = a.read_bytes(), b.read_bytes()
  a.write_bytes(second)
  b.write_bytes(first)
  for path in (a, b):
    os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize('swap', [swap_names, swap_contents])
def test_a_run_does_not_go_on_with_pictures_swapped_within_the_folder(tmp_path, swap):
  folder = tmp_path / 'pictures'
  write_black_and_white(folder)
  workdir.claim(tmp_path / 'work', experiment(folder), 'teacher')
  plan = {'output': tmp_path / 'out', 'recipe': records.Recipe((8,), 'png', 95), 'shard_size': 4, 'workers': 1,
          'max_unreadable': 0}
  prepare.prepare(folders.open_folder(folder, check=False), **plan)
  swap(folder / 'a.bmp', folder / 'b.bmp')
  with pytest.raises(workdir.WorkdirError, match='config.data_sha256'):
    workdir.check_claim(tmp_path / 'work', experiment(folder), 'teacher')
  with pytest.raises(prepare.PrepareError, match='data_sha256'):
    prepare.prepare(folders.open_folder(folder, check=False), **plan)
  swap(folder / 'a.bmp', folder / 'b.bmp')  # back: all is as it was
  workdir.check_claim(tmp_path / 'work', experiment(folder), 'teacher')
  prepare.prepare(folders.open_folder(folder, check=False), **plan)


def test_a_work_directory_among_the_pictures_is_refused_at_once(photos, tmp_path, monkeypatch, capsys):
  """Its grids, and files of checkpoints, would be pictures of one more class when the run goes on."""
  (tmp_path / 'link').symlink_to(photos)
  monkeypatch.chdir(photos)
  flags = [f'--config={tiny.__file__}', '--config.data.source=folder', '--config.data.channels=3']
  places = (photos, photos / 'run'), ('.', 'runs/a'), (tmp_path / 'link', photos), ('../photos/', '../link/a')
  for path, folder in places:
    assert main.main(['run', *flags, f'--config.data.path={path}', f'--workdir={folder}']) == 1
    assert f'{folder}: lies in config.data.path = ' in capsys.readouterr().err
  assert sorted(path.name for path in photos.iterdir()) == list(make_data.CLASSES)
  for folder in (tmp_path / 'photos2', tmp_path, photos / '.runs' / 'a'):
    workdir.check_apart(folder, experiment(photos))
  (photos / listing.CAPTIONS).touch()  # which lists the pictures
  workdir.check_apart(photos / 'run', experiment(photos))


def test_a_picture_that_changes_under_a_run_stops_the_reading_and_one_that_is_linked_does_not(photos, tmp_path):
  source, (first, second) = folders.open_folder(photos), [photos / 'bird' / f'0{i}.png' for i in range(2)]
  os.link(first, tmp_path / 'backup.png')
  assert source[0]['name'] == 'bird/00.png'
  shutil.copy(second, first)
  with pytest.raises(OSError, match='bird/00.png: changed since it was looked at; start again'):
    source[0]
  with pytest.raises(OSError, match='bird/00.png: changed'):  # nor is it left out as an unreadable picture
    prepare.prepare(source, tmp_path / 'out', records.Recipe((8,), 'png', 95), 8, 1, 1.0)


def test_a_file_is_read_once_for_the_check_and_again_only_after_a_change(photos, tmp_path, cache, monkeypatch):
  read, was = [], folders._read
  monkeypatch.setattr(folders, '_read', lambda path: [read.append(path), was(path)][1])
  first = folders.open_folder(photos)
  assert folders.open_folder(photos).digest == folders.open_folder(photos, check=False).digest == first.digest
  assert len(read) == 12 and len(list(cache.iterdir())) == 1
  os.utime(photos / 'cat' / '00.png', (0, 0))
  assert folders.open_folder(photos).digest == first.digest
  assert read[12:] == [photos / 'cat' / '00.png']
  shutil.copytree(photos, tmp_path / 'copy')
  assert folders.open_folder(tmp_path / 'copy', check=False).digest == first.digest
  folders.open_folder(tmp_path / 'copy')  # which has been hashed, but not decoded
  assert len(read) == 13 + 2 * 12


def test_an_empty_name_of_the_cache_is_none_and_not_the_current_folder(photos, tmp_path, monkeypatch):
  for name, value in (('XDG_CACHE_HOME', ''), ('HOME', str(tmp_path / 'home'))):
    monkeypatch.setenv(name, value)
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  folders.open_folder(photos)
  assert list((tmp_path / 'home' / '.cache' / 'pagoda_jax' / 'folders').iterdir())
  assert not list((tmp_path / 'here').iterdir())


def test_a_damaged_cache_is_not_believed(photos, cache):
  (photos / 'cat' / 'text.png').write_text('no picture')
  expected = folders.open_folder(photos, max_unreadable=0.5)
  (path,) = cache.iterdir()
  whole = path.read_bytes()
  for place in range(0, len(whole), 61):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    found = folders.open_folder(photos, max_unreadable=0.5)
    assert (found.digest, len(found)) == (expected.digest, 12)
  path.write_bytes(whole[:-100])
  assert folders.open_folder(photos, max_unreadable=0.5).digest == expected.digest


def test_what_is_no_regular_file_is_named_and_never_waited_for(photos, capsys):
  os.mkfifo(photos / 'cat' / 'fifo.png')
  os.symlink('/dev/zero', photos / 'cat' / 'device.png')
  os.symlink('loop.png', photos / 'cat' / 'loop.png')
  os.symlink('nowhere.png', photos / 'cat' / 'dead.png')
  with socket.socket(socket.AF_UNIX) as bound:
    place = os.open(photos / 'cat', os.O_RDONLY)  # a socket's path may not be long
    bound.bind(f'/proc/self/fd/{place}/socket.png')
    os.close(place)
    assert len(folders.open_folder(photos, max_unreadable=0.5)) == 12
  printed = capsys.readouterr().err
  assert '5 of 17 pictures cannot be read and are left out' in printed
  for text in ('fifo.png: OSError: a FIFO', 'device.png: OSError: a device', 'socket.png: OSError: a socket',
               'loop.png: OSError: Too many levels', 'dead.png: FileNotFoundError'):
    assert f'/cat/{text}' in printed
  source = folders.open_folder(photos, max_unreadable=0.5)
  (photos / 'bird' / '00.png').unlink()
  os.mkfifo(photos / 'bird' / '00.png')  # also while training
  with pytest.raises(pictures.SourceError, match='00.png: OSError: a FIFO'):
    source[0]
  os.mkfifo(photos / 'captions.jsonl')
  with pytest.raises(pictures.SourceError, match='captions.jsonl: cannot be read .*FIFO'):
    folders.open_folder(photos)


def test_links_are_followed_and_every_folder_is_entered_once(photos, tmp_path, capsys):
  names = [entry.file for entry in folders.open_folder(photos).entries]
  assert 'link' not in capsys.readouterr().err
  outside = tmp_path / 'outside'
  (outside / 'deep').mkdir(parents=True)
  (outside / 'deep' / '0.png').write_bytes(make_data.png(make_data.pixels(20)))
  (outside / 'deep' / 'back').symlink_to(photos)
  (photos / 'cat' / 'itself').symlink_to('.')
  (photos / 'aaa').symlink_to('dog')  # before the folder itself in any order
  (photos / 'cat' / 'root').symlink_to('/')
  (photos / 'fox').symlink_to(outside)
  (photos / 'fox_again').symlink_to(outside)
  (photos / 'cat' / '99.png').symlink_to(outside / 'deep' / '0.png')
  source = folders.open_folder(photos)
  assert sorted(entry.file for entry in source.entries) == sorted([*names, 'cat/99.png', 'fox/deep/0.png'])
  assert source.class_names == (*make_data.CLASSES, 'fox')
  printed = capsys.readouterr().err
  assert '5 links to folders' in printed
  for name in ('aaa', 'cat/itself', 'cat/root', 'fox/deep/back', 'fox_again'):
    assert f'\n  {photos / name}\n' in printed + '\n'


def test_pictures_too_long_to_be_scaled_are_named(photos, tmp_path, capsys):
  rows = []
  for name, size, scaled in (('high', (1, 10_000_000), '512 x 5120000000 = 2621440000000'),
                             ('long', (60_000, 1), '30720000 x 512 = 15728640000')):
    image = Image.new('L', size)
    image.save(photos / 'cat' / f'{name}.png')
    rows.append(f'cat/{name}.png: {size[0]} x {size[1]} pixels, scaled to a short side of 512: {scaled} pixels, '
                'more than 67108864')
    with pytest.raises(pictures.SourceError, match=rows[-1]):  # as a stream reads it
      pictures.picture_of({'image': image, 'name': f'cat/{name}.png'}, 512, 3)
  fitting.settle(experiment(photos, resolution=512, max_unreadable=0.2))
  assert f'left out:\n  {photos}/{rows[0]}\n  {photos}/{rows[1]}' in capsys.readouterr().err
  shutil.rmtree(photos / 'bird')
  command = ['prepare', f'--source=folder:{photos}', f'--output={tmp_path / "out"}', '--workers=1', '--resolution=512']
  assert main.main(command) == 1
  assert f'2 of 10 pictures cannot be read, more than max_unreadable = 0.01 allows:\n  {rows[0]}\n  {rows[1]}' in (
    capsys.readouterr().err)


def test_a_picture_beyond_pillows_limit_is_named(photos, capsys):
  Image.new('1', (20_000, 10_000)).save(photos / 'cat' / 'bomb.png')
  with (photos / 'cat' / 'sparse.bmp').open('wb') as file:
    file.truncate(2**40)
  folders.open_folder(photos, max_unreadable=0.5)
  printed = capsys.readouterr().err
  assert 'cat/bomb.png: DecompressionBombError: Image size (200000000 pixels) exceeds limit' in printed
  assert 'cat/sparse.bmp: 1099511627776 bytes, more than 1073741824' in printed


def tiff(values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
  """A grey TIFF of one strip, little-endian; its tags as given."""
  height, width = values.shape[0], values.shape[1] * values.itemsize * 8 // bits
  tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 10 * 12 + 4), (277, 1),
          (278, height), (279, values.nbytes), (339, sample_format)]
  entries = b''.join(struct.pack('<HHII', tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
  return b'II' + struct.pack('<HIH', 42, 8, len(tags)) + entries + bytes(4) + values.tobytes()


def saved(image, image_format, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, image_format, **options)
  return buffer.getvalue()


def grey(dtype, value):
  return np.full((8, 8), value, dtype)


def palette_with_transparency():
  image = Image.new('P', (8, 8), 1)
  image.putpalette([0, 0, 0, 200, 30, 60])
  return saved(image, 'PNG', transparency=0)


SIXTEEN = Image.fromarray(grey(np.uint16, 40000))
FRAMES = [Image.new('RGB', (8, 8), color) for color in ((200, 30, 60), (0, 0, 0))]
RED, GREY = (200, 30, 60), (155, 155, 155)


@pytest.mark.parametrize('content, expected', [
  (saved(SIXTEEN, 'PNG'), GREY),
  (saved(SIXTEEN, 'TIFF', compression='tiff_lzw'), GREY),
  (saved(SIXTEEN, 'JPEG2000'), GREY),
  (tiff(grey('<u2', 40000), 16), GREY),
  (tiff(np.full((8, 12), 0xff, np.uint8), 12), (255, 255, 255)),
  (b'P5 8 8 1023\n' + grey('>u2', 1023).tobytes(), (255, 255, 255)),
  (tiff(grey(np.uint8, 0), 8, photometric=0), (255, 255, 255)),
  (saved(Image.new('1', (8, 8), 1), 'PNG'), (255, 255, 255)),
  (saved(Image.new('LA', (8, 8), (155, 255)), 'PNG'), GREY),
  (saved(Image.new('PA', (8, 8)), 'TIFF'), (255, 255, 255)),
  (palette_with_transparency(), RED),
  (saved(Image.new('CMYK', (8, 8), (55, 225, 195, 0)), 'TIFF'), RED),
  (saved(Image.new('CMYK', (8, 8), (55, 225, 195, 0)), 'JPEG'), RED),
  (saved(FRAMES[0].convert('YCbCr'), 'TIFF'), RED),
  (saved(Image.new('LAB', (8, 8), (155, 128, 128)), 'TIFF'), (148, 148, 148)),
  *[(saved(FRAMES[0], f, save_all=True, append_images=FRAMES[1:], **o), RED)
    for f, o in (('GIF', {}), ('PNG', {}), ('TIFF', {}), ('WEBP', {'lossless': True}))],
], ids=lambda value: '')
def test_every_kind_of_pixels_becomes_8_bits(tmp_path, content, expected):
  (tmp_path / 'picture').write_bytes(content)
  image = folders.open_folder(tmp_path)[0]['image']
  np.testing.assert_allclose(pictures.picture(image, 8, 3)[4, 4], expected, atol=2)
  grey_level = np.dot(expected, (0.299, 0.587, 0.114))
  np.testing.assert_allclose(pictures.picture(image, 8, 1)[4, 4], grey_level, atol=2)


@pytest.mark.parametrize('content, expected', [
  (tiff(grey('<f4', 0.5), 32, sample_format=3), 'floating-point values in a TIFF'),
  (tiff(grey('<u4', 2**32 - 1), 32), '32-bit or signed values in a TIFF'),
  (tiff(grey('<i4', 2**30), 32, sample_format=2), '32-bit or signed values in a TIFF'),
  (tiff(grey('<i2', 3000), 16, sample_format=2), '32-bit or signed values in a TIFF'),
  (tiff(grey('<u2', 3000), 16, photometric=0), '16-bit values in a TIFF'),
  (b'Pf 8 8 -1.0\n' + grey('<f4', 0.5).tobytes(), 'floating-point values in a PPM'),
  (saved(Image.new('RGB', (8, 8)), 'PNG', exif=b'Exif\0\0garbage'), 'SyntaxError: not a TIFF file'),
], ids=lambda value: '')
def test_pixels_of_unknown_range_are_refused_by_name(photos, content, expected, capsys):
  (photos / 'cat' / 'picture').write_bytes(content)
  assert len(folders.open_folder(photos, max_unreadable=0.1)) == 12
  assert f'left out:\n  {photos}/cat/picture: {expected}' in capsys.readouterr().err
  with pytest.raises(pictures.SourceError, match=f'cat/picture: {expected}'):
    folders.open_folder(photos, check=False)[8]


@pytest.mark.parametrize('content, expected', [
  (make_data.png(grey(np.uint16, 40000)), 156),
  (tiff(grey('<f4', 0.5), 32, sample_format=3), 'small_pictures/train/0: floating-point values in a TIFF'),
], ids=['16 bits', 'float'])
def test_pictures_of_tfds_are_read_or_refused_alike(tmp_path, monkeypatch, content, expected):
  monkeypatch.setattr(make_data, 'png', lambda _: content)
  make_data.write_tfds(tmp_path, 'small_pictures', 1)
  source = sources.open_tfds('small_pictures', str(tmp_path))
  if isinstance(expected, int):
    assert pictures.picture(source[0]['image'], 8, 3)[0, 0].tolist() == [expected] * 3
  else:
    with pytest.raises(pictures.SourceError, match=expected):
      source[0]


def test_captions_may_hold_any_text_and_a_byte_order_mark(tmp_path):
  texts = ['one\u2028line\u2029still\x85', 'ein Käfer 🪲', '']
  make_data.write_captions(tmp_path, [{'file': f'{i}.png', 'caption': ''} for i in range(3)])
  lines = [f'{{"file": "{i}.png", "caption": "{caption}"}}\r\n' for i, caption in enumerate(texts)]
  (tmp_path / 'captions.jsonl').write_bytes('\ufeff'.encode() + ''.join(lines).encode())
  source = folders.open_folder(tmp_path)
  assert [source[i]['caption'] for i in range(3)] == texts


def test_pictures_may_have_several_captions_of_two_kinds(tmp_path):
  rows = [{'file': '0.png', 'caption': 'zero', 'recaption': ['a picture of zero', '']},
          {'file': '1.png', 'caption': ['one', 'uno']}, {'file': '2.png', 'caption': 'two ' * 10_000},
          {'file': '3.png', 'caption': [], 'recaption': 'three anew'}]
  make_data.write_captions(tmp_path, rows)
  source = folders.open_folder(tmp_path)
  assert captions.of_record(source[0]) == [
    ('original', 'zero'), ('recaption', 'a picture of zero'), ('recaption', '')]
  assert [kind for kind, _ in captions.of_record(source[1])] == ['original'] * 2
  assert source[0]['caption'] == 'zero' and source[3]['caption'] == 'three anew'
  assert source[2]['caption'] == rows[2]['caption'] and 'captions' not in source[2]
  before = source.digest
  rows[0]['recaption'].reverse()
  make_data.write_captions(tmp_path, rows)
  assert folders.open_folder(tmp_path).digest != before


def test_the_digest_of_a_folder_with_one_caption_each_is_as_it_was(tmp_path):
  """Runs and prepared sets of before there were kinds of captions go on: their digest is of [file, label, caption]."""
  rows = [{'file': '0.png', 'caption': 'zero', 'label': 'x'}, {'file': '1.png', 'caption': ''}]
  make_data.write_captions(tmp_path, rows)
  shas = [hashlib.sha256((tmp_path / f'{i}.png').read_bytes()).hexdigest() for i in range(2)]
  rows = [['0.png', 'x', 'zero', shas[0]], ['1.png', None, '', shas[1]]]
  expected = hashlib.sha256(b''.join(json.dumps(row).encode() for row in rows)).hexdigest()
  assert folders.open_folder(tmp_path).digest == expected
  make_data.write_class_folders(tmp_path / 'classes', per_class=1)
  paths = sorted((tmp_path / 'classes').rglob('*.png'))
  rows = [[f'{path.parent.name}/00.png', path.parent.name, None, hashlib.sha256(path.read_bytes()).hexdigest()]
          for path in paths]
  expected = hashlib.sha256(b''.join(json.dumps(row).encode() for row in rows)).hexdigest()
  assert folders.open_folder(tmp_path / 'classes').digest == expected


def row(**keys) -> bytes:
  return make_data.json.dumps({'file': '0.png', 'caption': ''} | keys).encode()


@pytest.mark.parametrize('line, expected', [
  (b'{"file": "0.png", "caption": "\xe4"}', 'not UTF-8 (byte 0xe4'),
  (row().decode().encode('utf-16'), 'not UTF-8 (byte 0xff'),
  (row().decode().encode('utf-16-le'), 'must be an object'),
  (b'[' * 100_000, 'must be an object with "file", "caption" and, if need be, "recaption" and "label" (RecursionError'),
  (b'{"file": "0.png", "caption": ' + b'[' * 500 + b']' * 500 + b'}', '"caption" = [[[['),
  (b'["0.png"]', 'must be an object'),
  (row(caption=[]), '"caption" = []: must be a string, or a list of at least one'),
  (row(caption=['a', 7]), '"caption" = [\'a\', 7]: must be a string, or a list of strings'),
  (row(recaption=None), '"recaption" = None: must be a string, or a list of strings'),
  (row(recaption='\ud800'), '"caption" = \'\\ud800\': no Unicode text (character 0'),
  (row(caption='a' * 2**20 + 'b'), 'a caption of 1048577 characters; at most 1048576 are taken'),
  (row(caption=['a'] * 1001), '1001 captions; at most 1000'),
  (row(label=300_000_000), '"label" = 300000000: must be a class number from 0 to 1048575, or a name'),
  (row(label=10**4000), '"label" = 1000'),
  (b'{"file": "0.png", "caption": "", "label": 1' + b'0' * 5000 + b'}', 'must be an object'),
  (row(label=True), '"label" = True'),
  (row(label=1.5), '"label" = 1.5'),
  *[(row(file=file), f'"file" = {file!r}: must be the path of a picture in the folder')
    for file in ('/etc/motd', '../0.png', 'a/../../0.png', '', '.', '0\0.png', '\ud800.png')],
], ids=lambda value: '')
def test_a_line_of_captions_that_cannot_be_used_is_named(tmp_path, line, expected):
  make_data.write_captions(tmp_path, [{'file': '0.png', 'caption': 'zero'}])
  with (tmp_path / 'captions.jsonl').open('ab') as file:
    file.write(line + b'\n')
  with pytest.raises(pictures.SourceError) as error:
    folders.open_folder(tmp_path)
  message = str(error.value)
  assert message.startswith(f'{tmp_path}/captions.jsonl, line 2: {expected}')
  assert len(message.splitlines()) == 1 and len(message) < len(str(tmp_path)) + 300


def test_captions_of_a_file_that_is_a_dead_link_are_not_passed_over(tmp_path):
  make_data.write_class_folders(tmp_path)
  (tmp_path / listing.CAPTIONS).symlink_to('elsewhere.jsonl')
  with pytest.raises(pictures.SourceError, match='captions.jsonl: cannot be read .FileNotFoundError'):
    folders.open_folder(tmp_path)


def test_a_file_whose_name_is_no_unicode_is_prepared(tmp_path):
  (tmp_path / 'photos').mkdir()
  pathlib.Path(os.fsdecode(os.fsencode(tmp_path / 'photos') + b'/\xff.png')).write_bytes(
    make_data.png(make_data.pixels(0)))
  source = folders.open_folder(tmp_path / 'photos')
  prepare.prepare(source, tmp_path / 'out', records.Recipe((8,), 'png', 95), shard_size=4, workers=1, max_unreadable=0)
  assert records.open_records(tmp_path / 'out')[0]['name'] == source[0]['name'] == '\udcff.png'
