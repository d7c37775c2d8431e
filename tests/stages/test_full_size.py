"""experiments/imagenet_64_to_512.py at full size with random weights: `pytest -m full_size` (an hour, 8 GB of disk).

Up to 512 px (`published`): 19 minutes on two cores, 22 GiB of memory, and up to 61,500 memory mappings, of which Linux
allows a process 65,530: `sysctl -w vm.max_map_count=262144` before it, as XLA crashes where there are no more.
"""

import importlib.util
import json
import pathlib
import resource
import tempfile
import time

import jax
import numpy as np
import published_files
import pytest
from PIL import Image

from pagoda_jax import config as configs
from pagoda_jax import main, pipeline
from pagoda_jax.networks.unet import GUIDED_ADM
from pagoda_jax.weights.convert import formats, torch_files

ROOT = pathlib.Path(__file__).parents[2]
TEACHER = GUIDED_ADM | {'channels': 192, 'stem_channels': 192, 'num_classes': 1000}


def write_pictures(folder, resolution):
  """Two pictures of noise, of two classes."""
  for index in range(2):
    pixels = np.random.default_rng(index).integers(0, 256, (resolution, resolution, 3), np.uint8)
    (folder / f'class{index}').mkdir(parents=True)
    Image.fromarray(pixels).save(folder / f'class{index}' / 'picture.png')


def experiment(variant):
  path = ROOT / 'experiments' / 'imagenet_64_to_512.py'
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


@pytest.fixture
def folder():
  """Gone afterwards, unlike tmp_path: it takes 8 GB."""
  with tempfile.TemporaryDirectory() as path:
    yield pathlib.Path(path)


@pytest.fixture
def one_device(monkeypatch):
  """The tests' eight virtual devices would hold eight copies."""
  device = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: device)
  monkeypatch.setattr(jax, 'local_devices', lambda: device)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


@pytest.mark.full_size
@pytest.mark.timeout(7200)
@pytest.mark.parametrize('variant', ['published,stop=64', 'published,stop=64,lpips', 'published'])
def test_imagenet_runs_from_files_of_published_size(variant, folder, one_device, monkeypatch):
  published_files.unlocked(monkeypatch)
  names = ('tf_efficientnet_lite0', 'deit_base_distilled_patch16_224', 'in_embeddings_tf_efficientnet_lite0')
  published_files.write(folder / 'weights', *names, 'vgg16', 'lpips_vgg')
  teacher = folder / 'weights' / 'edm_imagenet64_ema.pt'
  leaves = formats.FORMATS['pagoda'].leaves(TEACHER)
  torch_files.write_safetensors(teacher, published_files.random_tensors(leaves))
  flags = [f'--weights_dir={folder / "weights"}', f'--output={folder / "teacher"}']
  assert main.main(['convert', '--input=edm_imagenet64_ema', *flags]) == 0

  config = experiment(variant)
  write_pictures(folder / 'pictures', config.data.resolution)
  config.weights_dir = str(folder / 'weights')
  config.precision = 'float32'
  config.data.update({'source': 'folder', 'path': str(folder / 'pictures'), 'workers': 0, 'mirror': False})
  config.log.update({'samples': 1, 'every_steps': 1})
  for phase in config.phases.values():
    if phase.get('init_from'):
      phase.init_from = str(folder / 'teacher')
    if 'steps' in phase:  # plain gradient descent: RAdam's moments alone would be 2.4 GB
      phase.update({'batch_size': 1, 'steps': 1, 'optimizer': configs.optimizer(name='sgd')})
  config.phases.invert.update({'batch_size': 2, 'num_levels': 3})
  config.phases.distill.steps = 2
  for phase in config.order:
    start = time.monotonic()
    pipeline.run_experiment(config, folder / 'run', (phase,))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f'{variant}, {phase}: {time.monotonic() - start:.0f} s, peak memory {peak:.1f} GiB')
    if phase != 'invert':
      lines = (folder / 'run' / phase / 'metrics.jsonl').read_text().splitlines()
      metrics = [json.loads(line) for line in lines]
      print(metrics)
      assert metrics[-1]['step'] == config.phases[phase].steps
      assert all(np.isfinite(value) for line in metrics for value in line.values())
      assert metrics[-1]['loss'] > 0 and metrics[-1]['skipped_in_a_row'] == 0
