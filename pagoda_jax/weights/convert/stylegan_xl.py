"""StyleGAN-XL's MultiScaleD (the heads on one feature network) <-> Discriminator."""

import itertools
import re
from collections.abc import Iterator, Mapping

import numpy as np

from pagoda_jax.networks.discriminator import Discriminator
from pagoda_jax.weights.convert.layers import batch_norm_leaves
from pagoda_jax.weights.convert.mapping import CONV, LINEAR, ConversionError, Layout, Leaf, StateDict


def options(state_dict: StateDict) -> dict:
  """`network`'s arguments, and 'input_widths' (channels of the maps), from names and shapes.

  Raises:
    ConversionError: not a MultiScaleD.
  """
  heads = {int(match[1]) for name in state_dict if (match := re.match(r'mini_discs\.(\d+)\.', name))}
  if not heads:
    raise ConversionError('not a MultiScaleD: no mini_discs.*')
  conditional = 'mini_discs.0.cls.weight_orig' in state_dict
  widths, input_widths, logits = [], [], []
  for head in sorted(heads):
    blocks = []
    while (name := f'mini_discs.{head}.main.{len(blocks)}.main.0.weight_orig') in state_dict:
      blocks.append(state_dict[name].shape)
    last = f'mini_discs.{head}.cls.weight_orig' if conditional else f'mini_discs.{head}.main.{len(blocks)}.weight_orig'
    if last not in state_dict:
      raise ConversionError(f'not a MultiScaleD: no {last}')
    logits.append(state_dict[last].shape)
    widths.append(tuple(shape[0] for shape in blocks))
    input_widths.append((blocks or logits[-1:])[0][1])
  found = {'widths': tuple(widths), 'input_widths': tuple(input_widths), 'logits_kernel': logits[0][-1]}
  if conditional:
    classes, width = state_dict['mini_discs.0.embed.weight'].shape
    found |= {'num_classes': classes, 'embedding_width': width, 'projection_width': logits[0][0]}
  return found


def network(options: dict, **fields) -> Discriminator:
  """The module of `options`; `fields` are its others, such as dtype."""
  return Discriminator(**{name: value for name, value in options.items() if name != 'input_widths'}, **fields)


def leaves(options: dict) -> list[Leaf]:
  """The tensors of `network(options)`, under MultiScaleD's names."""
  net = network(options)
  found = []
  for head, (widths, first) in enumerate(zip(net.widths, options['input_widths'])):
    theirs, ours = f'mini_discs.{head}', f'head{head}'
    for level, (before, after) in enumerate(itertools.pairwise((first, *widths))):
      block, name = f'{theirs}.main.{level}.main', f'{ours}_block{level}'
      found += _spectral_leaves(f'{block}.0', f'{name}/conv', (after, before, 4, 4))
      found.append(Leaf(f'{block}.0.bias', f'params/{name}/conv/bias', (after,)))
      found += batch_norm_leaves(f'{block}.1', f'{name}/norm', after)
    width = (first, *widths)[-1]
    kernel = (net.logits_kernel, net.logits_kernel)
    if not net.num_classes:
      found += _spectral_leaves(f'{theirs}.main.{len(widths)}', f'{ours}_logits', (1, width, *kernel))
      continue
    found += _spectral_leaves(f'{theirs}.cls', f'{ours}_logits', (net.projection_width, width, *kernel))
    found += _class_leaves(theirs, ours, net)
  return found


def carried(name: str) -> bool:
  """Whether `name` is a counter of batches."""
  return name.endswith('num_batches_tracked')


def with_class_embedding(variables: Mapping, embedding: np.ndarray) -> dict:
  """A discriminator's variables with `embedding` [classes, channels] in every head.

  For the published ImageNet embedding (of EfficientNet-lite0), with which every head starts.

  Raises:
    ConversionError: the discriminator is not conditional, or its embedding is of another shape.
  """
  params = dict(variables['params'])
  names = [name for name in params if re.fullmatch(r'head\d+_embedding', name)]
  if not names:
    raise ConversionError('an unconditional discriminator has no class embedding')
  for name in names:
    shape = np.shape(params[name]['embedding'])
    if np.shape(embedding) != shape:
      raise ConversionError(f'class embedding of shape {np.shape(embedding)} for {name} of shape {shape}')
    params[name] = {'embedding': np.array(embedding, np.float32)}
  return {**variables, 'params': params}


def _class_leaves(theirs, ours, net) -> Iterator[Leaf]:
  shape = (net.num_classes, net.embedding_width)
  yield Leaf(f'{theirs}.embed.weight', f'params/{ours}_embedding/embedding', shape)
  shape = (net.projection_width, net.embedding_width)
  yield Leaf(f'{theirs}.embed_proj.weight', f'params/{ours}_projection_kernel', shape, LINEAR)
  yield Leaf(f'{theirs}.embed_proj.bias', f'params/{ours}_projection_bias', shape[:1])


def _spectral_leaves(theirs, ours, shape) -> Iterator[Leaf]:
  """Kernel and singular vectors; the right one is in the order of a flattened kernel, which differs."""
  inputs, height, width = shape[1:]
  right = Layout(
      lambda v: v.reshape(inputs, height, width).transpose(1, 2, 0).ravel(),
      lambda v: v.reshape(height, width, inputs).transpose(2, 0, 1).ravel(),
  )
  yield Leaf(f'{theirs}.weight_orig', f'params/{ours}/kernel', shape, CONV)
  yield Leaf(f'{theirs}.weight_u', f'spectral/{ours}/u', shape[:1])
  yield Leaf(f'{theirs}.weight_v', f'spectral/{ours}/v', (inputs * height * width,), right)
