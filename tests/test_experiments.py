"""Every file of experiments/, in every variant that it names: valid, can be planned, and two steps of each phase run.

New files are found by themselves. A file's constant VARIANTS names what may stand after its colon ('' aside). Of phases
that grow, the first is run; all of them, and ELSEWHERE, and files with more than five phases, that grow on ImageNet or
that have captions (whose phases training/test_text_run.py runs), by `pytest -m slow`.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re

import captioned
import jax
import latent_tools
import make_data
import numpy as np
import published_files
import pytest
import step_tools
from ml_collections import ConfigDict
from runs import pagoda

from pagoda_jax import config as configs
from pagoda_jax import pipeline, validation
from pagoda_jax.config import ladder, spaces
from pagoda_jax.method import perception
from pagoda_jax.networks.frozen.vgg_lpips import LPIPS
from pagoda_jax.planning import plan
from pagoda_jax.runtime import topologies
from pagoda_jax.stages import models
from pagoda_jax.use import to_published
from pagoda_jax.weights import locate
from pagoda_jax.weights.convert import folders, formats

EXPERIMENTS = sorted((pathlib.Path(__file__).parent.parent / 'experiments').glob('*.py'))
BASE, WIDTH, LEVELS, BATCH = 8, 8, 2, 2
# Keys that hold resolutions, wherever they stand: numbers, or names of blocks such as dec_64_block1.
SIDES = ('base_resolution', 'resolution', 'attention_resolutions', 'remat', 'thaw')
# What other keys become, wherever they stand, if they are larger.
LEAST = {'blocks': 1, 'steps': 2, 'batch_size': BATCH, 'num_levels': 3, 'sample_levels': 2, 'num_blocks': 1,
         'warmup_steps': 0, 'microbatch': 1, 'every_steps': 1, 'samples': 8, 'holdout': 3, 'fsdp': 1,
         'channels_per_head': 4, 'adversarial_from': 0}


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# What other tests run all parts of: digits those of cli and training/test_guided_run.py, latents test_latent_run.py, an
# autoencoder test_autoencoder_run.py; EDM2, R3GAN's loss on DINO's tokens, projected distances and LPIPS those of
# networks/test_edm2.py and stages/test_projected.py; published teachers training/test_starts.py; sizes are left.
ELSEWHERE = {'mnist:', 'mnist:guided', 'latent_folder:', 'autoencoder_tiny:', 'imagenet_64_to_512:next,stop=64',
             'imagenet_64_to_512:published,stop=64,lpips', 'imagenet_32_to_512:published,stop=32',
             'folder:'}  # at 4 and 8 px it is run
CASES = [(path, variant) for path in EXPERIMENTS for variant in ('', *getattr(load(path), 'VARIANTS', ()))]


def takes_long(path, config):
  grows = any(phase.stage == 'grow' for phase in config.phases.values())
  return len(config.order) > 5 or configs.has_text(config) or (path.stem.startswith('imagenet') and grows)


def first_grown(config):
  """The phases but those that grow what has grown."""
  grown = [name for name in config.order if config.phases[name].stage == 'grow']
  return [name for name in config.order if name not in grown[1:]]


def cases():
  """(file, variant, phases to run)."""
  for path, variant in CASES:
    config, name = load(path).get_config(variant), f'{path.stem}:{variant}'
    whole, first = list(config.order), first_grown(config)
    if quick := name not in ELSEWHERE and not takes_long(path, config):
      yield pytest.param(path, variant, first, id=name)
      name += ' to its end'
    if not quick or first != whole:
      yield pytest.param(path, variant, whole, id=name, marks=pytest.mark.slow)


def scaled(value, factor):
  """Resolutions divided by a factor; those that become less than a pixel are left out of lists."""
  if isinstance(value, bool):
    return value
  if isinstance(value, int):
    return value // factor
  if isinstance(value, str):
    return re.sub(r'(?<=_)\d+(?=_)', lambda side: str(int(side[0]) // factor), value)
  return tuple(small for each in value if (small := scaled(each, factor)))


def every_key(group):
  for key, value in list(group.items()):
    if isinstance(value, ConfigDict):
      yield from every_key(value)
    else:
      yield group, key, value


def reduced(config, photos):
  """The experiment at 8 px and upwards, with the narrowest networks, on twelve pictures."""
  config = config.copy_and_resolve_references()
  factor, wide = max(1, config.base_resolution // BASE), config.network.channels
  with config.unlocked(), config.ignore_type():
    for group, key, value in every_key(config):
      if key in SIDES:
        group[key] = scaled(value, factor)
      elif key in LEAST and type(value) is int and value > LEAST[key]:
        group[key] = LEAST[key]
    config.data.update({'source': 'folder', 'path': str(photos), 'workers': 0})
    if spaces.is_latent(config):  # of factor 2
      config.data.update({'source': 'array_record', 'path': str(photos.parent / 'latents')})
      config.autoencoder.update({'weights': str(photos.parent / 'autoencoder'), 'widths': (4, 4), 'groups': 2})
    else:
      config.autoencoder.update({'widths': (4,) * len(config.autoencoder.widths), 'groups': 2})
    network = config.network
    if configs.has_text(config):
      config.data.update({'source': 'array_record', 'path': str(photos.parent / 'captioned' / 'data')})
      config.text.update({'encoder': 'captioned:embed_as_clip', 'length': captioned.LENGTH, 'width': captioned.WIDTH,
                          'pooled_width': captioned.CLIPS})
      network.update({'text_channels': 0, 'text_pool_heads': min(network.text_pool_heads, 2)})
    levels = min(LEVELS, len(network.channel_mult))
    network.update({'channels': WIDTH, 'stem_channels': 0, 'embed_channels': 0, 'num_heads': 0,
                    'channel_mult': network.channel_mult[:levels],
                    'decoder_channel_mult': network.decoder_channel_mult[:levels]})
    least, most = config.base_resolution >> (levels - 1), config.data.resolution * spaces.factor(config)
    config.remat = tuple(side for side in config.remat if least <= side <= most)
    narrow = lambda channels: max(4, WIDTH * channels // wide)
    for name, phase in config.phases.items():
      if phase.stage == 'grow':
        phase.channels = narrow(phase.channels)
        phase.init_levels = tuple((narrow(level[0]), min(level[1], 1), level[2]) for level in phase.init_levels)
        blocks = ladder.decoder_blocks(config, name)  # fewer than before
        known = {*blocks, *blocks.values(), *map(ladder.side_of, blocks)}
        phase.thaw = tuple(entry for entry in phase.thaw if entry in known)
      if 'discriminator' in phase:
        side = configs.phase_resolution(config, name) // 2 ** (phase.get('sizes', 1) - 1)
        phase.discriminator.channels = WIDTH
        phase.discriminator.scales = min(phase.discriminator.scales, (side // 4).bit_length())
        phase.reconstruction.scale_weights = phase.reconstruction.scale_weights[: side.bit_length()]
        if phase.discriminator.features == phase.reconstruction.distance == 'projected':
          # Of two feature networks each loss sees one: they are most of what is compiled. Both together judge where
          # the distance is LPIPS.
          phase.discriminator.backbones = phase.discriminator.backbones[:1]
          phase.reconstruction.backbones = phase.reconstruction.backbones[-1:]
  return config


def write_captioned(config, folder):
  """Twelve pictures with captions, at all sides that phases work at."""
  sides = sorted({configs.phase_resolution(config, name) for name in config.order})
  captioned.prepare(folder, 12, sides, config.text.encoder)


def write_latents(config, photos):
  """A random autoencoder, and the photos' latents of all sides that phases work at."""
  network = {key: config.autoencoder[key] for key in spaces.NETWORK_KEYS}
  latent_tools.write_autoencoder(config.autoencoder.weights, image_channels=config.data.channels, network=network)
  sides = sorted({configs.phase_resolution(config, name) for name in config.order})
  assert pagoda('prepare', f'--source=folder:{photos}', f'--output={config.data.path}',
                f'--resolutions={",".join(str(2 * side) for side in sides)}',
                f'--autoencoder={config.autoencoder.weights}') == 0


def write_starts(config, folder):
  """Random weights of the network that each `init_from` is to hold, in its place."""
  written = {}
  for name in config.order:
    phase = config.phases[name]
    if not phase.get('init_from'):
      continue
    if phase.init_from not in written:
      unet = models.make_unet(config, name)
      if phase.stage == 'grow':
        unet = unet.clone(grown=unet.grown[: len(phase.init_levels)])
      shapes = jax.eval_shape(lambda unet=unet: models.fresh_params(unet, jax.random.key(0)))
      rng = np.random.default_rng(0)
      params = jax.tree.map(lambda leaf, rng=rng: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)
      options = {field.name: getattr(unet, field.name) for field in dataclasses.fields(unet)
                 if field.name not in ('parent', 'name', 'dtype', 'remat')}
      written[phase.init_from] = str(folder / f'weights{len(written)}')
      file_format = to_published.FORMATS[config.network.form]
      folders.write_converted(written[phase.init_from], formats.Converted({'params': params}, options, file_format),
                              {'file': 'random', 'sha256': name})
    phase.init_from = written[phase.init_from]


@pytest.fixture
def published(tmp_path, monkeypatch):
  """Tiny feature networks in place of the published files, for pictures of 128 px."""
  vgg = {'widths': (4,) * 5, 'depths': (2, 2, 3, 3, 3)}
  # Of one block: R1 and R2 compile each several times, and stages/test_projected.py has one for each tap.
  dino = step_tools.TINY_BACKBONES[perception.DINO_NAME] | {'depth': 1}
  monkeypatch.setattr(perception, 'BACKBONES', step_tools.TINY_BACKBONES | {perception.DINO_NAME: dino})
  monkeypatch.setattr(perception, 'RESIZED', 128)
  monkeypatch.setattr(perception, 'PROJECTED_WIDTH', 4)
  monkeypatch.setattr(perception, 'lpips_network', lambda dtype: LPIPS(**vgg, dtype=dtype))
  monkeypatch.setattr(published_files, 'VGG', vgg)
  monkeypatch.setenv(locate.ENVIRONMENT, str(tmp_path / 'published'))
  published_files.unlocked(monkeypatch)
  monkeypatch.setattr(perception, 'CLIP_OPTIONS', step_tools.TINY_CLIP)
  published_files.write(tmp_path / 'published', *configs.BACKBONES, perception.DINO_NAME, perception.CLIP_NAME,
                        'vgg16', 'lpips_vgg')


@pytest.fixture
def one_device(monkeypatch):
  device = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *args: device)
  monkeypatch.setattr(jax, 'local_devices', lambda **kwargs: device)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


@pytest.mark.parametrize('path, variant', [pytest.param(*case, id=f'{case[0].stem}:{case[1]}') for case in CASES])
def test_is_valid(path, variant):
  config = load(path).get_config(variant)
  validation.validate(config, config.mesh.fsdp)


@pytest.mark.parametrize('path, variant, phases', cases())
def test_trains_two_steps_of_every_phase(path, variant, phases, published, one_device, tmp_path):
  full = load(path).get_config(variant)
  make_data.write_class_folders(tmp_path / 'photos')
  config = reduced(full, tmp_path / 'photos')
  write_starts(config, tmp_path)
  if spaces.is_latent(config):
    write_latents(config, tmp_path / 'photos')
  if configs.has_text(config):
    (tmp_path / 'captioned').mkdir()
    write_captioned(config, tmp_path / 'captioned')
  assert [config.phases[name].stage for name in config.order] == [full.phases[name].stage for name in full.order]
  pipeline.run_experiment(config, tmp_path / 'run', phases)
  for name in config.order:
    if name in phases and config.phases[name].stage in configs.TRAINED_STAGES:
      rows = [json.loads(line) for line in (tmp_path / 'run' / name / 'metrics.jsonl').read_text().splitlines()]
      assert rows[-1]['step'] == 2 and rows[-1]['skipped_in_a_row'] == 0
      assert all(np.isfinite(value) for row in rows for value in row.values())
    assert plan.phase_costs(config, name, topologies.parse('1xh100')).flops > 0


def test_what_is_no_variant_is_refused():
  for path in EXPERIMENTS:
    with pytest.raises(ValueError, match='nonsense'):
      validation.validate(load(path).get_config('nonsense'), 1)
