"""The embedded digits, preprocessing, and a stream whose order depends on nothing but its seed and position."""

import tracemalloc
import types

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from pagoda_jax.data import pictures
from pagoda_jax.data import stream as streams
from pagoda_jax.runtime import sharding


@pytest.fixture(scope='module')
def settings():
  return tiny.get_config().data


def test_the_held_out_digits_are_never_trained_on(settings):
  train, labels = streams.epoch_pictures(settings, 32, 'train')
  held, held_labels = streams.epoch_pictures(settings, 32, 'holdout')
  assert (len(train), len(held)) == (4500, 500)
  assert np.bincount(labels).tolist() == [450] * 10 and np.bincount(held_labels).tolist() == [50] * 10
  assert not {image.tobytes() for image in train} & {image.tobytes() for image in held}


@pytest.mark.parametrize('size', [(70, 50), (50, 70), (64, 64), (33, 200)])
def test_picture_is_the_centre_of_the_halved_image(size):
  # A horizontal ramp stays a ramp through halving, bicubic resizing and cropping.
  width, height = size
  ramp = np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)
  out = pictures.picture(Image.fromarray(ramp), 16, 1)[..., 0].astype(float)
  scale = min(size) / 16
  centres = (width - 16 * scale) / 2 + scale * (np.arange(16) + 0.5) - 0.5
  # Odd sides lose a pixel in a halving, which shifts the content by less than two grey levels a pixel.
  np.testing.assert_allclose(out[8], centres * 255 / (width - 1), atol=2 * 255 / width + 2)


def test_mirror_images_are_keys_of_their_own():
  keys = streams.Keys(3, mirror=True)
  assert list(keys) == [(0, False), (0, True), (1, False), (1, True), (2, False), (2, True)]
  with pytest.raises(IndexError, match='key -1: the keys are 0 to 5'):
    keys[-1]  # would be the last picture's
  image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
  np.testing.assert_array_equal(pictures.picture(image, 4, 1)[:, ::-1], pictures.picture(image, 4, 1, flip=True))


class FakeStore:
  """Noise whose value is its key."""

  def __len__(self):
    return 4500

  def pair(self, key):
    return {'noise': np.full((8, 8, 1), key, np.float32)}


HALVES = [np.arange(4), np.arange(4, 8)]
INTERLEAVED = [np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])]  # a mesh may deal its rows out so


def keys_of(batches, count):
  return [next(batches)['key'].tolist() for _ in range(count)]


def test_batches_are_the_same_for_any_number_of_hosts(settings):
  stream = streams.Stream(settings, 8, seed=5)
  whole = keys_of(stream.batches(8), 3)
  for hosts in (HALVES, INTERLEAVED):
    for batch, first, second in zip(whole, *(keys_of(stream.batches(8, rows), 3) for rows in hosts)):
      joined = np.empty(8, int)
      joined[hosts[0]], joined[hosts[1]] = first, second
      assert joined.tolist() == batch  # row by row: a step's randomness goes by row
  assert sum(keys_of(stream.batches(1), 24), []) == sum(whole, [])


def test_a_position_restores_the_next_batch_on_another_host_count(settings):
  stream = streams.Stream(settings, 8, seed=5, noise=FakeStore())
  batches = stream.batches(8)
  for _ in range(3):
    next(batches)
  position = batches.get_state()
  expected = next(batches)
  again = stream.batches(8)
  again.set_state(position)
  restored = next(again)
  for key in expected:
    np.testing.assert_array_equal(restored[key], expected[key])
  halves = [stream.batches(8, rows) for rows in HALVES]
  for half in halves:
    half.set_state(position)
  assert sum((next(half)['key'].tolist() for half in halves), []) == expected['key'].tolist()


def test_pairs_carry_the_noise_of_their_own_picture_and_independent_real_images(settings):
  batches = streams.Stream(settings, 8, seed=5, noise=FakeStore()).batches(64)
  batch = next(batches)
  np.testing.assert_array_equal(batch['noise'][:, 0, 0, 0], batch['key'])
  assert np.mean(np.all(batch['image'] == batch['real_image'], axis=(1, 2, 3))) < 0.1


def test_an_epoch_of_pairs_holds_the_chosen_fraction_and_each_pair_once(settings):
  stream = streams.Stream(settings, 8, seed=5, noise=FakeStore(), pairs_fraction=0.02)
  epochs = np.array(keys_of(stream.batches(10), 18)).reshape(2, 90)
  assert len(set(epochs[0].tolist())) == 90
  assert set(epochs[0].tolist()) == set(epochs[1].tolist())
  assert epochs[0].tolist() != epochs[1].tolist()


def test_which_pictures_a_step_saw_is_told_by_one_program(monkeypatch):
  """log.batches asks at every step; a function made anew was compiled anew."""
  made, jit, mesh = [], jax.jit, sharding.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(jax, 'jit', lambda *args, **kwargs: made.append(args) or jit(*args, **kwargs))
  assert [sharding.gathered(np.arange(4) + step, mesh)[0] for step in range(3)] == [0, 1, 2]
  assert len(made) == 1


def test_what_a_stream_holds_does_not_grow_with_the_number_of_pictures(settings, monkeypatch):
  """Of a hundred million it was gigabytes, in each worker too."""
  monkeypatch.setattr(streams, 'source_keys', lambda data: (None, streams.Keys(10**8, mirror=True)))
  tracemalloc.start()
  dataset = streams.Stream(settings, 8, 5, streams.ToInvert(2 * 10**8, 8)).dataset()
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert most < 10**6 and len(dataset) > 10**9


@pytest.mark.parametrize('source, cores, free, expected', [
  ('folder', 1, 2**34, 0), ('folder', 2, 2**34, 0), ('folder', 4, 2**34, 2), ('folder', 96, 2**34, 8),
  ('folder', 96, 2**26, 0),  # a container's usual /dev/shm
  ('array_record', 96, 2**34, 0),
])  # fmt: skip
def test_a_folder_has_as_many_workers_as_cores_and_shared_memory_allow(
    settings, monkeypatch, source, cores, free, expected):
  monkeypatch.setattr('os.sched_getaffinity', lambda pid: set(range(cores)))
  monkeypatch.setattr('shutil.disk_usage', lambda path: types.SimpleNamespace(free=free))
  monkeypatch.setattr(streams.Stream, 'dataset', lambda self: None)
  settings = settings.copy_and_resolve_references()
  settings.source = source
  assert settings.workers == -1
  for workers in (-1, 0, 3):
    settings.workers = workers
    assert streams.Stream(settings, 8, seed=5).batches(8)._workers == (expected if workers == -1 else workers)
