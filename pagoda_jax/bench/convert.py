"""`pagoda bench convert`: time and memory that the conversion of published weights takes, at full size."""

import multiprocessing
import pathlib
import tempfile
import time

import numpy as np

# Options of the published networks at full size.
FULL_SIZE = {
  'Inception-v3': ('inception', {'classes': 1008}, {}),
  'DeiT-base distilled': (
    'timm',
    {
      'architecture': 'deit', 'width': 768, 'depth': 12, 'head_channels': 64, 'mlp_width': 3072, 'patch': 16,
      'grid': 14, 'distilled': True,
    },
    {},
  ),
  'ADM, ImageNet 64 px': ('pagoda', {'channels': 192, 'stem_channels': 192, 'num_classes': 1000}, {}),
}  # fmt: skip


def bench_convert(networks: dict = FULL_SIZE) -> list[dict]:
  """Converts random weights of full-size networks, each in a process of its own.

  Returns:
    One dict a network: name, parameters, weights_bytes (float32), seconds (reading the file to the
    finished folder), extra_bytes (peak memory of the process beyond what it had before and beyond the
    weights themselves; pages of the file that the system keeps count as used).
  """
  results = []
  context = multiprocessing.get_context('spawn')
  for name, (format, options, asked) in networks.items():
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / 'weights.safetensors'
      size = _write_random(file, format, options)
      with context.Pool(1) as pool:
        seconds, used = pool.apply(_convert_and_measure, (str(file), f'{folder}/converted', format, asked))
    results.append(
      {'name': name, 'parameters': size // 4, 'weights_bytes': size, 'seconds': seconds, 'extra_bytes': used - size}
    )
  return results


def _write_random(file: pathlib.Path, format: str, options: dict) -> int:
  """Writes normal numbers for every tensor; returns their bytes."""
  from pagoda_jax.weights.convert import formats, torch_files

  rng = np.random.default_rng(0)
  leaves = formats.FORMATS[format].leaves(options)
  tensors = {leaf.theirs: rng.standard_normal(leaf.shape, np.float32) for leaf in leaves}
  torch_files.write_safetensors(file, tensors)
  return sum(tensor.nbytes for tensor in tensors.values())


def _convert_and_measure(file: str, folder: str, format: str, asked: dict) -> tuple[float, int]:
  """(seconds, bytes of peak memory beyond those before) of one conversion."""
  from pagoda_jax.weights.convert import folders, formats

  before, start = _memory('VmRSS'), time.monotonic()
  folders.write_converted(folder, formats.read_converted(file, format, **asked), {})
  return time.monotonic() - start, _memory('VmHWM') - before


def _memory(field: str) -> int:
  """Bytes that this process has (VmRSS) or had at most (VmHWM), as Linux counts them."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(f'{field}:'):
      return 1024 * int(line.split()[1])
  raise RuntimeError(f'/proc/self/status has no {field}; memory is measured on Linux only')
