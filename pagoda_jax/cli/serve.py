"""`pagoda serve`: a page to draw pictures with, by a server of this machine or as a folder that needs none."""

import re
import sys

from absl import flags

from pagoda_jax.cli import common, generators

_NAME = re.compile(r'[\w-]+(\.[\w-]+)*', re.ASCII)  # of a host; others stand in no request, and all would be refused
_OF_SERVER = ('host', 'port', 'names', 'max_images', 'max_queue', 'rate')


def define_flags(fv) -> None:
  generators.define(fv)
  flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at; others than this machine reach it only if told so, '
                      'such as by 0.0.0.0.', flag_values=fv)
  flags.DEFINE_integer('port', 8000, 'Port to listen at; 0: any that is free.', lower_bound=0, upper_bound=65535,
                       flag_values=fv)
  flags.DEFINE_list('names', [], 'Names that the server may be called by, besides addresses and localhost, such as '
                    'digits.example.org behind a proxy.', flag_values=fv)
  flags.DEFINE_integer('max_images', 64, 'Images a request; fewer of large ones.', lower_bound=1, upper_bound=1024,
                       flag_values=fv)
  flags.DEFINE_integer('max_queue', 32, 'Requests that wait for the device or are at it; more are told to come again.',
                       lower_bound=1, upper_bound=10_000, flag_values=fv)
  common.define_number(fv, 'rate', 300, 'Requests a minute of one client, a sixth of them at once.', 1, 1e6)
  common.define_folder(fv, 'static', 'Instead of serving: a folder to make, with the same page and the generator as '
                       'ONNX, which draws in the browser.', required=False)
  common.define_folder(fv, 'onnxruntime', 'With --static: where `npm pack onnxruntime-web` has been unpacked; default: '
                       'node_modules here.', required=False)
  flags.DEFINE_string('prompts', '', "With --static, of a network of captions: what the page offers to draw, such as "
                      "'a red flag;a smiling cat', or a file, as `pagoda sample` takes it.", flag_values=fv)


def run(fv, args) -> int:
  """`pagoda serve`."""
  del args
  generators.check(fv)
  if fv.static is not None:
    if given := [name for name in _OF_SERVER if fv[name].present]:
      raise ValueError(f'--{given[0]}={fv[given[0]].value}: is of a server, and --static makes a folder')
    return _static(fv)
  if fv.onnxruntime is not None:
    raise ValueError(f'--onnxruntime={fv.onnxruntime}: is of --static')
  if fv['prompts'].present:
    raise ValueError(f'--prompts={fv.prompts}: is of --static; the page of a server takes any')
  if wrong := [name for name in fv.names if not _NAME.fullmatch(name)]:
    raise ValueError(f'--names={wrong[0]}: must be a name alone, such as digits.example.org: no http://, no port')
  try:
    from pagoda_jax.use.serve import server
  except ImportError as error:
    raise ValueError(f"{error.name} is missing: pip install 'pagoda_jax[serve]'") from None
  from pagoda_jax.use.serve.limits import Limits

  bound = server.listening(fv.host, fv.port)  # before minutes of compiling
  try:
    generator = generators.opened(fv)
    _ = generator.params
    limits = Limits(images=fv.max_images, queue=fv.max_queue, rate=fv.rate)
    ready = lambda: print(f'{server.address(bound)}: {generator.where}; Ctrl-C ends it', flush=True)
    print('compiling', file=sys.stderr)
    answered = server.serve(generator, bound, limits, tuple(name.lower() for name in fv.names), ready)
  except KeyboardInterrupt:
    return 130
  finally:
    bound.close()
  print(f'ended: {answered} requests were answered')
  return 0


def _static(fv) -> int:
  from pagoda_jax.use import sample
  from pagoda_jax.use.serve import static

  prompts = sample.parse_prompts(fv.prompts) if fv['prompts'].present else ()
  runtime = static.runtime_folder(fv.onnxruntime)  # before minutes of converting
  static.check(fv.static)
  if place := common.unwritable(fv.static):
    raise ValueError(f'--static={fv.static}: {place} is a folder that cannot be written to')
  print(static.write(generators.opened(fv), fv.weights, fv.static, runtime, prompts))
  return 0
