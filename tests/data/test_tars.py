"""WebDataset tars: read in any dialect, in one order, through an index that is made once; what is odd is named."""

import gzip
import json
import os
import tarfile

import make_data
import numpy as np
import pytest

from pagoda_jax import config as configs
from pagoda_jax.data import captions, pictures, prepare, records, sources, tar_members, tars
from pagoda_jax.data import stream as streams

FORMATS = {'ustar': tarfile.USTAR_FORMAT, 'gnu': tarfile.GNU_FORMAT, 'pax': tarfile.PAX_FORMAT}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'pagoda_jax' / 'tars'


def shows(source, index, seed):
  """Whether picture `index` of a source shows pixels(seed)."""
  found = pictures.picture(source[index]['image'], 8, 3)
  return np.array_equal(found, pictures.picture(make_data.Image.fromarray(make_data.pixels(seed)), 8, 3))


@pytest.mark.parametrize('format', FORMATS)
def test_samples_of_every_dialect_are_read_in_one_order(format, tmp_path):
  """Long and foreign names, folders, a leading ./; txt, json and cls; endings in capitals; others are passed over."""
  long = 'a' * 90 + '/' + 'b' * 60 if format == 'ustar' else 'ü' * 150 + '/' + '🦊' * 60
  row = {'caption': ['one', 'one more'], 'recaption': 'one anew', 'url': None}
  make_data.write_tar(tmp_path / 'b.tar', [
    ('./x.y/1.json', json.dumps(row).encode()), ('./x.y/1.png', make_data.png(make_data.pixels(1))),
    ('2.txt', '\ufeffzwei Käfer\n'.encode()), ('./x.y/1.txt', b'one\n'), ('2.seg.png', b'no picture'),
    ('2.JPG', make_data.png(make_data.pixels(2))), ('2.cls', b'7\n'), ('.hidden.png', b''),
  ], FORMATS[format])
  make_data.write_tar(tmp_path / 'a.tar', [
    (f'{long}.png', make_data.png(make_data.pixels(0))), (f'{long}.txt', b'')], FORMATS[format])
  with tarfile.open(tmp_path / 'a.tar', 'a') as tar:
    folder = tarfile.TarInfo('empty')
    folder.type = tarfile.DIRTYPE
    tar.addfile(folder)
  source = tars.open_tars(tmp_path)
  assert [source[i]['name'] for i in range(3)] == [f'a.tar/{long}', 'b.tar/x.y/1', 'b.tar/2']
  assert all(shows(source, i, i) for i in range(3))
  with pytest.raises(IndexError, match='picture -1: there are 0 to 2'):
    source[-1]  # was what the first tar has where the last one has its last picture
  assert captions.of_record(source[0]) == [('original', '')]
  assert captions.of_record(source[1]) == [('original', 'one'), ('original', 'one more'), ('recaption', 'one anew')]
  assert source[2]['caption'] == 'zwei Käfer' and source[2]['label'] == 7 and len(source.class_names) == 8
  only = tars.open_tars(str(tmp_path / 'b*.tar'))
  assert len(only) == 2 and shows(only, 1, 2) and only.digest != source.digest
  (tmp_path / 'moved').mkdir()
  for name in ('a.tar', 'b.tar'):
    (tmp_path / name).rename(tmp_path / 'moved' / name)
  assert tars.open_tars(tmp_path / 'moved').digest == source.digest


def test_an_index_is_made_once_and_anew_after_a_change(tmp_path, cache, monkeypatch):
  make_data.write_tar(tmp_path / 'a.tar', make_data.samples(3))
  made, members = [], tar_members.members
  monkeypatch.setattr(tar_members, 'members', lambda file, path: made.append(path) or members(file, path))
  first = tars.open_tars(tmp_path)
  assert len(made) == 1 and tars.open_tars(tmp_path).digest == first.digest and len(made) == 1
  tars.open_tars(tmp_path, check=False)
  assert len(made) == 1
  file, = cache.iterdir()
  file.write_bytes(file.read_bytes().replace(b'"001"', b'"009"'))
  assert tars.open_tars(tmp_path)[1]['name'] == 'a.tar/001' and len(made) == 2
  status = os.stat(tmp_path / 'a.tar')
  make_data.write_tar(tmp_path / 'a.tar', make_data.samples(3, first=3))  # of the same size
  os.utime(tmp_path / 'a.tar', ns=(status.st_atime_ns, status.st_mtime_ns))
  assert os.stat(tmp_path / 'a.tar').st_size == status.st_size
  changed = tars.open_tars(tmp_path)
  assert len(made) == 3 and changed.digest != first.digest and shows(changed, 0, 3)


@pytest.mark.parametrize('replace', [False, True])
def test_a_tar_that_changes_after_it_was_indexed_stops_the_reading(replace, tmp_path):
  path = tmp_path / 'a.tar'
  make_data.write_tar(path, make_data.samples(40))
  source = tars.open_tars(tmp_path)
  assert shows(source, 0, 0)
  if replace:
    make_data.write_tar(tmp_path / 'new.tar', make_data.samples(40, first=1))
    os.replace(tmp_path / 'new.tar', path)
  else:
    with path.open('r+b') as file:
      file.seek(1000)
      file.write(b'\0')
  with pytest.raises(OSError, match='a.tar: changed since it was indexed'):
    source[39]
  with pytest.raises(OSError, match='a.tar: changed since it was indexed'):  # not listed as an unreadable picture
    prepare.prepare(source, tmp_path / 'out', records.Recipe((8,), 'png', 95), 8, 1, 1.0)


def test_a_tar_is_found_whatever_its_name_would_mean_as_a_pattern(tmp_path):
  path = tmp_path / 'set [1]' / 'a*.tar'
  make_data.write_tar(path, make_data.samples(4))
  assert len(tars.open_tars(path.parent)) == len(tars.open_tars(path)) == 4


def test_a_tar_that_is_gone_stops_the_reading(tmp_path):
  for number in range(2):
    make_data.write_tar(tmp_path / 'tars' / f'{number}.tar', make_data.samples(4, first=4 * number))
  source = tars.open_tars(tmp_path / 'tars')
  (tmp_path / 'tars' / '1.tar').unlink()
  assert shows(source, 3, 3)
  with pytest.raises(OSError, match='1.tar: cannot be read any more .*No such file.*; start again when it is back'):
    source[4]
  with pytest.raises(OSError, match='1.tar: cannot be read any more'):  # its pictures are not left out as unreadable
    prepare.prepare(source, tmp_path / 'out', records.Recipe((8,), 'png', 95), 8, 1, 1.0)


def test_a_tar_cut_short_anywhere_is_named(tmp_path):
  """At every block and within each: never are there merely fewer samples."""
  path = tmp_path / 'a.tar'
  make_data.write_tar(path, make_data.samples(2))
  whole = path.read_bytes()
  end = len(whole.rstrip(b'\0'))
  end = -(-end // 512) * 512 + 1024
  for at in [*range(0, end, 512), *range(1, end, 487)]:
    path.write_bytes(whole[:at])
    with pytest.raises(pictures.SourceError, match='a.tar: .*(cut short|no tar: it has no end)'):
      tars.open_tars(tmp_path, check=False)
  for at in (end, len(whole)):
    path.write_bytes(whole[:at])
    assert len(tars.open_tars(tmp_path)) == 2


def test_a_changed_byte_of_a_header_is_named_and_one_of_a_picture_changes_the_digest(tmp_path):
  path = tmp_path / 'a.tar'
  make_data.write_tar(path, make_data.samples(1))
  whole, digest = path.read_bytes(), tars.open_tars(tmp_path).digest
  second = whole.index(b'000.txt')
  for at in [*range(0, 265, 4), *range(second, second + 265, 9)]:
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(pictures.SourceError, match='no header of a member at byte|not UTF-8'):
      tars.open_tars(tmp_path, check=False)
  path.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
  assert tars.open_tars(tmp_path, check=False).digest != digest


PNG = make_data.png(make_data.pixels(0))


def member(name, type=tarfile.REGTYPE, size=0, **more):
  info = tarfile.TarInfo(name)
  info.type, info.size = type, size
  for key, value in more.items():
    setattr(info, key, value)
  return info


@pytest.mark.parametrize('members, said', [
  ([('../0.png', PNG)], r"member '../0.png' at byte 0: a path outside; it must be relative"),
  ([('a/../../0.png', PNG)], "member 'a/../../0.png' at byte 0: a path outside"),
  ([('/etc/0.png', PNG)], "member '/etc/0.png' at byte 0: a path outside"),
  ([('0.png', PNG), ('0.png', PNG)], "member '0.png' at byte .*: twice in it, also at byte 0"),
  ([('0.png', PNG), ('0.jpg', PNG)], "member '0.jpg' .*: a second picture of one sample, beside '0.png'"),
  ([('0.txt', b'a'), ('0.TXT', b'b')], "a second txt of one sample, beside '0.txt'"),
  ([('0.txt', b'a'), ('0.json', b'{}')], 'a.tar: 0: no picture beside .json, .txt; it needs one of .jpg, .jpeg, .png'),
  ([('0.png', PNG), ('1.png', PNG), ('1.txt', b'')], 'a.tar: 0: no caption, and others have one .1 of 2 have none'),
  ([('0.png', PNG), ('0.txt', b'caf\xe9')], r'a.tar: 0.txt: not UTF-8 \(byte 0xe9'),
  ([('0.png', PNG), ('0.json', b'{"caption": "\xe9"}')], r'a.tar: 0.json: not UTF-8 \(byte 0xe9'),
  ([('0.png', PNG), ('0.json', b'["a"]')], 'a.tar: 0.json: must be a JSON object'),
  ([('0.png', PNG), ('0.json', b'[' * 100_000)], r'a.tar: 0.json: must be a JSON object \(RecursionError'),
  ([('0.png', PNG), ('0.json', b'{"caption": 7}')], '0.json: "caption" = 7: must be a string, or a list of strings'),
  ([('0.png', PNG), ('0.json', b'{"caption": "\\ud800"}')], '0.json: "caption" = .* no Unicode text'),
  ([('0.png', PNG), ('0.json', b'{"caption": "a", "label": -1}')], '0.json: "label" = -1: must be a class number'),
  ([('0.png', PNG), ('0.cls', b'cat')], "0.cls: 'cat': must be a class number from 0 to 1048575"),
  ([('0.png', PNG), ('0.cls', b'9999999')], '0.cls: "label" = 9999999: must be a class number'),
  ([('0.png', PNG), ('0.cls', b'3'), ('0.json', b'{"label": 4}')], '0: the label 4 in its .json, and 3 in its .cls'),
  ([('0.png', PNG), ('0.txt', b'a' * (2**20 + 1))], '0.txt: a caption of 1048577 characters'),
  ([('0.npy', b'')], r'no pictures in 1 tars \(.jpg, .jpeg, .png, .webp\)'),
  ([], 'no pictures in 1 tars'),
  ([member('0.png', tarfile.SYMTYPE, linkname='1.png')], "'0.png' at byte 0: a symbolic link, and only regular files"),
  ([member('0.png', tarfile.LNKTYPE, linkname='/etc/passwd')], 'a hard link, and only regular files are taken'),
  ([member('0.png', tarfile.FIFOTYPE)], 'a FIFO, and only regular files are taken'),
  ([member('0.png', tarfile.GNUTYPE_SPARSE)], 'a sparse file, and only regular files are taken'),
  ([member('0.png', pax_headers={'GNU.sparse.major': '1'})], 'a sparse file, and only regular files are taken'),
  ([member('0.png', b'V')], "of type b'V', which is not known"),
  ([member('0.png', pax_headers={'path': '../' + 'x' * 200 + '.png'})], r"member '../xxx.*: a path outside"),
  ([member('0.png', pax_headers={'size': 'many'})], "a damaged pax header: size = 'many'"),
  ([member('0.png', pax_headers={'size': '99999999'})], 'cut short: its 99999999 bytes end after the file'),
])
def test_what_is_odd_in_a_tar_is_named(members, said, tmp_path):
  path = tmp_path / 'a.tar'
  with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as tar:
    for one in members:
      info = one if isinstance(one, tarfile.TarInfo) else member(one[0], size=len(one[1]))
      tar.addfile(info, None if one is info else make_data.io.BytesIO(one[1]))
  with pytest.raises(pictures.SourceError, match=said) as error:
    tars.open_tars(tmp_path)
  assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1
  assert len(str(error.value)) < len(str(path)) + 400


def damaged_pax(content):
  return content.replace(b' path=', b'9path=')


@pytest.mark.parametrize('write, said', [
  (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), r'a.tar: compressed \(gzip\).*gunzip -k'),
  (lambda path: path.write_bytes(path.read_bytes() * 2), 'the archive ends at byte .*something follows.*tar -A'),
  (lambda path: path.write_bytes(b'hello'), 'no tar: it has no end of an archive'),
  (lambda path: path.write_bytes(b'hello' * 1000), 'no tar, or a damaged one: no header of a member at byte 0'),
  (lambda path: path.write_bytes(b''), 'no tar'),
  (lambda path: path.write_bytes(damaged_pax(path.read_bytes())), 'a damaged pax header at its byte 0'),
  (lambda path: (path.unlink(), os.mkfifo(path)), 'a.tar: cannot be read .OSError: a FIFO'),
  (lambda path: (path.unlink(), path.mkdir()), 'a.tar: cannot be read'),
  (lambda path: path.rename(path.with_suffix('.tar.gz')), 'a.tar.gz: compressed'),
  (lambda path: path.unlink(), 'no .tar there; must be a folder of them, one, or a pattern'),
  (lambda path: path.rename(path.with_name('b\udce9.tar')), None),
])
def test_what_is_no_tar_is_named(write, said, tmp_path):
  path = tmp_path / 'a.tar'
  make_data.write_tar(path, [('ü' + name, content) for name, content in make_data.samples(1)], tarfile.PAX_FORMAT)
  write(path)
  if said is None:
    assert len(tars.open_tars(tmp_path)) == 1
    return
  with pytest.raises(pictures.SourceError, match=said):
    tars.open_tars(tmp_path)


def test_unreadable_pictures_are_listed_and_left_out_up_to_a_share(tmp_path, capsys):
  members = make_data.samples(4)
  members[2] = ('001.png', members[2][1][:40])
  make_data.write_tar(tmp_path / 'a.tar', members)
  source = tars.open_tars(tmp_path, max_unreadable=0.5)
  assert '1 of 4 pictures cannot be read and are left out' in (said := capsys.readouterr().err)
  assert f'{tmp_path}/a.tar: 001: ' in said
  assert [source[i]['name'] for i in range(3)] == ['a.tar/000', 'a.tar/002', 'a.tar/003'] and len(source) == 3
  with pytest.raises(pictures.SourceError, match='1 of 4 pictures cannot be read, more than max_unreadable = 0.01'):
    tars.open_tars(tmp_path)
  with pytest.raises(pictures.SourceError, match='a.tar: 001: '):
    tars.open_tars(tmp_path, check=False)[1]


def test_tars_give_the_batches_of_a_folder_and_of_what_prepare_made_of_them(tmp_path):
  """Whatever the workers; a stream goes on where it was."""
  make_data.write_tar(tmp_path / 'tars' / '1.tar', make_data.samples(9))
  make_data.write_tar(tmp_path / 'tars' / '2.tar', make_data.samples(4, first=9))
  rows = [{'file': f'{i:03d}.png', 'caption': f'picture {i}'} for i in range(13)]
  make_data.write_captions(tmp_path / 'folder', rows)
  source = prepare.open_input(f'webdataset:{tmp_path / "tars"}')
  manifest = prepare.prepare(source, tmp_path / 'records', records.Recipe((8, 16), 'png', 95), 4, 1, 0.0)
  assert manifest['count'] == 13
  assert records.open_records(tmp_path / 'records')[12]['caption'] == 'picture 12'

  def batches(kind, path, workers=0):
    data = configs.experiment().data
    data.update({'source': kind, 'path': str(tmp_path / path), 'resolution': 16, 'workers': workers, 'holdout': 2})
    return streams.Stream(data, 8, seed=3).batches(8)

  wanted = batches('folder', 'folder')
  expected = [next(wanted) for _ in range(4)]
  for kind, path, workers in (('webdataset', 'tars', 0), ('webdataset', 'tars', 2), ('array_record', 'records', 0)):
    found = batches(kind, path, workers)
    first = [next(found) for _ in range(2)]
    going_on = batches(kind, path, workers)
    going_on.set_state(found.get_state())
    for batch, other in zip(expected, [*first, next(going_on), next(going_on)]):
      np.testing.assert_array_equal(batch['image'], other['image'])
      np.testing.assert_array_equal(batch['key'], other['key'])
    found.close()
    going_on.close()
  data = configs.experiment().data
  data.update({'source': 'webdataset', 'path': str(tmp_path / 'tars')})
  assert isinstance(sources.open_source(data), tars.TarSource)
