"""Which widths of a U-Net leave lanes of a chip's matrix units empty."""

from typing import NamedTuple

from pagoda_jax.networks.unet import Block, UNet

ENOUGH = 0.9  # share of useful work from which on a level is not named


class Level(NamedTuple):
  """Convolutions of one resolution, of the encoder ('enc_64', with the middle), or of the decoder ('dec_64').

  Attributes:
    widths: of its blocks' results, each once.
    useful: share of the chip's work on it that is not on padding.
    right: the widths' nearest multiples of the lanes, below (if any) and above.
  """

  name: str
  widths: tuple[int, ...]
  useful: float
  right: tuple[int, ...]


def padded(channels: int, lanes: int) -> int:
  """The next multiple of the lanes."""
  return -(-channels // lanes) * lanes


def useful_share(in_channels: int, channels: int, lanes: int) -> float:
  """Share of a convolution's work that is not on padding, where both its widths are padded to the lanes.

  192 channels on 128 lanes are padded to 256, 75 %: of a convolution from 192 to 192, 56 % is useful. A compiler that
  lays several taps side by side pads one of both only, 75 %: XLA for TPU v5e reaches 65 % there, and 98 % with 256.
  """
  return in_channels * channels / padded(in_channels, lanes) / padded(channels, lanes)


def wasteful(unet: UNet, lanes: int, grown_above: int = 0) -> list[Level]:
  """The levels of a U-Net that work to less than ENOUGH on something useful, in the order of their calls.

  Args:
    unet: the network.
    lanes: `Chip.lanes`.
    grown_above: looks only at levels of more pixels a side than this: those that a growth phase adds.
  """
  encoder, middle, decoder = unet.blocks()
  levels = {}
  for part, blocks in (('enc', encoder + middle), ('dec', [] if unet.estimator else decoder)):
    for block in blocks:
      if block.resolution > grown_above:
        levels.setdefault(f'{part}_{block.resolution}', []).append(block)
  found = []
  for name, blocks in levels.items():
    useful = _useful(blocks, lanes)
    widths = tuple(dict.fromkeys(block.channels for block in blocks if block.channels % lanes))
    if useful < ENOUGH and widths:  # else what it is given is to blame, of a level that is named itself
      right = sorted({size for width in widths for size in (width // lanes * lanes, padded(width, lanes)) if size})
      found.append(Level(name, widths, useful, tuple(right)))
  return found


def _useful(blocks: list[Block], lanes: int) -> float:
  """Of the convolutions of blocks of one resolution."""
  work = spent = 0.0
  for block in blocks:
    # 3x3 to the block's width and within it; a 1x1 beside them where the width changes.
    for taps, wide in ((9 + block.skip_conv, block.in_channels), (9, block.channels)):
      work += taps * wide * block.channels
      spent += taps * wide * block.channels / useful_share(wide, block.channels, lanes)
  return work / spent
