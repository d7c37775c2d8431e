"""PaGoDA in JAX: distil a low-resolution diffusion teacher into a one-step generator, then grow it."""

__version__ = '0.1.0'
