"""`pagoda convert`: published PyTorch weights -> a folder that a phase can start from, and back."""

import math

from absl import flags
from etils import epath

from pagoda_jax.cli import common
from pagoda_jax.runtime.files import file_digest, read_json
from pagoda_jax.stages import architectures
from pagoda_jax.use import to_published
from pagoda_jax.weights import autoencoders, locate, published
from pagoda_jax.weights.convert import folders, formats, torch_files
from pagoda_jax.weights.convert.mapping import ConversionError

_ASKED = ('resolution', 'attention_order', 'num_heads', 'channels_per_head', 'grown_num_blocks', 'head_channels',
          'groups', 'text_pool_heads', 'scaling_factor', 'shift_factor')
_OF_FILES = {'format', 'key', 'prefix', 'linear', 'weights_dir', *_ASKED} - {'attention_order'}
_OF_PHASES = ('step', 'attention_order')


def define_flags(fv: flags.FlagValues) -> None:
  """Defines the flags of `pagoda convert`."""

  def text(name, default, help):
    flags.DEFINE_string(name, default, help, flag_values=fv)

  def number(name, help, least=0):
    flags.DEFINE_integer(name, None, help, lower_bound=least, flag_values=fv)

  text(
    'input',
    None,
    'Weights file, local or gs://, or a name of `pagoda weights list`; with --to=torch, a converted '
    'folder, or a phase in a work directory.',
  )
  common.define_output(fv, 'Folder to make; with --to=torch, a .safetensors file.')
  flags.DEFINE_enum('to', 'jax', ['jax', 'torch'], 'Which way.', flag_values=fv)
  text('format', '', f'One of {", ".join(formats.FORMATS)}; default: by the names of the tensors.')
  text('key', '', 'Entry of a checkpoint to take, such as ema or state/model; default: an average before raw weights.')
  text(
    'prefix',
    '',
    'Convert only the tensors whose names begin so: one of several networks, such as '
    "'discriminators.tf_efficientnet_lite0.'",
  )
  text('linear', '', "lpips: the file of linear weights, where --input is torchvision's VGG16.")
  text('weights_dir', None, f'Folder of published files, looked in before ${locate.ENVIRONMENT} and the user cache.')
  text('attention_order', None, "pagoda, and with --to=torch a phase: order of attention channels: 'flash' (the "
       "released files), 'legacy', 'xformers'.")
  number('resolution', 'pagoda: pixels of the input; default: those of the published networks of these widths, or 64. '
         'deepfloyd: this and the next but one, by config.json beside the input.')
  number('num_heads', 'pagoda: attention heads; default 0, by --channels_per_head.')
  number('channels_per_head', 'pagoda, edm2, deepfloyd: default 64.')
  number('text_pool_heads', 'deepfloyd: heads of the attention that pools the text; default: by config.json, or 64.')
  number('grown_num_blocks', 'pagoda: residual blocks of an added level after the up-sampling one; default 2.')
  number('head_channels', 'timm, random_projections: channels of a DeiT head; default 64.')
  number('groups', 'diffusers: groups of the group norms; default: of the config.json beside the file, or 32.', 1)
  for name, default, low in (('scaling', '1', 1e-6), ('shift', '0', -1e6)):  # as config.autoencoder has them
    common.define_number(fv, f'{name}_factor', None, 'diffusers: networks see (latent - shift_factor) * '
                         f'scaling_factor; default: of the config.json beside the file, or {default}.', low, 1e6)
  number('step', 'With --to=torch and a phase: step of the checkpoint; default: the newest.')
  flags.mark_flag_as_required('input', flag_values=fv)


def run(fv: flags.FlagValues, args: list[str]) -> int:
  """`pagoda convert`.

  Raises:
    ValueError, FileNotFoundError: what is wrong with the input or the flags; nothing is left at --output.
  """
  del args
  for line in _to_torch(fv) if fv.to == 'torch' else _to_jax(fv):
    print(line)
  return 0


def _to_jax(fv):
  """Writes the folder and yields lines on what was done."""
  _refuse_given(fv, ('step',), 'is of --to=torch and a phase')
  path, published_format = _located(fv.input, fv.weights_dir)
  linear = _located(fv.linear, fv.weights_dir)[0] if fv.linear else ''
  folders.refuse_existing(fv.output)
  asked = {name: fv[name].value for name in _ASKED}
  asked['resolution'] = _resolution(path.name, asked['resolution'])
  told = _of_autoencoder(path, fv.format or published_format)
  asked |= {name: value for name, value in told.items() if asked[name] is None}
  converted = formats.read_converted(path, fv.format or published_format, fv.key, fv.prefix, linear, **asked)
  source = {'file': path.name, 'sha256': torch_files.digest(path), 'key': fv.key, 'prefix': fv.prefix}
  if linear:
    source |= {'linear': linear.name, 'linear_sha256': file_digest(linear)}
  folders.write_converted(fv.output, converted, source)
  yield from converted.notes
  count = folders.read_description(fv.output)['parameters']
  yield f'{fv.output}: {count:,} parameters of {path.name}, format {converted.format}'
  if converted.format in formats.UNET_FORMATS:
    yield f'start a phase from it with --config.phases.PHASE.init_from={fv.output}, and in the experiment file'
    yield from (f'  {line}' for line in architectures.config_lines(converted.options))
    yield f'or draw images: pagoda sample --weights={fv.output}'
  elif converted.format == autoencoders.FORMAT:
    yield f'latents of pictures: pagoda prepare --autoencoder={fv.output}; then, in the experiment file'
    yield from (f'  {line}' for line in autoencoders.config_lines(fv.output, converted.options))


def _to_torch(fv):
  """Writes the file and yields lines on what was done."""
  if not str(fv.output).endswith('.safetensors'):
    raise ConversionError(f'--output={fv.output}: --to=torch writes a .safetensors file')
  _refuse_given(fv, _OF_FILES, 'is of published files, and --to=torch writes what a folder holds')
  folder = epath.Path(fv.input)
  if not folder.is_dir():
    raise FileNotFoundError(f'{folder}: no such folder; --to=torch reads a converted folder or WORKDIR/PHASE')
  if folders.is_converted(folder):
    _refuse_given(fv, _OF_PHASES, f'is of phases, and {folder} holds converted weights')
    converted = folders.read_folder(folder)
  else:
    converted = to_published.read_phase(folder, fv.step, fv.attention_order)
  state_dict = formats.to_state_dict(converted)
  torch_files.write_safetensors(fv.output, state_dict, {'format': 'pt'})
  yield from converted.notes
  yield f'{fv.output}: {len(state_dict)} tensors under the names of format {converted.format}'


def _resolution(file_name: str, asked: int | None) -> int | None:
  """Of the network's input, where the file is a published one that does not tell it; otherwise what was asked."""
  entry = published.by_file_name(file_name)
  if entry is None or not entry.resolution:
    return asked
  if asked and asked != entry.resolution:
    raise ConversionError(f'--resolution={asked}: {entry.name} ({file_name}) has an input of {entry.resolution} px; '
                          'leave --resolution out')
  return entry.resolution


def _of_autoencoder(path, format: str) -> dict[str, float]:
  """What config.json beside an AutoencoderKL's file, or its publisher, tells: groups, scaling_factor, shift_factor.

  Raises:
    ConversionError: it is no JSON object, or its values are no numbers.
  """
  entry, beside = published.by_file_name(path.name), path.parent / 'config.json'
  if entry is not None and entry.scaling:
    return {'scaling_factor': entry.scaling, 'shift_factor': 0.0}
  if format not in ('', autoencoders.FORMAT) or not beside.exists():
    return {}
  names = {'groups': 'norm_num_groups', 'scaling_factor': 'scaling_factor', 'shift_factor': 'shift_factor'}
  try:
    found = read_json(beside)
    if found.get('_class_name') != 'AutoencoderKL':
      return {}
    values = {ours: found.get(theirs) for ours, theirs in names.items()}
    told = {name: (int if name == 'groups' else float)(value) for name, value in values.items() if value is not None}
    if not min(told.get('scaling_factor', 1), told.get('groups', 1)) > 0 or not all(map(math.isfinite, told.values())):
      raise ValueError(f'of scaling_factor, shift_factor and norm_num_groups it tells {told}')
  except (OSError, TypeError, ValueError) as error:
    raise ConversionError(f'{beside}: not the config of an AutoencoderKL ({error}); move it away, and give '
                          '--scaling_factor and --shift_factor') from None
  if found.get('latents_mean') is not None or found.get('latents_std') is not None:
    raise ConversionError(f'{beside}: normalises each channel by itself (latents_mean, latents_std), which is not '
                          'known here; move it away, and give --scaling_factor and --shift_factor for all channels')
  return told


def _located(given: str, weights_dir) -> tuple[epath.Path, str]:
  """(path, format where the registry knows it) of a file or of a published file's name."""
  path = epath.Path(given).expanduser()
  if given in {entry.name for entry in published.REGISTRY} and not path.exists():
    return locate.find(given, weights_dir), locate.entry(given).format
  return path, ''


def _refuse_given(fv, names, why: str) -> None:
  """Refuses flags that would have no effect."""
  if given := sorted(name for name in names if fv[name].present):
    raise ConversionError(f'--{given[0]}={fv[given[0]].value}: {why}')
