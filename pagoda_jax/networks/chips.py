"""Which chip a program is for, where layers have a form for each."""

import contextlib

import jax


def chip() -> str:
  """'cpu', 'tpu', 'nvidia' or another platform: of the mesh that is set where a program is traced, whose devices need
  not be here; where none is, of JAX's default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device or jax.devices()[0]
  if isinstance(device, str):  # the default may be a platform
    device = jax.local_devices(backend=device)[0]
  return 'nvidia' if 'NVIDIA' in device.device_kind else device.platform


class NoCpuError(RuntimeError):
  """JAX runs without its CPU backend; the message says how to have it."""


def on_cpu() -> contextlib.AbstractContextManager:
  """Programs and arrays within are of a CPU device, whichever devices JAX has besides."""
  try:
    return jax.default_device(jax.local_devices(backend='cpu')[0])
  except RuntimeError:
    raise NoCpuError(f"JAX's CPU backend is needed beside its devices: JAX_PLATFORMS={jax.default_backend()},cpu, or "
                     'leave JAX_PLATFORMS out') from None
