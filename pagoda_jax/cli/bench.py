"""`pagoda bench`: how fast this machine reads pictures (data) and converts weights (convert)."""

from absl import flags

BENCHMARKS = ('convert', 'data')


def define_flags(fv: flags.FlagValues) -> None:
  flags.DEFINE_float('seconds', 5.0, 'data: how long each row is measured.', lower_bound=0.01, flag_values=fv)
  flags.DEFINE_integer('workers', 0, 'data: worker processes of a further row; 0: no such row.', lower_bound=0,
                       flag_values=fv)


def run(fv: flags.FlagValues, args: list[str]) -> int:
  """`pagoda bench convert` or `pagoda bench data`; raises ValueError for another word."""
  if len(args) != 1 or args[0] not in BENCHMARKS:
    raise ValueError(f'pagoda bench {" ".join(args)}: use {", ".join(BENCHMARKS)}')
  if args == ['data']:
    from pagoda_jax.bench import data

    print(data.data_table(fv.seconds, fv.workers))
    return 0
  from pagoda_jax.bench import convert  # without `data`: it measures memory around what imports JAX

  for row in convert.bench_convert():
    print(
      f'{row["name"]}: {row["parameters"]:,} parameters ({row["weights_bytes"] / 2**20:.0f} MiB), '
      f'{row["seconds"]:.1f} s, {row["extra_bytes"] / 2**20:.0f} MiB of memory beyond the weights'
    )
  return 0
