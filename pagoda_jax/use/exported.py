"""The folder that `pagoda export` writes: a generator for those who have nothing but JAX, or nothing but ONNX.

    config.json          what it is, and checksums of the files below; sealed
    model.safetensors    its parameters by path, float32; in latent space those of the decoder too, autoencoder/...
    generator.stablehlo  jax.export's artefact: (parameters, noise, labels[, omega]) -> images in [-1, 1], for a batch
                         of any size, on CPU, CUDA and TPU; of a network of captions their embeddings too, text,
                         text_mask and text_pooled, behind the others: its encoder is not in the folder
    load.py              how to draw with them; needs only jax (and flatbuffers, by which jax.export reads)

It appears whole or not at all. The parameters are an argument of the program, so that they lie in the folder once.
"""

import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

import pagoda_jax
from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.networks import chips
from pagoda_jax.networks.unet import UNet
from pagoda_jax.runtime import buckets, files
from pagoda_jax.stages import decoding, models, sampler
from pagoda_jax.training import checkpoints, starts
from pagoda_jax.use import to_published
from pagoda_jax.weights import autoencoders, text_encoders
from pagoda_jax.weights.convert import torch_files
from pagoda_jax.weights.convert.unpickle import WeightsFileError

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
PROGRAM = 'generator.stablehlo'
LOADER = 'load.py'
FORMAT = 'pagoda_jax generator, version 1'
PLATFORMS = ('cpu', 'cuda', 'tpu')
_OF_TEXT = ('encoder', 'sha256', 'length', 'width', 'pooled_width')
_OF_RUN = ('precision', 'matmul_precision', 'label_dropout')
REMEDY = 'make the folder again (`pagoda export` or `pagoda publish`), or fetch it again'


class ExportError(ValueError):
  """An exported folder is missing something, is damaged, or cannot be made."""


def is_exported(folder) -> bool:
  """Whether a folder is one of `write`'s."""
  folder = epath.Path(folder)
  return (folder / WEIGHTS).exists() or (folder / PROGRAM).exists()


def write(generator, folder, add=lambda folder: None) -> dict:
  """Writes the folder.

  Args:
    generator: a `use.generator.Generator`.
    folder: must not exist; local.
    add: add(folder) writes what else belongs in it; no checksum is kept of that.

  Returns:
    What config.json holds.

  Raises:
    ExportError: the folder exists, or is not local.
    OSError: it cannot be written; names it. Nothing is left of it.
  """
  if buckets.is_in_bucket(folder):
    raise ExportError(f'{folder}: write a local folder, and copy it there')
  folder = pathlib.Path(folder).absolute()
  if folder.exists():
    raise ExportError(f'{folder} exists already; remove it, or choose another --output')
  target = folder.parent / f'.{folder.name}.{os.getpid()}.tmp'
  try:
    import flatbuffers  # noqa: F401  # JAX reads and writes programs by it, and does not install it
  except ImportError:
    raise ExportError('exporting needs flatbuffers, which JAX does not install: pip install flatbuffers') from None
  params = traverse_util.flatten_dict(generator.read(), sep='/')
  params = {path: np.asarray(params[path], np.float32) for path in sorted(params)}
  try:
    with files.naming(folder, instead_of=target):
      target.mkdir(parents=True)
      torch_files.write_safetensors(target / WEIGHTS, params, {'format': FORMAT})
      (target / PROGRAM).write_bytes(program(generator, params).serialize())
      shutil.copyfile(pathlib.Path(__file__).parent / 'exported_loader.py', target / LOADER)
      config = _description(generator, params) | {'files': files.checksums(target)}
      files.write_sealed(target / CONFIG, config)
      add(target)
    target.rename(folder)
  except BaseException:
    shutil.rmtree(target, ignore_errors=True)
    raise
  return config


def _description(generator, params) -> dict:
  config, phase = generator.config, generator.config.phases[generator.name]
  teacher = generator.kind == 'teacher'
  law = generator.networks.law
  return {
    'format': FORMAT,
    'kind': generator.kind,
    'resolution': generator.resolution,
    'noise_shape': list(generator.networks.noise_shape(1)[1:]),
    'num_classes': generator.num_classes,
    'guidance': _described_law(law) if law is not None and not teacher else None,
    'default_omega': law.nearest(1.0) if law is not None and not teacher else None,
    'levels': phase.sample_levels if teacher else None,
    'label_dropout': float(phase.label_dropout) if teacher else None,
    'begun_from_weights': bool(phase.init_from) if teacher else None,
    'text': _described_text(config.text) if generator.takes_text else None,
    'diffusion': {key: float(value) for key, value in config.diffusion.items()},
    'precision': config.precision,
    'matmul_precision': config.evaluation.matmul_precision,
    'options': {k: v for k, v in to_published.options_of(generator.networks.unet).items() if k != 'attention_form'},
    'parameters': sum(leaf.size for leaf in params.values()),
    'params_sha256': checkpoints.digest(params),
    'source': generator.source,
    'pagoda_jax': pagoda_jax.__version__,
  } | ({'autoencoder': autoencoders.options(config, *decoding.normalization(config))
        | {'sha256': config.autoencoder.sha256}} if spaces.is_latent(config) else {})


def _described_text(text) -> dict:
  return {key: text[key] for key in _OF_TEXT} | {'encoder': text_encoders.name_elsewhere(text.encoder)}


def _described_law(law) -> dict:
  """A guidance.Law as JSON values, with another for re-written captions under 'recaptions' where there is one."""
  first, *others = getattr(law, 'of_kinds', (law,))
  return first._asdict() | ({'recaptions': others[0]._asdict()} if others else {})


def program(generator, params) -> jax.export.Exported:
  """(flat parameters, noise [b, R, R, C], labels [b][, omega [b]][, text [b, L, W], text_mask [b, L], text_pooled
  [b, P]]) -> float32 images [b, S, S, C], for any b."""
  config = generator.config.copy_and_resolve_references()
  with config.unlocked():
    config.attention = 'xla'  # the other forms are kernels of one chip each
  draw, null = sampler.make_draw(config, generator.name), {} if generator.takes_text else None

  def generate(params, noise, labels, *more):
    given = sampler.draw_arguments(more, null)
    return draw(traverse_util.unflatten_dict(params, sep='/'), noise, labels, *given)

  b, *_ = jax.export.symbolic_shape('b')
  shaped = jax.ShapeDtypeStruct
  arguments = [{path: shaped(leaf.shape, leaf.dtype) for path, leaf in params.items()},
               shaped((b, *generator.networks.noise_shape(1)[1:]), jnp.float32), shaped((b,), jnp.int32)]
  if generator.kind == 'generator' and generator.networks.law is not None:
    arguments.append(shaped((b,), jnp.float32))
  if generator.takes_text:
    text = config.text
    arguments += [shaped((b, text.length, text.width), jnp.float32), shaped((b, text.length), jnp.bool_),
                  shaped((b, text.pooled_width), jnp.float32)]
  with chips.on_cpu():  # else the networks would be in the form of the chip that is here
    return jax.export.export(jax.jit(generate), platforms=PLATFORMS)(*arguments)


def read_description(folder) -> dict:
  """What config.json holds, all files being as they were written.

  Raises:
    ExportError: one is missing or damaged, or a later version wrote them.
  """
  folder = epath.Path(folder)
  try:
    config = files.read_sealed(folder / CONFIG)
    if config.get('format') != FORMAT:
      raise ExportError(f'{folder}: of format {config.get("format")!r}; this version reads {FORMAT!r}')
    if lacking := {'kind', 'options', 'levels', 'source', 'diffusion', 'guidance', 'files', *_OF_RUN} - {*config}:
      raise ValueError(f'it lacks {", ".join(sorted(lacking))}')
    wrong = files.damaged_files(folder, config['files'])
  except FileNotFoundError:
    raise ExportError(f'{folder / CONFIG}: missing; {REMEDY}') from None
  except OSError as error:
    raise ExportError(f'{folder}: cannot be read: {error}') from None
  except ExportError:
    raise
  except ValueError as error:
    raise ExportError(f'{folder / CONFIG}: damaged ({error}); {REMEDY}') from None
  if wrong:
    raise ExportError(f'{folder}: damaged: {files.first_rows(wrong)}; {REMEDY}')
  return config


def read_params(folder) -> dict:
  """The parameters of the network that config.json tells of, as nested dicts of NumPy arrays.

  Raises:
    ExportError: they are damaged.
    CheckpointError: they are another network's.
  """
  try:
    flat = torch_files.read(epath.Path(folder) / WEIGHTS, strip=()).tensors
  except WeightsFileError as error:
    raise ExportError(f'{error}; {REMEDY}') from None
  params = traverse_util.unflatten_dict({path: np.array(value) for path, value in flat.items()}, sep='/')
  description = read_description(folder)
  unet = UNet(**description['options'])
  expected = jax.eval_shape(lambda: models.fresh_params(unet, jax.random.key(0)))
  if 'autoencoder' in description:
    config = configs.experiment()
    _set_up_autoencoder(config, description['autoencoder'])
    expected = expected | {decoding.AUTOENCODER: decoding.decoder_shapes(config)}
  starts.check_same_tree(expected, params, str(epath.Path(folder) / WEIGHTS))
  return params


def set_up(config, kind: str, description: dict) -> None:
  """Has an experiment of `architectures.experiment_of` draw as an exported network does, or as a converted one."""
  if 'diffusion' not in description:
    return
  config.diffusion.update(description['diffusion'])
  config.precision = description['precision']
  config.evaluation.matmul_precision = description['matmul_precision']
  if kind == 'teacher':
    config.phases[kind].label_dropout = description['label_dropout']
    config.phases[kind].init_from = 'weights' if description.get('begun_from_weights') else ''
  if 'autoencoder' in description:
    _set_up_autoencoder(config, description['autoencoder'])
  if text := description.get('text'):
    config.text.update(text)
  if law := description['guidance']:
    said = lambda law: {'law': law['kind']} | {key: law[key] for key in ('mean', 'std', 'low', 'high')}
    config.guidance.update(said(law))
    if 'recaptions' in law:
      config.guidance.recaptions.update(said(law['recaptions']))


def _set_up_autoencoder(config, options: dict) -> None:
  config.space, config.data.channels = 'latent', options['channels']
  config.autoencoder = configs.autoencoder_network(
    channels=options['latent_channels'], sha256=options['sha256'], scaling=options['scaling_factor'],
    shift=options['shift_factor'], **{key: options[key] for key in spaces.NETWORK_KEYS if key != 'channels'})
