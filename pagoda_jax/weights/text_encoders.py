"""What embeds captions, by its name in config.text.encoder: published weights, hashed n-grams, any function."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pagoda_jax.networks.text import ngrams
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.files import file_digest
from pagoda_jax.weights import locate, text_tokenizers
from pagoda_jax.weights.convert import formats, state_dicts, torch_files
from pagoda_jax.weights.convert.mapping import ConversionError

FORMATS = ('clip', 't5')
WEIGHTS = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
BATCH = 32  # captions embedded at once, a device
NGRAMS_WIDTH = 256


class TextEncoderError(ValueError):
  """There is no such encoder, or it cannot be used as asked; the message says which and what would be right."""


@dataclasses.dataclass(frozen=True)
class Encoder:
  """What embeds captions.

  Attributes:
    name: as in config.text.encoder.
    sha256: of all that its embeddings follow from: weights, tokenizer, length.
    length, width, pooled_width: as in config.text.
    embed: captions -> (text, text_mask, text_pooled, truncated), arrays as `__call__` gives them.
  """

  name: str
  sha256: str
  length: int
  width: int
  pooled_width: int
  embed: Callable[[list[str]], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]

  def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Embeddings of captions.

    Returns:
      {'text': [N, L, W] float32, zero where there is no token; 'text_mask': [N, L] bool, True = token; 'text_pooled':
      [N, P] float32; 'truncated': [N] bool, whether the caption was too long, and its end is left out}.

    Raises:
      TextEncoderError: a caption is no text, or the encoder gives other arrays than it should, or no numbers.
    """
    captions = list(captions)
    for caption in captions:
      if not isinstance(caption, str):
        raise TextEncoderError(f'{str(caption)[:80]!r}: a caption must be text')
      try:
        caption.encode()
      except UnicodeEncodeError as error:
        raise TextEncoderError(f'{caption[:80]!r}: no Unicode text (character {error.start}: {error.reason})') from None
    text, mask, pooled, truncated = self.embed(captions)
    for name, array in (('text', text), ('text_pooled', pooled)):
      if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))[0])
        raise TextEncoderError(f'{self.name}: {name} of the caption {captions[row][:80]!r} holds NaN or infinity')
    return {'text': np.where(mask[..., None], text, 0).astype(np.float32), 'text_mask': mask,
            'text_pooled': pooled.astype(np.float32), 'truncated': truncated}


@functools.lru_cache(maxsize=2)
def open_encoder(name: str, length: int, width: int = 0, pooled_width: int = 0) -> Encoder:
  """An encoder by its name.

  Args:
    name: 'clip:FOLDER' or 't5:FOLDER' as published in transformers' form (config.json, weights, tokenizer), 'ngrams',
      or 'module:function': function(list of text) -> (text [N, L, W], text_mask [N, L], text_pooled [N, P]), or a dict
      of these names.
    length: tokens of a caption.
    width, pooled_width: what it must give; 0: whatever it does.

  Raises:
    TextEncoderError: there is no such encoder, it cannot be used so, or it gives other widths.
    TokenizerError, ConversionError, WeightsFileError: its files are missing, damaged or of another architecture.
  """
  kind, _, place = name.partition(':')
  if kind in FORMATS and place:
    encoder = _published(name, kind, epath.Path(place).expanduser(), length)
  elif name == 'ngrams':
    encoder = _ngrams(length, width or NGRAMS_WIDTH, pooled_width or width or NGRAMS_WIDTH)
  elif place and all(map(str.isidentifier, [*kind.split('.'), *place.split('.')])):
    encoder = _callable(name, kind, place, length)
  else:
    raise TextEncoderError(f'{name!r}: must be clip:FOLDER, t5:FOLDER, ngrams or module:function')
  for key, asked in (('width', width), ('pooled_width', pooled_width)):
    if asked not in (0, getattr(encoder, key)):
      raise TextEncoderError(f'config.text.{key} = {asked}: must be {getattr(encoder, key)}, which {name} gives')
  return encoder


def name_elsewhere(name: str) -> str:
  """A name for files that are handed on: of a folder of this machine alone its last part."""
  kind, _, place = name.partition(':')
  return f'{kind}:{os.path.basename(place.rstrip("/"))}' if kind in FORMATS and place[:1] in ('/', '~') else name


def check(config) -> None:
  """Refuses an experiment whose stored embeddings another encoder made than its own, where that is on this machine.

  Training reads embeddings only, so published weights need not be; a user's function is compared when it is used.

  Raises:
    TextEncoderError: names both. As `open_encoder`, of damaged files.
  """
  text = config.text
  kind, _, place = text.encoder.partition(':')
  if text.encoder == 'ngrams':
    found = open_encoder(text.encoder, text.length, text.width, text.pooled_width).sha256
  elif kind in FORMATS and (folder := epath.Path(place).expanduser()).is_dir():
    found = _published_digest(kind, folder, text.length, locate.recorded_digest)
  else:
    return
  check_same(text, found)


def check_same(text, sha256: str) -> None:
  """Refuses an encoder, by its SHA-256, that is not the one of `config.text`.

  Raises:
    TextEncoderError: it is not.
  """
  if text.sha256 not in ('', sha256):
    raise TextEncoderError(f'config.text.encoder = {text.encoder!r}: this encoder (SHA-256 {sha256}) is another than '
                           f'the one that made the embeddings which networks are trained on (SHA-256 {text.sha256})')


def _hash(*values) -> str:
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _ngrams(length, width, pooled_width):
  embed = functools.partial(ngrams.embed, length=length, width=width, pooled_width=pooled_width)
  sha256 = _hash('ngrams', ngrams.VERSION, length, width, pooled_width)
  return Encoder('ngrams', sha256, length, width, pooled_width, embed)


def weights_file(folder) -> epath.Path:
  """The weights in a folder that transformers publishes; TextEncoderError where there are none."""
  folder = epath.Path(folder).expanduser()
  found = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
  if found is None:
    state = 'no weights in it' if folder.is_dir() else 'no such folder'
    raise TextEncoderError(f'{folder}: {state}; a published text encoder has {", ".join(WEIGHTS[:2])} or '
                           f'{" or ".join(WEIGHTS[2:])}, config.json, and a tokenizer')
  return found


def _published_digest(kind, folder, length, digest_of_file=file_digest):
  weights, config = weights_file(folder), folder / 'config.json'
  return _hash(kind, torch_files.digest(weights, digest_of_file), _options_said(kind, weights, config),
               text_tokenizers.digest(folder), length)


def _options_said(kind, weights, config):
  if not config.exists():
    raise TextEncoderError(f'{config}: missing; it tells what the weights do not, such as the activation')
  return formats.FORMATS[kind].described(weights)


def _published(name, kind, folder, length):
  weights, module = weights_file(folder), formats.FORMATS[kind]
  tokenize = text_tokenizers.open_tokenizer(folder)
  sha256 = _published_digest(kind, folder, length)
  asked = _options_said(kind, weights, folder / 'config.json')
  tensors = {key: value for key, value in torch_files.read(weights).tensors.items() if not module.carried(key)}
  tensors, _ = state_dicts.as_float32(tensors)
  try:
    if bad := state_dicts.non_finite_names(tensors):
      raise ConversionError(f'NaN or infinite numbers in {", ".join(bad[:5])}')
    converted = formats.from_state_dict(tensors, kind, **asked)
  except ConversionError as error:
    raise ConversionError(f'{weights}: {error}') from None
  network = module.network(converted.options)
  limit = getattr(network, 'positions', length)
  if length > limit:
    raise TextEncoderError(f'config.text.length = {length}: {name} takes at most {limit} tokens')
  embed = _embedding(network, converted.variables, tokenize, length, name)
  width = network.width
  return Encoder(name, sha256, length, width, getattr(network, 'projection', 0) or width, embed)


def _embedding(network, variables, tokenize, length, name):
  """Captions -> arrays, on all devices of this process; the weights are split among them."""
  mesh = sharding.make_mesh(data=1, fsdp=-1, devices=jax.local_devices())
  variables, size = sharding.place(variables, mesh), BATCH * len(jax.local_devices())

  @jax.jit
  def apply(variables, ids, mask):
    with jax.default_matmul_precision('highest'):  # embeddings do not depend on the chip
      return network.apply(variables, ids, mask)

  def embed(captions):
    tokens = tokenize(captions)
    largest = max((max(row) for row in tokens), default=0)
    if largest >= network.vocabulary:
      raise TextEncoderError(f'{name}: its tokenizer knows {largest + 1} tokens or more, its weights '
                             f'{network.vocabulary}: they do not belong together')
    ids, mask, truncated = text_tokenizers.padded(tokens, length)
    text = np.zeros((len(captions), length, network.width), np.float32)
    pooled = np.zeros((len(captions), getattr(network, 'projection', 0) or network.width), np.float32)
    for start in range(0, len(captions), size):
      rows = slice(start, start + size)
      lacking = size - len(ids[rows])  # the last batch is filled up: one program serves all
      some = {'ids': np.pad(ids[rows], ((0, lacking), (0, 0)), mode='edge'),
              'mask': np.pad(mask[rows], ((0, lacking), (0, 0)), mode='edge')}
      with jax.set_mesh(mesh):
        placed = sharding.place_global(some, mesh)
        found = jax.device_get(apply(variables, placed['ids'], placed['mask']))
      text[rows], pooled[rows] = (array[: size - lacking] for array in found)
    return text, mask, pooled, truncated

  return embed


def _callable(name, module_name, path, length):
  function, source = _imported(name, module_name, path)
  text, _, pooled = _arrays(function([''] * 2), name, 2, length)
  width, pooled_width = text.shape[2], pooled.shape[1]

  def embed(captions):
    if not captions:
      return np.zeros((0, length, width)), np.zeros((0, length), bool), np.zeros((0, pooled_width)), np.zeros(0, bool)
    arrays = _arrays(function(captions), name, len(captions), length)
    if arrays[0].shape[2] != width or arrays[2].shape[1] != pooled_width:
      raise TextEncoderError(f'{name}: gave text of width {arrays[0].shape[2]} and text_pooled of width '
                             f'{arrays[2].shape[1]}, and before {width} and {pooled_width}')
    return *arrays, np.zeros(len(captions), bool)

  sha256 = _hash(name, source, str(getattr(function, 'sha256', '')), length, width, pooled_width)
  return Encoder(name, sha256, length, width, pooled_width, embed)


def _imported(name, module_name, path):
  """(the function, SHA-256 of its module's source); the current folder is searched too, as by `python -m`."""
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    module = importlib.import_module(module_name)
    function = functools.reduce(getattr, path.split('.'), module)
  except (ImportError, AttributeError) as error:
    raise TextEncoderError(f'config.text.encoder = {name!r}: {error}; must be module:function of an importable module, '
                           'or of a file in the current folder') from None
  if not callable(function):
    raise TextEncoderError(f'config.text.encoder = {name!r}: a {type(function).__name__}; must be a function')
  try:
    return function, hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
  except (OSError, TypeError):  # no Python source
    return function, ''


def _arrays(found, name, count, length):
  """What a user's function gave, checked: (text, mask, pooled)."""
  names = ('text', 'text_mask', 'text_pooled')
  shapes = f'text [{count}, {length}, W], text_mask [{count}, {length}], text_pooled [{count}, P]'
  if isinstance(found, dict):
    found = tuple(found.get(key) for key in names)
  if not isinstance(found, (tuple, list)) or len(found) != 3:
    raise TextEncoderError(f'{name}: gave a {type(found).__name__}; must give ({shapes}), or a dict of these names')
  text, mask, pooled = (np.asarray(array) for array in found)
  said = f'{name}: gave text {text.shape}, text_mask {mask.shape}, text_pooled {pooled.shape}'
  if not (text.ndim == 3 and pooled.ndim == 2 and text.shape[:2] == (count, length) == mask.shape
          and len(pooled) == count and text.shape[2] and pooled.shape[1]):
    raise TextEncoderError(f'{said}; must give {shapes}')
  if not all(jnp.issubdtype(array.dtype, jnp.floating) for array in (text, pooled)):
    raise TextEncoderError(f'{name}: gave text of {text.dtype}, text_pooled of {pooled.dtype}; must be floating point')
  if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
    raise TextEncoderError(f'{name}: gave a text_mask of {mask.dtype}; must be True where there is a token')
  mask = mask.astype(bool)
  if not mask.any(1).all():
    raise TextEncoderError(f'{name}: gave a text_mask without tokens; each caption, even the empty one, must have one')
  return text.astype(np.float32), mask, pooled.astype(np.float32)
