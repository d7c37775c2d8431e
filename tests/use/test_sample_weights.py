"""`pagoda sample --weights`: a converted network draws what the phase that it comes from draws."""

import numpy as np
import published_files
import pytest
from runs import pagoda
from test_to_published import trained_phase

from pagoda_jax.networks.unet import GUIDED_ADM
from pagoda_jax.runtime.files import write_sealed
from pagoda_jax.use import publish
from pagoda_jax.weights import published
from pagoda_jax.weights.convert import folders, formats, torch_files

GROWN = GUIDED_ADM | dict(resolution=8, channels=32, channel_mult=(1,), num_blocks=1, attention_resolutions=(),
                          stem_channels=32, num_classes=3, grown=((32, 2, False), (16, 2, True)))


def converted(folder, phase, *flags):
  """The folder of a trained phase that was written as a published file and converted."""
  assert pagoda('convert', f'--input={phase}', f'--output={folder}/w.safetensors', '--to=torch') == 0
  assert pagoda('convert', f'--input={folder}/w.safetensors', f'--output={folder}/converted', *flags) == 0
  return folder / 'converted'


def random_folder(folder, name='w.safetensors'):
  """A converted generator of random weights, from 8 to 32 px, under a file's name."""
  content = published_files.random_tensors(formats.FORMATS['pagoda'].leaves(GROWN))
  torch_files.write_safetensors(folder / 'w.safetensors', content)
  assert pagoda('convert', f'--input={folder}/w.safetensors', f'--output={folder}/converted', '--resolution=8') == 0
  described = folders.read_description(folder / 'converted')
  described['source']['file'] = name
  write_sealed(folder / 'converted' / folders.DESCRIPTION, described)
  return folder / 'converted'


def drawn(path, *flags):
  assert pagoda('sample', f'--out={path}', '--num_images=5', '--seed=7', '--labels=3,1', *flags) == 0
  with np.load(path) as arrays:
    return dict(arrays)


@pytest.mark.parametrize('form, name, kind, asked', [
  ('edm', 'teacher', ('--kind=teacher', '--levels=18'), ()),
  ('guided', 'distill', ('--kind=generator',), ('--resolution=8',)),
  ('guided', 'grow_16', (), ('--resolution=8', '--grown_num_blocks=1')),
])
def test_a_converted_network_draws_what_its_phase_draws(form, name, kind, asked, tmp_path, capsys):
  phase, _ = trained_phase(tmp_path / 'run', form, name)
  folder = converted(tmp_path, phase, *asked)
  assert f'pagoda sample --weights={folder}' in capsys.readouterr().out
  if kind:  # one architecture serves both: nothing tells
    assert pagoda('sample', f'--weights={folder}') == 1
    assert 'give --kind=teacher or --kind=generator' in capsys.readouterr().err
  found = drawn(tmp_path / 'weights.npz', f'--weights={folder}', *kind)
  expected = drawn(tmp_path / 'phase.npz', f'--workdir={tmp_path / "run"}', f'--phase={name}')
  assert found['arr_1'].tolist() == [3, 1, 3, 1, 3] and 2 < found['arr_0'].std() < 120
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value)


def test_a_card_of_weights_names_no_folder_of_this_machine(tmp_path):
  folder = random_folder(tmp_path, 'a file.pt')
  assert pagoda('publish', f'--weights={folder}', '--kind=generator', f'--output={tmp_path / "hub"}') == 0
  for path in (tmp_path / 'hub').glob('*'):
    assert str(tmp_path).encode() not in path.read_bytes(), path
  card = (tmp_path / 'hub' / publish.CARD).read_text()
  assert 'from weights: file a file.pt, sha256 ' in card and 'Trained with' not in card


def test_levels_and_grids_of_a_grown_generator(tmp_path, capsys):
  folder = random_folder(tmp_path)
  assert pagoda('sample', f'--weights={folder}', f'--out={tmp_path / "grid.png"}', '--num_images=4') == 0
  assert f'4 images of 32 px, generator of {folder}' in capsys.readouterr().out
  assert pagoda('sample', f'--weights={folder}', '--levels=5') == 1
  assert '--levels=5: ' in capsys.readouterr().err
  assert pagoda('sample', f'--weights={folder}', '--kind=teacher') == 1
  assert 'holds a generator, with levels above its input of 8 px' in capsys.readouterr().err
  assert pagoda('sample', f'--weights={folder}', '--labels=3') == 1
  assert '3 is no class; there are 0 to 2' in capsys.readouterr().err


@pytest.mark.parametrize('entry', [entry for entry in published.REGISTRY if entry.format in formats.UNET_FORMATS],
                         ids=lambda entry: entry.name)
def test_what_a_published_network_is_is_known(entry):
  assert entry.kind == ('generator' if 'generator' in entry.name else 'teacher')
  assert bool(entry.resolution) == (entry.format in ('pagoda', 'deepfloyd'))  # EDM's own files tell
  assert published.by_file_name(entry.file_name) is entry


def test_what_cannot_be_drawn_from_is_said(tmp_path, capsys):
  def refused(*flags):
    assert pagoda('sample', *flags) in (1, 2)
    return capsys.readouterr().err

  phase, _ = trained_phase(tmp_path / 'run', 'guided', 'teacher')
  assert 'a phase of a run, not converted weights; give --workdir and --phase' in refused(f'--weights={phase}')
  assert 'no converted.json there' in refused(f'--weights={tmp_path / "nowhere"}')
  (tmp_path / 'clip').mkdir()
  (tmp_path / 'clip' / 'config.json').write_text('{"model_type": "clip"}')
  assert 'no converted.json there' in refused(f'--weights={tmp_path / "clip"}')
  assert 'give --workdir=RUN or --weights=FOLDER' in refused()
  folder = random_folder(tmp_path, 'pagoda_generator_64_to_128.pt')
  assert 'not both' in refused(f'--weights={folder}', f'--workdir={tmp_path / "run"}')
  assert '--phase=teacher: is of --workdir' in refused(f'--weights={folder}', '--phase=teacher')
  assert '--levels=3: is of --weights' in refused(f'--workdir={tmp_path / "run"}', '--levels=3')
  assert 'not an integer in the range [2, 10000]' in refused(f'--weights={folder}', '--levels=1')
  file = next(path for path in (folder / 'variables').rglob('*') if path.is_file() and path.stat().st_size > 1000)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  assert f'{folder}: damaged: ' in refused(f'--weights={folder}')
  described = folders.read_description(folder)
  write_sealed(folder / folders.DESCRIPTION, described | {'format': 'timm'})
  assert 'weights of format timm draw no images' in refused(f'--weights={folder}')
  (folder / folders.DESCRIPTION).write_text('{}')
  assert 'damaged' in refused(f'--weights={folder}')
