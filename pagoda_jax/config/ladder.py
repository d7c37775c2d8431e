"""What growth phases make of one another: their decoder's blocks, by our names and by the release's."""

from ml_collections import ConfigDict

from pagoda_jax import config as configs


def variant_options(variant: str, flags: tuple[str, ...], stops: tuple[int, ...]) -> tuple[set[str], int]:
  """(the flags that are set, where to stop in px) of a ladder's variant such as 'published,stop=64'.

  The last of `stops` is where a ladder stops by itself.

  Raises:
    ConfigError: names the part that is no flag and no stop.
  """
  chosen, stop = set(), stops[-1]
  for part in filter(None, variant.split(',')):
    if part in flags:
      chosen.add(part)
    elif part in (known := {f'stop={side}': side for side in stops}):
      stop = known[part]
    else:
      raise configs.ConfigError(f'variant {variant!r}: {part!r} must be one of {", ".join((*flags, *known))}')
  return chosen, stop


def start_resolution(config: ConfigDict, name: str) -> int:
  """Side in pixels of the images of the generator that a growth phase grows."""
  phase = config.phases[name]
  if not phase.start:
    return config.base_resolution << len(phase.init_levels)
  return configs.phase_resolution(config, phase.start)


def growth_chain(config: ConfigDict, name: str) -> list[ConfigDict]:
  """The phases that add levels to the teacher's network, or to a generator from elsewhere, up to phase `name`, lowest
  resolution first: those of stage grow, and one of stage distill above the base resolution."""
  chain = []
  while name and config.phases[name].stage == 'grow':
    chain.insert(0, config.phases[name])
    name = config.phases[name].start
  above = name and config.phases[name].stage == 'distill' and config.phases[name].get('resolution')
  return [config.phases[name], *chain] if above else chain


def first_levels(chain: list[ConfigDict]) -> tuple:
  """What the generator that a chain starts from has above the base resolution: its `init_levels`."""
  return tuple(chain[0].get('init_levels', ())) if chain else ()


def decoder_blocks(config: ConfigDict, name: str) -> dict[str, str]:
  """{block of the decoder of a phase's U-Net, in the order of their calls: its name in the authors' release}."""
  chain, levels, last = growth_chain(config, name), len(config.network.channel_mult), -1
  found = {}
  for level in reversed(range(levels)):
    side = config.base_resolution >> level
    if level < levels - 1:  # it closes the level below, in the sequence of that one's last block
      found[f'dec_{side}_up'] = last
    for block in range(config.network.num_blocks + 1):
      last += 1
      found[f'dec_{side}_block{block}'] = last
  side = config.base_resolution
  grown = [count for _, count, _ in first_levels(chain)]
  for phase in chain:
    while side << len(grown) < phase.resolution:
      grown.append(phase.num_blocks)
  for count in grown:
    side *= 2
    for block in ('up', *(f'block{index}' for index in range(count))):
      last += 1
      found[f'dec_{side}_{block}'] = last
  return {block: f'output_blocks.{number}' for block, number in found.items()}


def thawed_blocks(config: ConfigDict, name: str) -> tuple[str, ...]:
  """The decoder's blocks that a growth phase trains: the new ones, and those that `thaw` names."""
  start, thaw = start_resolution(config, name), config.phases[name].thaw
  return tuple(
    block for block, released in decoder_blocks(config, name).items()
    if {block, released, side_of(block)} & set(thaw or (start,)) or side_of(block) > start
  )


def side_of(block: str) -> int:
  """The resolution of a decoder's block, by its name."""
  return int(block.split('_')[1])
