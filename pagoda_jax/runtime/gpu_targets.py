"""What XLA's compiler must know of a GPU that is not here: its `GpuTargetConfigProto`, as text."""

# NVIDIA's CUDA C++ programming guide (compute capabilities 8.0 and 9.0) and data sheets; memory in bytes as the driver
# tells it, clock in GHz at its highest. XLA's own descriptions (xla/backends/gpu/target_config/specs) have the same.
_HOPPER = {'capability': 'major: 9 feature_extension: ACCELERATED_FEATURES', 'cores': 132, 'fpus': 128, 'clock': 1.98,
           'l2': 52428800, 'shared': 233472}
GPUS = {
  'a100': {'name': 'NVIDIA A100-SXM4-80GB', 'capability': 'major: 8', 'cores': 108, 'fpus': 64, 'clock': 1.41,
           'l2': 41943040, 'shared': 167936, 'memory': 85100068864, 'bandwidth': 2039040000000},
  'h100': {'name': 'NVIDIA H100 80GB HBM3', **_HOPPER, 'memory': 84942979072, 'bandwidth': 3352320000000},
  'h200': {'name': 'NVIDIA H200', **_HOPPER, 'memory': 151397597184, 'bandwidth': 4800000000000},
}
# Versions of what would be installed beside the GPU: CUDA 12.8, cuDNN 9.10. A block may have all but 1 KiB of a
# multiprocessor's shared memory.
_TEXT = """
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ {capability} }}
  core_count: {cores}
  fpus_per_core: {fpus}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {optin}
  shared_memory_per_core: {shared}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def text(chip: str) -> str:
  """The description of one of GPUS."""
  facts = GPUS[chip]
  return _TEXT.format(**facts, optin=facts['shared'] - 1024)
