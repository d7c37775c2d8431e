"""Captions as hashed n-grams of letters and words: embeddings that nothing has to be downloaded or trained for.

A word is the sum of fixed random vectors of what it is made of: itself, its n-grams of 3 to 5 letters, and itself after
the word before it. Words that share letters are near each other, as names of pictures of one thing are; that "crimson"
is a red is in none of it. Large experiments take a trained encoder.
"""

import functools
import hashlib
import re
import unicodedata

import numpy as np

VERSION = 1  # of what follows: another one would be another encoder
BUCKETS = 2**14  # rows of the table of random vectors; n-grams whose hashes meet share one
SIZES = (3, 4, 5)  # letters
WORD = re.compile(r'\w+|[^\w\s]')
END = '\n'  # after the last word, where no caption has one, so that every caption has a token


def words(caption: str) -> list[str]:
  """A caption's words and signs in lower case; compatible forms of a letter are one."""
  return WORD.findall(unicodedata.normalize('NFKC', caption).casefold())


def embed(captions: list[str], length: int, width: int, pooled_width: int):
  """Embeddings of captions.

  Returns:
    (text [N, length, width] float32: a row a word, one of the end, zeros; text_mask [N, length] bool, True = row;
    text_pooled [N, pooled_width] float32, of all words; truncated [N] bool, whether there were too many). Values of
    text and text_pooled have a mean square of about 1.
  """
  text = np.zeros((len(captions), length, width), np.float32)
  mask = np.zeros((len(captions), length), bool)
  pooled = np.zeros((len(captions), pooled_width), np.float32)
  truncated = np.zeros(len(captions), bool)
  for row, caption in enumerate(captions):
    found = words(caption)
    truncated[row] = len(found) >= length
    found = [*found[: length - 1], END]
    buckets = [_buckets(word, before) for before, word in zip(['', *found], found)]
    for place, some in enumerate(buckets):
      text[row, place] = _table(width)[some].sum(0) / np.sqrt(len(some))
    every = [bucket for some in buckets for bucket in some]
    pooled[row] = _table(pooled_width)[every].sum(0) / np.sqrt(len(every))
    mask[row, : len(found)] = True
  return text, mask, pooled, truncated


def _buckets(word, before):
  whole = f'<{word}>'
  grams = {whole[i : i + size] for size in SIZES for i in range(len(whole) - size + 1)}
  features = [f'word {word}', f'after {before} {word}', *sorted(f'gram {gram}' for gram in grams)]
  hashes = (hashlib.blake2b(feature.encode(errors='surrogatepass'), digest_size=8).digest() for feature in features)
  return [int.from_bytes(value, 'little') % BUCKETS for value in hashes]


@functools.lru_cache(maxsize=4)
def _table(width):
  # RandomState's stream is frozen for all versions of NumPy to come, a Generator's is not.
  return np.random.RandomState(VERSION).standard_normal((BUCKETS, width)).astype(np.float32)
