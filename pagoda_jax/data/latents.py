"""Pictures as latents of an autoencoder: cached as mean and deviation, drawn anew from these in every epoch.

A record of `pagoda prepare --autoencoder` is a header as of a picture, then the mean and the standard deviation of the
latents, [h, w, c] each, rows from the top, float16, as the autoencoder makes them: neither scaled nor shifted. Where
mirror images are stored, a picture's is the record after it: an autoencoder does not commute with flips.
"""

import concurrent.futures
import dataclasses
import os
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pagoda_jax.data import pictures, shards
from pagoda_jax.data.pictures import SourceError

FORMAT = 'latent'  # of records
STORED = np.dtype('<f2')
DOMAIN = zlib.crc32(b'/latents') % 2**31  # of random numbers, as in runtime/randomness.py, but of NumPy's
PIXELS_AT_ONCE = 2**20  # of pictures that a device encodes together: 16 of 256 px, 1 of 1024; mirror images besides
MOST_AT_ONCE = 64  # of small ones


class Moments(NamedTuple):
  """Mean and standard deviation of a picture's latents, [h, w, c]; float16."""

  mean: np.ndarray
  deviation: np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An autoencoder, for `pagoda prepare`.

  Attributes:
    encode: encode(uint8 [B, S, S, C]) -> (mean, deviation) float32 [B, S / factor, S / factor, c] each.
    sha256: of its numbers.
    factor, channels: of its latents.
    image_channels: of its pictures.
    devices: that it runs on.
  """

  encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  sha256: str
  factor: int
  channels: int
  image_channels: int
  devices: int = 1

  def described(self, mirror: bool) -> dict[str, Any]:
    """What a manifest names."""
    return {'sha256': self.sha256, 'factor': self.factor, 'channels': self.channels, 'mirror': mirror}


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How latents become what networks see: (mean + deviation * noise - shift) * scaling."""

  seed: int  # the experiment's
  scaling: float
  shift: float

  def sampled(self, moments: Moments, key: int, epoch: int) -> np.ndarray:
    """[h, w, c] float32; the noise is one of the seed, the picture's key, the epoch and the side alone."""
    mean = moments.mean.astype(np.float32)
    rng = np.random.default_rng((DOMAIN, self.seed, int(key), int(epoch), len(mean)))
    noise = rng.standard_normal(mean.shape, np.float32)
    return self._normal(mean + moments.deviation.astype(np.float32) * noise)

  def middle(self, moments: Moments) -> np.ndarray:
    """[h, w, c] float32 of the mean."""
    return self._normal(moments.mean.astype(np.float32))

  def _normal(self, latents):
    return (latents - np.float32(self.shift)) * np.float32(self.scaling)


def to_bytes(mean: np.ndarray, deviation: np.ndarray) -> bytes:
  """Mean and deviation [h, w, c] as a record holds them."""
  return np.stack([mean, deviation]).astype(STORED).tobytes()


def of_bytes(content: bytes, side: int, channels: int) -> Moments:
  """What `to_bytes` made.

  Raises:
    SourceError: they are of another size.
  """
  shape = (2, side, side, channels)
  if len(content) != np.prod(shape) * STORED.itemsize:
    raise SourceError(f'{len(content)} bytes, not those of latents of {side} x {side} x {channels}')
  return Moments(*np.frombuffer(content, STORED).reshape(shape))


def write_shard(source, folder, layouts: dict[int, shards.Layout], shard: int, recipe, encoder: Encoder,
                tick: Callable[[], None]) -> None:
  """As records.write_shard, of latents; `layouts` are by the latents' sides."""
  names = {side: layout.name(shard) for side, layout in layouts.items()}
  writers = {side: shards.ShardWriter(folder, name) for side, name in names.items()
             if not shards.is_finished(folder, name)}
  labels, unreadable, enlarged, mirror = [], [], dict.fromkeys(names, 0), recipe.autoencoder['mirror']
  sides = {side: side * encoder.factor for side in recipe.resolutions}
  at = getattr(source, 'at', lambda side: source)  # pictures that are prepared at several sizes

  def read(index):
    """(the record without its image, that one's short side, {side: pixels}) of a picture, or why it cannot be read."""
    try:
      stored = source[index]
      of = {pixels: stored if at(pixels) is source else at(pixels)[index] for pixels in sides.values()}
      cut = {side: pictures.picture_of(of[pixels], pixels, encoder.image_channels) for side, pixels in sides.items()}
      # Originals are left here: a batch of them may be as large as the memory.
      return stored, min(stored.pop('image').size), cut
    except SourceError as error:
      return str(error)

  keys = layouts[recipe.resolutions[-1]].keys(shard)
  together = min(max(PIXELS_AT_ONCE // max(sides.values()) ** 2, 1), MOST_AT_ONCE) * encoder.devices
  together = min(together, layouts[recipe.resolutions[-1]].shard_size)
  with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count(), 16)) as pool:  # Pillow leaves the lock alone
    for batch in (keys[start : start + together] for start in range(0, len(keys), together)):
      found = list(pool.map(read, batch))
      unreadable += [each for each in found if isinstance(each, str)]
      good = [each for each in found if not isinstance(each, str)]
      for side, writer in writers.items():
        images = [cut[side] for *_, cut in good]
        images = [each for image in images for each in ((image, image[:, ::-1]) if mirror else (image,))]
        moments = _encoded(encoder, images, side, together * (1 + mirror))
        for number, content in enumerate(moments):
          stored = good[number // (1 + mirror)][0]
          place = len(labels) * (1 + mirror) + number
          if content is None:
            raise SourceError(f'{stored["name"]}: its latents are not finite, or beyond what float16 holds: an '
                              'autoencoder of other pictures, or a damaged one')
          writer.add(shards.encode_record({'shard': shard, 'record': place} | stored, content))
        enlarged[side] += sum(short < sides[side] for _, short, _ in good)
      labels += [stored['label'] for stored, *_ in good]
      for _ in batch:
        tick()
  for side, writer in writers.items():
    writer.close(labels=labels, unreadable=unreadable, enlarged=enlarged[side])


def _encoded(encoder, images, side, together):
  """Bytes of each picture's moments, None where they are not finite; every call has `together` pictures."""
  if not images:
    return
  batch = np.stack(images + [np.zeros_like(images[0])] * (together - len(images)))
  mean, deviation = (x[: len(images)] for x in encoder.encode(batch))
  expected = (len(images), side, side, encoder.channels)
  if mean.shape != expected:
    raise SourceError(f'the autoencoder makes latents {list(mean.shape[1:])} of pictures of {batch.shape[1]} px, not '
                      f'{list(expected[1:])}')
  largest = np.finfo(STORED).max
  for m, d in zip(mean, deviation):
    fits = np.isfinite(m).all() and np.isfinite(d).all() and max(np.abs(m).max(), d.max()) <= largest
    yield to_bytes(m, d) if fits else None
