"""Captions of pictures, of two kinds: as they were found, and written anew; how files and records hold them.

A record has its first caption as 'caption', and where there are more, or that one is written anew, all as 'captions':
[[kind, caption], ...] by the names of KINDS.
"""

import json
from collections.abc import Mapping
from typing import Any

from pagoda_jax.data.pictures import SourceError

KINDS = ('original', 'recaption')
KEYS = {'caption': 'original', 'recaption': 'recaption'}  # of JSON rows: a text, or a list of them
MAX_CHARACTERS = 2**20  # of a caption: beyond, it is some other text
MAX_CAPTIONS = 1000  # of a picture

Captions = list[tuple[str, str]]  # (kind, text) of each


def of_row(row: Mapping[str, Any], where: str) -> Captions:
  """The captions of a JSON object: "caption" and "recaption", each a text or a list of texts; others are ignored.

  Raises:
    SourceError: they are something else; begins with `where` that is.
  """
  found = []
  for key, kind in KEYS.items():
    value = row.get(key, [])
    for caption in [value] if not isinstance(value, list) else value:
      if not isinstance(caption, str):
        raise SourceError(f'{where}: "{key}" = {shortened(value)}: must be a string, or a list of strings')
      found.append((kind, checked(caption, where)))
  if len(found) > MAX_CAPTIONS:
    raise SourceError(f'{where}: {len(found)} captions; at most {MAX_CAPTIONS} are taken')
  return found


def checked(caption: str, where: str) -> str:
  """A caption that is not too long, and Unicode.

  Raises:
    SourceError: it is.
  """
  if len(caption) > MAX_CHARACTERS:
    raise SourceError(f'{where}: a caption of {len(caption)} characters; at most {MAX_CHARACTERS} are taken')
  try:
    caption.encode()
  except UnicodeEncodeError as error:
    raise SourceError(f'{where}: "caption" = {shortened(caption)}: no Unicode text (character {error.start}: '
                      f'{error.reason})') from None
  return caption


def decoded(content: bytes, where: str) -> str:
  """UTF-8 to text; a byte order mark at the beginning is taken off.

  Raises:
    SourceError: it is something else.
  """
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    byte = f'byte 0x{error.object[error.start]:02x}: {error.reason}'
    raise SourceError(f'{where}: not UTF-8 ({byte}); save the file as UTF-8') from None


def json_object(text: str, where: str, must: str) -> dict:
  """The JSON object in a text; `must` says what it should be.

  Raises:
    SourceError: there is none.
  """
  try:
    row = json.loads(text)
    if not isinstance(row, dict):
      raise TypeError(f'a {type(row).__name__}')
    return row
  except (ValueError, TypeError, RecursionError) as error:
    raise SourceError(f'{where}: {must} ({type(error).__name__}: {error})') from None


def as_record(captions: Captions) -> dict[str, Any]:
  """The keys of a record that hold these captions; {} of none."""
  if not captions:
    return {}
  first = {'caption': captions[0][1]}
  alone = len(captions) == 1 and captions[0][0] == KINDS[0]
  return first if alone else first | {'captions': [list(caption) for caption in captions]}


def of_record(record: Mapping[str, Any]) -> Captions:
  """The captions of a source's record; [] where it has none."""
  if 'captions' in record:
    return [(kind, caption) for kind, caption in record['captions']]
  return [(KINDS[0], record['caption'])] if 'caption' in record else []


def shortened(value) -> str:
  """A value for a message."""
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + '...'
