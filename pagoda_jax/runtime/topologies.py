"""Chips and sets of them, which need not be here: what `pagoda plan --topology=...` plans for, what MFU is told of."""

import dataclasses
import os
import re

import jax

from pagoda_jax.runtime import gpu_targets


class TopologyError(ValueError):
  """A topology that does not exist, or that nothing can be compiled for here; the message names the choices."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    peak: published dense bfloat16 FLOP/s; None where it differs from machine to machine.
    memory: published bytes of HBM; None likewise.
    kinds: what JAX calls it (`Device.device_kind`, of GPUs without "NVIDIA").
    per_host: most of them in one host of a set of several hosts.
    bandwidth: published bytes/s of HBM.
    link: published bytes/s that it sends to the others of its host, of TPUs to those of its slice, over all its links:
      half of a figure that counts both directions.
    network: bytes/s that a host sends to other hosts; None where links join them too.
    lanes: channels of a product's factors come in multiples of these, and are padded to them; 1: not told.
    float32: how many times as long as bfloat16's a product of float32 factors takes at matmul_precision 'default',
      'high' and 'highest': the number of bfloat16 products it is made of, or the ratio of the published peaks.
  """

  peak: float | None
  memory: float | None
  kinds: tuple[str, ...]
  per_host: int
  bandwidth: float | None = None
  link: float | None = None
  network: float | None = None
  lanes: int = 1
  float32: tuple[float, float, float] = (1, 1, 1)


_TPU = {'float32': (1, 3, 6)}
# TF32 has half the peak of bfloat16; 'highest' is left to the CUDA cores.
_A100, _HOPPER = {'lanes': 8, 'float32': (2, 2, 16)}, {'lanes': 8, 'float32': (2, 2, 14.8)}
CHIPS = {
  # Google Cloud's documentation, "TPU v4" to "TPU v6e", per chip. Links: a pod's all-reduce bandwidth over its chips
  # (v4, v5e, v6e), half of the bidirectional ICI bandwidth (v5p). Lanes: sides of the matrix units.
  'v4': Chip(275e12, 32 * 2**30, ('TPU v4',), 4, 1200e9, 268e9, lanes=128, **_TPU),
  'v5e': Chip(197e12, 16e9, ('TPU v5 lite', 'TPU v5e'), 4, 819e9, 200e9, lanes=128, **_TPU),
  'v5p': Chip(459e12, 95e9, ('TPU v5', 'TPU v5p'), 4, 2765e9, 600e9, lanes=128, **_TPU),
  'v6e': Chip(918e12, 32e9, ('TPU v6 lite', 'TPU v6e'), 4, 1638e9, 400e9, lanes=256, **_TPU),
  # As published, without sparsity; of the SXM modules where nothing else is said (memory and NVLink as others quote
  # NVIDIA's data sheets; bandwidths of PCIe cards and ratios of peaks unchecked). Links: NVLink, one way; of PCIe
  # cards, their bus. Networks: of a DGX, one 200 Gbit/s (A100) or 400 Gbit/s adapter a GPU. Lanes: 16 bytes of
  # bfloat16, which tensor cores read at once.
  'a100': Chip(312e12, 80e9, ('A100-SXM4-80GB', 'A100 80GB PCIe'), 8, 2039e9, 300e9, 200e9, **_A100),
  'a100-40gb': Chip(312e12, 40e9, ('A100-SXM4-40GB', 'A100-PCIE-40GB'), 8, 1555e9, 300e9, 200e9, **_A100),
  'h100': Chip(989e12, 80e9, ('H100 80GB HBM3',), 8, 3350e9, 450e9, 400e9, **_HOPPER),
  'h100-pcie': Chip(756e12, 80e9, ('H100 PCIe',), 8, 2000e9, 64e9, **_HOPPER),
  'h200': Chip(989e12, 141e9, ('H200',), 8, 4800e9, 450e9, 400e9, **_HOPPER),
  'cpu': Chip(None, None, ('cpu',), 2**31),
}
# Slices of both TPUs: chips -> sides of the rectangle.
SLICES = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
CHOICES = ('v5e-N or v6e-N (N chips), v5p-N (N cores, two a chip), Nxh100, Nxh200 or Nxa100, cpu:N; such as v5e-256, '
           'v5p-64, 8xh100 or cpu:8')


@dataclasses.dataclass(frozen=True)
class Topology:
  """`count` devices of one kind."""

  chip_name: str
  count: int

  @property
  def chip(self) -> Chip:
    return CHIPS.get(self.chip_name, Chip(None, None, (self.chip_name,), 2**31))

  @property
  def is_tpu(self) -> bool:
    """Whether its slices are those of SLICES, which can be compiled for."""
    return self.chip_name in ('v5e', 'v6e')

  @property
  def is_gpu(self) -> bool:
    return self.chip_name in gpu_targets.GPUS

  @property
  def platform(self) -> str:
    """As `networks.chips.chip` has it of its devices; '' of those that nothing is known of."""
    if self.chip.kinds[0].startswith('TPU'):
      return 'tpu'
    return 'nvidia' if self.chip_name.startswith(('a100', 'h100', 'h200')) else ''

  @property
  def hosts(self) -> int:
    # A single host has up to 8 chips of v5e or v6e, hosts of a larger slice 4 each.
    if self.count <= (8 if self.is_tpu else self.chip.per_host):
      return 1
    fewest = -(-self.count // self.chip.per_host)
    return next(hosts for hosts in range(fewest, self.count + 1) if self.count % hosts == 0)  # each has as many

  @property
  def one_host(self) -> 'Topology':
    """The devices of one of the hosts."""
    return Topology(self.chip_name, self.count // self.hosts)

  @property
  def link(self) -> float | None:
    """Bytes/s that a device sends in a ring over all of them: the rings of a host's devices share its network."""
    several, network = self.hosts > 1, self.chip.network
    return min(self.chip.link, network) if several and network else self.chip.link

  @property
  def sizes(self) -> list['Topology']:
    """Sets of such chips, smallest first: SLICES, else 1, 2, 4 ... up to 1024; of v4 and v5p from a host's 4 on."""
    least = self.chip.per_host if self.platform == 'tpu' else 1
    counts = SLICES if self.is_tpu else [2**i for i in range(11) if 2**i >= least]
    return [Topology(self.chip_name, count) for count in counts]

  def __str__(self) -> str:
    return f'{self.count} x {self.chip_name}' + (f' on {self.hosts} hosts' if self.hosts > 1 else '')


def parse(text: str) -> Topology:
  """The topology of a text such as 'v5e-256', '8xh100' or 'cpu:8'.

  Raises:
    TopologyError: there is none of that name.
  """
  found = re.fullmatch(r'(v5e|v6e|v5p)-(\d+)|(\d+)x(h100|h200|a100)|(cpu):(\d+)', text)
  if not found:
    raise TopologyError(f'--topology={text}: must be {CHOICES}')
  tpu, chips, gpus, gpu, cpu, cpus = found.groups()
  count = int(chips or gpus or cpus)
  if tpu == 'v5p':  # named by its cores, as Google Cloud does; slices are boxes of 4 and more chips
    if count < 8 or count % 8:
      raise TopologyError(f'--topology={text}: there are none of {count}; v5p comes with 8, 16, 24, ... cores')
    return Topology(tpu, count // 2)
  if count < 1 or (tpu and count not in SLICES):
    raise TopologyError(f'--topology={text}: there are none of {count}' + (
      f'; {tpu} comes with {", ".join(map(str, SLICES))} chips' if tpu else ' devices'))
  return Topology(tpu or gpu or cpu, count)


def here() -> Topology:
  """The devices that JAX sees now."""
  return Topology(chip_name(jax.devices()[0].device_kind), jax.device_count())


def chip_name(kind: str) -> str:
  """The name in CHIPS of what JAX calls `kind`, or `kind` itself where it is not there."""
  kind = kind.removeprefix('NVIDIA ')
  return next((name for name, chip in CHIPS.items() if kind in chip.kinds), kind)


def utilisation(images_per_second: float, image_flops: float, topology: Topology) -> float:
  """MFU: the share of the chips' published bfloat16 peak, in whatever precision they work.

  Args:
    images_per_second: of all chips together.
    image_flops: FLOPs that an image takes, without those that are done again to save memory.
    topology: chips whose peak is known.
  """
  return images_per_second * image_flops / (topology.chip.peak * topology.count)


def compile_devices(topology: Topology) -> list:
  """Devices of the topology that XLA can compile for on this machine: TPUs and GPUs that need not be here, or
  virtual CPUs.

  Raises:
    TopologyError: there is no compiler for them here; the message says what to install or to choose.
  """
  if topology.chip_name == 'cpu':
    return _cpus(topology.count)
  if not (topology.is_gpu or (topology.is_tpu and topology.count in SLICES)):
    raise TopologyError(f'--aot for {topology}: is compiled for v5e and v6e ({", ".join(map(str, SLICES))} chips), '
                        f'{", ".join(gpu_targets.GPUS)} and cpu')
  devices = _tpus(topology) if topology.is_tpu else _gpus(topology)
  jax.config.update('jax_enable_compilation_cache', False)  # it could not be read back without the devices
  return devices


def compile_options(topology: Topology) -> dict[str, bool]:
  """Options of XLA for programs of devices that are not here."""
  # Without a GPU to try tiles on, XLA's own kernels of products may get none that fit, which ends the compilation.
  return {'xla_gpu_enable_triton_gemm': False} if topology.is_gpu else {}


def _tpus(topology: Topology) -> list:
  # libtpu would ask the cloud which machine this is, and wait for an answer that does not come.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # its lock guards chips, which a compiler leaves alone
  from jax.experimental import topologies as descriptions

  sides = SLICES[topology.count]
  bounds = {} if topology.hosts > 1 else {'chips_per_host_bounds': (*map(int, sides.split('x')), 1)}
  try:
    return descriptions.get_topology_desc(
      platform='tpu', topology_name=f'{topology.chip_name}:{sides}', **bounds
    ).devices
  except RuntimeError as error:
    raise TopologyError(
      f'--aot for {topology}: no TPU compiler here ({str(error).splitlines()[0]}). It comes with the tpu extra: '
      'pip install "pagoda_jax[tpu]"; no TPU is needed'
    ) from None


def _gpus(topology: Topology) -> list:
  from jax.experimental import topologies as descriptions

  shape = f'1x{topology.hosts}x{topology.one_host.count}'  # slices, hosts of each, GPUs of each
  try:
    return descriptions.get_topology_desc(
      platform='cuda', target_config=gpu_targets.text(topology.chip_name), topology=shape
    ).devices
  except (NotImplementedError, RuntimeError) as error:
    release = re.match(r'\d+\.\d+\.\d+', jax.__version__)[0]
    raise TopologyError(
      f'--aot for {topology}: no GPU compiler here ({str(error).splitlines()[0]}). It comes with the CUDA plugin of '
      f'this JAX: pip install --no-deps jax-cuda13-plugin=={release} jax-cuda13-pjrt=={release}; no GPU and nothing '
      'else of CUDA is needed'
    ) from None


def _cpus(count: int) -> list:
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:
    pass  # JAX runs already, with as many as it has
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise TopologyError(f'--aot for cpu:{count}: JAX runs with {len(devices)} CPU devices')
  return devices[:count]
