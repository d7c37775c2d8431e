"""Embeddings of captions beside prepared pictures: made once by `pagoda prepare --text_encoder=...`.

Each shard of pictures has one of texts, whose records stand in the same order. A record is the length of a JSON
header (4 bytes, little-endian), the header {"shard", "record", "captions": [[kind, tokens], ...]}, and for each
caption its tokens' embeddings [tokens, width] and its pooled vector [pooled_width], in little-endian float16. Tokens
that the encoder's mask leaves out are not stored. One more shard holds one such record, of the empty caption: what
networks are told where they are told nothing. What all were made with stands in manifest.json under "text".
"""

import dataclasses
import hashlib

import numpy as np

from pagoda_jax.data import shards
from pagoda_jax.data.pictures import SourceError

PREFIX = 'text'
NULL_PREFIX = 'text_null'
DTYPE = '<f2'
SIZES = ('length', 'width', 'pooled_width')
PREPARE_HINT = '`pagoda prepare --text_encoder=...` on the same --output stores them'


@dataclasses.dataclass(frozen=True, eq=False)
class TextStore:
  """The embeddings of a prepared folder's captions; pickled to worker processes.

  Attributes:
    encoder: what made them, as config.text.encoder says it.
    sha256: of that encoder.
    length, width, pooled_width: as in config.text.
  """

  folder: str
  shard_names: tuple[str, ...]
  ends: np.ndarray  # [shards]: how many pictures there are up to and with a shard
  encoder: str
  sha256: str
  length: int
  width: int
  pooled_width: int

  def __len__(self) -> int:
    return int(self.ends[-1])

  def captions(self, index: int) -> list[dict[str, np.ndarray]]:
    """All captions of a picture, each as `text` gives one.

    Raises:
      SourceError: names the shard and the record that are damaged.
    """
    return self._read(*self._place(index))

  def text(self, index: int, key: int) -> dict[str, np.ndarray]:
    """One caption of a picture: the key draws it, and always the same one.

    Returns:
      {'text': [L, W] float16, zero where there is no token; 'text_mask': [L] bool, True = token;
      'text_pooled': [P] float16; 'caption_kind': int32, its place in captions.KINDS}.
    """
    return self._read(*self._place(index), key)[0]

  def null(self) -> dict[str, np.ndarray]:
    """The empty caption: {'text': [L, W], 'text_mask': [L], 'text_pooled': [P]}."""
    (caption,) = self._read(f'{NULL_PREFIX}-00000-of-00001', 1, 0, 0)
    return {name: value for name, value in caption.items() if name != 'caption_kind'}

  def _place(self, index):
    """(name of a shard, how many records it has, its number, a record's number in it)."""
    shard = int(np.searchsorted(self.ends, index, side='right'))
    first = int(self.ends[shard - 1]) if shard else 0
    return self.shard_names[shard], int(self.ends[shard]) - first, shard, int(index) - first

  def _read(self, name, count, shard, place, key=None):
    """A record's captions; with a key the one that it draws."""
    path = shards.shard_path(self.folder, name)
    try:
      header, content = shards.decode_record(shards.read_record(self.folder, name, count, place))
      if (header['shard'], header['record']) != (shard, place):  # a shard under another one's name
        raise ValueError(f'it is record {header["record"]} of shard {header["shard"]}')
      return self._decoded(header['captions'], np.frombuffer(content, DTYPE), key)
    except shards.ShardError as error:
      raise SourceError(f'{error}; {shards.VERIFY_HINT.format(self.folder)}') from None
    except (ValueError, KeyError, TypeError) as error:
      raise SourceError(f'{path}: record {place} is damaged ({error}); '
                        + shards.VERIFY_HINT.format(self.folder)) from None

  def _decoded(self, rows, numbers, key):
    ends = np.cumsum([tokens * self.width + self.pooled_width for _, tokens in rows])
    if not rows or len(numbers) != ends[-1]:
      raise ValueError(f'{len(numbers)} numbers instead of {ends[-1] if rows else "some"}')
    found = []
    for place in range(len(rows)) if key is None else [_draw(key) % len(rows)]:
      kind, tokens = rows[place]
      some = numbers[ends[place] - tokens * self.width - self.pooled_width : ends[place]]
      text = np.zeros((self.length, self.width), np.float16)
      text[:tokens] = some[: tokens * self.width].reshape(tokens, self.width)
      found.append({'text': text, 'text_mask': np.arange(self.length) < tokens,
                    'text_pooled': some[tokens * self.width :].copy(), 'caption_kind': np.int32(kind)})
    return found


def encode_record(shard: int, record: int, kinds, text: np.ndarray, mask: np.ndarray, pooled: np.ndarray) -> bytes:
  """The record of a picture's captions.

  Args:
    shard, record: its place.
    kinds: [C] numbers in captions.KINDS.
    text, mask, pooled: [C, L, W], [C, L] bool and [C, P] of them.
  """
  header = {'shard': shard, 'record': record, 'captions': [[kind, int(row.sum())] for kind, row in zip(kinds, mask)]}
  content = [array for tokens, row, whole in zip(text, mask, pooled) for array in (tokens[row], whole)]
  return shards.encode_record(header, b''.join(array.astype(DTYPE).tobytes() for array in content))


def _draw(key: int) -> int:
  return int.from_bytes(hashlib.blake2b(int(key).to_bytes(8, 'little'), digest_size=8).digest(), 'little')


def store_of(folder: str, entry: dict) -> TextStore:
  """The embeddings of a prepared folder, by its manifest's entry "text"."""
  names = [name for name in entry['shards'] if not name.startswith(NULL_PREFIX)]
  return TextStore(
    folder=folder,
    shard_names=tuple(names),
    ends=np.cumsum([entry['shards'][name]['count'] for name in names]),
    **{name: entry[name] for name in ('encoder', 'sha256', *SIZES)},
  )
