"""The store of (image key, flip) -> noise that the `invert` phase leaves and the generators read.

A folder of ArrayRecord shards, each a fixed range of keys whatever the number of hosts, with a small
JSON beside it (count, SHA-256) written last; `manifest.json` closes the store once every shard is there.
"""

import dataclasses
import functools
import hashlib
import json

import numpy as np
from array_record.python import array_record_module
from etils import epath

FORMAT_VERSION = 1


class NoiseStoreError(ValueError):
  """A noise store is missing, unfinished, damaged or made for something else."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a store of `count` pairs is cut into shards."""

  count: int
  shard_size: int

  @property
  def num_shards(self) -> int:
    return -(-self.count // self.shard_size)

  def keys(self, shard: int) -> range:
    """The keys of one shard."""
    return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

  def name(self, shard: int) -> str:
    return f'noise-{shard:05d}-of-{self.num_shards:05d}'


def finished_shards(folder: epath.Path, layout: Layout) -> list[int]:
  """Shards whose records and sidecar are both there."""
  return [
    shard
    for shard in range(layout.num_shards)
    if (folder / (layout.name(shard) + '.json')).exists()
    and (folder / (layout.name(shard) + '.array_record')).exists()
  ]


def write_shard(folder: epath.Path, layout: Layout, shard: int, noise: np.ndarray) -> None:
  """Writes one shard, [len(keys), H, W, C] in the store's dtype; a kill at any moment leaves it whole or absent."""
  path = folder / (layout.name(shard) + '.array_record')
  partial = folder / (layout.name(shard) + '.partial')
  folder.mkdir(parents=True, exist_ok=True)
  # group_size:1 lets a reader fetch single records; noise does not compress.
  writer = array_record_module.ArrayRecordWriter(str(partial), 'group_size:1,uncompressed')
  for record in noise:
    writer.write(np.ascontiguousarray(record).tobytes())
  writer.close()
  sidecar = {'count': len(noise), 'first_key': layout.keys(shard)[0], 'sha256': file_digest(partial)}
  partial.replace(path)
  write_json(folder / (layout.name(shard) + '.json'), sidecar | moments(noise))


def moments(noise: np.ndarray) -> dict[str, float]:
  """Sums from which the store's mean and standard deviation follow (float64)."""
  values = noise.astype(np.float64)
  return {'sum': float(values.sum()), 'sum_squares': float((values**2).sum())}


def write_manifest(folder: epath.Path, layout: Layout, shape: tuple[int, ...], dtype: str, origin: dict) -> dict:
  """Closes the store: counts, shape, checksums, moments and where the noise comes from."""
  sidecars = [json.loads((folder / (layout.name(s) + '.json')).read_text()) for s in range(layout.num_shards)]
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
  write_json(folder / 'manifest.json', manifest)
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
    layout = Layout(manifest['count'], manifest['shard_size'])
    shard, place = divmod(key, layout.shard_size)
    record = _reader(str(epath.Path(self.folder) / (layout.name(shard) + '.array_record'))).read([place])[0]
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


@functools.cache
def _reader(path: str):
  return array_record_module.ArrayRecordReader(path)


def damaged_shards(folder) -> list[str]:
  """Names of shards that are missing or whose bytes differ from the manifest's checksums."""
  folder = epath.Path(folder)
  shards = read_manifest(folder)['shards']
  paths = {name: folder / (name + '.array_record') for name in shards}
  return [name for name, path in paths.items() if not path.exists() or file_digest(path) != shards[name]]


def file_digest(path) -> str:
  """SHA-256 of a file, hexadecimal."""
  with epath.Path(path).open('rb') as file:
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
      digest.update(chunk)
  return digest.hexdigest()


def write_json(path, value) -> None:
  """Writes JSON whole or not at all."""
  path = epath.Path(path)
  partial = path.parent / (path.name + '.partial')
  partial.write_text(json.dumps(value, indent=2) + '\n')
  partial.replace(path)
