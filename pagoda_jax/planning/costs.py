"""What a program costs, from the program itself: arithmetic, memory while it runs, traffic between devices."""

import collections
import math
import re

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from pagoda_jax.networks import chips

# Bytes that a device sends for each byte of the result, over a ring of n devices.
SENT = {
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: n - 1,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
}


def flops(traced) -> float:
  """Operations of a traced program (`jax.jit(f).trace(*shapes)`), as XLA counts them before it optimises.

  XLA counts a loop's body once; here it counts as often as it runs. Sums over zeros at a convolution's border are
  not counted; an operation of a single element counts 1, a product added to a sum 2.

  Raises:
    chips.NoCpuError: JAX runs without its CPU backend, which counts.
  """
  return sum(first_and_further(traced))


def first_and_further(traced) -> tuple[float, float]:
  """`flops`, as those of every loop's first turn and those of the further turns."""
  with chips.on_cpu():  # XLA counts what is lowered for its CPU backend alone
    return counted_once(traced.lower()), _further_turns(traced.jaxpr.jaxpr)


def counted_once(program) -> float:
  """XLA's own count of a compiled program, or of one lowered for CPU: every loop's body once; 0 where it has none."""
  return (program.cost_analysis() or {}).get('flops', 0.0)


def _further_turns(jaxpr) -> float:
  """Operations of the scans in a program beyond their first turns."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'scan':
      body = eqn.params['jaxpr']
      shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in body.jaxpr.invars]
      once = counted_once(jax.jit(jaxpr_as_fun(body)).lower(*shapes))
      turns = eqn.params['length']
      total += (turns - 1) * once + turns * _further_turns(body.jaxpr)
    else:
      total += sum(map(_further_turns, inner_programs(eqn)))
  return total


def inner_programs(eqn) -> list:
  """The programs inside an equation: of a nested jit, a loop, a branch."""
  params = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))
  return [getattr(param, 'jaxpr', param) for param in params if hasattr(param, 'eqns') or hasattr(param, 'jaxpr')]


def float32_products(jaxpr) -> dict[str, float]:
  """{matmul precision: operations} of a program's products and convolutions whose factors are both float32.

  The precision is 'default', 'high' or 'highest': on how many parts of its factors a chip works. Sums over zeros at a
  convolution's border are counted here; a loop's body as often as it runs.
  """
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
      if all(var.aval.dtype == jnp.float32 for var in eqn.invars):
        precision = (eqn.params['precision'] or (jax.lax.Precision.DEFAULT,))[0]
        found[precision.name.lower()] += 2 * math.prod(eqn.outvars[0].aval.shape) * _summands(eqn)
    turns = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
    for inner in inner_programs(eqn):
      found.update({precision: turns * count for precision, count in float32_products(inner).items()})
  return dict(found)


def _summands(eqn) -> float:
  """How many products are added up to each number of a product's or convolution's result."""
  shapes = [var.aval.shape for var in eqn.invars]
  if eqn.primitive.name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    return math.prod(shapes[0][axis] for axis in contracted)
  _, inputs, *window = eqn.params['dimension_numbers'].rhs_spec
  taps = math.prod(shapes[1][axis] for axis in window)
  return shapes[1][inputs] * taps / math.prod(eqn.params['lhs_dilation'])  # of a spread input most taps meet nothing


def memory_bytes(compiled) -> dict[str, int]:
  """Bytes of a device that a compiled program takes, by what they are for."""
  memory = compiled.memory_analysis()
  return {
    'arguments': memory.argument_size_in_bytes,
    'results': memory.output_size_in_bytes - memory.alias_size_in_bytes,  # those that do not replace an argument
    'temporary': memory.temp_size_in_bytes,
    'program': memory.generated_code_size_in_bytes,
  }


def sent_bytes(hlo: str, devices: int) -> dict[str, float]:
  """{kind of collective: bytes that each device sends when a compiled program runs once, as over a ring}.

  Args:
    hlo: `compiled.as_text()`, of XLA for CPU, GPU or TPU.
    devices: of the mesh: the size of a group of devices where the text names none.
  """
  sent, turns, seen = collections.Counter(), _turns(hlo), {}
  for computation, line in _instructions(hlo):
    found = re.search(rf'= (.*?) ({"|".join(SENT)})(?:-start)?\(', line)
    if not found:
      continue
    shape, kind = found.groups()
    channel = re.search(r'channel_id=(\d+)', line)
    # A collective that runs beside other work stands in several fusions, always with the same channel; those of
    # shard_map, side by side, have one channel too.
    if channel and seen.setdefault((channel[1], shape), computation) != computation:
      continue
    sizes, group = _array_bytes(shape), _group_size(line, devices)
    size = sum(sizes)
    if '-start(' in line and kind in ('all-gather', 'collective-permute'):
      size = max(sizes)  # operand and result stand side by side
    if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):  # the TPU's form of it
      kind, size = 'reduce-scatter', size / group
    sent[kind] += turns[computation] * SENT[kind](group) * size
  return dict(sent)


def kernel_calls(hlo: str) -> dict[str, int]:
  """{what: how often a program compiled for a GPU runs it}: 'fusions', and calls of libraries by the library's name."""
  turns, inside, found = _turns(hlo), set(), collections.Counter()
  instructions = list(_instructions(hlo))
  for _, line in instructions:
    if called := re.search(r' fusion\(.*calls=%?([\w.-]+)', line):
      inside.add(called[1])
  for computation, line in instructions:
    call = re.search(r'custom_call_target="(?:__)?([^"$]+)', line)
    if computation not in inside and (call or ' fusion(' in line):
      found[call[1] if call else 'fusions'] += turns[computation]
  return dict(found)


def _instructions(hlo: str):
  """(name of the computation, line) of every instruction."""
  computation = ''
  for line in hlo.splitlines():
    header = re.match(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if header:
      computation = header[1]
    elif ' = ' in line:
      yield computation, line


def _turns(hlo: str) -> collections.defaultdict:
  """{computation: how often it runs}, of loops whose number of turns XLA has noted, or that count from 0 to a constant.

  Of the latter are the TPU's, where nothing is noted; all others run once.
  """
  calls, constants, limits = collections.defaultdict(list), {}, {}
  for computation, line in _instructions(hlo):
    if constant := re.search(r'(\S+) = s32\[\]\S* constant\((\d+)\)', line):
      constants[computation, constant[1]] = int(constant[2])
    elif compared := re.search(r'ROOT .* compare\(.* (\S+)\), direction=LT', line):
      limits[computation] = constants.get((computation, compared[1]), 1)
    noted = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    condition = re.search(r' while\(.*condition=%?([\w.-]+)', line)
    count = int(noted[1]) if noted else limits.get(condition[1], 1) if condition else 1
    for called in re.findall(r'(?:calls|to_apply|body)=%?([\w.-]+)', line):
      calls[called].append((computation, count))
  turns = collections.defaultdict(lambda: 1)

  def of(name):
    if name not in turns and name in calls:
      turns[name] = max(count * of(caller) for caller, count in calls[name])
    return turns[name]

  for name in list(calls):
    of(name)
  return turns


def _array_bytes(shape: str) -> list[int]:
  """Bytes of each array of an HLO shape such as '(f32[3,4]{1,0}, bf16[8]{0})'."""
  sizes = []
  for kind, dims in re.findall(r'\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]', shape):
    bits = 8 if kind == 'pred' else int(re.search(r'\d+', kind)[0])
    sizes.append(math.prod(int(dim) for dim in dims.split(',') if dim) * bits // 8)
  return sizes


def _group_size(line: str, devices: int) -> int:
  """How many devices take part in one group of a collective."""
  if found := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return len(found[1].split(','))
  if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', line):
    return int(found[2])
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
  return devices
