"""PaGoDA in JAX: distil a low-resolution diffusion teacher into a one-step generator, then grow it."""

__version__ = '0.1.0'


def load(path, **kwargs):
  """A finished generator, from a work directory, a phase, or a folder of `pagoda convert`, `export` or `publish`.

      generator = pagoda_jax.load('runs/mnist')
      images = generator(labels=[3, 5], seed=0)  # uint8 [2, S, S, C]

  Arguments, errors and what comes back: `pagoda_jax.use.generator.load`.
  """
  # Here, so that `import pagoda_jax` stays instant; by name, as this file stands below all floors.
  import importlib

  return importlib.import_module('pagoda_jax.use.generator').load(path, **kwargs)
