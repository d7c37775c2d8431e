"""The store of (image key, flip) -> noise that the `invert` phase leaves and the generators read.

A folder of shards (shards.py), each a fixed range of keys whatever the number of hosts; `manifest.json`
closes the store once every shard is there.
"""

import dataclasses
import functools
import json

import numpy as np
from etils import epath

from pagoda_jax import shards

FORMAT_VERSION = 1


class NoiseStoreError(ValueError):
  """A noise store is missing, unfinished, damaged or made for something else."""


def make_layout(count: int, shard_size: int) -> shards.Layout:
  """How a store of `count` pairs is cut into shards."""
  return shards.Layout('noise', count, shard_size)


def write_shard(folder: epath.Path, layout: shards.Layout, shard: int, noise: np.ndarray) -> None:
  """Writes one shard, [len(keys), H, W, C] in the store's dtype; a kill at any moment leaves it whole or absent."""
  writer = shards.ShardWriter(folder, layout.name(shard))
  for record in noise:
    writer.add(np.ascontiguousarray(record).tobytes())
  writer.close(first_key=layout.keys(shard)[0], **moments(noise))


def moments(noise: np.ndarray) -> dict[str, float]:
  """Sums from which the store's mean and standard deviation follow (float64)."""
  values = noise.astype(np.float64)
  return {'sum': float(values.sum()), 'sum_squares': float((values**2).sum())}


def write_manifest(folder: epath.Path, layout: shards.Layout, shape: tuple[int, ...], dtype: str, origin: dict) -> dict:
  """Closes the store: counts, shape, checksums, moments and where the noise comes from."""
  sidecars = [shards.read_sidecar(folder, name) for name in layout.names]
  values = layout.count * int(np.prod(shape))
  mean = sum(s['sum'] for s in sidecars) / values
  std = (sum(s['sum_squares'] for s in sidecars) / values - mean**2) ** 0.5
  manifest = {
    'format_version': FORMAT_VERSION,
    'count': layout.count,
    'shard_size': layout.shard_size,
    'shape': list(shape),
    'dtype': dtype,
    'mean': mean,
    'std': std,
    'origin': origin,
    'shards': {layout.name(i): s['sha256'] for i, s in enumerate(sidecars)},
  }
  shards.write_json(folder / 'manifest.json', manifest)
  return manifest


def read_manifest(folder) -> dict:
  """The manifest of a finished store.

  Raises:
    NoiseStoreError: there is none, or it is damaged.
  """
  path = epath.Path(folder) / 'manifest.json'
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise NoiseStoreError(f'{path}: no finished noise store there; run the invert phase first') from None
  except ValueError as error:
    raise NoiseStoreError(f'{path}: damaged ({error}); delete it and run the invert phase again') from None


def check_origin(manifest: dict, expected: dict, folder) -> None:
  """Refuses a store made by another teacher, from other data or at another resolution.

  Raises:
    NoiseStoreError: names each field that differs, with both values.
  """
  found = manifest['origin']
  rows = [
    f'  {key}: the store has {found.get(key)!r}, this run needs {value!r}'
    for key, value in expected.items()
    if found.get(key) != value
  ]
  if rows:
    raise NoiseStoreError(f'{folder}: this noise was made for something else:\n' + '\n'.join(rows))


@dataclasses.dataclass(frozen=True)
class NoiseStore:
  """Random access to the noise of a key; picklable, and opened once in each worker process."""

  folder: str
  scale: float = 1.0  # multiplies what is read; for standardised noise
  shift: float = 0.0  # subtracted first

  def __len__(self) -> int:
    return self.manifest['count']

  @property
  def manifest(self) -> dict:
    return _manifest(self.folder)

  def __getitem__(self, key: int) -> np.ndarray:
    """[H, W, C] float32."""
    manifest = self.manifest
    layout = make_layout(manifest['count'], manifest['shard_size'])
    shard, place = divmod(key, layout.shard_size)
    record = shards.read_record(self.folder, layout.name(shard), len(layout.keys(shard)), place)
    noise = np.frombuffer(record, manifest['dtype']).reshape(manifest['shape']).astype(np.float32)
    return self.standardized(noise)

  def standardized(self, noise: np.ndarray) -> np.ndarray:
    """(noise - shift) * scale."""
    return (noise - np.float32(self.shift)) * np.float32(self.scale)


def open_store(folder, sigma_max: float, standardize: bool) -> NoiseStore:
  """The store in a folder; standardised, its noise has mean 0 and standard deviation sigma_max.

  Raises:
    NoiseStoreError: there is no finished store.
  """
  manifest = read_manifest(folder)
  if not standardize:
    return NoiseStore(str(folder))
  return NoiseStore(str(folder), scale=sigma_max / manifest['std'], shift=manifest['mean'])


@functools.cache
def _manifest(folder: str) -> dict:
  return read_manifest(folder)


def damaged_shards(folder) -> list[str]:
  """Names of shards that are missing or whose bytes differ from the manifest's checksums."""
  return shards.damaged_shards(folder, read_manifest(folder)['shards'])
