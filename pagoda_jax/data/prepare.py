"""`pagoda prepare`: pictures from anywhere, cropped and resized once, into ArrayRecord shards and a manifest.

  pagoda prepare --source=folder:photos --output=data/photos --resolution=256
  pagoda prepare --source=tfds:imagenet2012 --data_dir=/data/tfds --output=data/imagenet --resolution=512
  pagoda prepare --verify --output=data/photos

Then --config.data.source=array_record --config.data.path=data/photos. Shards are fixed ranges of the
source, so that the same command goes on at the first one that is not there, whenever it was ended.
"""

import multiprocessing
from collections import Counter
from multiprocessing import connection

from etils import epath

from pagoda_jax.data import folders, records, shards, sources
from pagoda_jax.runtime import lock, processes
from pagoda_jax.runtime.files import file_digest, read_json, write_json, write_sealed
from pagoda_jax.runtime.interrupts import EXIT_INTERRUPTED, Interrupted
from pagoda_jax.runtime.progress import Progress

PLAN = 'prepare.json'  # what the shards are made of, written first: another plan must not go on with them
GO_ON = 'start the same command again to go on'


class PrepareError(ValueError):
  """Pictures cannot be prepared as asked."""


def open_input(text: str, data_dir: str = '', split: str = 'train') -> sources.Source:
  """The source that --source names, such as folder:PATH; unreadable pictures raise when they are read.

  The files of a folder are read here for their digest, but not decoded.

  Raises:
    PrepareError: there is no such kind of source.
    SourceError: there is no such source.
  """
  kind, _, place = text.partition(':')
  needs_place = kind in ('folder', 'tfds', 'array_record')
  if needs_place == bool(place):
    if kind == 'folder':
      return folders.open_folder(place, check=False)
    if kind in ('mnist', 'tfds', 'array_record'):
      return sources.open_whole(kind, data_dir if kind == 'tfds' else place, place, split)
  raise PrepareError(f'--source={text}: must be folder:PATH, tfds:NAME, array_record:PATH or mnist')


def prepare(source: sources.Source, output, recipe: records.Recipe, shard_size: int, workers: int,
            max_unreadable: float) -> dict:
  """Writes the shards that are not there yet, then the manifest.

  Args:
    source: the pictures.
    output: folder to write to.
    recipe: how they are stored.
    shard_size: pictures in a shard, unreadable ones included.
    workers: processes; 1 works in this one.
    max_unreadable: share of unreadable pictures that is left out without an error.

  Returns:
    The manifest.

  Raises:
    PrepareError: `output` was begun with other settings, or a worker process died.
    LockError: another process prepares pictures there.
    SourceError: too many pictures cannot be read.
    OSError: a shard cannot be written; names it.
    Interrupted: by Ctrl-C; finished shards stay.
  """
  with lock.hold(output):
    return _prepare(source, epath.Path(output), recipe, shard_size, workers, max_unreadable)


def _prepare(source, output, recipe, shard_size, workers, max_unreadable):
  layout = shards.Layout(records.PREFIX, len(source), shard_size)
  plan = {'data_sha256': source.digest, 'pictures': len(source), 'shard_size': shard_size, **vars(recipe)}
  _claim(output, plan)
  finished = set(shards.finished_shards(output, layout))
  numbers = [number for number in range(layout.num_shards) if number not in finished]
  if numbers:
    done = sum(len(layout.keys(number)) for number in finished)
    progress = Progress('prepare', len(source), done, unit='picture')
    _write(source, output, layout, numbers, recipe, min(workers, len(numbers)), _Counter(progress, done))
  return _close(source, output, layout, plan, max_unreadable)


def _claim(output, plan):
  path = output / PLAN
  output.mkdir(parents=True, exist_ok=True)
  if not path.exists():
    write_json(path, plan)
  try:
    found = read_json(path)
  except ValueError as error:
    raise PrepareError(f'{path}: damaged ({error}); delete it if the shards beside it are of these settings') from None
  differing = [key for key, value in plan.items() if found.get(key) != value]
  rows = [f'  {key}: there {found.get(key)!r}, here {plan[key]!r}' for key in differing]
  if rows:
    raise PrepareError(f'{output}: was begun with other pictures or settings:\n' + '\n'.join(rows)
                       + '\nUse another --output, or delete it.')


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


def _write(source, output, layout, numbers, recipe, workers, counter):
  try:
    if workers > 1:
      _write_in_processes((source, output, layout), numbers, recipe, workers, counter)
    else:
      for number in numbers:
        records.write_shard(source, output, layout, number, recipe, counter.tick)
  except KeyboardInterrupt:
    there = len(shards.finished_shards(output, layout))
    raise Interrupted(f'prepare: stopped with {there} of {layout.num_shards} shards written; {GO_ON}',
                      EXIT_INTERRUPTED) from None


def _write_in_processes(job, numbers, recipe, count, counter):
  context = multiprocessing.get_context('spawn')  # a fork would copy the threads' locks of JAX
  done, failed = context.Value('Q', 0), context.SimpleQueue()
  workers = [
    context.Process(target=records.work, args=(*job, numbers[i::count], recipe, done, failed), daemon=True)
    for i in range(count)
  ]
  try:
    for worker in workers:
      worker.start()
    while alive := [worker.sentinel for worker in workers if worker.exitcode is None]:
      connection.wait(alive, timeout=0.5)
      counter.show(done.value)
      for worker in workers:
        if worker.exitcode and not failed.empty():
          raise failed.get()
        if worker.exitcode:
          raise PrepareError(f'prepare: worker process {worker.pid} {processes.ending(worker.exitcode)}; {GO_ON}')
  finally:
    for worker in workers:
      if worker.pid is not None:
        worker.kill()  # it heeds nothing else
        worker.join()


def _close(source, output, layout, plan, max_unreadable) -> dict:
  lock.confirm()
  sidecars = {name: shards.read_sidecar(output, name) for name in layout.names}
  unreadable = [row for sidecar in sidecars.values() for row in sidecar['unreadable']]
  folders.report_unreadable(output, unreadable, layout.count, max_unreadable)
  counts = Counter(label for sidecar in sidecars.values() for label in sidecar['labels'])
  manifest = {
    'format_version': records.RAW_VERSION if plan['format'] == 'raw' else records.FORMAT_VERSION,
    'count': sum(sidecar['count'] for sidecar in sidecars.values()),
    **plan,
    'classes': list(source.class_names),
    'class_counts': [counts[label] for label in range(len(source.class_names))],
    'enlarged': sum(sidecar['enlarged'] for sidecar in sidecars.values()),
    'unreadable': unreadable,
    'shards': {
      name: {key: sidecar[key] for key in ('count', 'bytes', 'sha256')}
      | {'sidecar_sha256': file_digest(shards.sidecar_path(output, name))}
      for name, sidecar in sidecars.items()
    },
  }
  write_sealed(output / records.MANIFEST, manifest)
  return manifest


def verify(output) -> dict:
  """Compares every shard with its SHA-256; returns the manifest.

  Raises:
    SourceError: names the files that are damaged or missing.
  """
  manifest = records.read_manifest(output)
  progress, parts = Progress('verify', len(manifest['shards']), unit='shard'), []
  for done, (name, entry) in enumerate(manifest['shards'].items(), 1):
    parts += records.damaged_parts(output, manifest, name, verify=True)
    progress.update(done, entry['count'])
  records.refuse_damaged(output, parts)
  return manifest


def summary(output, manifest: dict) -> str:
  """One line about a prepared folder."""
  size = sum(entry['bytes'] for entry in manifest['shards'].values()) / 1e9
  enlarged = f', {manifest["enlarged"]} of them enlarged to it' if manifest['enlarged'] else ''
  return (f'{output}: {manifest["count"]} pictures of {len(manifest["classes"])} classes at '
          f'{manifest["resolution"]} px{enlarged}, in {len(manifest["shards"])} shards, {size:.2f} GB')
