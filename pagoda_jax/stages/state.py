"""What a phase trains and must survive a crash: pytrees, their optimisers, one guarded update.

`step` counts train steps, skipped ones included; `skipped` counts consecutive steps with a number that was
not finite, `skipped_total` all of them. `fixed` holds the generator's leaves that a growth
phase does not train.
"""

import inspect
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.experimental import layout

from pagoda_jax import config as configs
from pagoda_jax.method import ema
from pagoda_jax.networks import chips, edm2
from pagoda_jax.runtime import sharding

Tree = Any


@flax.struct.dataclass
class TeacherState:
  """State of stage 1: `params` and `ema` are trees of equal structure.

  `ema` is the first of the averages that config.ema_names names, `other_emas` holds the others by name: {} where
  there is one.
  """

  step: jax.Array
  skipped: jax.Array
  skipped_total: jax.Array
  params: Tree
  ema: Tree
  opt_state: Tree
  other_emas: Tree = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class GeneratorState:
  """State of stages 2 and 3: two players. `fixed` is {} where the whole generator trains.

  `discriminator` holds all its variables: {'params': trained, other collections (spectral norm
  vectors, batch statistics): updated by its forward passes}. `pairs_discriminator` is the same of the
  pairs' own; without one, it and its optimiser's state are {}.
  """

  step: jax.Array
  skipped: jax.Array
  skipped_total: jax.Array
  params: Tree
  fixed: Tree
  ema: Tree
  opt_state: Tree
  discriminator: Tree
  discriminator_opt_state: Tree
  pairs_discriminator: Tree = flax.struct.field(default_factory=dict)
  pairs_discriminator_opt_state: Tree = flax.struct.field(default_factory=dict)


def learning_rate(config, steps: int) -> optax.Schedule:
  """schedule(steps taken) -> learning rate, of a config's `optimizer` group in a phase of `steps` steps."""
  if config.schedule == 'cosine':
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, steps)
  after = optax.constant_schedule(config.learning_rate)
  if config.schedule == 'inverse_sqrt':  # counts from the end of the warm-up
    after = lambda count: config.learning_rate / jnp.sqrt(
      jnp.maximum((count + config.warmup_steps) / config.decay_from, 1))
  return optax.join_schedules(
    [optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1)), after],
    [config.warmup_steps],
  )


def make_optimizer(config, steps: int, updates: int = 1) -> optax.GradientTransformation:
  """The optimiser of optax that a config's `optimizer` group names (config.optimizer explains its keys).

  Its schedule is one of steps, in each of which it makes so many updates.
  """
  schedule = learning_rate(config, steps)
  make = getattr(optax, config.name)
  accepted = inspect.signature(make).parameters
  given = {key: config[key] for key in ('b1', 'b2', 'weight_decay') if key in accepted}
  transform = make(lambda count: schedule(count // updates), **given)
  if config.clip_norm:
    transform = optax.chain(optax.clip_by_global_norm(config.clip_norm), transform)

  def update(grads, opt_state, params=None):
    return transform.update(laid_out(sharding.split_as_update(grads)), opt_state, params)

  return optax.GradientTransformation(transform.init, jax.named_scope('update')(update))


def laid_out(grads: Tree) -> Tree:
  """The gradients as parameters lie in memory, on NVIDIA GPUs.

  There those of convolutions come transposed. Left to itself XLA transposes what is made of them instead: moments,
  parameters and averages, slowly and not in place (networks/README.md, "bfloat16": 11 of 123 ms). As they are where
  parameters or their update are, or may be, split over devices: XLA would gather them for it.
  """
  if not _whole_on_gpus():
    return grads

  def of(leaf):
    row_major = layout.Layout(tuple(range(leaf.ndim)))
    # Without the barrier the transposing is fused into the update.
    return jax.lax.optimization_barrier(layout.with_layout_constraint(leaf, row_major))

  return jax.tree.map(of, grads)


@jax.named_scope('update')
def global_norm(grads: Tree) -> jax.Array:
  """`optax.global_norm`, with 512 kernels fewer of the 3,939 of a step of ADM-64's teacher, compiled for an H200.

  XLA sums each leaf in two or three kernels, of which all but the first are small. Here the first's sums are together
  before they are summed; without the barrier XLA would take them apart again. As it is where leaves may be split over
  devices: their sums would be gathered.
  """
  if not _whole_on_gpus():
    return optax.global_norm(grads)
  squares = [jnp.square(leaf) for leaf in jax.tree.leaves(grads)]
  parts = [leaf.sum(-1).ravel() if leaf.ndim > 1 else leaf.ravel() for leaf in squares]
  return jnp.sqrt(jax.lax.optimization_barrier(jnp.concatenate(parts)).sum())


def _whole_on_gpus() -> bool:
  """Whether this is for NVIDIA GPUs that each hold all of the parameters and of their update."""
  mesh = sharding.own_mesh()
  whole = jax.device_count() == 1 if mesh is None else mesh.shape['fsdp'] == mesh.shape['zero1'] == 1
  return whole and chips.chip() == 'nvidia'


def init_teacher(params: Tree, config) -> TeacherState:
  """State at step 0. Its averages are copies: the state is donated, and one buffer cannot be donated twice.

  Raises:
    ValueError: parameters of less than 32 bits.
  """
  _check_types(params)
  optimizer = make_optimizer(config.optimizer, config.steps)
  others = {name: copy(params) for name in configs.ema_names(config)[1:]}
  return TeacherState(
    **_counters(), params=params, ema=copy(params), opt_state=optimizer.init(params), other_emas=others)


def init_generator(
  params: Tree, fixed: Tree, discriminator: Tree, config, pairs_discriminator: Tree | None = None
) -> GeneratorState:
  """State at step 0 of a generator whose trained leaves are `params` and whose other leaves are `fixed`.

  `pairs_discriminator`: where `config.reconstruction_adversarial` has a weight, variables as the discriminator's.

  Raises:
    ValueError: trained parameters of less than 32 bits; a pairs' discriminator is missing, or nothing would train it.
  """
  weight = config['reconstruction_adversarial'].weight if 'reconstruction_adversarial' in config else 0
  if bool(weight) != bool(pairs_discriminator):
    raise ValueError(f'reconstruction_adversarial.weight = {weight}: pairs_discriminator must be '
                     + ('the variables of a second discriminator' if weight else 'None'))
  _check_types(params, discriminator['params'])
  discriminator_optimizer = make_optimizer(config.discriminator_optimizer, config.steps)
  of_pairs = {}
  if pairs_discriminator:
    of_pairs = {'pairs_discriminator': pairs_discriminator,
                'pairs_discriminator_opt_state': discriminator_optimizer.init(pairs_discriminator['params'])}
  return GeneratorState(
    **_counters(),
    params=params,
    fixed=fixed,
    ema=copy(params),
    opt_state=make_optimizer(config.optimizer, config.steps).init(params),
    discriminator=discriminator,
    discriminator_opt_state=discriminator_optimizer.init(discriminator['params']),
    **of_pairs,
  )


def _check_types(*trees: Tree) -> None:
  """Refuses parameters that would hardly be trained: beside 8 or 11 bits most updates, and an average's, round away."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
    kind = jnp.result_type(leaf)
    if jnp.issubdtype(kind, jnp.floating) and jnp.finfo(kind).bits < 32:
      raise ValueError(f'parameter {jax.tree_util.keystr(path[1:])} is {kind}; must be float32, from which the '
                       "networks compute in their own `dtype`")


def _counters() -> dict[str, jax.Array]:
  return {name: jnp.zeros((), jnp.int32) for name in ('step', 'skipped', 'skipped_total')}


def copy(tree: Tree) -> Tree:
  """The tree in buffers of its own."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


@jax.named_scope('update')
def updated(unet, params: Tree, updates: Tree) -> Tree:
  """A U-Net's parameters, or those of them that are trained, after an optimiser's updates."""
  new = optax.apply_updates(params, updates)
  return edm2.forced(new, params) if unet.magnitude_preserving else new


@jax.named_scope('update')
def mix(average: Tree, params: Tree, decay: float) -> Tree:
  """Exponential moving average: decay * average + (1 - decay) * params; of constants, themselves."""

  def mixed(path, e, p):
    # Their average would drift by its rounding.
    return e if path[-1].key in edm2.CONSTANTS else decay * e + (1 - decay) * p.astype(e.dtype)

  return jax.tree_util.tree_map_with_path(mixed, average, params)


@jax.named_scope('update')
def averaged(state: TeacherState, params: Tree, config) -> dict[str, Tree]:
  """The fields `ema` and `other_emas` of a teacher's state after the step that made `params` of it."""
  images_seen = state.step.astype(jnp.float32) * config.batch_size
  rates = [ema.halflife_rate(images_seen, config.batch_size, h, config.ema_rampup) for h in config.ema_halflife]
  rates += [ema.power_rate(state.step + 1, std) for std in config.ema_std]
  if not rates:
    return {'ema': mix(state.ema, params, config.ema)}
  others = zip(configs.ema_names(config)[1:], rates[1:])
  return {'ema': ema.moved(state.ema, params, rates[0]),
          'other_emas': {name: ema.moved(state.other_emas[name], params, rate) for name, rate in others}}


def finite_leaves(tree: Tree) -> Tree:
  """For each leaf whether all of its numbers are finite."""
  return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)


@jax.named_scope('update')
def guarded(measured: Tree, new, old):
  """`new`, or where a number in `measured` is not finite `old`, with its step counted and the skip recorded.

  `new` itself is not looked at: `old` would have to be kept until all of it is known, a second state in memory. What
  is measured tells of a state that is not finite a step later, and the loop looks before it saves one.
  """
  finite = jnp.all(jnp.stack(jax.tree.leaves(finite_leaves(measured))))

  def of(path, new, old):
    if new is old:
      return old
    kept = jnp.where(finite, new, old)
    # A discriminator's statistics are not an update's but its forward passes'.
    measured = path[0].name in ('discriminator', 'pairs_discriminator') and path[1].key != 'params'
    # Each device looks at its share: what all hold whole is gathered after it.
    return kept if measured else sharding.split_as_update(kept)

  kept = jax.tree_util.tree_map_with_path(of, new, old)
  return kept.replace(
    step=old.step + 1,
    skipped=jnp.where(finite, 0, old.skipped + 1),
    skipped_total=old.skipped_total + jnp.where(finite, 0, 1),
  )


def step_keys(rng: jax.Array, step: jax.Array, count: int) -> jax.Array:
  """`count` independent keys for one train step: the same for every host, sharding and restart."""
  return jax.random.split(jax.random.fold_in(rng, step), count)
