"""The store of (image key, flip) -> noise that the `invert` phase leaves and the generators read.

Where pictures were inverted with guidance, its strength omega follows the noise in each record, as a float32.
A folder of shards (shards.py), each a fixed range of keys whatever the number of hosts; `manifest.json`
closes the store once every shard is there. `holdout.npz` beside them: the noise of a few held-out pictures.
"""

import dataclasses
import hashlib
import io
import json

import numpy as np
from etils import epath

from pagoda_jax.data import shards
from pagoda_jax.runtime import buckets
from pagoda_jax.runtime.files import read_sealed, write_sealed

FORMAT_VERSION = 1
MANIFEST = 'manifest.json'
HOLDOUT_FILE = 'holdout.npz'  # label, noise, with guidance omega: for the sample grids
OMEGA_TYPE = np.dtype('<f4')
TEACHER, ENCODER = 'teacher_sha256', 'encoder_sha256'  # in an origin: which network made the noise; one of them


class NoiseStoreError(ValueError):
  """A noise store is missing, unfinished, damaged or made for something else."""


def make_layout(count: int, shard_size: int) -> shards.Layout:
  """How a store of `count` pairs is cut into shards."""
  return shards.Layout('noise', count, shard_size)


def write_shard(folder: epath.Path, layout: shards.Layout, shard: int, noise: np.ndarray, origin: dict,
                omegas: np.ndarray | None = None) -> None:
  """Writes one shard, [len(keys), H, W, C] in the store's dtype; a kill at any moment leaves it whole or absent.

  `origin` says where the noise comes from, as in the manifest; `omegas` [len(keys)] go with a 'guidance' in it.
  """
  if (omegas is not None) != ('guidance' in origin):
    raise ValueError(f'{layout.name(shard)}: strengths of guidance and an origin that says how they were drawn go '
                     f'together, and origin has {", ".join(origin)}')
  writer = shards.ShardWriter(folder, layout.name(shard))
  for place, record in enumerate(noise):
    omega = b'' if omegas is None else np.asarray(omegas[place], OMEGA_TYPE).tobytes()
    writer.add(np.ascontiguousarray(record).tobytes() + omega)
  writer.close(first_key=layout.keys(shard)[0], origin=origin_mark(origin), **moments(noise))


def finished_shards(folder, layout: shards.Layout, origin: dict) -> list[int]:
  """Numbers of the shards that need not be made again.

  Raises:
    NoiseStoreError: names those that were made from something else: they must not be mixed with new ones.
  """
  finished, mark = shards.finished_shards(folder, layout), origin_mark(origin)
  sidecars = dict(zip(finished, buckets.mapped(
    folder, lambda shard: shards.read_sidecar(folder, layout.name(shard)), finished)))
  foreign = [layout.name(shard) for shard, sidecar in sidecars.items()
             if sidecar.get('origin') not in (None, mark)]  # older versions wrote none
  if foreign:
    raise NoiseStoreError(f'{folder}: made by another teacher, or with other settings: {", ".join(foreign)}; '
                          f'delete {folder} to make the noise again')
  # The last shard of a run of fewer pairs (--max_steps) may have the name of one with more.
  return [shard for shard, sidecar in sidecars.items() if sidecar['count'] == len(layout.keys(shard))]


def origin_mark(origin: dict) -> str:
  """A short digest of what noise was made from."""
  return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]


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
  write_sealed(folder / MANIFEST, manifest)
  return manifest


def write_promise(folder: epath.Path, count: int, origin: dict) -> None:
  """The manifest where nothing is stored: how many pairs the phases that read it invert themselves, and by what."""
  manifest = {'format_version': FORMAT_VERSION, 'count': count, 'origin': origin, 'shards': {}}
  write_sealed(folder / MANIFEST, manifest)


def read_manifest(folder) -> dict:
  """The manifest of a finished store; its 'shards' are empty where nothing is stored.

  Raises:
    NoiseStoreError: there is none, or it is damaged.
  """
  path = epath.Path(folder) / MANIFEST
  try:
    return read_sealed(path)
  except FileNotFoundError:
    raise NoiseStoreError(f'{path}: no finished noise store there; run the invert phase first') from None
  except ValueError as error:
    raise NoiseStoreError(f'{path}: damaged ({error}); delete it and run the invert phase again') from None


def made_by(manifest: dict) -> str:
  """Which network made the noise, in words: 'teacher 0123456789abcdef', or an encoder."""
  origin = manifest['origin']
  kind, key = ('encoder', ENCODER) if ENCODER in origin else ('teacher', TEACHER)
  return f'{kind} {origin[key][:16]}'


def check_origin(manifest: dict, expected: dict, folder) -> None:
  """Refuses a store made by another teacher or encoder, from other data or at another resolution.

  Raises:
    NoiseStoreError: names each field that differs, with both values.
  """
  found = manifest['origin']
  rows = [
    f'  {key}: the store has {found.get(key)!r}, this run needs {expected.get(key)!r}'
    for key in {**expected, **found}
    if found.get(key) != expected.get(key)
  ]
  if rows:
    raise NoiseStoreError(f'{folder}: this noise was made for something else:\n' + '\n'.join(rows))


@dataclasses.dataclass(frozen=True)
class NoiseStore:
  """Random access to the noise of a key; picklable, and opened once in each worker process."""

  folder: str
  layout: shards.Layout
  shape: tuple[int, ...]
  dtype: str
  scale: float = 1.0  # multiplies what is read; for standardised noise
  shift: float = 0.0  # subtracted first
  guided: bool = False  # whether records hold an omega

  def __len__(self) -> int:
    return self.layout.count

  def __getitem__(self, key: int) -> np.ndarray:
    """The noise [H, W, C] float32 of a key; raises as `pair`."""
    return self.pair(key)['noise']

  def pair(self, key: int) -> dict[str, np.ndarray]:
    """What a picture's key brings to a batch: 'noise' [H, W, C] float32, and with guidance 'omega', a float32.

    Raises:
      IndexError: the store holds no such key.
      NoiseStoreError: names the shard that is damaged or missing.
    """
    if not 0 <= key < len(self):  # the last shard would seem to have lost a record, and be deleted
      raise IndexError(f'key {key}: {self.folder} holds the noise of keys 0 to {len(self) - 1}')
    shard, place = divmod(key, self.layout.shard_size)
    name = self.layout.name(shard)
    try:
      record = shards.read_record(self.folder, name, len(self.layout.keys(shard)), place)
    except shards.ShardError as error:
      raise NoiseStoreError(f'{error}; delete {name}.* there and start the same `pagoda run` again: the invert phase '
                            'makes that shard anew, and no other') from None
    values, end = {}, len(record)
    if self.guided:
      end -= OMEGA_TYPE.itemsize
      values['omega'] = np.float32(np.frombuffer(record[end:], OMEGA_TYPE)[0])
    noise = np.frombuffer(record[:end], self.dtype).reshape(self.shape).astype(np.float32)
    return {'noise': self.standardized(noise)} | values

  def standardized(self, noise: np.ndarray) -> np.ndarray:
    """(noise - shift) * scale."""
    return (noise - np.float32(self.shift)) * np.float32(self.scale)


def open_store(folder, sigma_max: float, standardize: bool) -> NoiseStore:
  """The store in a folder; standardised, its noise has mean 0 and standard deviation sigma_max.

  Raises:
    NoiseStoreError: there is no finished store.
  """
  manifest = read_manifest(folder)
  layout = make_layout(manifest['count'], manifest['shard_size'])
  guided = 'guidance' in manifest['origin']
  store = NoiseStore(str(folder), layout, tuple(manifest['shape']), manifest['dtype'], guided=guided)
  if not standardize:
    return store
  return dataclasses.replace(store, scale=sigma_max / manifest['std'], shift=manifest['mean'])


def read_holdout(folder) -> dict[str, np.ndarray]:
  """'label' and 'noise' (not standardised) of the held-out pictures, and with guidance their 'omega'; 'origin', the
  mark of where it is from.

  Raises:
    NoiseStoreError: the file is missing or damaged.
    OSError: the bucket that it lies in cannot be reached.
  """
  path = epath.Path(folder) / HOLDOUT_FILE
  try:
    with io.BytesIO(path.read_bytes()) as file, np.load(file) as arrays:
      held = {key: arrays[key] for key in ('label', 'noise', 'omega') if key in arrays or key != 'omega'}
      return held | {'origin': arrays['origin'] if 'origin' in arrays else None}  # older versions wrote none
  except Exception as error:  # what damaged bytes lead NumPy's and zipfile's readers to; the file has a checksum
    if buckets.is_away(path, error):
      raise
    raise NoiseStoreError(f'{path}: missing or damaged ({error}); delete it and start the same `pagoda run` again: the '
                          'invert phase makes it anew, and nothing else') from None


def lost_parts(folder, manifest: dict) -> list[str]:
  """Names of files of a finished store that are missing, cut short or not those of its manifest; reads no shard.

  It takes two small reads a shard. Changed bytes within a shard show when the record is read, or in `damaged_shards`.
  """
  folder = epath.Path(folder)
  lost = [] if (folder / HOLDOUT_FILE).exists() else [HOLDOUT_FILE]
  digests = manifest['shards']
  whole = buckets.mapped(folder, lambda name: (
    shards.is_finished(folder, name) and shards.read_sidecar(folder, name)['sha256'] == digests[name]), digests)
  return lost + [name for name, fine in zip(digests, whole) if not fine]


def damaged_shards(folder) -> list[str]:
  """Names of shards that are missing or whose bytes differ from the manifest's checksums."""
  return shards.damaged_shards(folder, read_manifest(folder)['shards'])
