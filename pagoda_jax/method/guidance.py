"""Classifier-free guidance (Ho & Salimans 2022), and the laws that its strength omega is drawn from.

omega = 1 is no guidance; larger ones give samples of p(x|c, omega) ~ p(x|c)^omega p(x)^(1 - omega), or near it.

What pictures are conditioned on is a mapping `cond` of [B, ...]: 'label', or 'text', 'text_mask' and 'text_pooled' (an
encoder's embeddings of captions), and perhaps 'omega'. Nothing is the label -1, or the embeddings of the empty caption:
`null`, {'text': [L, W], 'text_mask': [L], 'text_pooled': [P]}, which the data's store holds and None stands for where
there is no text.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pagoda_jax.method.diffusion import broadcast

TEXT = ('text', 'text_mask', 'text_pooled')
CONDITIONS = ('label', *TEXT)


def text_of(mapping: Mapping) -> dict:
  """Those entries that are of text; {} without any."""
  return {key: mapping[key] for key in TEXT if key in mapping}


def condition_of(batch: Mapping, prefix: str = '') -> dict:
  """What a batch's pictures, or those whose entries begin with `prefix`, are conditioned on."""
  return {key: batch[prefix + key] for key in CONDITIONS if prefix + key in batch}


def nothing(cond: Mapping, null: Mapping | None = None) -> dict:
  """The condition of nothing, in the shapes of `cond`; a strength of guidance stays.

  Raises:
    ValueError: `cond` has text, and `null` none in its place.
  """
  if lacking := [key for key in text_of(cond) if key not in (null or {})]:
    raise ValueError(f'without text there must be the embeddings of the empty caption: no {", ".join(lacking)} of it')

  def instead(key, value):
    if key == 'label':
      return jnp.full_like(value, -1, dtype=jnp.int32)  # of unsigned labels too, of which -1 would be the largest
    return jnp.broadcast_to(null[key], value.shape).astype(value.dtype) if key in TEXT else value

  return {key: instead(key, value) for key, value in cond.items()}


def dropped(rng: jax.Array, cond: Mapping, rate: float, null: Mapping | None = None) -> dict:
  """`cond`, each row replaced by nothing with probability `rate`, for classifier-free guidance."""
  if rate == 0 or not cond:
    return dict(cond)
  rows = jax.random.bernoulli(rng, rate, next(iter(cond.values())).shape[:1])
  chosen = lambda other, own: jnp.where(rows.reshape(-1, *(1,) * (own.ndim - 1)), other, own)
  return {key: chosen(other, cond[key]) for key, other in nothing(cond, null).items()}


def guided(denoise: Callable, omega, null: Mapping | None = None) -> Callable:
  """D_uncond + omega * (D_cond - D_uncond), of a denoiser with its parameters bound.

  A picture's two states lie side by side in one batch: the network stands once in the program, and a batch that is
  split over devices stays where it is.

  Args:
    denoise: denoise(x, sigma, cond) of a teacher trained with label dropout; sigma a scalar or [B].
    omega: a scalar or [B].
    null: of text.
  """

  def denoise_guided(x, sigma, cond):
    cond = {key: cond[key] for key in CONDITIONS if key in cond}
    without = nothing(cond, null)
    both = {key: jnp.stack([value, without[key]], axis=1).reshape(-1, *value.shape[1:]) for key, value in cond.items()}
    sigmas = jnp.repeat(broadcast(sigma, x).reshape(-1), 2)
    denoised = denoise(jnp.repeat(x, 2, axis=0), sigmas, both)
    conditional, unconditional = jnp.moveaxis(denoised.reshape(-1, 2, *denoised.shape[1:]), 1, 0)
    return unconditional + broadcast(omega, x) * (conditional - unconditional)

  return denoise_guided


class Law(NamedTuple):
  """How omega is distributed: 'constant' (`mean`), 'uniform' in [low, high], or 'truncated_normal' (of `mean` and
  `std` before it is cut to [low, high])."""

  kind: str
  mean: float = 1.0
  std: float = 1.0
  low: float = 1.0
  high: float = 1.0

  @property
  def ends(self) -> tuple[float, float]:
    """The smallest and the largest omega."""
    return (self.mean, self.mean) if self.kind == 'constant' else (self.low, self.high)

  def draw(self, rng: jax.Array, shape: tuple[int, ...] = (), kinds: jax.Array | None = None) -> jax.Array:
    """float32 of a shape; the kinds of captions are the others' business (`Laws`).

    Raises:
      ValueError: there is no such law.
    """
    del kinds
    if self.kind == 'constant':
      return jnp.full(shape, self.mean, jnp.float32)
    if self.kind == 'uniform':
      return jax.random.uniform(rng, shape, jnp.float32, self.low, self.high)
    if self.kind != 'truncated_normal':
      raise ValueError(f"law {self.kind!r}: must be 'constant', 'uniform' or 'truncated_normal'")
    low, high = ((end - self.mean) / self.std for end in self.ends)
    # Rounding must not lead out of the range.
    drawn = self.mean + self.std * jax.random.truncated_normal(rng, low, high, shape, jnp.float32)
    return jnp.clip(drawn, self.low, self.high)

  def of_pictures(self, rng: jax.Array, keys: jax.Array, kinds: jax.Array | None = None) -> jax.Array:
    """float32 [B] of pictures' keys int32 [B]: each depends on rng and its own key alone."""
    del kinds
    return jax.vmap(lambda key: self.draw(jax.random.fold_in(rng, key)))(keys)

  def nearest(self, omega: float) -> float:
    """The strength in the law's range that is nearest to omega."""
    low, high = self.ends
    return min(max(omega, low), high)


class Laws(NamedTuple):
  """A law for each kind of caption, number 0, 1, ...; used as a `Law`, of pictures whose captions' kinds are known.

  A picture's strength depends on rng, its key (or place) and its kind alone.
  """

  of_kinds: tuple[Law, ...]

  @property
  def ends(self) -> tuple[float, float]:
    """The smallest and the largest omega of any kind."""
    low, high = zip(*(law.ends for law in self.of_kinds))
    return min(low), max(high)

  @property
  def mean(self) -> float:
    """The first kind's."""
    return self.of_kinds[0].mean

  def draw(self, rng: jax.Array, shape: tuple[int, ...] = (), kinds: jax.Array | None = None) -> jax.Array:
    """float32 of a shape, which is that of `kinds`."""
    return self._chosen(kinds, [law.draw(key, shape) for law, key in zip(self.of_kinds, self._keys(rng))])

  def of_pictures(self, rng: jax.Array, keys: jax.Array, kinds: jax.Array | None = None) -> jax.Array:
    """float32 [B] of pictures' keys and kinds, int32 [B]."""
    return self._chosen(kinds, [law.of_pictures(key, keys) for law, key in zip(self.of_kinds, self._keys(rng))])

  def nearest(self, omega: float) -> float:
    """The strength in the laws' range that is nearest to omega."""
    low, high = self.ends
    return min(max(omega, low), high)

  def _keys(self, rng):
    return [rng, *(jax.random.fold_in(rng, kind) for kind in range(1, len(self.of_kinds)))]

  def _chosen(self, kinds, drawn):
    if kinds is None:
      raise ValueError("with a law for each kind of caption a batch needs 'caption_kind', int [B]")
    return jnp.take_along_axis(jnp.stack(drawn), jnp.clip(kinds, 0, len(drawn) - 1)[None], axis=0)[0]
