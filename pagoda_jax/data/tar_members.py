"""Which files a tar holds, and where: its headers read one after the other, and anything odd refused by name.

Python's tarfile ends at a header that it cannot read as at the end of the archive; here that is an error.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pagoda_jax.data.captions import shortened
from pagoda_jax.data.pictures import SourceError

BLOCK = tarfile.BLOCKSIZE
END = bytes(BLOCK)  # two of them end an archive
MAX_NAME = 2**16  # bytes of a long name, or of a pax header
COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}
REPACK = 'write it anew with `tar -cf` (or webdataset.TarWriter) of regular files'
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
ABOUT_NEXT = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
KINDS = {tarfile.LNKTYPE: 'a hard link', tarfile.SYMTYPE: 'a symbolic link', tarfile.CHRTYPE: 'a device',
         tarfile.BLKTYPE: 'a device', tarfile.FIFOTYPE: 'a FIFO', tarfile.GNUTYPE_SPARSE: 'a sparse file'}


class Member(NamedTuple):
  """A file within a tar."""

  name: str  # with forward slashes, relative, without '.' and '..'
  offset: int  # of its first byte
  size: int


def members(file: BinaryIO, path) -> Iterator[Member]:
  """The regular files of a tar, in their order; folders are passed over.

  GNU's long names and pax headers are understood.

  Args:
    file: open at its beginning.
    path: of the tar, for messages.

  Raises:
    SourceError: it is compressed, no tar, cut short, or one after another in one file; or a member is no regular file
      or has a path outside. Names the tar, the member and its place.
  """
  end, position, pax, long_name = file.seek(0, 2), 0, {}, None
  _refuse_compressed(_block(file, 0), path)
  while (header := _block(file, position)) != END:
    info = _info(header, path, position)
    name = pax.get('path') or long_name or info.name
    where = f'{path}: member {shortened(name)} at byte {position}'
    if info.type in KINDS or any(key.startswith('GNU.sparse') for key in pax):
      raise SourceError(f'{where}: {KINDS.get(info.type, "a sparse file")}, and only regular files are taken; {REPACK}')
    if info.type not in (*REGULAR, *ABOUT_NEXT, tarfile.XGLTYPE, tarfile.DIRTYPE):
      raise SourceError(f'{where}: of type {info.type!r}, which is not known; {REPACK}')
    position += BLOCK
    if info.type == tarfile.DIRTYPE:
      _inside(name, where)
      pax, long_name = {}, None
      continue
    is_file = info.type in REGULAR
    size = _number(pax['size'], where) if is_file and 'size' in pax else info.size
    if size < 0 or position + size > end:
      raise SourceError(f'{where}: cut short: its {size} bytes end after the file, at byte {end}; copy it again')
    if is_file:
      yield Member(_inside(name, where), position, size)
      pax, long_name = {}, None
    elif info.type == tarfile.GNUTYPE_LONGNAME:
      long_name = _text(_content(file, position, size, where).rstrip(b'\0'), where)
    elif info.type != tarfile.GNUTYPE_LONGLINK:
      said = _pax(_content(file, position, size, where), where)
      if info.type == tarfile.XGLTYPE and said.keys() & {'path', 'size'}:
        raise SourceError(f'{where}: a pax header that gives all members one path or size; {REPACK}')
      pax = pax if info.type == tarfile.XGLTYPE else said
    position += -(-size // BLOCK) * BLOCK
  _check_end(file, path, position, end)


def _refuse_compressed(first, path):
  for magic, name in COMPRESSED.items():
    if first.startswith(magic):
      raise SourceError(f'{path}: compressed ({name}), and no member of it can be read by itself: decompress it '
                        '(`gunzip -k`, `zstd -d`, ...); pictures in it are compressed already')


def _block(file, position):
  file.seek(position)
  return file.read(BLOCK)


def _info(header, path, position):
  if len(header) < BLOCK:
    where = 'no tar: it' if not position else f'cut short: it ends at byte {position + len(header)}, and'
    raise SourceError(f'{path}: {where} has no end of an archive; copy it again, or {REPACK}')
  try:
    return tarfile.TarInfo.frombuf(header, 'utf-8', 'strict')
  except UnicodeDecodeError as error:
    byte = f'byte 0x{error.object[error.start]:02x}: {error.reason}'
    raise SourceError(f'{path}: member at byte {position}: its name is not UTF-8 ({byte}); {REPACK}') from None
  except (tarfile.TarError, ValueError) as error:
    what = 'no tar, or a damaged one' if not position else 'damaged'
    raise SourceError(f'{path}: {what}: no header of a member at byte {position} ({error}); copy it again') from None


def _check_end(file, path, position, end):
  """That two blocks of zeros end the archive, and nothing but zeros follows."""
  if position + 2 * BLOCK > end:
    raise SourceError(f'{path}: cut short: half an end of an archive at byte {position}; copy it again')
  file.seek(position)
  while chunk := file.read(2**20):
    if rest := chunk.lstrip(b'\0'):
      place = file.tell() - len(rest)
      raise SourceError(f'{path}: the archive ends at byte {position}, and at byte {place} something follows: tars '
                        'written one after the other (`cat`) are joined by `tar -A`; or give them a file each')


def _content(file, position, size, where):
  if size > MAX_NAME:
    raise SourceError(f'{where}: a name or header of {size} bytes; at most {MAX_NAME} are read')
  file.seek(position)
  return file.read(size)


def _text(content, where):
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise SourceError(f'{where}: not UTF-8 (byte 0x{content[error.start]:02x}: {error.reason}); {REPACK}') from None


def _pax(content, where) -> dict[str, str]:
  """The records "LENGTH KEY=VALUE\\n" of a pax header; of those but path and size, that they are there."""
  found, position = {}, 0
  while position < len(content.rstrip(b'\0')):
    match = re.match(rb'([1-9][0-9]{0,5}) ([^=\n]+)=', content[position:])
    length = int(match[1]) if match else 0
    record = content[position : position + length]
    if not match or len(record) < length or length <= match.end() or record[-1:] != b'\n':
      raise SourceError(f'{where}: a damaged pax header at its byte {position}; copy the tar again')
    key, value = match[2].decode(errors='replace'), record[match.end() : -1]
    found[key] = _text(value, where) if key in ('path', 'size') else ''
    position += length
  return found


def _number(text, where):
  if not re.fullmatch('[0-9]{1,18}', text):
    raise SourceError(f'{where}: a damaged pax header: size = {shortened(text)}')
  return int(text)


def _inside(name, where):
  parts = [part for part in name.split('/') if part not in ('', '.')]
  if name.startswith('/') or '..' in parts or '\0' in name:
    raise SourceError(f'{where}: a path outside; it must be relative and without ".."')
  return '/'.join(parts)
