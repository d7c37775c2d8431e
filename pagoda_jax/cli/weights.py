"""`pagoda weights list`, `pagoda weights check [NAME ...]`, `pagoda weights path NAME`: published files here."""

from absl import flags

from pagoda_jax.weights import locate, published
from pagoda_jax.weights.published import Published


def define_flags(fv: flags.FlagValues) -> None:
  flags.DEFINE_string(
    'weights_dir', '', f'folder looked in before ${locate.ENVIRONMENT} and the user cache; local or gs://',
    flag_values=fv,
  )


def run(fv: flags.FlagValues, args: list[str]) -> int:
  """`list`, `check [NAME ...]` or `path NAME`; the exit code is 1 where a check failed.

  Raises:
    ValueError, FileNotFoundError: another word, an unknown name, a missing or wrong file for `path`.
  """
  action, *names = args or ['list']
  if action == 'list' and not names:
    print(listing(fv.weights_dir))
    return 0
  if action == 'check':
    whole = [_check(locate.entry(name), fv.weights_dir, bool(names)) for name in names or _present(fv)]
    return 0 if all(whole) else 1
  if action == 'path' and len(names) == 1:
    print(locate.find(names[0], fv.weights_dir))
    return 0
  raise ValueError(f'pagoda weights {" ".join(args)}: use list, check [NAME ...] or path NAME')


def _present(fv) -> list[str]:
  return [wanted.name for wanted in published.REGISTRY if locate.located(wanted, fv.weights_dir) is not None]


def _check(wanted: Published, weights_dir, asked_for: bool) -> bool:
  """Prints whether a file is whole; computes its digest anew."""
  path = locate.located(wanted, weights_dir)
  if path is None:
    print(locate.how_to_get(wanted, weights_dir))
    return not asked_for
  try:
    digest = locate.verify(wanted, path, again=True)
  except locate.WrongDigestError as error:
    print(f'WRONG  {wanted.name}: {error}')
    return False
  known = {0: 'recorded', 64: 'as published'}.get(len(wanted.sha256), 'leading digits as published')
  print(f'ok     {wanted.name}  {path}  {digest} ({known})')
  return True


def listing(weights_dir=None) -> str:
  """A table of every published file: present or not, size, licence, what it is."""
  rows = [('name', 'here', 'MiB', 'licence', 'what')]
  for wanted in published.REGISTRY:
    here = 'yes' if locate.located(wanted, weights_dir) is not None else '-'
    size = f'{wanted.size / 2**20:.1f}' if wanted.size else ''
    rows.append((wanted.name, here, size, wanted.licence, wanted.what))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = ['  '.join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]) for row in rows]
  return '\n'.join([*lines, f'Looked in {", ".join(map(str, locate.folders(weights_dir)))}.'])
