"""`pagoda prepare`: pictures from anywhere, cropped and resized once, into ArrayRecord shards and a manifest.

  pagoda prepare --source=folder:photos --output=data/photos --resolution=256
  pagoda prepare --source=tfds:imagenet2012 --data_dir=/data/tfds --output=data/imagenet --resolutions=64,128,256,512
  pagoda prepare --source=webdataset:tars --output=data/captioned --resolution=64 --text_encoder=clip:weights/clip
  pagoda prepare --source=folder:photos --output=data/latents --resolutions=256,512 --autoencoder=weights/sd_vae
  pagoda prepare --verify --output=data/photos

Then --config.data.source=array_record --config.data.path=data/photos. Shards are fixed ranges of the
source, so that the same command goes on at the first one that is not there, whenever it was ended.
"""

import contextlib
import itertools
import multiprocessing
import re
import shutil
import tempfile
from collections import Counter
from multiprocessing import connection

from absl import logging
from etils import epath

from pagoda_jax.data import embeddings, folders, latents, records, shards, sources, tars
from pagoda_jax.data.embeddings import PrepareError
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.runtime import lock, processes
from pagoda_jax.runtime.files import file_digest, read_json, write_json, write_sealed
from pagoda_jax.runtime.interrupts import EXIT_INTERRUPTED, Interrupted
from pagoda_jax.runtime.progress import Progress

PLAN = 'prepare.json'  # what the shards are made of, written first: another plan must not go on with them
LARGEST_SIDE = 8192  # pixels, as config.data.resolution
GO_ON = 'start the same command again to go on'


def open_input(text: str, data_dir: str = '', split: str = 'train') -> sources.Source:
  """The source that --source names, such as folder:PATH; unreadable pictures raise when they are read.

  The files of a folder are read here for their digest, but not decoded.

  Raises:
    PrepareError: there is no such kind of source.
    SourceError: there is no such source.
  """
  kind, _, place = text.partition(':')
  needs_place = kind in ('folder', 'webdataset', 'tfds', 'array_record')
  if needs_place == bool(place):
    sources.check_place(kind, place)
    if kind == 'folder':
      return folders.open_folder(place, check=False)
    if kind == 'webdataset':
      return tars.open_tars(place, check=False)
    if kind in ('mnist', 'tfds', 'array_record'):
      return sources.open_whole(kind, data_dir if kind == 'tfds' else place, place, split)
  raise PrepareError(f'--source={text}: must be folder:PATH, webdataset:PATH, tfds:NAME, array_record:PATH or mnist')


def parse_resolutions(text: str) -> tuple[int, ...]:
  """Sides in pixels of '64,128,256,512', smallest first.

  They are one of them times 2, 4, 8, ...: those that the phases of one experiment can work at.

  Raises:
    PrepareError: no such numbers, the same one twice, or numbers of no one ladder.
  """
  said = f'--resolutions={text}'
  parts = text.split(',')
  if not all(re.fullmatch('[1-9][0-9]{0,3}', part) and int(part) <= LARGEST_SIDE for part in parts):
    raise PrepareError(f'{said}: must be numbers of pixels from 1 to {LARGEST_SIDE}, such as 64,128,256,512')
  sides = sorted(map(int, parts))
  for low, high in itertools.pairwise(sides):
    if low == high:
      raise PrepareError(f'{said}: names {high} twice')
    if high % sides[0] or (high // sides[0]).bit_count() != 1:
      raise PrepareError(f'{said}: {high} must be {sides[0]}, the smallest, times 2, 4, 8, ...: no experiment works at '
                         'both')
  return tuple(sides)


def latent_recipe(sides: tuple[int, ...], encoder: latents.Encoder, mirror: bool) -> records.Recipe:
  """The recipe of latents of pictures of these sides in pixels.

  Raises:
    PrepareError: a side that the autoencoder's factor does not divide.
  """
  for side in sides:
    if side % encoder.factor:
      near = [n for n in (side // encoder.factor * encoder.factor, -(-side // encoder.factor) * encoder.factor) if n]
      raise PrepareError(f'{side} px: the autoencoder makes one place of {encoder.factor} x {encoder.factor} pixels, '
                         f'which does not divide them; {" or ".join(map(str, near))} px would be right')
  return records.Recipe(tuple(side // encoder.factor for side in sides), latents.FORMAT, 0, encoder.described(mirror))


def prepare(source: sources.Source, output, recipe: records.Recipe, shard_size: int, workers: int,
            max_unreadable: float, text_encoder=None, autoencoder: latents.Encoder | None = None) -> dict:
  """Writes the shards that are not there yet, then the manifest.

  Embeddings of captions that are there already stay, where the pictures are the same.

  Args:
    source: the pictures.
    output: folder to write to.
    recipe: how they are stored.
    shard_size: pictures in a shard, unreadable ones included.
    workers: processes; 1 works in this one.
    max_unreadable: share of unreadable pictures that is left out without an error.
    text_encoder: of the captions, whose embeddings are stored too (embeddings.Encoder).
    autoencoder: of a recipe of latents; this process then does all the work, on its devices.

  Returns:
    The manifest.

  Raises:
    PrepareError: `output` was begun with other settings or another encoder, pictures have no captions, or a worker
      process died.
    LockError: another process prepares pictures there.
    SourceError: too many pictures cannot be read.
    OSError: a shard cannot be written; names it.
    Interrupted: by Ctrl-C; finished shards stay.
  """
  with lock.hold(output):
    output = epath.Path(output)
    if text_encoder:
      embeddings.check_claim(output, text_encoder)
      _check_captioned(source)
    manifest = _prepare(source, output, recipe, shard_size, workers, max_unreadable, autoencoder)
    if text_encoder:
      with _saying_what_is_there(lambda: 'embedding stopped'):
        manifest = embeddings.add(output, manifest, text_encoder)
    return manifest


def _check_captioned(source):
  """Refuses pictures of which the first has no caption: before all of them are written, which may take hours."""
  for index in range(len(source)):
    with contextlib.suppress(SourceError):  # unreadable: listed and left out later
      embeddings.captions_of(source[index])
      return


def _prepare(source, output, recipe, shard_size, workers, max_unreadable, encoder):
  if getattr(sources.prepared(source), 'autoencoder', None):
    raise PrepareError(f'{sources.prepared(source).folder}: holds latents; give the pictures that they are of')
  layouts = recipe.layouts(len(source), shard_size)
  sides = recipe.resolutions
  plan = {'data_sha256': source.digest, 'pictures': len(source), 'shard_size': shard_size,
          **({'resolutions': list(sides)} if len(sides) > 1 else {'resolution': sides[0]}),
          'format': recipe.format, 'quality': recipe.quality,
          **({'autoencoder': recipe.autoencoder} if recipe.autoencoder else {})}
  _claim(output, plan)
  _warn_of_stored(source, [side * encoder.factor for side in sides] if encoder else sides)
  layout = layouts[sides[-1]]
  finished = set(range(layout.num_shards)).intersection(
    *(shards.finished_shards(output, layout) for layout in layouts.values()))
  numbers = [number for number in range(layout.num_shards) if number not in finished]
  if numbers:
    done = sum(len(layout.keys(number)) for number in finished)
    progress = Progress('prepare', len(source), done, unit='picture')
    _write(source, output, layouts, numbers, recipe, min(workers, len(numbers)), _Counter(progress, done), encoder)
  return _close(source, output, layouts, plan, max_unreadable)


def _warn_of_stored(source, sides):
  """Says which resolutions are not cut from the originals."""
  if isinstance(source, records.ArrayRecordSource) and (
      others := [side for side in sides if side not in source.resolutions]):
    logging.warning('%s: cut from pictures prepared at %d px, not from the originals, which would give other pixels: '
                    '%s px', source.folder, source.resolution, ', '.join(map(str, others)))


def _claim(output, plan):
  path = output / PLAN
  output.mkdir(parents=True, exist_ok=True)
  if not path.exists():
    write_json(path, plan)
  try:
    found = read_json(path)
  except ValueError as error:
    raise PrepareError(f'{path}: damaged ({error}); delete it if the shards beside it are of these settings') from None
  found, wanted = _sides_as_list(found), _sides_as_list(plan)
  differing = [key for key, value in wanted.items() if found.get(key) != value]
  rows = [f'  {key}: there {found.get(key)!r}, here {wanted[key]!r}' for key in differing]
  if rows:
    raise PrepareError(f'{output}: was begun with other pictures or settings:\n' + '\n'.join(rows)
                       + '\nUse another --output, or delete it.')


def _sides_as_list(plan):
  return plan if 'resolution' not in plan else plan | {'resolutions': [plan['resolution']]}


class _Counter:
  """Shows how many pictures are done, all processes together."""

  def __init__(self, progress, done):
    self._progress, self._first, self._shown = progress, done, 0

  def show(self, count):
    """`count`: pictures since the start of this command."""
    self._progress.update(self._first + count, count - self._shown)
    self._shown = count

  def tick(self):
    self.show(self._shown + 1)


def _write(source, output, layouts, numbers, recipe, workers, counter, encoder):
  def said():
    there = sum(len(shards.finished_shards(output, layout)) for layout in layouts.values())
    return f'stopped with {there} of {sum(layout.num_shards for layout in layouts.values())} shards written'

  with _saying_what_is_there(said):
    if encoder:
      for number in numbers:
        latents.write_shard(source, output, layouts, number, recipe, encoder, counter.tick)
    elif workers > 1:
      _write_in_processes((source, output, layouts), numbers, recipe, workers, counter)
    else:
      for number in numbers:
        records.write_shard(source, output, layouts, number, recipe, counter.tick)


@contextlib.contextmanager
def _saying_what_is_there(said):
  """Ctrl-C within the block ends the command with a word on how far it came."""
  try:
    yield
  except KeyboardInterrupt:
    raise Interrupted(f'prepare: {said()}; {GO_ON}', EXIT_INTERRUPTED) from None


def _write_in_processes(job, numbers, recipe, count, counter):
  context = multiprocessing.get_context('spawn')  # a fork would copy the threads' locks of JAX
  done, failed = context.Value('Q', 0), context.SimpleQueue()
  room = tempfile.mkdtemp(prefix='pagoda-')  # for what is on its way to a bucket: a worker that is killed leaves it
  workers = [
    context.Process(target=records.work, args=(*job, numbers[i::count], recipe, room, done, failed), daemon=True)
    for i in range(count)
  ]
  try:
    for worker in workers:
      worker.start()
    # Codes are looked at once a round: one that ends between two looks is neither missed nor taken for silent.
    while None in (codes := [worker.exitcode for worker in workers]) or any(codes):
      for worker, code in zip(workers, codes):
        if code and not failed.empty():
          raise failed.get()
        if code:
          raise PrepareError(f'prepare: worker process {worker.pid} {processes.ending(code)}; {GO_ON}')
      connection.wait([worker.sentinel for worker, code in zip(workers, codes) if code is None], timeout=0.5)
      counter.show(done.value)
  finally:
    for worker in workers:
      if worker.pid is not None:
        worker.kill()  # it heeds nothing else
        worker.join()
    shutil.rmtree(room, ignore_errors=True)


def _close(source, output, layouts, plan, max_unreadable) -> dict:
  lock.confirm()
  sidecars = {side: {name: shards.read_sidecar(output, name) for name in layout.names}
              for side, layout in layouts.items()}
  _check_alike(output, sidecars)
  largest = max(layouts)
  unreadable = [row for sidecar in sidecars[largest].values() for row in sidecar['unreadable']]
  folders.report_unreadable(output, unreadable, layouts[largest].count, max_unreadable)
  counts = Counter(label for sidecar in sidecars[largest].values() for label in sidecar['labels'])
  several, raw = 'resolutions' in plan, plan['format'] == 'raw'
  enlarged = {side: sum(sidecar['enlarged'] for sidecar in found.values()) for side, found in sidecars.items()}
  version = records.SIDES_VERSION if several else records.RAW_VERSION if raw else records.FORMAT_VERSION
  if 'autoencoder' in plan:
    version = records.LATENT_VERSION
  manifest = {
    'format_version': version,
    'count': sum(sidecar['count'] for sidecar in sidecars[largest].values()) // records.orientations(plan),
    **plan,
    'classes': list(source.class_names),
    'class_counts': [counts[label] for label in range(len(source.class_names))],
    'enlarged': {str(side): number for side, number in enlarged.items()} if several else enlarged[largest],
    'unreadable': unreadable,
    'shards': {
      name: {key: sidecar[key] for key in ('count', 'bytes', 'sha256')}
      | {'sidecar_sha256': file_digest(shards.sidecar_path(output, name))}
      for found in sidecars.values() for name, sidecar in found.items()
    },
  }
  manifest |= embeddings.kept(output, manifest)
  write_sealed(output / records.MANIFEST, manifest)
  return manifest


def _check_alike(output, sidecars):
  """That a shard holds the same pictures at each resolution: one made anew later may have met a file that was lost."""
  for alike in zip(*(found.items() for found in sidecars.values())):
    first = alike[0][1]
    if any(sidecar[key] != first[key] for _, sidecar in alike for key in ('labels', 'unreadable')):
      names = ', '.join(name for name, _ in alike)
      raise PrepareError(f'{output}: {names} do not hold the same pictures: some could be read for one and not for '
                         'another; delete these shards and start the same command again')


def verify(output) -> dict:
  """Compares every shard with its SHA-256; returns the manifest.

  Raises:
    SourceError: names the files that are damaged or missing.
  """
  manifest = records.read_manifest(output)
  entries = [*manifest['shards'].items(), *manifest.get('text', {'shards': {}})['shards'].items()]
  progress, parts = Progress('verify', len(entries), unit='shard'), []
  of_picture = records.orientations(manifest)  # but embeddings, which a picture and its mirror image share
  for done, (name, entry) in enumerate(entries, 1):
    parts += records.damaged_parts(output, entry, name, verify=True)
    progress.update(done, entry['count'] // (of_picture if name in manifest['shards'] else 1))
  records.refuse_damaged(output, parts)
  return manifest


def summary(output, manifest: dict) -> str:
  """One line about a prepared folder."""
  size = sum(entry['bytes'] for entry in manifest['shards'].values()) / 1e9
  sides = manifest.get('resolutions') or [manifest['resolution']]
  enlarged = manifest['enlarged'] if 'resolutions' in manifest else {str(sides[0]): manifest['enlarged']}
  of, factor = manifest.get('autoencoder'), manifest.get('autoencoder', {}).get('factor', 1)
  rows = [f'{number} of them enlarged to ' + ('it' if len(sides) == 1 else f'{int(side) * factor} px')
          for side, number in enlarged.items() if number]
  if of:
    shapes = ', '.join(f'{side} x {side} x {of["channels"]}' for side in sides)
    rows.append(f'as latents of {shapes} of autoencoder {of["sha256"][:16]}, '
                + ('mirror images too' if of['mirror'] else 'without mirror images'))
  return (f'{output}: {manifest["count"]} pictures of {len(manifest["classes"])} classes at '
          f'{", ".join(str(side * factor) for side in sides)} px{"".join(f", {row}" for row in rows)}, in '
          f'{len(manifest["shards"])} shards, {size:.2f} GB' + embeddings.summary(manifest))
