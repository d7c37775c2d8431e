"""Images of a generator, and the files that hold them: grids, folders of pictures, arrays, animations."""

import contextlib
import io
import json
import textwrap

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from pagoda_jax.config import ranges
from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.runtime.files import replacing
from pagoda_jax.use.generator import check_guidance

FORMATS = ('.png', '.npz', '.webp')
STOPS = 4  # noises that an animation passes through, before it is back at the first
FRAME = 60  # ms
LARGEST_WEBP = 16_383  # pixels of a side
LARGEST_PROMPTS = 2**24  # bytes of a file
LINE = 24  # characters of a caption's line


def parse_guidance(text: str) -> tuple[float, ...]:
  """Strengths of guidance of a list such as '1,2,4'; () of ''.

  Raises:
    ValueError: not a number in the range that a config may ask for.
  """
  if not text:
    return ()
  try:
    omegas = tuple(float(part) for part in text.split(','))
  except ValueError:
    raise ValueError(f'--guidance={text}: must be a number, or several such as 1,2,4') from None
  if wrong := [omega for omega in omegas if not ranges.OMEGA.holds(omega)]:
    raise ValueError(f'--guidance={text}: {wrong[0]:g} must be {ranges.OMEGA.must}')
  return omegas


def parse_prompts(given: str) -> tuple[str, ...]:
  """Prompts of a list such as 'a red flag;a smiling cat', or of a file that ends in .txt, one a line.

  Raises:
    ValueError: one is empty, holds a NUL or is no UTF-8 (names the line, or its number in the list); or the file has
      more than LARGEST_PROMPTS bytes.
    FileNotFoundError: there is no such file.
  """
  where, rows = '--prompts', given.split(';')
  if given.endswith('.txt'):
    path = epath.Path(given).expanduser()
    if not path.is_file():
      raise FileNotFoundError(f'--prompts={given}: no such file')
    if (size := path.stat().length) > LARGEST_PROMPTS:
      raise ValueError(f'--prompts={given}: {size:,} bytes; at most {LARGEST_PROMPTS:,} are read')
    where, rows = f'--prompts={given}', path.read_bytes().removeprefix(b'\xef\xbb\xbf').split(b'\n')
    rows = rows[:-1] if rows[-1:] == [b''] else rows
  prompts = []
  for number, row in enumerate(rows, 1):
    place = f'line {number}' if given.endswith('.txt') else f'number {number}'
    try:
      text = (row.decode() if isinstance(row, bytes) else row).strip()
    except UnicodeDecodeError as error:
      raise ValueError(f'{where}, {place}: no UTF-8 (byte {error.start + 1}: {error.reason})') from None
    if not text:
      raise ValueError(f'{where}, {place}: is empty; each must be a text')
    if '\0' in text:
      raise ValueError(f'{where}, {place}: holds a NUL; it must be a text')
    prompts.append(text)
  if not prompts:
    raise ValueError(f'{where}: there is no prompt in it')
  return tuple(prompts)


def draw(generator, count: int, labels: str, seed: int, batch_size: int, omegas: tuple[float, ...] = (),
         truncate: float = 1.0, prompts: tuple[str, ...] = ()):
  """Images of a `use.generator.Generator`.

  Args:
    generator: what draws them.
    count: number of images.
    labels: 'cycle', 'random' or a list such as '3,5,7'.
    seed: the same seed gives the same images.
    batch_size: images a call.
    omegas: strengths of guidance, each for all images; (): none, or the nearest to it that a generator knows.
    truncate: what the noise is multiplied by.
    prompts: of a network of captions; the first once more after the last.

  Returns:
    (uint8 [count * M, S, S, C], labels int32): an image at all its M strengths, or its only one, then the next image.

  Raises:
    ValueError: there is no such label, or the network takes no guidance.
  """
  check_guidance(generator.config, generator.name, omegas)
  classes = generator.labels(labels, count, seed)  # refused before anything is read
  texts = generator.texts(prompts, count)
  noise, size = generator.noise(seed, count, truncate), min(batch_size, count)
  strengths = [np.full(count, omega, np.float32) for omega in omegas] or [None]
  images = np.stack([generator.of_noise(noise, classes, each, size, texts) for each in strengths], axis=1)
  return images.reshape(-1, *images.shape[2:]), classes.repeat(images.shape[1])


def slerp(a, b, t) -> np.ndarray:
  """Noise [N, ...] between a and b (t = 0 and 1; a number or [N]), each image's along the great circle of the two.

  A straight line would pass through noise of too small a norm, of which a generator makes blurred images. Norms go
  evenly from one to the other; where the two point in one direction, or in opposite ones, so does the line.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  sides = (len(a), *(1,) * (a.ndim - 1))
  norm = lambda x: np.sqrt(np.square(x.reshape(len(x), -1)).sum(1)).reshape(sides)
  t, (norm_a, norm_b) = np.broadcast_to(t, len(a)).reshape(sides), (norm(a), norm(b))
  cosine = (a * b).reshape(len(a), -1).sum(1).reshape(sides) / np.maximum(norm_a * norm_b, 1e-30)
  angle = np.arccos(np.clip(cosine, -1, 1))
  plain = np.sin(angle) < 1e-4
  sine = np.where(plain, 1, np.sin(angle))
  of_a, of_b = (np.where(plain, part, np.sin(part * angle) / sine) for part in (1 - t, t))
  on_circle = of_a * a / np.maximum(norm_a, 1e-30) + of_b * b / np.maximum(norm_b, 1e-30)
  path = np.where(plain, of_a * a + of_b * b, ((1 - t) * norm_a + t * norm_b) * on_circle)
  return path.astype(np.float32)


def wander(generator, count: int, labels: str, seed: int, batch_size: int, omega: float | None = None,
           truncate: float = 1.0, frames: int = 15, prompts: tuple[str, ...] = ()):
  """Images whose noise goes around: from the seed's own to STOPS - 1 others and back, by `slerp`.

  Args:
    frames: from one noise to the next.
    omega: strength of guidance.
    The others as of `draw`.

  Returns:
    (uint8 [STOPS * frames, count, S, S, C], labels int32 [count]); the first frame is `draw`'s images.
  """
  omegas = generator.strengths(omega, count)
  classes, texts = generator.labels(labels, count, seed), generator.texts(prompts, count)
  stops = np.split(np.asarray(generator.noise(seed, STOPS * count, truncate)), STOPS)
  images = []
  for start, end in zip(stops, stops[1:] + stops[:1]):
    for frame in range(frames):
      noise = slerp(start, end, frame / frames) if frame else start
      images.append(generator.of_noise(noise, classes, omegas, min(batch_size, count), texts))
  return np.stack(images), classes


def captions(labels: np.ndarray, omegas: tuple[float, ...] = (), prompts: tuple[str, ...] = ()) -> list[str]:
  """What stands below each image of `draw`: its label or prompt, if it has one, and its strength of guidance."""
  strengths = np.resize(omegas, len(labels)) if omegas else [None] * len(labels)
  said = prompts_of(labels, omegas, prompts) or [str(label) if label >= 0 else '' for label in labels.tolist()]
  return [', '.join(filter(None, [text, f'omega {omega:g}' if omega is not None else '']))
          for text, omega in zip(said, strengths)]


def prompts_of(labels: np.ndarray, omegas: tuple[float, ...], prompts: tuple[str, ...]) -> list[str]:
  """The prompt of each image of `draw`; [] without any."""
  times = max(len(omegas), 1)
  return [prompts[place // times % len(prompts)] for place in range(len(labels))] if prompts else []


def in_lines(text: str) -> str:
  """A text in lines that fit below an image: three at most, and of characters that the font has."""
  plain = text.encode('latin-1', 'replace').decode('latin-1')  # the font that Pillow brings may have no others
  return '\n'.join(textwrap.wrap(plain, LINE, max_lines=3, placeholder=' ...'))


def captioned_grid(images: np.ndarray, texts: list[str], columns: int = 0) -> np.ndarray:
  """`image_grid` with a text of up to three lines below each image; larger pixels where it would not fit otherwise."""
  texts = [in_lines(text) for text in texts]
  bounds = [ImageDraw.Draw(Image.new('L', (1, 1))).textbbox((0, 0), text) for text in texts]
  width, line = max(32, *(bound[2] for bound in bounds)) + 4, max(bound[3] for bound in bounds) + 4
  factor = -(-width // images.shape[2])
  images = images.repeat(factor, 1).repeat(factor, 2)
  tiles = []
  for image, text, bound in zip(images, texts, bounds):
    label = Image.new('L', (image.shape[1], line), 255)
    ImageDraw.Draw(label).text(((image.shape[1] - bound[2]) // 2, 2), text, fill=0, align='center')
    tiles.append(np.concatenate([image, np.asarray(label)[..., None].repeat(image.shape[-1], 2)]))
  return image_grid(np.stack(tiles), columns)


def write(path, images: np.ndarray, labels: np.ndarray, omegas: tuple[float, ...] = (), captioned=False,
          prompts: tuple[str, ...] = ()) -> None:
  """Images of `draw`, by what the path ends in.

  .png: a grid, a row of it as wide as there are strengths of guidance where these are several. .npz: what the
  guided-diffusion evaluator reads: arr_0 uint8 NHWC, arr_1 labels, and `omega` and `prompt` of each image where there
  are any. No suffix: a folder of pictures NUMBER_LABEL.png, as `pagoda evaluate` and others take them; of prompts
  NUMBER.png beside a captions.jsonl, as the source 'folder' reads it.

  Raises:
    ValueError: the folder has other things in it.
  """
  path = epath.Path(path)
  if path.suffix == '.png':
    columns = len(omegas) if len(omegas) > 1 else 0
    texts = captions(labels, omegas, prompts)
    grid = captioned_grid(images, texts, columns) if captioned else image_grid(images, columns)
    write_png(path, grid)
    return
  if not path.suffix:
    check_empty(path)
    _write_folder(path, images, labels, omegas, prompts)
    return
  buffer = io.BytesIO()
  more = {'omega': np.resize(np.float32(omegas), len(images))} if omegas else {}
  if prompts:
    more['prompt'] = np.array(prompts_of(labels, omegas, prompts))
  np.savez(buffer, arr_0=images, arr_1=labels.astype(np.int64), **more)
  with replacing(path) as file:
    file.write(buffer.getbuffer())


def _write_folder(path, images, labels, omegas, prompts) -> None:
  digits, there, rows = len(str(len(images) - 1)), path.exists(), []
  try:
    for number, (image, text) in enumerate(zip(images, captions(labels, omegas))):
      ending = ''.join(f'_{part}' for part in text.replace('omega ', 'omega').split(', ') if part)
      write_png(path / f'{number:0{digits}d}{ending}.png', image)
      rows.append(f'{number:0{digits}d}{ending}.png')
    if prompts:
      with replacing(path / 'captions.jsonl') as file:
        file.write(''.join(json.dumps({'file': name, 'caption': prompt}, ensure_ascii=False) + '\n' for name, prompt
                           in zip(rows, prompts_of(labels, omegas, prompts))).encode())
  except BaseException:  # a full disk, Ctrl-C: fewer than were asked for would be taken for all, and stand in the way
    with contextlib.suppress(OSError):
      for name in rows:
        (path / name).unlink()
      if not there:
        path.rmdir()
    raise


def check_empty(folder) -> None:
  """Refuses a folder that pictures would be mixed with others in."""
  if epath.Path(folder).exists() and any(epath.Path(folder).iterdir()):
    raise ValueError(f'{folder}: there are files in it already; remove them, or choose another --out')


def check_webp(side: int, count: int) -> None:
  """Refuses more images of `side` pixels than the grid of an animation can hold, before they are drawn.

  Raises:
    ValueError: says how many it holds.
  """
  shown = side * max(1, -(-32 // side))  # as image_grid shows them
  columns = LARGEST_WEBP // shown
  if count > columns**2:
    raise ValueError(f'{count} images of {side} px: a .webp has at most {LARGEST_WEBP} pixels a side, which hold '
                     f'{columns**2} of them; take fewer, or another --out')


def write_webp(path, frames: np.ndarray, milliseconds: int = FRAME) -> None:
  """Writes [T, H, W, C] uint8 as a lossless animated WebP that starts over at its end; whole or not at all."""
  pictures = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).convert('RGB') for frame in frames]
  buffer = io.BytesIO()
  pictures[0].save(buffer, 'WEBP', save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0,
                   lossless=True)
  with replacing(path) as file:
    file.write(buffer.getbuffer())
