"""A phase's compiled step without its data and weights: shapes in, for planning and for compiling ahead of time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.method import guidance
from pagoda_jax.networks import chips
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import decoding, models, sampler
from pagoda_jax.training import first_state, inverting, loop
from pagoda_jax.weights import frozen_weights


class Program(NamedTuple):
  """What one step of a phase computes and from what: trees of ShapeDtypeStructs.

  Attributes:
    step: step(state, batch, frozen, rng); of stage `invert` the inversion of a batch, whose state is the teacher, and
      of `sampling` the images of noise, whose state is what draws them.
    batch: without what is only logged.
    trains: whether the step gives back a new state, in the place of the old one.
    shard_frozen: `config.shard_frozen`.
    results: results(mesh) -> the sharding of what it gives back beside a state.
  """

  step: Callable[..., Any]
  state: Any
  batch: dict[str, jax.ShapeDtypeStruct]
  frozen: dict
  rng: jax.ShapeDtypeStruct
  trains: bool
  shard_frozen: bool = False
  results: Callable[[Mesh], Sharding] = sharding.replicated

  @property
  def images(self) -> int:
    """Images of one step."""
    return self.batch['label'].shape[0]

  def trace(self, mesh: Mesh | None = None):
    """`jax.jit(...).trace(...)` of the step: with the shardings that the loops give it on a mesh, or as one CPU device
    would run it, whatever is here.

    Raises:
      chips.NoCpuError: there is no mesh, and JAX runs without its CPU backend.
    """
    if mesh is None:
      with chips.on_cpu():
        return jax.jit(self.step).trace(self.state, self.batch, self.frozen, self.rng)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    placed = lambda tree, where: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)
    begun = sharding.abstract(self.state, mesh)
    options = {'out_shardings': self.results(mesh)}
    if self.trains:
      options = {'out_shardings': (sharding.tree_shardings(begun, mesh), self.results(mesh)), 'donate_argnums': 0}
    with jax.set_mesh(mesh):
      frozen = sharding.abstract(self.frozen, mesh, self.shard_frozen)
      return jax.jit(self.step, **options).trace(begun, placed(self.batch, split), frozen, placed(self.rng, whole))


def make(config, name: str, num_devices: int = 1) -> Program:
  """The program of a phase on so many devices; nothing is allocated, no file is read."""
  phase = config.phases[name]
  base, side, count = config.base_resolution, configs.phase_resolution(config, name), phase.batch_size
  channels, stored = spaces.image_channels(config), jnp.float32 if spaces.is_latent(config) else jnp.uint8
  image = jax.ShapeDtypeStruct((count, side, side, channels), stored)
  label = jax.ShapeDtypeStruct((count,), jnp.int32)
  captions, null = _captions(config, count)
  batch = {'image': image, 'label': label} | captions
  rng = jax.eval_shape(lambda: jax.random.key(0))
  if phase.stage == 'invert':
    solve = inverting.make_inverter(config, name)
    step = lambda params, batch, frozen, rng: solve(params, batch, frozen.get('null_text'))
    return Program(step, first_state.params_shapes(config, name), batch | {'key': label}, null, rng, trains=False,
                   results=inverting.RESULTS)
  networks, step = loop.make_step(config, name, num_devices)
  frozen = frozen_weights.shapes(config, name) | null
  if phase.stage == 'guide':
    frozen = frozen | {'teacher': models.unet_shapes(models.make_teacher(config, name))}
  if phase.stage in configs.GENERATOR_STAGES:
    batch |= {'real_image': image, 'real_label': label} | {f'real_{key}': rows for key, rows in captions.items()}
  if phase.get('noise'):
    small = (count, base, base, channels)
    if networks.invert is None and networks.draw is None:
      batch['noise'] = jax.ShapeDtypeStruct(small, jnp.float32)
      if networks.law is not None:
        batch['omega'] = jax.ShapeDtypeStruct((count,), jnp.float32)
    else:
      batch |= {'base_image': jax.ShapeDtypeStruct(small, stored), 'key': label}
      frozen = frozen | {'teacher': first_state.params_shapes(config, phase.noise)}
    if phase.get('guide'):
      frozen = frozen | {'guide': first_state.params_shapes(config, phase.guide)}
      if side > base:
        batch['real_base_image'] = jax.ShapeDtypeStruct(small, stored)
  begun = first_state.shapes(config, name, networks, frozen)
  return Program(step, begun, batch, frozen, rng, True, config.shard_frozen)


def sampling(config, name: str, count: int) -> Program:
  """The program that draws `count` images of a phase of stage teacher, distill or grow, as `pagoda sample` does."""
  draw, networks = sampler.make_draw(config, name), models.build(config, name)
  batch = {'noise': jax.ShapeDtypeStruct(networks.noise_shape(count), jnp.float32),
           'label': jax.ShapeDtypeStruct((count,), jnp.int32)}
  if networks.law is not None:
    batch['omega'] = jax.ShapeDtypeStruct((count,), jnp.float32)
  captions, null = _captions(config, count)
  step = lambda params, batch, frozen, rng: draw(
    params, batch['noise'], batch['label'], batch.get('omega'), guidance.text_of(batch), frozen.get('null_text'))
  params = first_state.params_shapes(config, name)
  if spaces.is_latent(config):
    params = params | {decoding.AUTOENCODER: decoding.decoder_shapes(config)}
  return Program(step, params, batch | guidance.text_of(captions), null, jax.eval_shape(lambda: jax.random.key(0)),
                 trains=False)


def _captions(config, count: int):
  """(what a batch has of the captions of so many pictures, what a step is given of the empty one); {} without."""
  if not configs.has_text(config):
    return {}, {}
  text = config.text
  one = {'text': ((text.length, text.width), jnp.float16), 'text_mask': ((text.length,), bool),
         'text_pooled': ((text.pooled_width,), jnp.float16)}
  null = {key: jax.ShapeDtypeStruct(*each) for key, each in one.items()}
  rows = {key: jax.ShapeDtypeStruct((count, *shape), dtype) for key, (shape, dtype) in one.items()}
  return rows | {'caption_kind': jax.ShapeDtypeStruct((count,), jnp.int32)}, {'null_text': null}
