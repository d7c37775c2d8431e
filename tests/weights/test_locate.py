"""The registry of published files: found, checked, explained when missing."""

import dataclasses
import hashlib
import json
import os

import pytest
from absl import flags

from pagoda_jax.cli import weights as command
from pagoda_jax.weights import locate, published

CONTENT = b'some weights'
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A weights folder of its own, none of the user's."""
  monkeypatch.delenv(locate.ENVIRONMENT, raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  (tmp_path / 'weights').mkdir()
  return tmp_path / 'weights'


@pytest.fixture
def register(monkeypatch):
  """Replaces the registry by one entry."""

  def replace(**fields):
    plain = published.Published('small', 'a small file', 'https://example.org/page', 'small.pt', 'MIT')
    monkeypatch.setattr(published, 'REGISTRY', (dataclasses.replace(plain, **fields),))

  return replace


def run(*args, weights_dir=None):
  fv = flags.FlagValues()
  fv.set_gnu_getopt(True)  # as main does
  command.define_flags(fv)
  rest = fv(['pagoda', *args] + ([f'--weights_dir={weights_dir}'] if weights_dir else []))[1:]
  return command.run(fv, rest)


def test_registry_is_sound():
  names = [entry.name for entry in published.REGISTRY]
  assert len(set(names)) == len(names)
  assert len({entry.file_name for entry in published.REGISTRY}) == len(names)
  formats = {'', 'edm', 'edm2', 'pagoda', 'timm', 'dinov2', 'lpips', 'inception', 'diffusers', 'stylegan_xl',
             'deepfloyd', 'clip', 'clip_image', 't5', 'convnext', 'siglip'}
  for entry in published.REGISTRY:
    assert entry.page.startswith('https://') and (not entry.url or entry.url.startswith('https://'))
    assert entry.licence and entry.what and entry.format in formats
    assert all(digit in '0123456789abcdef' for digit in entry.sha256) and len(entry.sha256) in (0, 8, 64)
    if len(entry.sha256) == 8:  # only what the publisher itself wrote into the name
      assert entry.sha256 in entry.file_name
    if 'NC' in entry.licence or 'non-commercial' in entry.licence:
      assert entry.non_commercial


def test_folders_in_order_of_preference(tmp_path, monkeypatch):
  monkeypatch.setenv(locate.ENVIRONMENT, 'gs://bucket/weights')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  expected = ['/given', 'gs://bucket/weights', f'{tmp_path}/pagoda_jax/weights']
  assert [str(folder) for folder in locate.folders('/given')] == expected
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', '/home/someone')
  assert str(locate.folders()[-1]) == '/home/someone/.cache/pagoda_jax/weights'


def test_missing_file_says_where_from_and_where_to(folder):
  with pytest.raises(FileNotFoundError) as error:
    locate.find('edm_imagenet64_ema', folder)
  for said in ('https://openaipublic.blob.core.windows.net/consistency/edm_imagenet64_ema.pt', 'model card'):
    assert said in str(error.value)
  assert f'put it at {folder}/edm_imagenet64_ema.pt' in str(error.value)


@pytest.mark.timeout(60)
def test_pipe_in_its_place_is_not_waited_for(folder, register):
  register()
  os.mkfifo(folder / 'small.pt')
  with pytest.raises(locate.MissingWeightsError, match='small is not there'):
    locate.find('small', folder)


def test_unknown_name_suggests_near_ones():
  with pytest.raises(ValueError, match='edm_imagenet64_emma.*did you mean edm_imagenet64_ema'):
    locate.find('edm_imagenet64_emma')


def test_found_in_the_environment_folder_and_in_the_cache(folder, register, monkeypatch, tmp_path):
  register(sha256=DIGEST, size=len(CONTENT))
  cache = tmp_path / 'cache' / 'pagoda_jax' / 'weights'
  cache.mkdir(parents=True)
  (cache / 'small.pt').write_bytes(CONTENT)
  assert str(locate.find('small')) == str(cache / 'small.pt')
  (folder / 'small.pt').write_bytes(CONTENT)
  monkeypatch.setenv(locate.ENVIRONMENT, str(folder))
  assert str(locate.find('small')) == str(folder / 'small.pt')


@pytest.mark.parametrize('known', [DIGEST, DIGEST[:8]])
def test_wrong_content_is_an_error(known, folder, register):
  register(sha256=known)
  (folder / 'small.pt').write_bytes(CONTENT)
  assert locate.find('small', folder)
  (folder / 'small.pt').write_bytes(b'Some weights')
  os.utime(folder / 'small.pt', (0, 0))  # the record is of another time, so it is not trusted
  with pytest.raises(locate.WrongDigestError, match=f'published is {known}. Download it again'):
    locate.find('small', folder)


def test_truncated_download_is_named_by_its_size(folder, register):
  register(size=100)
  (folder / 'small.pt').write_bytes(CONTENT)
  with pytest.raises(locate.WrongDigestError, match='12 bytes of 100'):
    locate.find('small', folder)


def test_unknown_digest_is_recorded_on_first_use_and_held_to(folder, register):
  register()
  (folder / 'small.pt').write_bytes(CONTENT)
  locate.find('small', folder)
  assert json.loads((folder / 'small.pt.sha256.json').read_text())['sha256'] == DIGEST
  (folder / 'small.pt').write_bytes(b'other weights')
  with pytest.raises(locate.WrongDigestError, match=f'was {DIGEST} at first use.*delete small.pt.sha256.json'):
    locate.find('small', folder)


def test_digest_is_computed_once_and_a_broken_record_is_ignored(folder, register, monkeypatch):
  register(sha256=DIGEST)
  (folder / 'small.pt').write_bytes(CONTENT)
  (folder / 'small.pt.sha256.json').write_text('{"sha2')
  locate.find('small', folder)
  monkeypatch.setattr(locate, 'file_digest', lambda path: pytest.fail('computed again'))
  locate.find('small', folder)


def test_non_commercial_licence_is_shown_when_loaded(folder, register, caplog):
  register(non_commercial=True, licence='CC BY-NC-SA 4.0')
  (folder / 'small.pt').write_bytes(CONTENT)
  with caplog.at_level('WARNING'):
    locate.find('small', folder)
  assert 'CC BY-NC-SA 4.0' in caplog.text


def test_list_shows_what_is_here(folder, capsys):
  (folder / 'lpips_vgg.pth').write_bytes(b'')
  assert run('list', weights_dir=folder) == 0
  lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
  assert lines['lpips_vgg'].split()[1] == 'yes' and lines['vgg16'].split()[1:3] == ['-', '527.8']
  assert str(folder) in lines['Looked']


def test_path_and_check(folder, register, capsys):
  register(sha256=DIGEST)
  assert run('check', weights_dir=folder) == 0  # nothing there, nothing wrong
  assert run('check', 'small', weights_dir=folder) == 1
  (folder / 'small.pt').write_bytes(CONTENT)
  assert run('path', 'small', weights_dir=folder) == 0
  assert run('check', weights_dir=folder) == 0
  out = capsys.readouterr().out
  assert f'{folder}/small.pt\n' in out and f'{DIGEST} (as published)' in out
  (folder / 'small.pt').write_bytes(b'damaged')
  assert run('check', weights_dir=folder) == 1
  assert 'WRONG  small' in capsys.readouterr().out


def test_check_computes_the_digest_anew(folder, register):
  """A bit that rotted on disk leaves size and time as they were."""
  register(sha256=DIGEST)
  path = folder / 'small.pt'
  path.write_bytes(CONTENT)
  locate.find('small', folder)
  before = path.stat()
  path.write_bytes(CONTENT.replace(b's', b'S'))
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert run('check', weights_dir=folder) == 1


@pytest.mark.parametrize('args', [('frobnicate',), ('path',), ('path', 'a', 'b')])
def test_other_words_are_errors(args):
  with pytest.raises(ValueError, match='use list, check'):
    run(*args)
