"""`pagoda inspect`: what a work directory holds, and one digest over everything in a checkpoint."""

from absl import flags
from clu import parameter_overview
from etils import epath

from pagoda_jax.cli import common
from pagoda_jax.data import noise_store
from pagoda_jax.runtime import trees
from pagoda_jax.training import checkpoints, starts, workdir


def define_flags(fv) -> None:
  common.define_folder(fv, 'workdir', 'Work directory of a run.')
  flags.DEFINE_string('phase', '', 'One phase, with its parameter tree; default: all, a line each.', flag_values=fv)
  flags.DEFINE_string('step', '', "Step of the checkpoint, or 'best'; default: the newest whole one.", flag_values=fv)


def run(fv, args) -> int:
  """`pagoda inspect`."""
  del args
  config = workdir.read_config(fv.workdir)
  if fv.phase and fv.phase not in config.phases:
    raise ValueError(f'--phase={fv.phase}: must be one of {", ".join(config.order)}')
  for name in [fv.phase] if fv.phase else config.order:
    print('\n'.join(describe(epath.Path(fv.workdir) / name, config, fv.step, bool(fv.phase))))
  return 0


def describe(folder: epath.Path, config, step: str, whole: bool) -> list[str]:
  """Lines about a phase: its checkpoints, which of them are damaged, and a digest; with `whole`, every leaf."""
  stage = config.phases[folder.name].stage
  if stage == 'invert':
    return describe_store(folder)
  damage = {step: checkpoints.damage(folder, step) for step in checkpoints.finished_steps(folder)}
  there = checkpoints.finished_steps(folder)  # a run that goes on removes its oldest while they are read here
  damage = {step: wrong for step, wrong in damage.items() if step in there}
  good = [step for step in damage if not damage[step]]
  missing = checkpoints.lost(folder)
  lines = [f'  {missing}'] if missing else []
  lines += [f'  step {step} is damaged: {wrong}' for step, wrong in damage.items() if wrong]
  lines += [f'  {path} was damaged and has been set aside' for path in checkpoints.set_aside(folder)]
  if not good:
    return [f'{folder.name} ({stage}): no {"whole " if lines else ""}checkpoint', *lines]
  chosen = starts.chosen_step(folder, step, config.checkpoint)
  state, chosen = checkpoints.read_state(folder, max(good) if chosen is None else chosen)
  sha = checkpoints.digest(state, checkpoints.read_data_position(folder, chosen))
  best = starts.best_step(folder, config.checkpoint)
  said = f', the best: {best[0]} (mean {config.checkpoint.best} {best[1]:.4g})' if best else ''
  lines.insert(0, f'{folder.name} ({stage}): whole checkpoints at steps {", ".join(map(str, good))}{said}; '
                  f'step {chosen}: sha256 {sha}')
  return lines + (parameters(state) if whole else [])


def parameters(state: dict) -> list[str]:
  """A table of the parameters, then how many numbers each part of the state has."""
  shown = {part: state[part] for part in ('params', 'fixed') if part in state}
  for part in ('discriminator', 'pairs_discriminator'):
    if state.get(part):
      shown[part] = {'params': state[part]['params']}
  leaves = trees.flat_leaves(state)
  counts = {part: sum(leaf.size for path, leaf in leaves.items() if path.split('/')[0] == part) for part in state}
  return [parameter_overview.get_parameter_overview(shown, include_stats=False),
          *(f'  {part}: {count:,} numbers' for part, count in counts.items()),
          *(f'  other_emas: {name}' for name in state.get('other_emas', {}))]


def describe_store(folder: epath.Path) -> list[str]:
  """The manifest of a noise store and the state of its shards."""
  if not (folder / noise_store.MANIFEST).exists():
    return [f'{folder.name} (invert): not finished']
  manifest = noise_store.read_manifest(folder)
  damaged = sorted({*noise_store.damaged_shards(folder), *noise_store.lost_parts(folder, manifest)})
  origin = [f'  {key}: {value}' for key, value in manifest['origin'].items()]
  if not manifest['shards']:
    lost = f'; damaged or missing: {", ".join(damaged)}' if damaged else ''
    return [f'{folder.name} (invert): {manifest["count"]} pairs, not stored: the phases that read them invert inside '
            f'their steps{lost}', *origin]
  state = f'damaged or missing: {", ".join(damaged)}' if damaged else 'all shards whole'
  return [
    f'{folder.name} (invert): {manifest["count"]} pairs of {tuple(manifest["shape"])} {manifest["dtype"]}, '
    f'mean {manifest["mean"]:.3f}, standard deviation {manifest["std"]:.3f}; {state}',
    *origin,
  ]
