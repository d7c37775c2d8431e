"""What transformers' config.json beside published weights tells of a text encoder."""

import json

from etils import epath

from pagoda_jax.weights.convert.mapping import ConversionError


def beside(path, part: str = '') -> dict:
  """config.json in the folder of a weights file, or its group `part` where it has that; {} without such a file.

  Raises:
    ConversionError: it is no JSON object.
  """
  file = epath.Path(path).parent / 'config.json'
  if not file.exists():
    return {}
  try:
    said = json.loads(file.read_bytes())
    said = said.get(part, said)
    return said | {'': str(file)}
  except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
    raise ConversionError(f'{file}: damaged ({type(error).__name__}: {error})') from None


def value(said: dict, key: str, kind: type, default):
  """The value of a key, of one type.

  Raises:
    ConversionError: it is of another.
  """
  found = said.get(key, default)
  found = float(found) if kind is float and type(found) is int else found
  if type(found) is not kind:
    raise ConversionError(f'{said[""]}: "{key}" = {str(found)[:80]!r}: must be {"text" if kind is str else "a number"}')
  return found
