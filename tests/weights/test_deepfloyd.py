"""DeepFloyd IF as a teacher: its published sizes, the config that says them, what a generator begins as."""

import json

import jax
import numpy as np
import pytest
import step_tools
import tiny

from pagoda_jax import config as c
from pagoda_jax import validation
from pagoda_jax.networks.unet import DEEPFLOYD, UNet
from pagoda_jax.stages import architectures, models
from pagoda_jax.training import claims, first_state, starts, workdir
from pagoda_jax.use import exported
from pagoda_jax.use import generator as generators
from pagoda_jax.weights.convert import deepfloyd
from pagoda_jax.weights.convert.mapping import ConversionError


def published(channels):
  return DEEPFLOYD | {
    'resolution': 64, 'image_channels': 3, 'channels': channels, 'channel_mult': (1, 2, 3, 4),
    'stem_channels': channels, 'embed_channels': 4 * channels, 'num_blocks': 3, 'channels_per_head': 64,
    'attention_resolutions': (32, 16, 8), 'text_width': 4096, 'text_attention': 'added_kv',
    'text_channels': 4 * channels, 'text_pool_heads': 64}


@pytest.mark.parametrize('channels, billions', [(704, 4.3), (320, 0.9), (192, 0.4)], ids=['XL', 'L', 'M'])
def test_the_published_sizes_are_read_back_and_said_in_a_config(channels, billions):
  leaves = deepfloyd.leaves(published(channels))
  theirs = {name: np.broadcast_to(np.float32(0), leaf.shape) for leaf in leaves for name in leaf.names}
  assert sum(leaf.size for leaf in theirs.values()) / 1e9 == pytest.approx(billions, abs=0.05)
  assert deepfloyd.options(theirs) == published(channels)
  unet = UNet(**published(channels))
  assert {leaf.ours.split('/')[0] for leaf in leaves} == set(
    jax.eval_shape(lambda: models.fresh_params(unet, jax.random.key(0))))
  # The lines that `pagoda convert` prints make the same network.
  config = c.experiment()
  exec('\n'.join(architectures.config_lines(published(channels))), {'config': config, 'c': c})
  config.text.encoder = 't5:weights/t5_xxl'
  c.add_phase(config, 'teacher', c.teacher(init_from='weights/if'))
  config.data.update({'source': 'array_record', 'path': 'data/photos', 'resolution': 64})
  validation.validate(config)
  assert architectures.differences(unet, models.make_unet(config, 'teacher')) == []


def test_another_architecture_is_shown():
  theirs = {name: np.zeros(leaf.shape, np.float32) for leaf in deepfloyd.leaves(published(32)) for name in leaf.names}
  plain = theirs | {'conv_out.weight': np.zeros((3, 32, 3, 3), np.float32)}
  with pytest.raises(ConversionError, match='gives 3 channels for pictures of 3: not noise and its variance'):
    deepfloyd.options(plain)
  with pytest.raises(ConversionError, match='no levels above the input'):
    deepfloyd.leaves(published(32) | {'grown': ((32, 1, False),)})


def test_a_generator_begins_as_the_teacher_but_grey_and_its_teacher_draws_for_named_encoders(monkeypatch, tmp_path):
  config = tiny.get_config('text')
  config.guidance.law, config.guidance.recaptions.law, config.phases.distill.guide = 'none', '', ''
  config.network.update({'form': 'deepfloyd', 'text_attention': 'added_kv', 'text_pool_heads': 2})
  networks = models.build(config, 'distill')
  teacher = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32),
                         jax.eval_shape(lambda: models.fresh_params(networks.unet, jax.random.key(0))))
  monkeypatch.setattr(starts, 'read_start', lambda *_: (teacher, 'there'))
  monkeypatch.setattr(models, 'init_discriminator', lambda *_: {'params': {'w': np.zeros(3, np.float32)}})
  begun, said = first_state.init_generator(config, '', 'distill', networks, {}, jax.random.key(0))
  assert said == 'starts from there, its last convolution as zeros'
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(begun.params['out_conv']))
  assert all(np.all(leaf == 1) for name in begun.params if name != 'out_conv'
             for leaf in jax.tree.leaves(begun.params[name]))
  # Another run's generator makes pictures already, and stays what it is; another run's teacher does not.
  config.phases.distill.update({'teacher': '', 'init_from': str(tmp_path)})
  monkeypatch.setattr(starts.checkpoints, 'newest_step', lambda _: 1)
  for stage, kept in (('distill', True), ('teacher', False)):
    claims.write(tmp_path, stage, {}, json.loads(workdir.as_json(config)))
    begun, _ = first_state.init_generator(config, '', 'distill', networks, {}, jax.random.key(0))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(begun.params['out_conv'])) == kept
  # Converted weights may be either's: growth, which would begin as noise of a teacher's, says what it takes them for.
  monkeypatch.setattr(first_state.grow, 'grown_params', lambda *_: (begun.params, {}, 'all of it'))
  monkeypatch.setattr(starts.folders, 'is_converted', lambda _: True)
  for start, init_from, told in (('distill', '', False), ('', str(tmp_path), True)):
    config.phases.grow_16.update({'start': start, 'init_from': init_from})
    _, said = first_state.init_generator(config, '', 'grow_16', networks, {}, jax.random.key(0))
    assert ("taken for a generator's" in said) == told
  draw = jax.eval_shape(lambda: networks.generate(teacher, np.zeros((2, 8, 8, 1)), models.any_cond(networks.unet, 2)))
  assert draw.shape == (2, 8, 8, 1)

  config.text.encoder = architectures.UNKNOWN_ENCODER
  found = generators.Generator(config, 'teacher', 'weights', {}, lambda: teacher)
  with pytest.raises(ValueError, match='which encoder of captions it knows is not in the weights: give text_encoder'):
    found.texts(['a'], 1)
  assert generators.with_text_encoder(found, 'captioned:embed').config.text.encoder == 'captioned:embed'
  labelled = generators.Generator(step_tools.CONFIG, 'teacher', 'weights', {}, dict)
  with pytest.raises(ValueError, match='was not trained with captions'):
    generators.with_text_encoder(labelled, 'ngrams')


def test_a_converted_teacher_can_be_guided_also_once_it_is_exported(tmp_path, monkeypatch):
  described = {'format': 'deepfloyd', 'options': published(64), 'source': {'file': 'if.safetensors'}}
  (tmp_path / generators.folders.DESCRIPTION).touch()
  monkeypatch.setattr(generators.folders, 'read_description', lambda folder: described)
  converted = generators.of_weights(tmp_path, 'teacher')
  assert converted.strengths(7.0, 2).tolist() == [7, 7]
  config = architectures.experiment_of(converted.networks.unet, 'teacher', c.teacher())
  exported.set_up(config, 'teacher', exported._description(converted, {}))
  generators.check_guidance(config, 'teacher', (7.0,))


def test_discriminators_see_the_captions_vector_where_the_network_pools_tokens():
  """Of another width than a token's, as CLIP's beside T5's tokens."""
  config = tiny.get_config('text')
  config.network.update({'form': 'deepfloyd', 'text_attention': 'added_kv', 'text_pool_heads': 2})
  assert config.text.width != config.text.pooled_width
  networks, cond = models.build(config, 'distill'), {'omega': np.ones(2), 'text_pooled': np.ones((2, 5))}

  def logits(rng):
    images = jax.numpy.zeros((2, 8, 8, 1))
    maps = networks.features({}, images, networks.feature_draws(rng, 2))
    return networks.judge(models.init_discriminator(networks, {}, 8, rng), maps, cond)[0]

  assert jax.eval_shape(logits, jax.random.key(0)).shape[0] == 2
