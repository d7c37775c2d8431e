"""What requests ask for, checked, as calls of a generator; what they get, as JSON values."""

import base64
import binascii
import dataclasses
import io
import json
import math
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from pagoda_jax.runtime import buckets
from pagoda_jax.use import edit, picture_files
from pagoda_jax.use.generator import LARGEST_SEED, Generator
from pagoda_jax.use.serve.limits import Limits, Refusal

SIZES = (1, 16)  # of compiled batches
PICTURES = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF')  # which Pillow reads without other programs
EDITS = ('reconstruct', 'inpaint')
STEPS, TRIES = (25, 400, 100), (1, 4, 1)  # least, most, default
TEACHERS_OMEGA = 8.0  # the strongest guidance of a teacher here
MOST_VALUES = 10_000  # of a body; pictures and noise are one each
LONGEST_PROMPT = 1000  # characters, of what page.html takes too
NO_TEXT = ('Cc', 'Cs')  # Unicode's categories: controls, line ends among them, and halves of characters
LARGEST_NOISE = 100.0  # times sigma_max


def describe(generator: Generator, limits: Limits) -> dict:
  """What the page is to know of a generator; names no folder but by its last part."""
  source = generator.where if generator.folder else epath.Path(generator.where.split(' of ')[-1]).name
  return {
    'name': generator.name,
    'where': source,
    'run': buckets.absolute(generator.folder).name if generator.folder else '',
    'kind': generator.kind,
    'resolution': generator.resolution,
    'channels': generator.channels,
    'num_classes': generator.num_classes,
    'noise_shape': list(generator.networks.noise_shape(1)[1:]),
    'sigma_max': float(generator.networks.sigma_max),
    'omega': omegas(generator),
    'text': generator.takes_text,
    'edits': list(EDITS) if generator.kind == 'generator' else [],
    'tries_labels': 0 < generator.num_classes <= edit.MOST_CLASSES,
    'limits': {'images': limits.images_of(generator.resolution), 'bytes': limits.body, 'pixels': limits.picture},
  }


def omegas(generator: Generator) -> dict | None:
  """The range of strengths of guidance that it can be drawn with, and the default; None: it takes none."""
  if not generator.num_classes and not generator.takes_text:
    return None
  phase, law = generator.config.phases[generator.name], generator.networks.law
  if generator.kind == 'teacher':
    guided = phase.label_dropout or phase.init_from
    return {'low': 1.0, 'high': TEACHERS_OMEGA, 'default': 1.0} if guided else None
  if law is None:
    return None
  low, high = (float(end) for end in law.ends)
  return {'low': low, 'high': high, 'default': float(law.nearest(1.0))}


class Fields:
  """The values of a JSON object, each taken once; what is left over is refused.

  Raises:
    Refusal: it is no JSON object (400), has too many values (413), or one that is not what it must be (422).
  """

  def __init__(self, body: bytes):
    if body.count(b',') > MOST_VALUES:  # a list of nothings takes twenty times the memory of its text
      raise Refusal(413, f'the body has more than {MOST_VALUES} values')
    try:
      values = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
      raise Refusal(400, 'the body is no JSON, or not all of it') from None
    if not isinstance(values, dict):
      raise Refusal(400, 'the body must be a JSON object')
    self._values = values

  def has(self, name: str) -> bool:
    return self._values.get(name) is not None

  def take(self, name: str, default=None) -> Any:
    value = self._values.pop(name, None)
    return default if value is None else value

  def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
    return _whole(name, self.take(name, default), low, high)

  def content(self, name: str) -> bytes:
    """Bytes in base64."""
    value = self.take(name)
    try:
      return base64.b64decode(value, validate=True) if isinstance(value, str) else _refuse_base64(name)
    except (ValueError, binascii.Error):
      return _refuse_base64(name)

  def end(self) -> None:
    if self._values:
      raise Refusal(422, f'{", ".join(_short(name) for name in list(self._values)[:5])}: no such field here')


def _whole(name, value, low, high) -> int | None:
  if value is not None and (type(value) is not int or not low <= value <= high):
    raise Refusal(422, f'{name} = {_short(value)}: must be a whole number in {low} to {high}')
  return value


def _no_number(text):
  raise ValueError(text)


def _refuse_base64(name):
  raise Refusal(422, f'{name}: must be bytes in base64')


def _short(value) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:57] + '...'


@dataclasses.dataclass(frozen=True)
class Calls:
  """The calls of one generator; each takes a body and returns what is to be done in the device's turn.

  That is a function of a `device.Work`, which returns (uint8 images, noise, labels, JSON values besides).
  """

  generator: Generator
  limits: Limits

  def warm_up(self) -> None:
    """Compiles what draws; of a teacher with guidance too, which is another program."""
    known = omegas(self.generator)
    for size in SIZES:
      for omega in (None, known['default']) if known and self.generator.kind == 'teacher' else (None,):
        self._images(self.generator.noise(0, size), self.generator.labels(None, size, 0), omega, '')

  def draw(self, body: bytes) -> Callable:
    """New images of a seed, or the images of given noise."""
    generator, fields = self.generator, Fields(body)
    most = self.limits.images_of(generator.resolution)
    omega, noise, labels = self._omega(fields), None, fields.take('labels')
    if labels is not None and not isinstance(labels, (str, int, list)):
      raise Refusal(422, f"labels = {_short(labels)}: must be a class, a list of classes, 'cycle' or 'random'")
    prompt = self._prompt(fields, 'labels', labels)
    seed = fields.whole('seed', 0, 0, LARGEST_SEED)
    count = fields.take('count')
    if count is not None and (type(count) is not int or count < 1):
      raise Refusal(422, f'count = {_short(count)}: must be a whole number, at least 1')
    if fields.has('noise'):
      noise = self._noise(fields.content('noise'))
      if count not in (None, len(noise)):
        raise Refusal(422, f'count = {count}: there is noise of {len(noise)} images')
      count = len(noise)
    fields.end()
    asked = max(count or 1, len(labels) if isinstance(labels, list) else 1)
    if asked > most:
      raise Refusal(413, f'{asked} images: at most {most} a request')
    if isinstance(labels, str) and len(labels) > 1000:
      raise Refusal(422, "labels: too long; must be 'cycle', 'random' or a list of classes")
    if isinstance(labels, list) and not all(type(label) is int for label in labels):
      raise Refusal(422, f'labels = {_short(labels)}: must be whole numbers')
    try:
      classes = generator.labels(labels, count, seed)
    except ValueError as error:
      raise Refusal(422, str(error).removeprefix('--')) from None
    if len(classes) > most:
      raise Refusal(413, f'{len(classes)} images: at most {most} a request')

    def work(turn):
      of = generator.noise(seed, len(classes)) if noise is None else noise
      return self._images(of, classes, omega, prompt), np.asarray(of), classes, {}

    return work

  def square(self, body: bytes) -> dict:
    """A picture as the generator would be shown it."""
    fields = Fields(body)
    picture = self._picture(fields.content('picture'), 'picture')
    fields.end()
    generator = self.generator
    return {'png': png(_square(picture, generator)), 'width': picture.width, 'height': picture.height}

  def edit(self, body: bytes) -> Callable:
    """A picture reconstructed, or what a mask marks of it painted anew."""
    generator, fields = self.generator, Fields(body)
    if generator.kind == 'teacher':
      raise Refusal(422, 'a teacher draws here; edits need a one-step generator')
    word = fields.take('edit')
    if word not in EDITS:
      raise Refusal(422, f'edit = {_short(word)}: must be {" or ".join(EDITS)}')
    omega, label = self._omega(fields), fields.take('label')
    prompt = self._prompt(fields, 'label', label)
    if label is not None and not generator.num_classes:
      raise Refusal(422, f'label = {_short(label)}: {generator.name} knows no classes')
    label = _whole('label', label, 0, generator.num_classes - 1)
    options = edit.Options(
      steps=fields.whole('steps', STEPS[2], *STEPS[:2]), tries=fields.whole('tries', TRIES[2], *TRIES[:2]),
      seed=fields.whole('seed', 0, 0, LARGEST_SEED), learning_rate=0.1)
    contents = {name: fields.content(name) for name in ('picture', 'mask')[: 1 + (word == 'inpaint')]}
    fields.end()
    picture = self._picture(contents['picture'], 'picture')
    arguments = [_square(picture, generator)[None]]
    if word == 'inpaint':
      mask = self._picture(contents['mask'], 'mask')
      try:
        arguments.append(picture_files.mask(mask, picture.size, generator.resolution)[None])
      except edit.EditError as error:
        raise Refusal(422, str(error)) from None

    def work(turn):
      try:
        found = getattr(edit, word)(generator, *arguments, label, options=options, report=turn.check, omega=omega,
                                    prompts=prompt)
      except edit.EditError as error:
        raise Refusal(422, str(error)) from None
      told = {'misfit': round(float(found.misfit[0]), 2), 'steps': found.steps, 'settled': found.settled}
      return found.images, found.noise, found.labels, told

    return work

  def _prompt(self, fields, key: str, labels) -> str | None:
    """What pictures show, '' where it is not said: the empty caption. None of a network of labels.

    Args:
      fields: of the body.
      key: of labels there, which a network of captions takes none of.
      labels: their value.
    """
    generator, prompt = self.generator, fields.take('prompt')
    if not generator.takes_text:
      if prompt is not None:
        raise Refusal(422, f'prompt = {_short(prompt)}: {generator.name} was not trained with captions; give {key}')
      return None
    if labels is not None:
      raise Refusal(422, f'{key} = {_short(labels)}: {generator.name} draws what captions say; give a prompt')
    if prompt is None:
      return ''
    if not isinstance(prompt, str) or len(prompt) > LONGEST_PROMPT:
      raise Refusal(422, f'prompt = {_short(prompt)}: must be a text of at most {LONGEST_PROMPT} characters')
    if wrong := [letter for letter in prompt if unicodedata.category(letter) in NO_TEXT]:
      raise Refusal(422, f'prompt = {_short(prompt)}: must be one line of text; U+{ord(wrong[0]):04X} is a control '
                    'character, or half of one')
    return prompt

  def _omega(self, fields) -> float | None:
    value, known = fields.take('omega'), omegas(self.generator)
    if value is None:
      return None
    if type(value) not in (int, float) or abs(value) == math.inf:  # no NaN is read; an int may be beyond all floats
      raise Refusal(422, f'omega = {_short(value)}: must be a number')
    if known is None:
      raise Refusal(422, f'omega = {_short(value)}: {self.generator.name} was trained without guidance')
    low, high = known['low'], known['high']
    if not low <= value <= high:
      raise Refusal(422, f'omega = {_short(value)}: must be in {low:g} to {high:g}')
    return float(value)

  def _noise(self, content: bytes) -> np.ndarray:
    shape = self.generator.networks.noise_shape(1)[1:]
    size = 4 * math.prod(shape)
    if not content or len(content) % size:
      raise Refusal(422, f'noise: {len(content)} bytes; an image takes {size}, float32 of {list(shape)}')
    noise = np.frombuffer(content, '<f4').reshape(-1, *shape)
    if not np.all(np.abs(noise) <= LARGEST_NOISE * self.generator.networks.sigma_max):  # NaN: False
      raise Refusal(422, f'noise: values that are no noise of standard deviation {self.generator.networks.sigma_max:g}')
    return noise

  def _picture(self, content: bytes, name: str) -> Image.Image:
    try:
      with Image.open(io.BytesIO(content), formats=PICTURES) as image:
        width, height = image.size  # before anything is decoded
    except UnidentifiedImageError:
      raise Refusal(415, f'{name}: no picture; {", ".join(PICTURES)} are read') from None
    except Image.DecompressionBombError:
      raise Refusal(413, f'{name}: too many pixels; at most {self.limits.picture} are taken') from None
    except Exception:  # Pillow raises many kinds
      raise Refusal(422, f'{name}: damaged') from None
    if width * height > self.limits.picture:
      raise Refusal(413, f'{name}: {width} x {height} pixels; at most {self.limits.picture} are taken')
    try:
      return picture_files.of_bytes(content, name, PICTURES)
    except edit.EditError as error:
      raise Refusal(422, str(error)) from None

  def _images(self, noise, labels, omega, prompt):
    generator, count = self.generator, len(labels)
    size = next((size for size in SIZES if size >= count), SIZES[-1])
    texts = generator.texts([prompt] if generator.takes_text else [], count)
    return generator.of_noise(noise, labels, generator.strengths(omega, count), size, texts)


def _square(picture, generator) -> np.ndarray:
  try:
    return picture_files.square(picture, generator.resolution, generator.channels)
  except edit.EditError as error:
    raise Refusal(422, str(error)) from None


def png(image: np.ndarray) -> str:
  """[S, S, C] uint8 as a PNG in base64."""
  buffer = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, 'PNG')
  return base64.b64encode(buffer.getvalue()).decode()


def answer(images, noise, labels, told: dict, waited: float, took: float) -> bytes:
  """The JSON of what came of work."""
  text = lambda numbers: base64.b64encode(np.asarray(numbers, '<f4').tobytes()).decode()
  shown = [{'png': png(image), 'noise': text(one), 'label': int(label)}
           for image, one, label in zip(images, noise, labels)]
  times = {'waited': round(1000 * waited, 1), 'device': round(1000 * took, 1)}
  return json.dumps({'images': shown, **told, 'milliseconds': times}).encode()
