"""Random keys: every use of randomness has a domain of its own, so that no two draw the same numbers.

A phase trains with the domain of its name and begins with NAME/init; those below belong to no phase.
"""

import zlib

import jax

PRIOR = '/prior'  # the noise that images are drawn from
INVERSION = '/inversion'  # the noise that inversion adds to images
GUIDANCE = '/guidance'  # the strength of guidance that each picture is inverted with


def key_for(seed: int, domain: str) -> jax.Array:
  """The typed random key of one use: equal seeds give other numbers in every domain."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(domain.encode()) % 2**31)
