"""The page: one HTML file with its style, its script and its pictures inside, nothing from elsewhere."""

import base64
import hashlib
import json
import pathlib
import time
from collections.abc import Callable

import pagoda_jax
from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.evaluation.report import curves, pictures, read
from pagoda_jax.evaluation.report.markup import Markup, element, join, number, table
from pagoda_jax.runtime import buckets
from pagoda_jax.runtime.progress import duration

_HERE = pathlib.Path(__file__).parent
# title -> names in metrics.jsonl, on one pair of axes; others have a panel each
PANELS = {
  'Loss': ('loss',),
  'Adversarial loss': ('adversarial',),
  'Weight of the adversarial loss': ('weight',),
  "Discriminator's loss": ('discriminator',),
  'Logits': ('logit_real', 'logit_fake'),
  'Gradient norms': ('grad_norm', 'discriminator_grad_norm'),
  'Estimates of omega for real pictures': ('omega_real', 'omega_real_std'),
  'Skipped steps': ('skipped',),
  'Images a second': ('images_per_second',),
  'MFU': ('mfu',),
}
_SAID_ELSEWHERE = ('kimg', 'epochs', 'skipped_in_a_row', 'images_per_second_per_chip')
MOST_PANELS = 40


def render(runs: list[read.Run], image_flops: Callable[[read.Run, str], float | None], running: bool = False) -> bytes:
  """The page of one run, or of two side by side.

  Args:
    image_flops: image_flops(run, phase) -> FLOPs that an image takes, None where they were not counted.
    running: whether the first run goes on.
  """
  names = _names(runs)
  shown = _pictures(runs)
  sections = [
    ('phases', 'Phases', [
      join(*_title(runs, name, index), _phases(run, name, image_flops))
      for index, (run, name) in enumerate(zip(runs, names))]),
    ('resolutions', 'The same noise at every resolution', _strips(runs, names, shown)),
    ('figures', 'Evaluation', _evaluation(runs, names)),
    ('curves', 'Curves and samples', _curves(runs, names, shown)),
    ('config', 'Config', _config(runs, names)),
    ('digests', 'Digests', [
      join(*_title(runs, name, index), _digests(run, name)) for index, (run, name) in enumerate(zip(runs, names))]),
  ]
  style, script = (_HERE / 'page.css').read_text(), (_HERE / 'page.js').read_text()
  # Nothing is fetched, and no other script runs, whatever stands in a name.
  trusted = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  rules = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{trusted}'"
  title = ' and '.join(names)
  links = [element('li', element('a', name, href=f'#{mark}')) for mark, name, _ in sections]
  body = [
    element('header', element('h1', title), *_head(runs, names, running)),
    element('nav', element('ul', *links), aria_label='Sections'),
    element('main', *(element('section', element('h2', name, id=f'{mark}-title'), *content, id=mark,
                              aria_labelledby=f'{mark}-title') for mark, name, content in sections)),
    element('footer', f'pagoda_jax {pagoda_jax.__version__}. This page holds everything it shows.'),
    element('script', Markup(script)),
  ]
  head = element(
    'head', element('meta', charset='utf-8'), element('meta', http_equiv='Content-Security-Policy', content=rules),
    element('meta', name='viewport', content='width=device-width, initial-scale=1'), element('title', f'{title}: run'),
    element('style', Markup(style)))
  return f'<!doctype html>\n{element("html", head, element("body", *body), lang="en")}\n'.encode()


def _names(runs):
  names = [buckets.absolute(run.folder).name or str(run.folder) for run in runs]  # of '.' too
  return [str(run.folder) for run in runs] if len(set(names)) < len(names) else names


def _title(runs, name, index) -> list:
  """Whose what follows is; nothing where there is one run."""
  return [element('h3', element('span', 'AB'[index], class_='ab'[index]), f' {name}')] if len(runs) > 1 else []


def _head(runs, names, running):
  written = time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())
  yield element('p', f'Written {written}', ' while the run goes on; reload for a newer one.' if running else '.',
                class_='quiet')
  for index, run in enumerate(runs):
    yield from _title(runs, names[index], index)
    config = run.config
    data = config['data']
    base = config['base_resolution'] * spaces.factor(config)
    largest = max((phase.resolution for phase in run.phases if phase.stage in configs.IMAGE_STAGES), default=base)
    began = next((f'{phase.name}: {phase.state}' for phase in run.phases if not phase.finished), 'finished')
    classes = data['num_classes']
    images = sum(phase.images for phase in run.phases if phase.stage in configs.TRAINED_STAGES)
    facts = {
      'State': began,
      'Data': f'{data.get("name") or data["source"]}, ' + (f'{classes:,} classes' if classes > 0 else 'no classes'),
      'Resolution': f'{base} to {largest} px',
      'Trained for': duration(sum(phase.seconds for phase in run.phases)),
      'Images': f'{images:,}',
      'Seed': str(config['seed']),
    }
    yield element('dl', *(element('div', element('dt', key), element('dd', value)) for key, value in facts.items()),
                  class_='facts')
    if run.notes:
      yield element('div', element('b', 'Not shown, or not whole'), element('ul', *(
        element('li', note) for note in run.notes[:50])), class_='warn', role='note')


def _phases(run, name, image_flops):
  rows, whole, counted = [], 0.0, True
  for phase in run.phases:
    flops = image_flops(run, phase.name) if phase.done else None
    counted = counted and (flops is not None or not phase.done)
    total = flops * phase.images if flops else None
    whole += total or 0.0
    rate, mfu, epochs = (phase.last(name) for name in ('images_per_second', 'mfu', 'epochs'))
    skipped = phase.last('skipped')
    rows.append([
      phase.name, phase.stage, f'{phase.resolution} px', phase.state, f'{phase.images:,}' if phase.done else '–',
      '–' if epochs is None else number(epochs, 3), duration(phase.seconds) if phase.seconds else '–',
      '–' if rate is None else f'{rate:,.0f}', _scaled(flops), _scaled(total),
      '–' if mfu is None else f'{mfu:.1%}', '–' if skipped is None else f'{skipped:,.0f}'])
  head = ['Phase', 'Stage', 'Size', 'State', 'Images', 'Epochs', 'Time', 'Images/s', 'FLOPs an image', 'FLOPs', 'MFU',
          'Skipped']
  said = ['Time is from the first logged step to the last, without breaks and without compilation.']
  if paused := sum(phase.paused for phase in run.phases):
    said.append(f'Breaks: {duration(paused)}.')
  if whole:
    said.append(f'In all {_scaled(whole)} FLOPs' + ('.' if counted else ', but for phases whose own are not known.'))
  elif not counted:
    said.append('FLOPs were not counted; `pagoda report` counts them.')
  if not any('mfu' in phase.curves for phase in run.phases):
    said.append("No MFU: the run's chip is none whose peak is published.")
  return join(table(head, rows, f'Phases of {name}', 4), element('p', ' '.join(said), class_='quiet'))


def _scaled(value) -> str:
  if not value:
    return '–'
  for power, unit in ((1e21, 'Z'), (1e18, 'E'), (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M')):
    if value >= power:
      return f'{value / power:.3g} {unit}'
  return f'{value:,.0f}'


def _pictures(runs) -> list[dict]:
  """Of each run: phase -> [(step, pictures.Grid)]."""
  drawing = [(run, phase) for run in runs for phase in run.phases if phase.grids]
  share = pictures.PAGE_BYTES // max(len(drawing), 1)
  found = [{} for _ in runs]
  for index, run in enumerate(runs):
    config = _attributes(run.config)
    for phase in run.phases:
      found[index][phase.name] = pictures.chosen(phase.grids, config, phase, share, run.notes)
  return found


def _attributes(config):
  from ml_collections import ConfigDict

  return ConfigDict(config, sort_keys=False)


def _strips(runs, names, shown):
  columns = []
  for index, run in enumerate(runs):
    strips = []
    for phase in run.phases:
      drawn = shown[index].get(phase.name)
      if not drawn or not drawn[-1][1].strip:
        continue
      step, grid = drawn[-1]
      strips.append(element('div', element('p', f'{phase.name}, {phase.resolution} px, step {step:,}'), element(
        'img', src=grid.strip, alt=f'{grid.columns} samples of {phase.name} at {phase.resolution} px')))
    ladder = run.folder / 'ladder.png'
    if not strips and ladder.exists():
      try:
        uri = pictures.encoded(pictures.array_of(ladder))
        strips = [element('div', element('img', src=uri, alt='One row for each generator'))]
      except Exception as error:
        strips = [element('p', f'ladder.png cannot be shown ({error})', class_='quiet')]
    content = element('div', *strips, class_='strips') if strips else element('p', 'No samples yet.', class_='quiet')
    columns.append(element('div', *_title(runs, names[index], index), content))
  about = 'A column is one draw from the prior: what the teacher makes of it in many evaluations, a generator in one.'
  return [element('p', about, class_='quiet'), element('div', *columns, class_='pair')]


def _evaluation(runs, names):
  for index, run in enumerate(runs):
    yield from _title(runs, names[index], index)
    rows = []
    for phase in run.phases:
      f = phase.figures
      if f:
        ratio = _quotient(f.get('frechet'), f.get('frechet_real'))
        rows.append([phase.name, f'{f.get("resolution", "–")} px', number(f.get('step')), _share(f.get('accuracy')),
                     _share(f.get('accuracy_real')), number(f.get('frechet')), number(f.get('frechet_real')), ratio])
    if rows:
      yield table(['Phase', 'Size', 'Step', 'Class recognised', 'real, held out', 'Frechet distance', 'real, held out',
                   'ratio'], rows, 'Figures of the end of the run')
      first = run.config['evaluation'].get('components', 'few')
      yield element('p', f'Frechet distance in the first {first} principal components of the training pictures.',
                    class_='quiet')
    guided = [[phase.name, omega, _share(f.get('accuracy')), number(f.get('spread')), number(f.get('recall'))]
              for phase in run.phases for omega, f in (phase.figures.get('guided') or {}).items()]
    if guided:
      yield table(['Phase', 'omega', 'Class recognised', 'Spread', 'Recall'], guided, 'Figures by strength of guidance')
    results = [(phase.name, file, result) for phase in run.phases for file, result in phase.evaluations]
    for phase, file, result in results:
      yield _result(phase, file, result)
    if not rows and not results:
      yield element('p', 'Nothing measured yet: `pagoda evaluate` does, and the end of a run with '
                    'config.evaluation.samples.', class_='quiet')


def _result(phase, file, result) -> Markup:
  group = lambda name: value if isinstance(value := result.get(name), dict) else {}
  samples, held, ratios = group('samples'), group('held_out'), (group('fd_ratio').get('of') or {})
  strength = '' if samples.get('guidance') is None else f', guidance {number(samples["guidance"])}'
  average = '' if samples.get('ema', 'ema') == 'ema' else f', average {samples["ema"]}'  # of a phase that keeps several
  title = f'{phase}, step {number(samples.get("step"))}, {number(samples.get("count"))} samples{strength}{average}'
  rows = [[name, number(value, 5), number(held.get(name), 5), number(ratios.get(name))]
          for name, value in group('metrics').items()]
  about = f'Held out: {number(held["count"])} pictures. ' if 'count' in held else ''
  notes = [element('li', note) for note in result.get('notes') or ()]
  repeats = {key: result[key] for key in ('samples', 'reference', 'features', 'how', 'versions') if key in result}
  return join(
    element('h3', title), table(['Figure', 'samples', 'held out', 'ratio'], rows, title),
    element('p', about, f'evaluate/{file}', class_='quiet'), element('ul', *notes, class_='quiet') if notes else '',
    element('details', element('summary', 'What repeats it'),
            element('pre', json.dumps(repeats, indent=2, ensure_ascii=False), tabindex=0)))


def _share(value) -> str:
  return f'{value:.1%}' if isinstance(value, (int, float)) and abs(value) < 1e9 else number(value)


def _quotient(a, b) -> str:
  fine = all(isinstance(x, (int, float)) for x in (a, b)) and b
  return f'{a / b:.2f}' if fine else '–'


def _curves(runs, names, shown):
  order = list(dict.fromkeys(phase.name for run in runs for phase in run.phases))
  for number_of, name in enumerate(order):
    having = [(index, phase) for index, run in enumerate(runs) for phase in run.phases if phase.name == name]
    told = '; '.join((f'{"AB"[index]}: ' if len(runs) > 1 else '') + _told(phase) for index, phase in having)
    yield element('h3', f'{name} ', element('small', told), id=f'phase-{number_of}')
    if panels := _panels(runs, having):
      yield element('div', *panels, class_='panels')
    viewers = [_viewer(runs, index, phase, shown[index][name]) for index, phase in having if shown[index].get(name)]
    if viewers:
      yield element('div', *viewers, class_='pair')


def _told(phase) -> str:
  if phase.stage == 'invert' and phase.manifest:
    if 'std' in phase.manifest:
      return (f'{phase.done:,} pairs, noise of mean {number(phase.manifest["mean"], 3)} and standard deviation '
              f'{number(phase.manifest["std"], 3)}')
    return f'{phase.done:,} pairs, inverted inside the steps of the phases that read them'
  return f'{phase.stage}, {phase.resolution} px, {phase.state}'


def _panels(runs, having):
  present = {name for _, phase in having for name in phase.curves} - set(_SAID_ELSEWHERE)
  known = {name for group in PANELS.values() for name in group}
  groups = PANELS | {name: (name,) for name in sorted(present - known)[:MOST_PANELS]}
  panels = []
  for title, group in groups.items():
    found = []
    for index, phase in having:
      for kind, name in enumerate(name for name in group if name in phase.curves):
        whose = f'{"AB"[index]} ' if len(runs) > 1 else ''
        label = whose + (name if len(group) > 1 or whose else title.lower() if title in PANELS else name)
        found.append(curves.Curve(label, *phase.curves[name], kind % 3, other=index > 0))
    if found:
      panels.append(curves.panel(title, found, f'{having[0][1].name}, '))
  return panels


def _viewer(runs, index, phase, drawn) -> Markup:
  whose = f'{"AB"[index]}: ' if len(runs) > 1 else ''
  frames = []
  for place, (step, grid) in enumerate(drawn):
    of = f'{phase.name}, step {step:,}'
    parts = [element('div', element('p', 'Samples of the prior'), element(
      'img', src=grid.samples, alt=f'Samples, {of}'))]
    if grid.reconstructions:
      parts.append(element('div', element('p', 'Held-out pictures, each row over its reconstructions'), element(
        'img', src=grid.reconstructions, alt=f'Reconstructions, {of}')))
    frames.append(element('div', element('div', *parts, class_='frames'), class_='frame',
                          data_step=f'step {step:,} of {phase.target:,}', hidden=place < len(drawn) - 1))
  slide = element(
    'div', element('label', f'{whose}Samples over time', for_=f'slide-{index}-{_mark(phase)}'),
    element('input', type='range', min=0, max=len(drawn) - 1, value=len(drawn) - 1, step=1,
            id=f'slide-{index}-{_mark(phase)}'),
    element('output', f'step {drawn[-1][0]:,}', for_=f'slide-{index}-{_mark(phase)}'), class_='slide', hidden=True)
  left_out = len(phase.grids) - len(drawn)
  more = [element('p', f'{left_out} more in {phase.name}/samples/.', class_='quiet')] if left_out > 0 else []
  return element('div', slide, *frames, *more, class_='card viewer')


def _mark(phase) -> str:
  return hashlib.sha256(phase.name.encode('utf-8', 'replace')).hexdigest()[:12]  # an id holds no spaces


def _config(runs, names):
  if len(runs) > 1:
    flat = [read.flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [[element('code', key), *(element('code', _json(values[key]) if key in values else 'absent')
                                     for values in flat)]
            for key in keys if flat[0].get(key, read) != flat[1].get(key, read)]
    yield element('h3', 'What differs between the two')
    yield (table(['Key', f'A {names[0]}', f'B {names[1]}'], rows, 'Keys that differ', 9) if rows
           else element('p', 'Nothing.', class_='quiet'))
  for index, run in enumerate(runs):
    yield from _title(runs, names[index], index)
    rows = [[element('code', key), element('code', _json(value)), element('code', _json(default))]
            for key, value, default in read.differences(run.config)]
    yield element('h3', 'What differs from the defaults')
    yield table(['Key', 'Here', 'Default'], rows, 'Keys that differ from the defaults', 9)
    yield element('details', element('summary', 'The whole config'), element(
      'pre', json.dumps(run.config, indent=2, ensure_ascii=False), tabindex=0))


def _json(value) -> str:
  return json.dumps(value, ensure_ascii=False)


def _digests(run, name) -> Markup:
  rows = [[phase.name, what, element('span', value, class_='digest')]
          for phase in run.phases for what, value in phase.digests.items()]
  about = 'SHA-256. `pagoda inspect` prints the digest of all that a checkpoint holds, which takes reading it.'
  return join(table(['Phase', 'Of', 'SHA-256'], rows, f'Digests of {name}', 9), element('p', about, class_='quiet'))
