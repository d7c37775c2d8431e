"""What lies in a bucket (gs://) instead of a file system: whole objects, of which any part can be read."""

import concurrent.futures
from collections.abc import Callable, Iterable

import fsspec
from etils import epath

SCHEME = '://'
AT_ONCE = 32  # requests under way, of which each waits for the network
KNOWN = 'gs'  # epath would take schemes that it does not know for names of folders, and others were never tried
# gcsfs would remember how a folder looked, and the sizes of objects, for ever: what another host has written since,
# such as its lock, or Orbax by tensorstore, would be read as it was, or cut off. Before epath opens a bucket.
for _protocol in ('gs', 'gcs'):
  fsspec.config.conf.setdefault(_protocol, {})['use_listings_cache'] = False


class BucketError(ValueError):
  """No bucket, or none that can be reached from here; the message says why."""


def is_in_bucket(path) -> bool:
  """Whether a path is one of a bucket, and not of a file system."""
  return SCHEME in str(path)


def absolute(path) -> epath.Path:
  """The path from the root of its file system; a bucket's as it is, which epath would take for a relative one."""
  path = epath.Path(path)
  return path if is_in_bucket(path) else path.absolute()


def check(path) -> None:
  """Refuses a path in a bucket that cannot be one.

  Raises:
    BucketError: it is of another scheme, names no bucket, or the package for it is not installed.
  """
  scheme, _, rest = str(path).partition(SCHEME)
  if scheme != KNOWN or not rest.strip('/'):
    raise BucketError('names no bucket; must be gs://BUCKET/PATH, or a local path')
  try:
    fsspec.get_filesystem_class(scheme)
  except ImportError as error:
    raise BucketError(f'{error}: pip install "pagoda_jax[gcs]"') from None


def is_away(path, error: Exception) -> bool:
  """Whether what reading an object raised says nothing about it: its bucket cannot be reached or read at the moment."""
  away = isinstance(error, OSError) or type(error).__module__.startswith('gcsfs')  # whose answers of 500 and the like
  return is_in_bucket(path) and away and not isinstance(error, FileNotFoundError)


def system(path):
  """fsspec's file system of a path in a bucket."""
  return fsspec.core.url_to_fs(str(path))[0]


def mapped(folder, function: Callable, items: Iterable) -> list:
  """function(item) of each; of what lies in a bucket, where each waits for answers, of many at once."""
  if not is_in_bucket(folder):
    return list(map(function, items))
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    return list(pool.map(function, items))


def read_range(path: str, start: int, end: int) -> bytes:
  """Bytes start to end-1 of an object, in one request."""
  return system(path).cat_file(path, start=start, end=end)


def upload(file, path) -> None:
  """Makes an object of a local file: whole, or not at all."""
  system(path).put_file(str(file), str(path))
