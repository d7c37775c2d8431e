"""Golden checks of augmentation, losses and resizing (pagoda_losses, resize)."""

import jax.numpy as jnp
import numpy as np

import golden_tools
from pagoda_jax import augment


def cases():
  """Yields (id, check)."""
  _, meta = golden_tools.load('pagoda_losses')
  for name in meta:
    if name.startswith('diffaug'):
      yield f'losses-{name}', lambda name=name: check_diff_augment(name)


def golden_augmentation(name):
  """(images NHWC, DiffAugment parameters) of one entry."""
  arrays, _ = golden_tools.load('pagoda_losses')
  params = {key: jnp.asarray(arrays[f'{name}/{key}']).ravel() for key in ('brightness', 'saturation', 'contrast')}
  for ours, theirs in (('translation', 'translation'), ('cutout', 'offset')):
    params[ours] = jnp.stack([jnp.asarray(arrays[f'{name}/{theirs}_{axis}'], jnp.int32).ravel() for axis in 'xy'], -1)
  return golden_tools.nhwc(arrays[f'{name}/x']), params


def check_diff_augment(name):
  arrays, _ = golden_tools.load('pagoda_losses')
  images, params = golden_augmentation(name)
  for last, key in enumerate(augment.POLICY):
    reference = arrays[f'{name}/out' if key == 'cutout' else f'{name}/after_{key}']
    out = augment.apply(images, {key: params[key] for key in augment.POLICY[: last + 1]})
    np.testing.assert_allclose(golden_tools.nchw(out), reference, rtol=0, atol=2e-6)
