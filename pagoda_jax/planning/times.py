"""How long a phase's step takes on chips of published speeds, and on how many of them, placed how, it is best run."""

import functools
from typing import NamedTuple

from pagoda_jax.planning.plan import Counted, PhaseCosts
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.topologies import Topology

# Of the bfloat16 peak, what a step's arithmetic reaches with ever more images at once, what passes take for parameters
# (passes.BYTES) apart: (of a U-Net alone, with a discriminator and its feature networks). Of ADM-64: on a TPU as XLA
# for v5e counts its cycles, of the teacher at four and at eight images and of parts of distill at four pairs (whole
# they take 138 ms where this makes 155, and growth of one image 61 where it makes 57); on a GPU as an H200 took 107.9
# ms for 64 images of the teacher (this makes 107.2), 182.6 for 32 pairs of distill (191) and 97.9 for 16 of growth to
# 128 px (94.9).
MFU = {'tpu': (0.59, 0.4), 'nvidia': (0.4, 0.32)}
FITS = 0.8  # share of a chip's memory: steps were seen to take up to 16 % more than is reckoned
DEARER = 1.5  # times the fewest chip-hours, for which the run may take less time
_PRECISIONS = ('default', 'high', 'highest')


class StepTime(NamedTuple):
  """Seconds of a step, one after the other."""

  compute: float
  passes: float
  collectives: float
  update: float

  @property
  def total(self) -> float:
    return sum(self)

  @property
  def hidden(self) -> float:
    """Where collectives run beside the arithmetic."""
    return max(self.compute + self.passes, self.collectives) + self.update

  @property
  def bound(self) -> str:
    """What takes longest."""
    return max(self._fields, key=lambda part: getattr(self, part))


def step_time(found: PhaseCosts, topology: Topology, mfu: float | None = None) -> StepTime:
  """The time of a step on chips whose speeds are known.

  Arithmetic runs at the share `mfu` of the bfloat16 peak; what float32 products take beyond bfloat16's
  (`Chip.float32`) is added at the full peak. Passes read parameters, and optimisers and moving average read and write,
  at the speed of HBM; collectives send at the links'.

  Args:
    found: of the phase on the topology.
    topology: the devices that the step runs on together.
    mfu: in (0, 1]; None: MFU's.
  """
  chip, mfu = topology.chip, mfu or MFU[topology.platform][found.opposed]
  further = sum(found.products.get(precision, 0) * (times - 1) for precision, times in zip(_PRECISIONS, chip.float32))
  return StepTime(
    compute=(found.flops / mfu + further) / topology.count / chip.peak,
    passes=found.passes / chip.bandwidth,
    collectives=found.sent / topology.link,
    update=found.updated / chip.bandwidth,
  )


class Choice(NamedTuple):
  """Devices, and how a step is placed on them."""

  topology: Topology
  mesh: dict[str, int]
  microbatch: int
  memory: float
  time: StepTime

  @property
  def chip_seconds(self) -> float:
    """Of a step."""
    return self.time.total * self.topology.count


def recommended(counted: Counted, topology: Topology, mfu: float | None = None) -> Choice | None:
  """The most chips of the topology's kind whose chip-hours are at most DEARER times the fewest of any number.

  On each number of chips (`best_on`) the phase must fit. None where it fits on none.
  """
  choices = [choice for some in topology.sizes if (choice := best_on(counted, some, mfu))]
  fewest = min((choice.chip_seconds for choice in choices), default=0)
  return max((choice for choice in choices if choice.chip_seconds <= DEARER * fewest),
             key=lambda choice: choice.topology.count, default=None)


def best_on(counted: Counted, topology: Topology, mfu: float | None = None) -> Choice | None:
  """The mesh and microbatch on such devices with which a phase that trains takes at most FITS of their memory.

  Of those that do the largest microbatch, as parts of a batch sum gradients and compute again; then the fewest
  ways to split parameters, then the quickest. None where none does, or the batch does not split over the devices.
  """
  images, devices = counted.program.images, topology.count
  if images % devices:
    return None
  share = images // devices
  ways = [count for count in range(1, devices + 1) if devices % count == 0 and count & (count - 1) == 0]
  placed = functools.cache(lambda fsdp, zero1: counted.on(sharding.axis_sizes(devices, fsdp=fsdp, zero1=zero1)))
  for most in (most for most in range(share, 0, -1) if share % most == 0):
    for fsdp in ways:
      choices = []
      for zero1 in (zero1 for zero1 in ways if devices % (fsdp * zero1) == 0):
        found, mesh = placed(fsdp, zero1).costs(most), placed(fsdp, zero1).mesh
        if found.memory <= FITS * topology.chip.memory:
          microbatch = most if most < share else 0
          choices.append(Choice(topology, mesh, microbatch, found.memory, step_time(found, topology, mfu)))
      if choices:
        return min(choices, key=lambda choice: choice.time.total)
  return None
