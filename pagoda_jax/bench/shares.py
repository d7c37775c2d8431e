"""Which part of a program its devices' time goes to, from a profile of a few of its runs."""

import collections
import re

import jax
from etils import epath

# Names of scopes (jax.named_scope in stages/) that an operation is counted under: the outermost of its name.
PARTS = ('denoiser', 'encoder', 'estimator', 'generator', 'autoencoder', 'decoder', 'features', 'distance',
         'discriminator', 'clip', 'update')
OTHER = 'other'
GRAPH = 'command_buffer'  # XLA's CUDA graphs, which stand as the operation of all the kernels in them


def traced(run, folder) -> epath.Path:
  """Writes an XProf trace of run() to a folder; returns the newest file of it."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # every Python call would stand between the operations
  with jax.profiler.trace(str(folder), profiler_options=options):
    run()
  return max(epath.Path(folder).glob('plugins/profile/*/*.xplane.pb'), key=lambda path: path.parent.name)


def part_of(op_name: str) -> str:
  """'generator forward', 'generator backward', 'update' ... of an operation's name, such as JAX gives it.

  >>> part_of('jit(step)/transpose(jvp(generator))/UNet/out_conv/conv_general_dilated')
  'generator backward'
  """
  for place in op_name.split('/'):
    scope = re.sub(r'\w+\(|\)', '', place)
    if scope in PARTS:
      direction = 'backward' if 'transpose(' in op_name else 'forward'
      return scope if scope == 'update' else f'{scope} {direction}'
  return OTHER


def parts_of_instructions(hlo: str) -> dict[str, str]:
  """{instruction: part} of the text of a compiled program; a fusion goes by the operation that it ends with."""
  parts = {}
  for line in hlo.splitlines():
    if found := re.match(r'\s+(?:ROOT )?%?([\w.-]+) = ', line):
      name = re.search(r'op_name="([^"]*)"', line)
      parts[found[1]] = part_of(name[1] if name else '')
  return parts


def seconds_by_part(profile, parts: dict[str, str]) -> dict[str, float]:
  """{part: seconds of all its operations, on all devices} of a jax.profiler.ProfileData, largest first.

  An operation's time is its own, without those that run within it (a loop's body). Threads and devices that work
  side by side add up. Of a CUDA graph's kernels, those of XLA are told by their names, and those of libraries count to
  the part of the one before.
  """
  kernels = {re.sub(r'\W', '_', name): part for name, part in parts.items()}
  planes = list(profile.planes)
  devices = [plane for plane in planes if plane.name.startswith('/device:')]
  total = collections.Counter()
  for plane in devices or planes:  # CPU's operations stand among the host's threads
    lines = list(plane.lines)
    for line in [line for line in lines if line.name == 'XLA Ops'] or lines:  # TPU has others, of the same operations
      before = OTHER
      for (name, kernel), seconds in _own_times(line):
        part = kernels.get(kernel, before) if name.startswith(GRAPH) else parts.get(name)
        if part:
          total[part] += seconds
          before = part
  return dict(total.most_common())


def _own_times(line):
  """((instruction, event), its own seconds) of the events of a line that are operations, by their names."""
  events = []
  for event in line.events:
    name = dict(event.stats).get('hlo_op') or (line.name == 'XLA Ops' and event.name.split(' = ')[0].lstrip('%'))
    if name:
      events.append((event.start_ns, -event.duration_ns, (name, event.name)))
  open_ = []  # [end, own time, names] of events that enclose the one at hand
  for start, minus, names in sorted(events):
    while open_ and open_[-1][0] <= start:
      _, own, ended = open_.pop()
      yield ended, own / 1e9
    if open_:
      open_[-1][1] += minus
    open_.append([start - minus, -minus, names])
  for _, own, ended in open_:
    yield ended, own / 1e9
