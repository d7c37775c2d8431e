"""The part of `pagoda prepare` that embeds captions: shards of embeddings beside those of the pictures (texts.py).

Each shard of pictures is read once more, at its smallest resolution, for the captions in it. What is finished stays:
the same command goes on at the first shard that is not there, or whose pictures were made anew.
"""

from typing import Protocol

import numpy as np
from etils import epath

from pagoda_jax.data import captions, records, shards, texts
from pagoda_jax.runtime import lock
from pagoda_jax.runtime.files import file_digest, read_sealed, write_sealed
from pagoda_jax.runtime.progress import Progress

CLAIM = 'text.json'  # what the embeddings are made by, written first: another encoder must not go on with them
AT_ONCE = 256  # captions given to the encoder
COUNTS = ('captions', 'truncated', 'empty')


class PrepareError(ValueError):
  """Pictures cannot be prepared as asked."""


class Encoder(Protocol):
  """What embeds captions: text_encoders.Encoder."""

  name: str
  sha256: str
  length: int
  width: int
  pooled_width: int

  def __call__(self, captions: list[str]) -> dict[str, np.ndarray]: ...


def check_claim(output: epath.Path, encoder: Encoder) -> None:
  """Refuses a folder whose embeddings another encoder made.

  Raises:
    PrepareError: names both encoders; or what tells is damaged.
  """
  path = output / CLAIM
  if not path.exists():
    return
  try:
    found = read_sealed(path)
  except (OSError, ValueError) as error:
    raise PrepareError(f'{path}: damaged ({error}); delete it and the text shards beside it') from None
  differing = [key for key, value in _made_by(encoder).items() if key != 'encoder' and found.get(key) != value]
  if differing:
    rows = [f'  {key}: there {found.get(key)!r}, here {getattr(encoder, key)!r}' for key in differing]
    raise PrepareError(f'{output}: holds embeddings of captions by {found.get("encoder")}, and here is '
                       f'{encoder.name}:\n' + '\n'.join(rows)
                       + f'\nUse another --output, or delete {CLAIM} and {texts.PREFIX}* there.')


def _made_by(encoder) -> dict:
  return {'encoder': encoder.name} | {key: getattr(encoder, key) for key in ('sha256', *texts.SIZES)}


def add(output: epath.Path, manifest: dict, encoder: Encoder) -> dict:
  """Writes the shards of embeddings that are not there yet, and the manifest with them; returns that.

  Raises:
    PrepareError: pictures have no captions, the encoder makes numbers of them that float16 cannot hold, or another
      encoder was here.
    SourceError: a shard of pictures is damaged.
    OSError: a shard cannot be written; names it.
  """
  check_claim(output, encoder)
  write_sealed(output / CLAIM, _made_by(encoder))
  source = records.open_records(str(output))
  source = source.at(source.resolutions[0])
  layout = shards.Layout(texts.PREFIX, len(source.shard_names), 1)  # their numbers are those of the pictures' shards
  names = dict(zip(source.shard_names, layout.names))
  progress, starts = Progress('embed', len(source), unit='picture'), [0, *map(int, source.ends)]
  for number, (pictures, name) in enumerate(names.items()):
    made_from = _origin(manifest, pictures, encoder)
    if not _is_finished(output, name, made_from):
      _write_shard(source, range(starts[number], starts[number + 1]), output, name, number, encoder, made_from)
    progress.update(starts[number + 1], starts[number + 1] - starts[number])
  null = f'{texts.NULL_PREFIX}-00000-of-00001'
  made_from = {'encoder_sha256': encoder.sha256}
  if not _is_finished(output, null, made_from):
    _write_null(output, null, encoder, made_from)
  sidecars = {name: shards.read_sidecar(output, name) for name in [*names.values(), null]}
  totals = {key: sum(sidecar.get(key, 0) for sidecar in sidecars.values()) for key in COUNTS}
  manifest = manifest | {'text': _made_by(encoder) | totals | {'shards': {
    name: {key: sidecar[key] for key in ('count', 'bytes', 'sha256', 'pictures_sha256') if key in sidecar}
    | {'sidecar_sha256': file_digest(shards.sidecar_path(output, name))} for name, sidecar in sidecars.items()}}}
  lock.confirm()
  write_sealed(output / records.MANIFEST, manifest)
  return manifest


def _origin(manifest, pictures, encoder):
  return {'pictures_sha256': manifest['shards'][pictures]['sha256'], 'encoder_sha256': encoder.sha256}


def _is_finished(output, name, made_from):
  if not shards.is_finished(output, name):
    return False
  sidecar = shards.read_sidecar(output, name)
  return all(sidecar.get(key) == value for key, value in made_from.items())


def _write_shard(source, indices, output, name, number, encoder, made_from):
  writer = shards.ShardWriter(output, name)
  counts, waiting, place = dict.fromkeys(COUNTS, 0), [], 0
  for index in indices:
    record = source[index]
    waiting.append((record['name'], captions_of(record)))
    if sum(len(some) for _, some in waiting) >= AT_ONCE or index == indices[-1]:
      for row in _encoded(waiting, encoder, counts):
        writer.add(texts.encode_record(number, place, *row))
        place += 1
      waiting = []
  writer.close(**made_from, **counts)


def captions_of(record) -> captions.Captions:
  """The captions of a source's record; raises PrepareError where it has none."""
  if found := captions.of_record(record):
    return found
  raise PrepareError(f'--text_encoder: the picture {record["name"]} has no caption to embed; captions come from a '
                     "folder's captions.jsonl, or from .txt or .json in tars")


def _write_null(output, name, encoder, made_from):
  writer = shards.ShardWriter(output, name)
  (row,) = _encoded([('', [(captions.KINDS[0], '')])], encoder, dict.fromkeys(COUNTS, 0))
  writer.add(texts.encode_record(0, 0, *row))
  writer.close(**made_from)


def _encoded(waiting, encoder, counts):
  """Yields (kinds, text, mask, pooled) of each picture's captions; adds to the counts."""
  listed = [text for _, some in waiting for _, text in some]
  made = encoder(listed)
  for key in ('text', 'text_pooled'):
    with np.errstate(over='ignore'):
      made[key] = made[key].astype(texts.DTYPE)
    if wrong := np.flatnonzero(~np.isfinite(made[key]).reshape(len(listed), -1).all(1)).tolist():
      raise PrepareError(f'{encoder.name}: {key} of the caption {captions.shortened(listed[wrong[0]])} is beyond what '
                         'float16 holds (65504)')
  counts['captions'] += len(listed)
  counts['truncated'] += int(made['truncated'].sum())
  counts['empty'] += sum(not text.strip() for text in listed)
  start = 0
  for _, some in waiting:
    rows = slice(start, start := start + len(some))
    kinds = [captions.KINDS.index(kind) for kind, _ in some]
    yield kinds, made['text'][rows], made['text_mask'][rows], made['text_pooled'][rows]


def kept(output: epath.Path, manifest: dict) -> dict:
  """{'text': ...} of the manifest that is there, where its embeddings are of the pictures of this one; else {}."""
  try:
    text = read_sealed(output / records.MANIFEST)['text']
    shas = {entry['sha256'] for entry in manifest['shards'].values()}
    fit = all(entry.get('pictures_sha256', '') in {'', *shas} for entry in text['shards'].values())
    return {'text': text} if fit else {}
  except (OSError, ValueError, KeyError, TypeError):
    return {}


def summary(manifest: dict) -> str:
  """The end of a line about a prepared folder: its embeddings; '' without."""
  if 'text' not in manifest:
    return ''
  text = manifest['text']
  return (f'; {text["captions"]} captions embedded by {text["encoder"]}, {text["truncated"]} of them truncated to '
          f'{text["length"]} tokens, {text["empty"]} empty')
