"""Published tokenizers, through the packages that they were published for: tokenizers, sentencepiece (extra `text`)."""

import hashlib
import importlib
from collections.abc import Callable

import numpy as np
from etils import epath

from pagoda_jax.runtime.files import file_digest

BOS, EOS = '<|startoftext|>', '<|endoftext|>'  # CLIP's
# CLIP's words: its endings, runs of letters, single digits, runs of signs.
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
T5_EOS = '</s>'
KINDS = (('tokenizer.json',), ('vocab.json', 'merges.txt'), ('spiece.model',))
Tokenize = Callable[[list[str]], list[list[int]]]


class TokenizerError(ValueError):
  """No tokenizer, a damaged one, or the package that reads it is not installed; the message says which."""


def open_tokenizer(folder) -> Tokenize:
  """captions -> the ids of each, with the tokens that begin and end it; `folder` as in `files_of`.

  Raises:
    TokenizerError: there are no files of a tokenizer, they are damaged, or the package that reads them is not there.
  """
  files = files_of(folder)
  return _checked(_read(files), files[0])


def digest(folder) -> str:
  """SHA-256 of the files of a tokenizer, which are not read."""
  return hashlib.sha256(''.join(map(file_digest, files_of(folder))).encode()).hexdigest()


def files_of(folder) -> list[epath.Path]:
  """The files of a text encoder's tokenizer.

  Args:
    folder: with the encoder's weights, as transformers publishes it; or as diffusers does: for text_encoder_2 the
      files lie in tokenizer_2 beside it.

  Raises:
    TokenizerError: there are none.
  """
  folder = epath.Path(folder)
  places = dict.fromkeys((folder, folder.parent / folder.name.replace('text_encoder', 'tokenizer')))
  for place in places:
    for names in KINDS:
      files = [place / name for name in names]
      if all(file.exists() for file in files):
        return files
  raise TokenizerError(f'{" and ".join(map(str, places))}: no tokenizer; the published folders have '
                       f'{", or ".join(" and ".join(names) for names in KINDS)}')


def padded(ids: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(ids [N, length] int32 with zeros behind; mask [N, length] bool, True = token; truncated [N] bool).

  Of captions that are too long the first tokens are kept, and the last one, which ends them.
  """
  array, mask = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), bool)
  truncated = np.array([len(row) > length for row in ids], bool)
  for place, row in enumerate(ids):
    kept = row if len(row) <= length else [*row[: length - 1], row[-1]]
    array[place, : len(kept)], mask[place, : len(kept)] = kept, True
  return array, mask, truncated


def _read(files) -> Tokenize:
  package = 'sentencepiece' if files[0].suffix == '.model' else 'tokenizers'
  try:
    library = importlib.import_module(package)
  except ImportError:
    raise TokenizerError(f'{files[0]}: needs the package {package}; pip install "pagoda_jax[text]"') from None
  try:
    if package == 'sentencepiece':
      return _sentencepiece(library, files[0])
    if files[0].name == 'tokenizer.json':
      tokenizer = library.Tokenizer.from_str(files[0].read_text(encoding='utf-8'))
      tokenizer.no_padding()
      tokenizer.no_truncation()
    else:
      tokenizer = _clip(library, *files)
  except Exception as error:  # these packages raise bare Exceptions
    raise TokenizerError(f'{files[0]}: damaged, or no tokenizer ({_line(error)})') from None
  return lambda captions: [encoding.ids for encoding in tokenizer.encode_batch(captions)]


def _sentencepiece(sentencepiece, file) -> Tokenize:
  processor = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
  end = processor.piece_to_id(T5_EOS)
  if end == processor.unk_id():
    raise ValueError(f'it has no {T5_EOS}')
  return lambda captions: [[*row, end] for row in processor.encode(captions)]


def _clip(tokenizers, vocabulary, merges):
  """CLIP's byte-pair encoding, of words in lower case, as its own code splits them."""
  model = tokenizers.models.BPE.from_file(
    str(vocabulary), str(merges), unk_token=EOS, end_of_word_suffix='</w>', continuing_subword_prefix='')
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Sequence([
    tokenizers.normalizers.NFC(), tokenizers.normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
    tokenizers.normalizers.Lowercase()])
  split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), 'removed', invert=True)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
    split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
  ends = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS)]
  if any(number is None for _, number in ends):
    raise ValueError(f'no {BOS} or no {EOS} in the vocabulary')
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f'{BOS} $A {EOS}', special_tokens=ends)
  tokenizer.add_special_tokens([BOS, EOS])
  return tokenizer


def _checked(tokenize: Tokenize, file) -> Tokenize:
  """Refuses a tokenizer that does not end texts with a token: nothing would then stand for the empty one."""
  empty, other = tokenize(['', 'a'])
  if not empty or empty[-1] != other[-1]:
    raise TokenizerError(f'{file}: it does not end texts with a token; those of CLIP and T5 do')
  return tokenize


def _line(error):
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
