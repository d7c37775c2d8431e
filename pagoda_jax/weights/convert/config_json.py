"""config.json beside published weights, as transformers and diffusers write it: what names and shapes do not tell."""

import json
import math

from etils import epath

from pagoda_jax.runtime.files import read_whole
from pagoda_jax.weights.convert.mapping import ConversionError

FILE = 'config.json'
LARGEST = 2**20  # bytes


def beside(path, kinds: tuple[str, ...], part: str = '') -> dict:
  """config.json in the folder of a weights file, or its group `part` where it has that; {} without such a file.

  Args:
    path: of the weights; local or gs://.
    kinds: what it may call itself: "model_type" of transformers', "_class_name" of diffusers'. One that says neither
      is taken.
    part: name of a group.

  Returns:
    Its values; under '' its own path, for messages.

  Raises:
    ConversionError: it is no JSON object, or of other weights that lie in the same folder.
  """
  file = epath.Path(path).parent / FILE
  if not file.exists():
    return {}
  try:
    content = read_whole(file, LARGEST + 1)
    if len(content) > LARGEST:
      raise ValueError(f'longer than {LARGEST} bytes')
    said = json.loads(content)
    found = said.get(part, said)
    if not isinstance(found, dict):
      raise TypeError(f'"{part}" is no object')
  except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
    what = 'no object' if isinstance(error, AttributeError) else error
    raise ConversionError(f'{file}: not the description of a network: {what}') from None
  kind = said.get('_class_name') or said.get('model_type')
  if kind is not None and kind not in kinds:
    raise ConversionError(f'{file}: of a network of kind {str(kind)[:80]!r}, not {" or ".join(kinds)}: it tells '
                          f'nothing of {epath.Path(path).name}; move it away, or each into a folder of its own')
  return found | {'': str(file)}


def value(said: dict, key: str, kind: type, default):
  """The value of a key, of one type; numbers are finite and above 0.

  Raises:
    ConversionError: it is another.
  """
  found = said.get(key, default)
  found = float(found) if kind is float and type(found) is int else found
  if type(found) is not kind or (kind is not str and not 0 < found < math.inf):
    must = 'text' if kind is str else 'a number above 0'
    raise ConversionError(f'{said[""]}: "{key}" = {str(found)[:80]!r}: must be {must}')
  return found
