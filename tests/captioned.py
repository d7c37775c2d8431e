"""A few prepared pictures with captions, embedded by an encoder that gives each word a vector of its own."""

import zlib

import numpy as np
import tiny
from make_data import write_captions
from runs import pagoda

COLOURS, THINGS = ('red', 'blue', 'green', 'grey'), ('flag', 'cat', 'bird')
LENGTH, WIDTH, POOLED = 4, 6, 5
CLIPS = 768  # width of CLIP ViT-L/14's vector


def captions(number: int) -> list[str]:
  """Of picture number i: what it was called, and that written anew."""
  name = f'{COLOURS[number % 4]} {THINGS[number % 3]}'
  return [name, f'a picture of a {name}']


def _vector(word, size):
  return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(size).astype(np.float32)


def embed(texts):
  """(text, text_mask, text_pooled), as config.text.encoder = 'captioned:embed' has to give."""
  rows = [text.split()[-LENGTH:] or ['.'] for text in texts]  # the empty caption has a token too
  text = np.zeros((len(rows), LENGTH, WIDTH), np.float32)
  for row, words in zip(text, rows):
    row[: len(words)] = [_vector(word, WIDTH) for word in words]
  mask = np.arange(LENGTH) < np.array([[len(words)] for words in rows])
  return text, mask, np.stack([sum(_vector(word, POOLED) for word in words) for words in rows])


def embed_as_clip(texts):
  """The same with vectors of CLIP's width."""
  text, mask, _ = embed(texts)
  return text, mask, np.stack([sum(_vector(word, CLIPS) for word in words.split() or ['.']) for words in texts])


def entries(texts):
  """Each embedding as a store gives it."""
  names = ('text', 'text_mask', 'text_pooled')
  stored = lambda array: array if array.dtype == bool else array.astype(np.float16)
  return [{name: stored(array) for name, array in zip(names, row)} for row in zip(*embed(texts))]


def prepare(folder, count: int = 40, sides=(8, 16), encoder: str = 'captioned:embed'):
  """A prepared folder of so many pictures at these sides, with embeddings of both of each one's captions."""
  write_captions(folder / 'pictures', [
    {'file': f'{i:02d}.png', 'caption': captions(i)[0], 'recaption': captions(i)[1]} for i in range(count)])
  assert pagoda('prepare', f'--source=folder:{folder / "pictures"}', f'--output={folder / "data"}',
                f'--resolutions={",".join(map(str, sides))}', '--workers=1', f'--text_encoder={encoder}',
                f'--text_length={LENGTH}') == 0
  return folder / 'data'


def config_of_digits(encoder: str = 'captioned:embed'):
  """tiny.py's experiment with captions over pictures without any: for networks of made-up numbers."""
  config = tiny.get_config('text')
  config.data.source, config.text.encoder = 'mnist', encoder
  return config
