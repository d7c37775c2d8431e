"""The command line: `pagoda COMMAND --flag=value`. `pagoda COMMAND --help` lists a command's flags."""

import importlib
import os
import signal
import sys
import traceback

from absl import flags, logging

from pagoda_jax.cli import faults

# command -> what it does; pagoda_jax/cli/COMMAND.py has its flags and what it prints
COMMANDS = {
  'run': 'all phases of an experiment in order; goes on where it stopped',
  'train': 'one phase of an experiment',
  'plan': 'what each phase of an experiment costs, before it runs',
  'sample': 'images from a trained phase or from weights: a grid, a folder, arrays, an animation',
  'evaluate': "FID and its relatives of a phase's samples, or of finished pictures",
  'edit': 'pictures: reconstruct | super_resolve | restyle | inpaint | deblur | colorize | interpolate',
  'export': 'a generator as a StableHLO program and its weights, which need only jax and flatbuffers; ONNX from there',
  'publish': 'a folder for a model hub: what `export` writes, a model card and samples',
  'serve': 'a page to draw pictures with, in a browser: wander, interpolate, reconstruct, inpaint',
  'report': 'how a run went, as one HTML file: curves, samples, figures, config; two runs side by side',
  'prepare': 'pictures from anywhere into ArrayRecord shards of one resolution or several, or latents of them',
  'bench': 'how fast this machine runs a phase (step, sample, invert), reads pictures (data), converts (convert)',
  'inspect': "a work directory's checkpoints, parameters and digests",
  'convert': 'published PyTorch weights to a folder, and back',
  'ema': "an average of a teacher's weights that was not kept, from its checkpoints; to a folder for init_from",
  'weights': 'list | check [NAME ...] | path NAME: published files on this machine',
}
WITH_WORDS = ('bench', 'edit', 'weights')  # the others take flags only
RESTARTED = ('run', 'train')  # by launchers, on exit code 75
LOST = 'If that tells of a lost connection, another process has gone: see its log.'


def usage() -> str:
  """The list of commands."""
  lines = [f'  {name:<9} {COMMANDS[name]}' for name, purpose in COMMANDS.items()]
  return '\n'.join(['usage: pagoda COMMAND [--flag=value ...]', '', 'commands:', *lines, '',
                    '`pagoda COMMAND --help` lists the flags of a command with their defaults.'])


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code: 0, 1 for bad input, 2 for a bad command line, 75 preempted, 130 Ctrl-C,
  141 where who read its output has closed it."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ('--help', '-h', 'help'):
    print(usage())
    return 0 if argv else 2
  if argv[0] not in COMMANDS:
    print(f'pagoda: no command {argv[0]!r}\n\n{usage()}', file=sys.stderr)
    return 2
  return _run_command(argv[0], argv[1:])


def _run_command(name: str, args: list[str]) -> int:
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  logging.set_verbosity(logging.WARNING)
  module = importlib.import_module(f'pagoda_jax.cli.{name}')
  fv = flags.FlagValues()
  fv.set_gnu_getopt(True)  # flags may follow words: pagoda weights list --weights_dir=...
  sys.argv = [f'pagoda {name}', *args]  # where config_flags looks for --config.KEY=VALUE, whoever called main()
  module.define_flags(fv)
  if any(arg in ('--help', '-h', '--helpfull') for arg in args):
    print(f'usage: pagoda {name} [--flag=value ...]\n{COMMANDS[name]}\n\n{fv.get_help()}')
    return 0
  from pagoda_jax.cli import common
  from pagoda_jax.runtime.interrupts import EXIT_INTERRUPTED, Interrupted

  try:
    rest = fv([f'pagoda {name}', *args])[1:]
    if rest and name not in WITH_WORDS:
      raise flags.Error(f'{" ".join(rest)!r}: {name} takes flags only, --flag=value')
    if 'config' in fv and fv['config'].present:  # some words of `bench` need none
      common.check_experiment(fv.config)
  except (Exception, SystemExit) as error:  # SystemExit: of an experiment file
    said = faults.of_command_line(error, args)
    if os.environ.get('PAGODA_DEBUG') or not said:
      raise
    print(f'pagoda {name}: {said}\n`pagoda {name} --help` lists the flags.', file=sys.stderr)
    return 2
  flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl's global flags
  set_up_jax()
  from pagoda_jax.runtime import distributed

  try:
    if 'coordinator_address' in fv:
      distributed.start(fv.coordinator_address, fv.num_processes, fv.process_id, fv.config.barrier_timeout,
                        run=fv.workdir)
    code = module.run(fv, rest) or 0
    sys.stdout.flush()  # a full disk shows here, and not when Python has ended
    return code
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    return stop.exit_code
  except SystemExit as stop:  # of `_leave`
    if distributed.several():
      distributed.fail('it was asked to stop; start the same command again to go on', stop.code)
    raise
  except (Exception, KeyboardInterrupt) as error:
    faults.drop_lost_output()
    if faults.is_closed_output(error) and name not in RESTARTED:  # `| head` has all that it wants; training would end
      return 128 + signal.SIGPIPE
    lost = distributed.several() and isinstance(error, Exception) and distributed.is_of_jax(error)
    if os.environ.get('PAGODA_DEBUG') or not faults.is_for_the_user(error):
      if not distributed.several():
        raise
      traceback.print_exc()
      if lost:
        print(LOST, file=sys.stderr)
    else:
      print(f'pagoda {name}: {faults.text(error)}', file=sys.stderr)
    code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    if distributed.several():
      distributed.fail(faults.text(error) + f'. {LOST}' * lost, code)
    return code


def set_up_jax() -> None:
  """A cache of compiled programs that later runs share ($JAX_COMPILATION_CACHE_DIR, or the user's cache folder).

  XLA's own caches lie in the same folder, whose path would thereby be part of every program's key: without them a
  cache that was copied into an image or a bucket still fits.
  """
  import jax

  from pagoda_jax.runtime import files

  if 'JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES' not in os.environ:
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', os.path.join(files.user_cache(), 'pagoda_jax', 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


def console() -> None:
  """Entry point of the installed `pagoda`."""
  if sys.argv[1:2] and sys.argv[1] in RESTARTED:
    signal.signal(signal.SIGTERM, _leave)
  if os.environ.get('PAGODA_DEBUG'):
    sys.exit(main())
  faults.say_once()
  try:
    sys.exit(main())
  except KeyboardInterrupt as error:  # while it loads, before main heeds it
    print(f'pagoda: {faults.text(error)}', file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def _leave(number, frame) -> None:
  """SIGTERM where no phase is under way, which would save first: before the first, or after the last."""
  del number, frame
  os.write(2, b'stopped between phases; start the same command again to go on\n')
  sys.exit(os.EX_TEMPFAIL)


if __name__ == '__main__':
  console()
