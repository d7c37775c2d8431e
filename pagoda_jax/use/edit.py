"""Edits of pictures without training: the noise that explains a picture is found, and an image is made of it.

Each edit is a function of arrays: uint8 pictures [B, S, S, C] of the generator's size in, an `Edit` out. How noise is
found: by Adam (`method/inverse_problems.py` has the objective), which needs nothing but the generator; or, of whole
pictures, by the teacher's inversion, where a work directory has one.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from pagoda_jax.config import spaces
from pagoda_jax.data import latents, noise_store, resize
from pagoda_jax.data import pictures as cutting
from pagoda_jax.data import stream as streams
from pagoda_jax.method import inverse_problems
from pagoda_jax.training import inverting, starts
from pagoda_jax.use import descent
from pagoda_jax.use.generator import listed
from pagoda_jax.use.sample import slerp
from pagoda_jax.weights import autoencoders

LARGEST_BATCH = 2**18  # pixels of candidates that are fitted at once: 64 of 64 px, 1 of 512
MOST_CLASSES = 32  # that are tried where no label is given
LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)  # grey of R, G, B, as Pillow has it


class EditError(ValueError):
  """An edit that cannot be made of that picture, or by that generator."""


@dataclasses.dataclass(frozen=True)
class Options:
  """How noise is sought.

  Attributes:
    steps: of Adam at most, rounded up to a multiple of descent.REPORT; fewer where the objective has settled.
    tries: beginnings for each picture and label, of which the best is taken.
    learning_rate: of noise of unit standard deviation.
    error: standard deviation of a measured value, white minus black being 2: how exactly the picture is to be met.
    prior: weight of the prior.
    seed: of the beginnings.
  """

  steps: int = 400
  tries: int = 4
  learning_rate: float = 0.05
  error: float = 0.1
  prior: float = 1.0
  seed: int = 0


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Edit:
  """What came of an edit.

  Attributes:
    images: uint8 [B, S, S, C].
    noise: [B, R, R, C] that they were made of.
    labels: int32 [B].
    misfit: [B], root of the mean squared difference between what was measured and what the images would give, in grey
      levels.
    steps: of Adam; 0 by inversion.
    settled: whether the objective had settled before the steps ended.
  """

  images: np.ndarray
  noise: np.ndarray
  labels: np.ndarray
  misfit: np.ndarray
  steps: int = 0
  settled: bool = True


def reconstruct(generator, pictures, labels=None, options=DEFAULTS, report=None, by: str = 'adam',
                omega: float | None = None, prompts=None) -> Edit:
  """The images nearest to pictures that the generator can make.

  Args:
    generator: a `use.generator.Generator` that draws in one step.
    pictures: uint8 [B, S, S, C].
    labels: class, or [B]; None: each class is tried, where there are few, and the best taken.
    options: how noise is sought.
    report: report(step, mean objective) is called every descent.REPORT steps.
    by: 'adam' or 'inversion', by the teacher of the generator's work directory.
    omega: strength of guidance.
    prompts: of a network of captions, in place of labels: what the pictures show, a text or [B] of them.

  Raises:
    EditError: pictures of another size, labels that are none, or a generator that cannot do it.
    ValueError: prompts are missing, or of a network that takes none.
  """
  pictures = _checked(generator, pictures)
  measure = inverse_problems.whole(generator.resolution, generator.channels)
  return _by(by, generator, measure, pictures, labels, options, report, omega, prompts)


def _by(by, generator, measure, pictures, labels, options, report, omega, prompts) -> Edit:
  _refuse_teacher(generator)
  if by == 'adam':
    return solve(generator, measure, pictures, labels, options, report, omega, prompts)
  if by != 'inversion':
    raise EditError(f"by = {by!r}: must be 'adam' or 'inversion'")
  own = _labels(generator, labels, len(pictures))
  noise = invert(generator, pictures, labels, omega)
  return _edit(generator, measure, _signed(pictures), noise, own, omega)


def super_resolve(generator, pictures, labels=None, options=DEFAULTS, report=None, by: str = 'adam',
                  omega: float | None = None, prompts=None) -> Edit:
  """Images that pictures uint8 [B, r, r, C], r < S, are the means over areas of; else as `reconstruct`.

  By inversion, r must be the base resolution that the teacher works at.
  """
  pictures = _checked(generator, pictures, smaller=True)
  whole = inverse_problems.whole(generator.resolution, generator.channels)
  side = pictures.shape[1]
  measure = whole._replace(sides=resize.resize_matrix(generator.resolution, side, 'area').astype(np.float32))
  base = generator.networks.unet.resolution * spaces.factor(generator.config)
  if by == 'inversion' and side != base:
    raise EditError(f"pictures of {side} px: the teacher inverts those of {base} px; take by = 'adam'")
  return _by(by, generator, measure, pictures, labels, options, report, omega, prompts)


def restyle(generator, pictures, label=None, labels=None, options=DEFAULTS, report=None, by: str = 'adam',
            omega: float | None = None, prompt=None, prompts=None) -> Edit:
  """Pictures as another class: their noise under their own labels, drawn with `label` (a class, or [B]).

  Of a network of captions: their noise under their own `prompts`, drawn with `prompt` (a text, or [B]). The other
  arguments are `reconstruct`'s; the misfit is that of the reconstruction.
  """
  if not generator.num_classes and not generator.takes_text:
    raise EditError(f'{generator.name} knows no classes to restyle to')
  texts = _texts(generator, prompt, len(pictures))
  if generator.num_classes and label is None:
    raise EditError('restyle needs the label that the pictures are to have')
  wanted = _labels(generator, label, len(pictures))
  found = reconstruct(generator, pictures, labels, options, report, by, omega, prompts)
  images = generator.of_noise(found.noise, wanted, generator.strengths(omega, len(wanted)), texts=texts)
  return dataclasses.replace(found, images=images, labels=wanted)


def inpaint(generator, pictures, masks, labels=None, options=DEFAULTS, report=None,
            omega: float | None = None, prompts=None) -> Edit:
  """Pictures with what masks, bool [B or 1, S, S], mark painted anew; what they do not mark stays as it is.

  Raises:
    EditError: as `reconstruct`; or a mask marks nothing, or everything.
  """
  pictures, masks = _checked(generator, pictures), np.asarray(masks)
  if masks.dtype != bool or masks.ndim != 3 or masks.shape[1:] != pictures.shape[1:3] or (
      len(masks) not in (1, len(pictures))):
    raise EditError(f'masks are {masks.dtype} {list(masks.shape)}; must be bool [{len(pictures)} or 1, '
                    f'{pictures.shape[1]}, {pictures.shape[2]}]')
  if not masks.any((1, 2)).all():
    raise EditError('a mask marks nothing: there is nothing to paint')
  if masks.all((1, 2)).any():
    raise EditError('a mask marks everything: nothing is known of the picture')
  known = np.broadcast_to(~masks[..., None], (*pictures.shape[:3], 1)).astype(np.float32)
  measure = inverse_problems.whole(generator.resolution, generator.channels)._replace(mask=known)
  found = solve(generator, measure, pictures, labels, options, report, omega, prompts)
  return dataclasses.replace(found, images=np.where(known > 0, pictures, found.images))


def deblur(generator, pictures, blur: float, labels=None, options=DEFAULTS, report=None,
           omega: float | None = None, prompts=None) -> Edit:
  """Images that pictures are blurred ones of, by a Gaussian of `blur` pixels; else as `reconstruct`."""
  if not 0 < blur <= generator.resolution:
    raise EditError(f'blur = {blur}: must be above 0 and at most {generator.resolution} pixels')
  whole = inverse_problems.whole(generator.resolution, generator.channels)
  measure = whole._replace(sides=inverse_problems.gaussian_blur(generator.resolution, blur))
  return solve(generator, measure, _checked(generator, pictures), labels, options, report, omega, prompts)


def colorize(generator, pictures, labels=None, options=DEFAULTS, report=None,
             omega: float | None = None, prompts=None) -> Edit:
  """Images in colour of which grey pictures, uint8 [B, S, S, 1], are the luma; else as `reconstruct`."""
  if generator.channels != 3:
    raise EditError(f'{generator.name} makes grey images itself: there is no colour to give')
  measure = inverse_problems.whole(generator.resolution, 3)._replace(mix=LUMA)
  return solve(generator, measure, _checked(generator, pictures, channels=1), labels, options, report, omega, prompts)


def interpolate(generator, first, second, labels=None, frames: int = 30, options=DEFAULTS, report=None,
                by: str = 'adam', omega: float | None = None, prompts=None) -> np.ndarray:
  """uint8 [frames, S, S, C] from one picture's reconstruction to another's, uint8 [S, S, C] each, by slerp of noise.

  labels, prompts: of both, one or two, as `reconstruct`'s. Where they differ, the second half of the frames has the
  second's.
  """
  if frames < 2:
    raise EditError(f'frames = {frames}: must be at least 2')
  found = reconstruct(generator, np.stack([first, second]), labels, options, report, by, omega, prompts)
  t = np.linspace(0, 1, frames)
  start, end = (np.broadcast_to(noise, (frames, *noise.shape)) for noise in found.noise)
  half = (t >= 0.5).astype(int)
  texts = _texts(generator, prompts, 2, half)
  return generator.of_noise(slerp(start, end, t), found.labels[half], generator.strengths(omega, frames), texts=texts)


def invert(generator, pictures, labels, omega: float | None = None) -> np.ndarray:
  """Noise [B, R, R, C] of uint8 pictures [B, r, r, C] by the probability-flow ODE of the generator's teacher, guided as
  images of that noise are to be drawn, and standardised where the generator has learnt such noise.

  Pictures of more than R pixels are made smaller as training pictures are.

  Raises:
    EditError: the generator is of no work directory, its phase names no inversion there, or there is not one label, or
      one for each picture, where it knows classes.
    ValueError: there is no such label.
    NoiseStoreError: the store that tells mean and deviation is missing or damaged.
  """
  if generator.takes_text:
    raise EditError(f"{generator.where}: draws what captions say, and pictures are inverted with labels; take by = "
                    "'adam'")
  if labels is None and generator.num_classes:
    raise EditError('by inversion a picture needs its label')
  labels = _labels(generator, labels if generator.num_classes else None, len(pictures))
  config, name = generator.config, generator.config.phases[generator.name].get('noise', '')
  if not generator.folder or name not in config.phases:
    raise EditError(f'{generator.where}: no teacher beside it to invert pictures with; give a work directory, or '
                    "take by = 'adam'")
  side, channels = config.base_resolution * spaces.factor(config), config.data.channels
  as_image = lambda picture: Image.fromarray(picture[..., 0] if channels == 1 else picture)
  band = pictures.shape[1] if streams.band_of(config.data) else 0  # a band's band is the picture's
  small = np.stack([cutting.picture(as_image(picture), side, channels, band_of=band) for picture in pictures])
  if spaces.is_latent(config):
    small = _latents_of(config, small)
  params, _ = starts.read_start(config, epath.Path(generator.folder), name)
  with jax.set_mesh(generator.mesh):
    solver = inverting.Solver(config, name, params, generator.mesh)
    strengths = descent.strengths_of(generator, omega, len(small))
    noise = solver({'image': small, 'label': labels, 'key': np.arange(len(small))}
                   | ({} if strengths is None else {'omega': strengths}))['noise']
  if not config.phases[generator.name].standardize_noise:
    return noise
  store = epath.Path(generator.folder) / name
  return noise_store.open_store(store, generator.networks.sigma_max, standardize=True).standardized(noise)


def _latents_of(config, images) -> np.ndarray:
  """Mean latents [B, h, w, c] of pictures uint8 [B, S, S, C], as networks see them."""
  encoder, drawn = autoencoders.encoder(config.autoencoder.weights), streams.sampling(config)
  if encoder.sha256 != config.autoencoder.sha256:
    raise EditError(f'{config.autoencoder.weights}: the autoencoder there is {encoder.sha256[:16]}, and the generator '
                    f'is of {config.autoencoder.sha256[:16]}')
  return np.stack([drawn.middle(latents.Moments(*each)) for each in zip(*encoder.encode(images))])


def solve(generator, measure: inverse_problems.Measurement, measured: np.ndarray, labels=None,
          options: Options = DEFAULTS, report: Callable | None = None, omega: float | None = None,
          prompts=None) -> Edit:
  """Images that `measure` makes `measured` of, uint8 [B, m, m, c]; the other arguments are `reconstruct`'s.

  Raises:
    EditError: as `reconstruct`, `measured` is of another type or shape, or an option is out of its range.
  """
  _check_options(options)
  _refuse_teacher(generator)
  measured, side, channels = np.asarray(measured), measure.sides.shape[0], measure.mix.shape[1]
  if measured.dtype != np.uint8 or measured.shape[1:] != (side, side, channels) or not len(measured):
    raise EditError(f'measured is {measured.dtype} {list(measured.shape)}; must be uint8 [B, {side}, {side}, '
                    f'{channels}]')
  count, target = len(measured), _signed(measured)
  texts = _texts(generator, prompts, count)
  tried = _candidates(generator, labels, count)  # [classes, B]
  classes = len(tried) * options.tries
  # Candidates of a picture: every label from every beginning.
  all_labels = np.repeat(tried, options.tries, axis=0).reshape(-1)
  which = np.tile(np.arange(count), classes)
  beginnings = np.asarray(generator.noise(options.seed, options.tries)) / generator.networks.sigma_max
  w = np.tile(beginnings.repeat(count, 0), (len(tried), 1, 1, 1))
  devices = generator.mesh.size
  size = -(-min(len(w), max(LARGEST_BATCH // generator.resolution**2, 1)) // devices) * devices
  found_w, best, steps, settled = [], [], 0, True
  for start in range(0, len(w), size):
    rows = slice(start, start + size)
    part = descent.Descent(
      generator, measure, target, all_labels[rows], which[rows], w[rows], size, options, omega, texts)
    done, quiet = part.run(report)
    found_w.append(part.best_w)
    best.append(part.best)
    steps, settled = max(steps, done), settled and quiet
  best = np.concatenate(best).reshape(classes, count)
  if not np.isfinite(best).any(0).all():
    raise EditError('no noise with a finite objective was found; take a smaller learning rate, or a larger error')
  winner = np.where(np.isfinite(best), best, np.inf).argmin(0) * count + np.arange(count)
  noise = generator.networks.sigma_max * np.concatenate(found_w)[winner]
  edit = _edit(generator, measure, target, noise, all_labels[winner], omega, texts)
  return dataclasses.replace(edit, steps=steps, settled=settled)


def _refuse_teacher(generator) -> None:
  if generator.kind == 'teacher':
    raise EditError(f'{generator.where}: a teacher, which takes many evaluations an image; edits need a one-step '
                    'generator')


def _edit(generator, measure, target, noise, labels, omega, texts=None) -> Edit:
  """The images of noise, and how well they explain `target` [B, m, m, c] in [-1, 1]."""
  images = generator.of_noise(noise, labels, generator.strengths(omega, len(labels)), texts=texts)
  rest = np.square(np.asarray(measure(jnp.asarray(_signed(images))) - measure.mask * target))
  measured = np.broadcast_to(measure.mask, (*target.shape[:3], 1)).sum((1, 2, 3)) * target.shape[3]
  return Edit(images, noise, labels, 127.5 * np.sqrt(rest.sum((1, 2, 3)) / measured))


def _signed(pictures: np.ndarray) -> np.ndarray:
  return pictures.astype(np.float32) / 127.5 - 1


def _checked(generator, pictures, channels: int = 0, smaller: bool = False) -> np.ndarray:
  pictures, side, channels = np.asarray(pictures), generator.resolution, channels or generator.channels
  fits = pictures.ndim == 4 and len(pictures) and pictures.shape[1] == pictures.shape[2] and (
    0 < pictures.shape[1] < side if smaller else pictures.shape[1] == side)
  if pictures.dtype != np.uint8 or not fits or pictures.shape[3] != channels:
    sides = f'r, r, {channels}] with r below {side}' if smaller else f'{side}, {side}, {channels}]'
    raise EditError(f'pictures are {pictures.dtype} {list(pictures.shape)}; must be uint8 [B, {sides}')
  return pictures


def _labels(generator, labels, count: int) -> np.ndarray:
  """int32 [count]; -1 where the generator knows no classes."""
  if not generator.num_classes:
    if labels is not None:
      raise EditError(f'labels = {labels!r}: {generator.name} knows no classes; leave them out (--label)')
    return np.full(count, -1, np.int32)
  found = generator.labels(labels, None, 0)
  if len(found) not in (1, count):
    raise EditError(f'{len(found)} labels for {count} pictures; give one, or one for each')
  return np.broadcast_to(found, count)


def _texts(generator, prompts, count: int, rows=None) -> dict | None:
  """What `of_noise` takes of a prompt for all pictures, or of one for each, in their order or that of `rows`."""
  prompts = listed(prompts)
  if len(prompts) not in (0, 1, count):
    raise EditError(f'{len(prompts)} prompts for {count} pictures; give one, or one for each')
  texts = generator.texts(prompts, count)
  if texts is None or rows is None:
    return texts
  return texts | {'text': {key: values[rows] for key, values in texts['text'].items()}}


def _candidates(generator, labels, count: int) -> np.ndarray:
  """int32 [K, count]: labels to try for each picture."""
  if labels is not None or not generator.num_classes:
    return _labels(generator, labels, count)[None]
  if generator.num_classes > MOST_CLASSES:
    raise EditError(f'a picture needs its label: {generator.name} knows {generator.num_classes} classes, and up to '
                    f'{MOST_CLASSES} are tried')
  return np.arange(generator.num_classes, dtype=np.int32)[:, None].repeat(count, 1)


def _check_options(options: Options) -> None:
  for name, low, high in (('steps', 1, 100_000), ('tries', 1, 64), ('learning_rate', 1e-6, 10), ('error', 1e-4, 10),
                          ('prior', 0, 1e6), ('seed', 0, 2**32 - 1)):
    value = getattr(options, name)
    if not low <= value <= high:
      raise EditError(f'{name} = {value}: must be in {low:g} to {high:g}')

