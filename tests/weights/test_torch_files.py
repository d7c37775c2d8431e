"""Reading PyTorch weight files: every format, every wrapper, and whatever can be wrong with a file."""

import json
import pickle
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_writers as writers

from pagoda_jax.weights.convert import state_dicts, torch_files
from pagoda_jax.weights.convert.torch_files import WeightsFileError


def some_tensors():
  rng = np.random.default_rng(0)
  return {
    'conv.weight': rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
    'conv.bias': rng.standard_normal(4).astype(np.float16),
    'norm.weight': rng.standard_normal(4).astype(ml_dtypes.bfloat16),
    'norm.count': np.array(7, np.int64),
    'empty': np.zeros((0, 3), np.float32),
  }


def save_as(suffix, path, content):
  """Writes the content in the format that the suffix stands for."""
  if suffix == 'zip.pt':
    writers.save_zip(path, content)
  elif suffix == 'legacy.pth':
    with open(path, 'wb') as file:
      writers.save_legacy(file, content)
  elif suffix == 'safetensors':
    torch_files.write_safetensors(path, content)
  elif suffix == 'npz':
    np.savez(path, **{name: value for name, value in content.items() if value.dtype.kind != 'V'})
  elif suffix == 'pkl':
    writers.save_pickle(path, content)
  return path


FORMATS = ('zip.pt', 'legacy.pth', 'safetensors', 'npz', 'pkl')


def assert_same(actual, expected):
  assert list(actual) == list(expected)
  for name, value in expected.items():
    assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
    assert actual[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize('suffix', FORMATS)
def test_every_format_gives_the_tensors_bit_for_bit(suffix, tmp_path):
  expected = some_tensors()
  if suffix == 'npz':  # NumPy's own format has no name for bfloat16
    del expected['norm.weight']
  assert_same(torch_files.read(save_as(suffix, tmp_path / f'f.{suffix}', expected)).tensors, expected)


@pytest.mark.parametrize('suffix', FORMATS)
def test_the_content_decides_and_not_the_suffix(suffix, tmp_path):
  expected = {'w': np.arange(3, dtype=np.float32)}
  path = save_as(suffix, tmp_path / f'f.{suffix}', expected)
  assert_same(torch_files.read(path.rename(tmp_path / 'weights.model')).tensors, expected)


def test_compressed_members_are_read(tmp_path):
  expected = {'w': np.arange(300, dtype=np.float32)}
  writers.save_zip(tmp_path / 'a.pt', expected, compression=zipfile.ZIP_DEFLATED)
  np.savez_compressed(tmp_path / 'b.npz', **expected)
  for name in ('a.pt', 'b.npz'):
    assert_same(torch_files.read(tmp_path / name).tensors, expected)


def test_stored_numbers_are_views_of_the_file(tmp_path):
  """No copy, so that memory holds the weights once, after conversion."""
  for suffix in ('zip.pt', 'legacy.pth', 'safetensors', 'npz'):
    path = save_as(suffix, tmp_path / f'f.{suffix}', {'w': np.arange(8, dtype=np.float32)})
    value = torch_files.read(path).tensors['w']
    assert not value.flags.owndata and not value.flags.writeable


def test_strided_and_shared_tensors(tmp_path):
  base = np.arange(12, dtype=np.float32)
  content = {'transposed': writers.View(base, 0, (4, 3), (1, 4)), 'part': writers.View(base, 5, (2, 2), (4, 1))}
  writers.save_zip(tmp_path / 'a.pt', content)
  tensors = torch_files.read(tmp_path / 'a.pt').tensors
  np.testing.assert_array_equal(tensors['transposed'], base.reshape(3, 4).T)
  np.testing.assert_array_equal(tensors['part'], [[5, 6], [9, 10]])


def test_parameters_of_the_oldest_files(tmp_path):
  """torchvision's VGG16 is of 2017."""
  expected = {'w': np.arange(6, dtype=np.float32).reshape(2, 3)}
  with open(tmp_path / 'old.pth', 'wb') as file:
    writers.save_legacy(file, {name: writers.OldParameter(value) for name, value in expected.items()})
  assert_same(torch_files.read(tmp_path / 'old.pth').tensors, expected)


def test_tensors_of_a_subclass(tmp_path):
  w = np.arange(6, dtype=np.float32)
  parameter = (writers.Global('torch._utils', '_rebuild_parameter'), writers.Global('mine', 'P'), (w, True, {}), {})
  content = {'w': writers.Reduced(writers.Global('torch._tensor', '_rebuild_from_type_v2'), parameter)}
  writers.save_pickle(tmp_path / 'a.pkl', content)
  assert_same(torch_files.read(tmp_path / 'a.pkl').tensors, {'w': w})


def test_files_that_are_not_from_torch_save(tmp_path):
  (tmp_path / 'pointer.pt').write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n')
  (tmp_path / 'page.pt').write_bytes(b'<!DOCTYPE html><html>quota exceeded</html>')
  (tmp_path / 'empty.pt').write_bytes(b'')
  (tmp_path / 'text.txt').write_bytes(b'hello, this is some text')
  for name, said in (('pointer', 'LFS pointer'), ('page', 'web page'), ('empty', 'empty')):
    with pytest.raises(WeightsFileError, match=said):
      torch_files.read(tmp_path / f'{name}.pt')
  with pytest.raises(WeightsFileError, match='unknown content.*safetensors'):
    torch_files.read(tmp_path / 'text.txt')
  with zipfile.ZipFile(tmp_path / 'photos.zip', 'w') as archive:
    archive.writestr('a.jpg', b'')
  with pytest.raises(WeightsFileError, match='without weights.*a.jpg'):
    torch_files.read(tmp_path / 'photos.zip')


def test_missing_file_and_directory(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file.*pagoda weights list'):
    torch_files.read(tmp_path / 'absent.pt')
  save_as('zip.pt', tmp_path / 'inside.pt', {'w': np.ones(1, np.float32)})
  with pytest.raises(WeightsFileError, match='is a directory.*inside.pt'):
    torch_files.read(tmp_path)


def test_torchscript_and_whole_modules_in_pt_are_named(tmp_path):
  writers.save_zip(tmp_path / 'module.pt', writers.module({'w': np.ones(1, np.float32)}))
  with pytest.raises(WeightsFileError, match='somewhere.networks.Net.*state_dict'):
    torch_files.read(tmp_path / 'module.pt')
  with zipfile.ZipFile(tmp_path / 'module.pt', 'a') as archive:
    archive.writestr('archive/constants.pkl', b'')
  with pytest.raises(WeightsFileError, match='TorchScript'):
    torch_files.read(tmp_path / 'module.pt')


# Network objects in .pkl


def test_network_object_becomes_its_state_dict(tmp_path):
  one, two, three = (np.full(2, n, np.float32) for n in (1, 2, 3))
  child = writers.module({'weight': two, 'bias': None}, buffers={'mean': three, 'scratch': one}, unsaved=['scratch'])
  network = writers.module({'weight': one}, children={'layer': child})
  writers.save_pickle(tmp_path / 'n.pkl', {'ema': network, 'kimg': 5})
  file = torch_files.read(tmp_path / 'n.pkl')
  assert_same(file.tensors, {'weight': one, 'layer.weight': two, 'layer.mean': three})
  assert file.taken == "key 'ema'"


def test_nvidia_persistence_is_read_without_its_source_code(tmp_path):
  """Its module_src here is `raise SystemExit`, which running it would do."""
  inner = writers.persistent_module({'w': np.ones(2, np.float32)}, cls='DhariwalUNet')
  network = writers.persistent_module(children={'model': inner}, cls='EDMPrecond')
  writers.save_pickle(tmp_path / 'n.pkl', {'ema': network, 'dataset_kwargs': {'path': 'x'}})
  file = torch_files.read(tmp_path / 'n.pkl')
  assert_same(file.tensors, {'model.w': np.ones(2, np.float32)})


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_tensors_in_a_plain_pickle(protocol, tmp_path):
  expected = some_tensors() | {'tied': some_tensors()['conv.weight']}
  writers.save_pickle(tmp_path / 'a.pkl', expected, protocol)
  assert_same(torch_files.read(tmp_path / 'a.pkl').tensors, expected)


def test_dictionaries_of_every_kind(tmp_path):
  ordered, w = writers.Global('collections', 'OrderedDict'), np.ones(2, np.float32)
  python_2 = writers.Reduced(ordered, ([['w', w], ['b', w]],))
  counter = writers.Reduced(writers.Global('collections', 'Counter'), ({'w': w},))
  for name, content in {'python_2': python_2, 'counter': counter}.items():
    writers.save_pickle(tmp_path / name, content)
    assert 'w' in torch_files.read(tmp_path / name).tensors
  # Other keys than text, those of optimisers and tokenizers for one, are left out.
  writers.save_pickle(tmp_path / 'keys', {'w': w, 0: w, ('a', ('b',)): w, None: {'w': w}})
  assert_same(torch_files.read(tmp_path / 'keys').tensors, {'w': w})


# Which state dict of a checkpoint


def checkpoint(*keys):
  return {key: {'w': np.full(2, n, np.float32)} for n, key in enumerate(keys)} | {'step': 3, 'optimizer': {'state': {}}}


@pytest.mark.parametrize(
  'keys, taken',
  [
    (('model', 'ema'), 'ema'),
    (('state_dict', 'state_dict_ema'), 'state_dict_ema'),
    (('G', 'D', 'G_ema'), 'G_ema'),
    (('model', 'ema_0.9999', 'ema_0.999'), 'ema_0.9999'),
    (('model_ema', 'ema'), 'ema'),
    (('discriminator', 'generator'), 'generator'),
    (('anything',), 'anything'),
  ],
)
def test_average_before_raw_weights_and_said(keys, taken, tmp_path):
  content = checkpoint(*keys)
  writers.save_zip(tmp_path / 'c.pt', content)
  file = torch_files.read(tmp_path / 'c.pt')
  assert file.key == taken and taken in file.taken
  assert all(key in file.taken for key in keys)  # the others are named as left aside
  np.testing.assert_array_equal(file.tensors['w'], content[taken]['w'])


def test_key_chooses_also_nested(tmp_path):
  writers.save_zip(tmp_path / 'c.pt', checkpoint('model', 'ema') | {'more': checkpoint('inner')})
  assert torch_files.read(tmp_path / 'c.pt', key='model').key == 'model'
  assert torch_files.read(tmp_path / 'c.pt', key='more/inner').key == 'more/inner'
  with pytest.raises(WeightsFileError, match="no tensors under key 'EMA'; there are: 'model', 'ema', 'more/inner'"):
    torch_files.read(tmp_path / 'c.pt', key='EMA')


def test_undecidable_and_tensorless_checkpoints(tmp_path):
  writers.save_zip(tmp_path / 'a.pt', checkpoint('left', 'right'))
  with pytest.raises(WeightsFileError, match="choose one with key=: 'left', 'right'"):
    torch_files.read(tmp_path / 'a.pt')
  writers.save_zip(tmp_path / 'b.pt', {'epoch': 3, 'args': 'x'})
  with pytest.raises(WeightsFileError, match="no named tensors.*'epoch', 'args'"):
    torch_files.read(tmp_path / 'b.pt')


def test_settings_beside_the_weights_do_no_harm(tmp_path):
  settings = writers.Built(writers.Global('argparse', 'Namespace'), {'lr': 0.1})
  writers.save_zip(tmp_path / 'c.pt', checkpoint('model') | {'args': settings})
  assert torch_files.read(tmp_path / 'c.pt').key == 'model'


@pytest.mark.parametrize(
  'names, expected',
  [
    (('module.a', 'module.b.c'), ('a', 'b.c')),
    (('_orig_mod.module.a', '_orig_mod.module.b'), ('a', 'b')),
    (('module._orig_mod.a', 'module._orig_mod.b'), ('a', 'b')),
    (('net._orig_mod.a', 'head.b'), ('net.a', 'head.b')),
    (('module.a', 'b'), ('module.a', 'b')),
    (('model.a', 'model.b'), ('model.a', 'model.b')),  # EDM's own names begin so
  ],
)
def test_prefixes_of_wrappers(names, expected):
  tensors = {name: np.zeros(1) for name in names}
  assert tuple(state_dicts.without_wrappers(tensors)) == expected


def test_model_prefix_goes_on_request_only():
  tensors = {'model.a': np.zeros(1), 'model.b': np.zeros(1)}
  assert list(state_dicts.without_wrappers(tensors, strip=('model.',))) == ['a', 'b']
  with pytest.raises(WeightsFileError, match='same name'):
    state_dicts.without_wrappers({'_orig_mod.a': np.zeros(1), 'a': np.zeros(1)})


# Number types


def test_half_precision_becomes_float32_without_loss():
  tensors = some_tensors() | {'double': np.ones(2)}
  out, changed = state_dicts.as_float32(tensors)
  assert changed == {'float16': ['conv.bias'], 'bfloat16': ['norm.weight'], 'float64': ['double']}
  for name in ('conv.bias', 'norm.weight'):
    assert out[name].dtype == np.float32
    np.testing.assert_array_equal(out[name].astype(tensors[name].dtype), tensors[name])
  assert out['norm.count'].dtype == np.int64


def test_tensors_with_nan_or_infinity_are_named():
  tensors = some_tensors()
  tensors['norm.weight'][1] = np.inf
  tensors['conv.bias'][0] = np.nan
  assert state_dicts.non_finite_names(tensors) == ['conv.bias', 'norm.weight']


# Writing


def test_safetensors_are_written_at_once_or_not_at_all(tmp_path):
  path = tmp_path / 'made' / 'w.safetensors'
  torch_files.write_safetensors(path, {'w': np.ones(2, np.float32)}, {'format': 'pt'})
  before = path.read_bytes()
  with pytest.raises(ValueError, match='broken.*no type for object'):
    torch_files.write_safetensors(path, {'broken': np.array([None])})

  assert path.read_bytes() == before
  assert [child.name for child in path.parent.iterdir()] == ['w.safetensors']


def test_safetensors_header_is_aligned_as_the_format_asks(tmp_path):
  torch_files.write_safetensors(tmp_path / 'w.safetensors', {'w': np.ones((2, 0), np.float32)}, {'format': 'pt'})
  data = (tmp_path / 'w.safetensors').read_bytes()
  (length,) = struct.unpack('<Q', data[:8])
  assert length % 8 == 0 and data[8 : 8 + length].rstrip(b' ').endswith(b'}')
  assert torch_files.read(tmp_path / 'w.safetensors').tensors['w'].shape == (2, 0)


def test_safetensors_agree_with_their_own_package(tmp_path):
  expected = {name: value for name, value in some_tensors().items() if value.dtype != ml_dtypes.bfloat16}
  torch_files.write_safetensors(tmp_path / 'ours.safetensors', expected)
  theirs = safetensors.numpy.load_file(tmp_path / 'ours.safetensors')
  assert_same({name: theirs[name] for name in expected}, expected)
  safetensors.numpy.save_file(expected, tmp_path / 'theirs.safetensors')
  ours = torch_files.read(tmp_path / 'theirs.safetensors').tensors
  assert_same({name: ours[name] for name in expected}, expected)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_numpy_arrays_in_a_pickle(protocol, tmp_path):
  expected = {
    'w': np.arange(6, dtype=np.float32).reshape(2, 3),
    'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    'swapped': np.arange(3, dtype='>f4'),
    'scalar': np.float64(2.5),
  }
  (tmp_path / 'a.pkl').write_bytes(pickle.dumps({'params': expected}, protocol))
  tensors = torch_files.read(tmp_path / 'a.pkl').tensors
  for name, value in expected.items():
    np.testing.assert_array_equal(tensors[name], value)


# Damage


@pytest.mark.parametrize('suffix', FORMATS)
def test_truncated_anywhere_is_an_error_that_says_so(suffix, tmp_path):
  path = save_as(suffix, tmp_path / f'f.{suffix}', {'w': np.arange(9, dtype=np.float32)})
  whole = path.read_bytes()
  for end in range(len(whole)):
    path.write_bytes(whole[:end])
    with pytest.raises(WeightsFileError) as error:
      torch_files.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize('suffix', ('zip.pt', 'npz'))
def test_flipped_bit_in_the_numbers_is_found(suffix, tmp_path):
  path = save_as(suffix, tmp_path / f'f.{suffix}', {'w': np.arange(99, dtype=np.float32)})
  damaged = bytearray(path.read_bytes())
  position = damaged.index(np.float32(57).tobytes())
  damaged[position] ^= 1
  path.write_bytes(damaged)
  with pytest.raises(WeightsFileError, match='corrupted.*checksum'):
    torch_files.read(path)


@pytest.mark.parametrize('suffix', FORMATS)
def test_random_damage_gives_no_other_error(suffix, tmp_path):
  path = save_as(suffix, tmp_path / f'f.{suffix}', {'w': np.arange(20, dtype=np.float32), 'v': np.ones(3, np.float32)})
  whole = path.read_bytes()
  rng = random.Random(0)
  for _ in range(200):
    damaged = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
      damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    path.write_bytes(damaged)
    try:
      torch_files.read(path)
    except WeightsFileError:
      pass


def test_tensor_that_reaches_beyond_its_storage(tmp_path):
  base = np.arange(4, dtype=np.float32)
  forged = [((5,), (1,), 0), ((2,), (1,), 3), ((2,), (-1,), 1), ((-1,), (1,), 0), ((1,), (1,), -1)]
  forged += [((1000, 1000), (0, 4), 0), ((2, 2), (1,), 0)]
  for shape, strides, offset in forged:
    writers.save_zip(tmp_path / 'a.pt', {'w': writers.View(base, offset, shape, strides)})
    with pytest.raises(WeightsFileError, match='than its storage|beyond its storage|are no counts|corrupted'):
      torch_files.read(tmp_path / 'a.pt')


def write_in_parts(folder, tensors):
  """Two files of tensors, and their index as transformers writes it."""
  names, parts = list(tensors), ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')
  weight_map = {name: parts[place % 2] for place, name in enumerate(names)}
  for part in parts:
    torch_files.write_safetensors(folder / part, {name: tensors[name] for name in names if weight_map[name] == part})
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': weight_map}))
  return index


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
  expected = some_tensors()
  index = write_in_parts(tmp_path, expected)
  found = torch_files.read(index).tensors
  assert_same({name: found[name] for name in expected}, expected)
  digests = [torch_files.digest(index)]
  part = tmp_path / 'model-00002-of-00002.safetensors'
  part.write_bytes(part.read_bytes()[:-1] + b'\x7f')
  digests.append(torch_files.digest(index))
  index.write_text(index.read_text() + '\n')
  assert len({*digests, torch_files.digest(index)}) == 3
  with pytest.raises(WeightsFileError, match='is a directory.*model.safetensors.index.json'):
    torch_files.read(tmp_path)


@pytest.mark.parametrize('change, said', [
  (lambda said: said['weight_map'].pop('conv.bias'), 'conv.bias is not in the index'),
  (lambda said: said['weight_map'].update({'more': 'model-00001-of-00002.safetensors'}), 'more is in the index alone'),
  (lambda said: said['weight_map'].update({'conv.bias': 'lost.safetensors'}), 'lost.safetensors: no such file'),
  (lambda said: said['weight_map'].update({'conv.bias': '../other.safetensors'}), 'is no name of a file beside it'),
  (lambda said: said['weight_map'].update({'conv.bias': '/etc/passwd'}), 'is no name of a file beside it'),
  (lambda said: said['weight_map'].update({'conv.bias': 7}), 'no index of weights, or a damaged one'),
  (lambda said: said['weight_map'].update({'conv.bias': 'a.index.json'}), 'names no files of weights'),
  (lambda said: said.update(weight_map={}), 'names no files of weights'),
  (lambda said: said.pop('weight_map'), 'no index of weights, or a damaged one'),
])
def test_faults_of_an_index_are_named(change, said, tmp_path):
  index = write_in_parts(tmp_path, some_tensors())
  content = json.loads(index.read_text())
  change(content)
  index.write_text(json.dumps(content))
  with pytest.raises((WeightsFileError, FileNotFoundError), match=said):
    torch_files.read(index)
