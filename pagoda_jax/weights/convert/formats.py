"""The published formats by name: told apart by their tensors' names, converted both ways.

A format is a module with `options(state_dict, **asked)`, `leaves(options, ...)` and `carried(name)`; where files beside
the weights tell some of what is asked, also `described(path of the weights)`.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from pagoda_jax.weights.convert import (
  clip,
  clip_image,
  convnext,
  deepfloyd,
  diffusers,
  dinov2,
  edm,
  edm2,
  inception,
  lpips,
  mapping,
  pagoda,
  random_projections,
  siglip,
  state_dicts,
  stylegan_xl,
  t5,
  timm,
  torch_files,
)
from pagoda_jax.weights.convert.mapping import ConversionError, StateDict
from pagoda_jax.weights.convert.unpickle import DAMAGE

FORMATS = {
  'edm': edm,
  'edm2': edm2,
  'pagoda': pagoda,
  'deepfloyd': deepfloyd,
  'dinov2': dinov2,
  'siglip': siglip,
  'convnext': convnext,
  'timm': timm,
  'lpips': lpips,
  'inception': inception,
  'diffusers': diffusers,
  'stylegan_xl': stylegan_xl,
  'random_projections': random_projections,
  'clip': clip,
  'clip_image': clip_image,
  't5': t5,
}

UNET_FORMATS = ('edm', 'edm2', 'pagoda', 'deepfloyd')  # of teachers and generators

# A name of this form is in every state dict of the format, and of none of those below it.
_SIGNS = {
  'edm': r'model\.enc\.\d+x\d+_conv\.weight',
  'edm2': r'unet\.enc\.\d+x\d+_conv\.weight',
  'pagoda': r'input_blocks\.0\.0\.weight',
  'deepfloyd': r'add_embedding\.pool\.positional_embedding',
  'dinov2': r'blocks\.0\.ls1\.gamma',  # and what timm's have
  'siglip': r'attn_pool\.latent',  # and what timm's have
  'convnext': r'stages\.0\.blocks\.0\.conv_dw\.weight',
  'timm': r'(patch_embed\.proj|conv_stem)\.weight',
  'lpips': r'(net\.slice1|features)\.0\.weight',
  'inception': r'Mixed_7c\.branch1x1\.conv\.weight',
  'diffusers': r'encoder\.mid_block\.resnets\.0\.conv1\.weight',
  'stylegan_xl': r'mini_discs\.0\..*',
  'random_projections': r'scratch\.layer0_ccm\.weight',
  'clip': r'text_model\.embeddings\.token_embedding\.weight',  # and what holds both towers
  'clip_image': r'vision_model\.embeddings\.class_embedding',
  't5': r'encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight',
}


@dataclasses.dataclass(frozen=True)
class Converted:
  """A network's variables, and what takes them back.

  Attributes:
    variables: {'params': ..., other collections}, as our module's `apply` takes them.
    options: arguments of our module (those of the format's `network`, or of `UNet`).
    format: a key of FORMATS.
    carried: their tensors that have no place here.
    leaves_asked: what the format's `leaves` was asked besides the options.
    notes: what was taken, assumed or changed on the way, one sentence each.
  """

  variables: dict[str, Any]
  options: dict[str, Any]
  format: str
  carried: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  leaves_asked: dict[str, Any] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()


def detected(names: Iterable[str]) -> str:
  """The format that a state dict's names are of.

  Raises:
    ConversionError: of none.
  """
  names = list(names)
  for name, sign in _SIGNS.items():
    if any(re.fullmatch(sign, theirs) for theirs in names):
      return name
  shown = ', '.join(names[:6])
  raise ConversionError(f'no known format ({", ".join(FORMATS)}) has tensors named like these: {shown}, ...')


def read_converted(path, format: str = '', key: str = '', prefix: str = '', linear='', **asked) -> Converted:
  """A published file as our variables, in float32.

  Args:
    path: .pt, .pth, .safetensors, .npz or .pkl; local or gs://.
    format: a key of FORMATS; '' tells it by the names.
    key: which entry of a checkpoint, see `torch_files.read`.
    prefix: only the tensors whose names begin so, without it: one network out of several.
    linear: LPIPS's linear weights, where `path` is torchvision's VGG16.
    **asked: what the format's `options` and `leaves` need to know besides.

  Raises:
    FileNotFoundError, WeightsFileError: the file cannot be read.
    ConversionError: it is of another architecture (the message has a table), or is asked what its
      format does not ask.
  """
  file = torch_files.read(path, key)
  notes = [f'took {file.taken}'] if file.key else []
  try:
    state_dict = _with_prefix(file.tensors, prefix)
    if 'features.0.weight' in state_dict and not linear and format in ('', 'lpips'):
      raise ConversionError(
        "torchvision's VGG16 is one half of LPIPS; give the other, its linear weights, as well "
        '(--linear=lpips_vgg, see `pagoda weights list`)'
      )
    if linear:
      state_dict = lpips.from_torchvision(state_dict, torch_files.read(linear).tensors)
    if not format:
      state_dict = _without_model_prefix(state_dict)
      format = detected(state_dict)
      notes.append(f'format {format}, by the names of its tensors')
    elif not _fits(state_dict, format):
      state_dict = _without_model_prefix(state_dict)
    asked |= _described(path, _module(format), asked)
    state_dict, changed = state_dicts.as_float32(state_dict)
    notes += [f'{len(names)} tensors of {dtype} made float32' for dtype, names in changed.items()]
    converted = from_state_dict(state_dict, format, **asked)
  except ConversionError as error:
    raise ConversionError(f'{path}: {error}') from error
  # Copies of what still are views, so that nothing depends on the file any more.
  own = jax.tree.map(lambda x: x if x.flags.writeable else x.copy(), (converted.variables, converted.carried))
  _warn_of_non_finite(state_dict, path)
  for note in (notes := (*notes, *converted.notes)):
    logging.info('%s: %s', path, note)
  return dataclasses.replace(converted, variables=own[0], carried=own[1], notes=notes)


def from_state_dict(state_dict: StateDict, format: str, **asked) -> Converted:
  """A state dict as our variables; arguments and errors as `read_converted`."""
  module = _module(format)
  asked = {name: value for name, value in asked.items() if value is not None}
  _check_asked(module, format, asked)
  leaves_asked = _accepted(module.leaves, asked)
  try:
    options = module.options(state_dict, **_accepted(module.options, asked))
    leaves = module.leaves(options, **leaves_asked)
  except ConversionError:
    raise
  except DAMAGE as error:  # a tensor that the format always has is not there, or has fewer sides
    raise ConversionError(f'no network of format {format}: {type(error).__name__}: {error}') from error
  tree, carried = mapping.to_ours(state_dict, leaves, module.carried)
  variables = tree if 'params' in tree else {'params': tree}
  return Converted(variables, options, format, carried, leaves_asked, _assumptions(module, asked, options))


def to_state_dict(converted: Converted) -> dict[str, np.ndarray]:
  """The published code's state dict, bit for bit; raises ConversionError where a leaf does not fit."""
  module = _module(converted.format)
  leaves = module.leaves(converted.options, **converted.leaves_asked)
  has_collections = leaves[0].ours.startswith(('params/', 'batch_stats/', 'spectral/'))
  tree = converted.variables if has_collections else converted.variables['params']
  return mapping.to_theirs(tree, leaves, converted.carried)


def _described(path, module, asked: Mapping[str, Any]) -> dict[str, Any]:
  said = module.described(path) if hasattr(module, 'described') else {}
  for name, value in said.items():
    if asked.get(name) not in (None, value):
      raise ConversionError(f'{name} = {asked[name]}: the file beside the weights says {value}; leave it out')
  return said


def _module(format: str):
  if format not in FORMATS:
    raise ConversionError(f'no format {format!r}; there are {", ".join(FORMATS)}')
  return FORMATS[format]


def _fits(state_dict: StateDict, format: str) -> bool:
  return format in _SIGNS and any(re.fullmatch(_SIGNS[format], name) for name in state_dict)


def _without_model_prefix(state_dict: StateDict) -> StateDict:
  """Without `model.` where that is a wrapper's: EDM's own names begin so."""
  stripped = state_dict
  while not any(re.fullmatch(sign, name) for sign in _SIGNS.values() for name in stripped):
    if not all(name.startswith('model.') for name in stripped):
      return state_dict  # no prefix was in the way: the error shows the names as they are
    stripped = {name.removeprefix('model.'): value for name, value in stripped.items()}
  return stripped


def _with_prefix(state_dict: StateDict, prefix: str) -> StateDict:
  chosen = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
  if not chosen:
    beginnings = sorted({'.'.join(name.split('.')[:2]) for name in state_dict})
    raise ConversionError(f'no name of a tensor begins with {prefix!r}; they begin with {", ".join(beginnings[:12])}')
  return chosen


def _parameters(function) -> dict[str, inspect.Parameter]:
  return dict(list(inspect.signature(function).parameters.items())[1:])


def _accepted(function, asked: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in asked.items() if name in _parameters(function)}


def _check_asked(module, format: str, asked: Mapping[str, Any]) -> None:
  known = {**_parameters(module.options), **_parameters(module.leaves)}
  for name in asked:
    if name not in known:
      has = f'it asks for {", ".join(known)}' if known else 'its names and shapes tell everything'
      raise ConversionError(f'format {format} does not ask for {name}: {has}')


def _assumptions(module, asked: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[str, ...]:
  """What no name or shape tells and nobody said."""
  defaults = {name: options.get(name, p.default) for name, p in _parameters(module.options).items()
              if name not in asked}
  said = ', '.join(f'{name}={value}' for name, value in defaults.items())
  return (f'assumed {said}, which the file does not tell',) if said else ()


def _warn_of_non_finite(state_dict: StateDict, path) -> None:
  names = state_dicts.non_finite_names(state_dict)
  if names:
    more = f' and {len(names) - 10} more' if len(names) > 10 else ''
    logging.warning('%s: NaN or infinite numbers in %s%s', path, ', '.join(names[:10]), more)
