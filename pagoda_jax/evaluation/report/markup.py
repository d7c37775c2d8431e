"""HTML in which no text can become markup: what is not Markup itself is escaped."""

import html
import math

_VOID = {'meta', 'img', 'input', 'br', 'line', 'polyline', 'rect', 'circle'}


class Markup(str):
  """Text that is HTML already."""


def element(name: str, /, *children, **attributes) -> Markup:
  """<name attributes>children</name>.

  Args:
    children: Markup, or texts and numbers, which are escaped.
    attributes: `class_` is class, `aria_label` aria-label; True writes the name alone, None and False nothing.
  """
  shown = ''.join(
    f' {key.rstrip("_").replace("_", "-")}' + ('' if value is True else f'="{html.escape(_text(value))}"')
    for key, value in attributes.items() if value is not None and value is not False)
  if name in _VOID:
    return Markup(f'<{name}{shown}>' if name in ('meta', 'img', 'input', 'br') else f'<{name}{shown}/>')
  return Markup(f'<{name}{shown}>{join(*children)}</{name}>')


def join(*children) -> Markup:
  """Markup one after the other; texts among it are escaped."""
  return Markup(''.join(child if isinstance(child, Markup) else html.escape(_text(child)) for child in children))


def _text(value) -> str:
  # A lone surrogate, as JSON may hold, cannot be written to a file; a control character is no HTML.
  text = str(value).encode('utf-8', 'replace').decode()
  return ''.join(character if character >= ' ' or character in '\n\t' else '\ufffd' for character in text)


def table(head: list, rows: list[list], label: str, numbers_from: int = 1) -> Markup:
  """A table that scrolls sideways where it is too wide; columns from `numbers_from` on are set as numbers."""
  kind = lambda column: 'number' if column >= numbers_from else None
  cells = lambda row: [element('th', row[0], scope='row'), *(
    element('td', cell, class_=kind(column)) for column, cell in enumerate(row[1:], 1))]
  body = [element('tr', *cells(row)) for row in rows]
  columns = [element('th', cell, scope='col', class_=kind(column)) for column, cell in enumerate(head)]
  whole = element('table', element('thead', element('tr', *columns)), element('tbody', *body))
  # Of the keyboard too: what scrolls can be given the focus.
  return element('div', whole, class_='scroll', tabindex=0, role='region', aria_label=label)


def number(value, digits: int = 4) -> str:
  """A figure as people read it; what is no number, or none that is finite, in words."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return '–' if value is None else str(value)
  if not math.isfinite(value):
    return 'not finite'
  if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
    return f'{int(value):,}'
  return f'{value:.{digits}g}'
