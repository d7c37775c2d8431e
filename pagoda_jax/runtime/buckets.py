"""What lies in a bucket (gs://) instead of a file system: whole objects, of which any part can be read."""

from etils import epath

SCHEME = '://'


def is_in_bucket(path) -> bool:
  """Whether a path is one of a bucket, and not of a file system."""
  return SCHEME in str(path)


def absolute(path) -> epath.Path:
  """The path from the root of its file system; a bucket's as it is, which epath would take for a relative one."""
  path = epath.Path(path)
  return path if is_in_bucket(path) else path.absolute()


def system(path):
  """fsspec's file system of a path in a bucket; ImportError names the package that it lacks."""
  import fsspec  # with `gcs`, an extra

  return fsspec.core.url_to_fs(str(path))[0]


def read_range(path: str, start: int, end: int) -> bytes:
  """Bytes start to end-1 of an object, in one request."""
  return system(path).cat_file(path, start=start, end=end)


def upload(file, path) -> None:
  """Makes an object of a local file: whole, or not at all."""
  system(path).put_file(str(file), str(path))
