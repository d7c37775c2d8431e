"""Which chip a program is for, where layers have a form for each."""

import jax


def chip() -> str:
  """'cpu', 'tpu', 'nvidia' or another platform: of the mesh that is set where a program is traced, whose devices need
  not be here; where none is, of JAX's first device."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return 'nvidia' if 'NVIDIA' in device.device_kind else device.platform
