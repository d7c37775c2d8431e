"""`pagoda bench`: how fast this machine runs a phase's programs, reads pictures and converts weights."""

import json

from absl import flags
from etils import epath

from pagoda_jax.cli import common
from pagoda_jax.runtime import buckets

PROGRAMS = ('step', 'sample', 'invert')
BENCHMARKS = ('convert', 'data', *PROGRAMS)
_OF = dict.fromkeys(('config', 'phase', 'repeats', 'warm_up', 'peak', 'profile', 'json'), PROGRAMS) | {
  'seconds': ('data',), 'workers': ('data',), 'batch_size': ('sample',)}


def define_flags(fv: flags.FlagValues) -> None:
  common.define_number(fv, 'seconds', 5.0, 'data: how long each row is measured.', 0.01)
  flags.DEFINE_integer('workers', 0, 'data: worker processes of a further row; 0: no such row.', lower_bound=0,
                       flag_values=fv)
  common.define_experiment(fv)
  flags.DEFINE_string('phase', '', 'step, sample, invert: the phase; default: the first for step and invert, the last '
                      'for sample.', flag_values=fv)
  flags.DEFINE_integer('batch_size', 100, "sample: images a call. Others run at the phase's batch size, "
                       '--config.phases.NAME.batch_size=N.', lower_bound=1, flag_values=fv)
  flags.DEFINE_integer('repeats', 20, 'step, sample, invert: runs that the median is taken of.', lower_bound=1,
                       flag_values=fv)
  flags.DEFINE_integer('warm_up', 3, 'step, sample, invert: runs before them.', lower_bound=0, flag_values=fv)
  common.define_number(fv, 'peak', None, 'step, sample, invert: FLOP/s of one device that MFU is a share of, such as '
                       '197e12; default: the published bfloat16 peak, where the chip is known.', 1)
  common.define_folder(fv, 'profile', 'step, sample, invert: folder for an XProf trace of three further runs.',
                       required=False)
  flags.DEFINE_bool('json', False, 'step, sample, invert: prints one JSON object in place of the table.',
                    flag_values=fv)


def run(fv: flags.FlagValues, args: list[str]) -> int:
  """`pagoda bench convert`, `data`, `step`, `sample` or `invert`; raises ValueError for another word."""
  if len(args) != 1 or args[0] not in BENCHMARKS:
    raise ValueError(f'{" ".join(args) or "a word is missing"}: use {", ".join(BENCHMARKS)}')
  for name, of in _OF.items():
    if fv[name].present and args[0] not in of:
      own = '; --config.phases.NAME.batch_size=N is that of others' if name == 'batch_size' else ''
      raise ValueError(f'{args[0]}: --{name} is of {", ".join(of)}{own}')
  if args[0] in PROGRAMS:
    found = _measured(fv, args[0])
    print(json.dumps(found) if fv.json else '\n'.join(table(found)))
    return 0
  if args == ['data']:
    from pagoda_jax.bench import data

    print(data.data_table(fv.seconds, fv.workers))
    return 0
  from pagoda_jax.bench import convert  # without the others: it measures memory around what imports JAX

  for row in convert.bench_convert():
    print(
      f'{row["name"]}: {row["parameters"]:,} parameters ({row["weights_bytes"] / 2**20:.0f} MiB), '
      f'{row["seconds"]:.1f} s, {row["extra_bytes"] / 2**20:.0f} MiB of memory beyond the weights'
    )
  return 0


def _measured(fv, what: str) -> dict:
  """What was found out about a program of the phase that the flags name."""
  import jax

  from pagoda_jax import config as configs
  from pagoda_jax import validation
  from pagoda_jax.bench import step
  from pagoda_jax.planning import plan

  config = fv.config
  if config is None:
    raise configs.ConfigError(f'{what} needs --config=FILE')
  validation.validate(config, jax.device_count())
  stages = {'invert': ('invert',), 'sample': configs.IMAGE_STAGES, 'step': configs.TRAINED_STAGES}[what]
  choices = [name for name in config.order if config.phases[name].stage in stages]
  if not choices:
    raise configs.ConfigError(f'{what}: the experiment has no phase of stage {" or ".join(stages)}')
  name = fv.phase or choices[-1 if what == 'sample' else 0]
  if name not in choices:
    raise configs.ConfigError(f'--phase={name}: must be one of {", ".join(choices)}')
  _, notes = plan.settled_pairs(config, num_images=1)  # how many there are does not matter here
  if fv.profile and not buckets.is_in_bucket(fv.profile):
    epath.Path(fv.profile).mkdir(parents=True, exist_ok=True)  # refused before minutes of compiling, not after
  options = {'repeats': fv.repeats, 'warm_up': fv.warm_up, 'peak': fv.peak, 'profile': fv.profile}
  if what == 'sample':
    found = step.bench_sample(config, name, fv.batch_size, **options)
  else:
    found = {'step': step.bench_step, 'invert': step.bench_invert}[what](config, name, **options)
  return {'measured': what} | found | {'notes': notes}


def table(found: dict) -> list[str]:
  """What `pagoda bench step`, `sample` or `invert` found out, for a reader."""
  seconds, peak, memory = found['seconds'], found['peak_flops_per_second'], found['memory']
  achieved = f'{common.number(found["flops_per_second"] / found["devices"])}FLOP/s a device'
  mfu = f'MFU {found["mfu"]:.1%} of {common.number(peak)}FLOP/s' if peak else (
    'no MFU: the peak of this chip is not known here (--peak=FLOP/s)')
  stored = ' (read from the cache of compiled programs)' if found['compiled_before'] else ''
  held = f', at most {common.number(found["peak_memory"])}B since the process began' if found['peak_memory'] else ''
  lines = [
    f'{found["measured"]} of {found["phase"]} (stage {found["stage"]}, {found["resolution"]} px, '
    f'{found["precision"]}): {found["images"]} images a run on {found["devices"]} x {found["chip"]}',
    'Pictures, noise and weights are random, those of frozen networks too.',
    *found['notes'],
    _row('time', f'{_seconds(seconds["median"])}, the median of {found["repeats"]} runs after {found["warm_up"]}; half '
         f'of them between {_seconds(seconds["quartile_1"])} and {_seconds(seconds["quartile_3"])}, all between '
         f'{_seconds(seconds["lowest"])} and {_seconds(seconds["highest"])}'),
    _row('images/s', f'{found["images_per_second"]:.5g}, {found["images_per_second_per_chip"]:.5g} a device'),
    _row('FLOPs', f'{common.number(found["flops_per_image"])}FLOP per image; {achieved}; {mfu}'),
    _row('memory', f'{common.number(sum(memory.values()))}B of a device by the compiler: '
         + ', '.join(f'{what} {common.number(size)}B' for what, size in memory.items() if size) + held),
    _row('compilation', f'{_seconds(found["compile_seconds"])}{stored}, after {_seconds(found["trace_seconds"])} of '
         'tracing and lowering'),
  ]
  if 'input_seconds' in found:
    waits = found['input_seconds']
    lines.append(_row('input', 'not measured: the pictures are not here' if waits is None else
                      f'{_seconds(waits)} to read a batch and put it on the devices, beside the run: '
                      f'{waits / seconds["median"]:.0%} of its time'))
  lines.append(_row('parts', f'of {_seconds(found["operations"])}, the sum over the operations of a profiled run and '
                    'device; what runs side by side adds up, gaps are left out'))
  for part, value in found['parts'].items():
    lines.append(_row('', f'{value / found["operations"]:6.1%}  {_seconds(value):>8}  {part}'))
  if found['profile']:
    lines.append(_row('profile', f'{found["profile"]}: open it with `xprof --logdir={found["profile"]}`'))
  return lines


def _row(title: str, text: str) -> str:
  return f'  {title:<12} {text}'


def _seconds(value: float) -> str:
  return f'{value:.3g} s' if value >= 1 else f'{1000 * value:.3g} ms'
