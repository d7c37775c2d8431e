"""The page of a run, from written files: what it shows, what it escapes, what it survives."""

import base64
import html.parser
import io
import json
import math
import re
import shutil
import subprocess

import browser
import numpy as np
import pytest
import tiny
from PIL import Image

from pagoda_jax import main
from pagoda_jax.data import noise_store
from pagoda_jax.evaluation.report import curves, page, pictures, read, write
from pagoda_jax.runtime.files import write_sealed
from pagoda_jax.training import claims, grids, workdir

HOSTILE = '<script>alert(1)<img src=x onerror=alert(2)>'
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def experiment(rename=None, **changed):
  """The tiny experiment as JSON has it; `rename`: another name of its last phase."""
  config = tiny.get_config()
  config.update_from_flattened_dict(changed)
  values = json.loads(workdir.as_json(config))
  if rename:
    values['phases'][rename] = values['phases'].pop('grow_16')
    values['order'][-1] = rename
  return values


def write_run(folder, config, lines=4, steps=(2, 4)):
  """What a run leaves, but for its checkpoints: those are folders that Orbax has named."""
  rng = np.random.default_rng(0)
  for name in config['order']:
    phase = config['phases'][name]
    claims.write(folder / name, name, {'config.data_sha256': 'f' * 64}, config)
    if phase['stage'] == 'invert':
      write_sealed(folder / name / 'manifest.json', {
        'format_version': 1, 'count': 4500, 'mean': -1.5, 'std': 76.0, 'shards': {},
        'origin': {'teacher_sha256': 'ab'}})
      continue
    keys = ['loss', 'grad_norm'] + ['adversarial', 'weight', 'logit_real', 'logit_fake'] * (phase['stage'] != 'teacher')
    with (folder / name / 'metrics.jsonl').open('w') as file:
      for step in range(1, lines + 1):
        values = {key: float(value) for key, value in zip(keys, rng.uniform(0.5, 2, len(keys)))}
        file.write(json.dumps({'step': step, 'time': 1e9 + 2 * step, 'kimg': step * 8 / 1000, 'epochs': step * 8 / 4500,
                               **values, 'skipped': 0.0, 'skipped_in_a_row': 0.0, 'images_per_second': 4.0}) + '\n')
    side = 32  # 8 and 16 px are drawn in larger pixels
    height = side if phase['stage'] == 'teacher' else side + grids.GAP + 4 * side
    (folder / name / 'samples').mkdir()
    small = 8 if name in ('teacher', 'distill') else 16
    for step in steps:
      dots = rng.integers(0, 256, (height * small // side + 1, 10 * small), np.uint8)
      image = dots.repeat(side // small, 0).repeat(side // small, 1)[:height]
      Image.fromarray(image).save(folder / name / 'samples' / f'step_{step:08d}.png')
    (folder / name / 'checkpoints' / str(steps[-1])).mkdir(parents=True)
    write_sealed(folder / name / 'evaluation.json', {
      'step': steps[-1], 'resolution': small, 'accuracy': 0.875, 'accuracy_real': 0.94, 'frechet': 0.3,
      'frechet_real': 0.2})
  write_sealed(folder / config['order'][-1] / 'evaluate' / 'step_4_ab.json', {
    'metrics': {'fd_data': 1.7585, 'kid_data': math.nan}, 'held_out': {'count': 500, 'fd_data': 0.0626},
    'samples': {'step': 4, 'count': 2000, 'guidance': None}, 'notes': ['few <b>pictures</b>']})
  return folder


class Page(html.parser.HTMLParser):
  """Elements with their attributes; raises where what was opened is not closed."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.found, self.open, self.scripts, self.text = [], [], [], ''
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag not in ('meta', 'img', 'input', 'br'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] == ['script']:
      self.scripts.append(data)
    elif self.open[-1:] != ['style']:
      self.text += data + ' '

  def all(self, tag):
    return [attributes for name, attributes in self.found if name == tag]


def page_of(*folders):
  runs = [read.read(folder) for folder in folders]
  return Page(page.render(runs, lambda run, name: 2e6).decode())


def stands_alone(shown):
  """One script, the page's own; nothing fetched; no element has a handler."""
  return (shown.scripts == [(read.epath.Path(page.__file__).parent / 'page.js').read_text()]
          and all(image['src'].startswith('data:image/') for image in shown.all('img'))
          and all(link['href'].startswith('#') for link in shown.all('a')) and not shown.all('link')
          and not [key for _, attributes in shown.found for key in attributes if key.startswith('on')])


def test_results_of_several_averages_are_told_apart():
  titled = lambda ema: page._result('teacher', 'step_4_ab.json', {
    'metrics': {'fid': 3.0}, 'samples': {'step': 4, 'count': 2000, 'guidance': 2.0, 'ema': ema}})
  assert '>teacher, step 4, 2,000 samples, guidance 2, average std_0.1<' in titled('std_0.1')
  assert '>teacher, step 4, 2,000 samples, guidance 2<' in titled('ema')


def test_the_page_of_a_run_shows_all_of_it_and_fetches_nothing(tmp_path):
  shown = page_of(write_run(tmp_path, experiment()))
  assert stands_alone(shown) and "default-src 'none'" in shown.all('meta')[1]['content']
  plots = [plot['aria-label'] for plot in shown.all('svg')]
  assert sum('distill, Logits: logit_real: last' in plot and 'logit_fake: last' in plot for plot in plots) == 1
  assert sum('Weight of the adversarial loss' in plot for plot in plots) == 2  # distill and grow_16
  # 32 images at 2 MFLOP; 4500 pairs; seconds from the first line to the last.
  assert '64 M' in shown.text and '9 G' in shown.text and '0:06' in shown.text and '4,500' in shown.text
  assert '87.5%' in shown.text and '1.50' in shown.text and '1.7585' in shown.text and 'not finite' in shown.text
  assert 'f' * 64 in shown.text and 'Not shown' not in shown.text
  sliders = [box for box in shown.all('input') if box['type'] == 'range']
  assert [(box['min'], box['max']) for box in sliders] == [('0', '1')] * 3
  labels = {label['for'] for label in shown.all('label')}
  assert labels == {box['id'] for box in sliders}
  # Two grids of a phase, in the generators' with reconstructions; three rows of the same noise.
  assert len(shown.all('img')) == 2 + 4 + 4 + 3
  assert 'phases.grow_16.resolution' in shown.text and 'phases.grow_16.ema' not in shown.text.split('The whole')[0]


def test_a_grid_is_cut_into_samples_reconstructions_and_one_row(tmp_path):
  rng = np.random.default_rng(1)
  drawn, made = rng.integers(0, 256, (2, 16, 8 * 10), np.uint8)[:, :16]
  image = np.concatenate([drawn.repeat(4, 0).repeat(4, 1), np.full((grids.GAP, 320), 128, np.uint8),
                          made.repeat(4, 0).repeat(4, 1)])
  path = read.epath.Path(tmp_path / 'step_00000001.png')
  Image.fromarray(image).save(path)
  config = tiny.get_config()
  config.log.samples = 20
  found = pictures.read(path, config, 8)
  back = lambda uri: np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))))
  np.testing.assert_array_equal(back(found.samples), drawn)
  np.testing.assert_array_equal(back(found.reconstructions), made)
  np.testing.assert_array_equal(back(found.strip), drawn[:8])


def test_no_name_and_no_note_becomes_markup(tmp_path):
  config = experiment(rename=HOSTILE)
  config['data']['name'] = f'"\'{HOSTILE}\ud800\x00'
  shown = page_of(write_run(tmp_path, config))
  assert stands_alone(shown) and HOSTILE in shown.text and 'few <b>pictures</b>' in shown.text
  assert not [attributes for _, attributes in shown.found if attributes.get('src') == 'x']


def test_what_is_broken_is_named_and_the_rest_is_shown(tmp_path):
  folder = write_run(tmp_path, experiment())
  with (folder / 'teacher' / 'metrics.jsonl').open('ab') as file:
    file.write(b'{"step": 5, "loss": NaN, "odd": Infinity}\n{"step": 6, "loss": 1' + b'0' * 400 + b', "skipped": 3}\n'
               b'{"step": true}\n[]\n{"step": 7, "lo')
  (folder / 'distill' / 'metrics.jsonl').write_bytes(b'\xff\x00' * 100)
  evaluation = folder / 'distill' / 'evaluation.json'
  evaluation.write_text(evaluation.read_text().replace('0.875', '0.999'))
  picture = folder / 'grow_16' / 'samples' / 'step_00000004.png'
  picture.write_bytes(picture.read_bytes()[:300])
  shutil.rmtree(folder / 'invert')
  (folder / 'grow_16' / 'config.json').write_text('{')
  shown = page_of(folder)
  for said in ('teacher/metrics.jsonl: 3 lines', 'distill/metrics.jsonl: 1 lines', 'distill/evaluation.json',
               'grow_16/samples/step_00000004.png', 'grow_16/config.json', '1 not finite', 'not begun'):
    assert said in shown.text, said
  assert '99.9%' not in shown.text
  for name in experiment()['order']:
    shutil.rmtree(folder / name, ignore_errors=True)
  with pytest.raises(claims.WorkdirError, match='no phase'):
    read.read(folder)


def test_an_unfinished_run_says_where_it_stands(tmp_path):
  config = experiment()
  write_run(tmp_path, config, lines=3, steps=(2,))
  for name in ('invert', 'distill', 'grow_16'):
    shutil.rmtree(tmp_path / name)
  shown = page_of(tmp_path)
  assert 'teacher: step 3 of 4' in shown.text and shown.text.split('Evaluation')[1].count('not begun') == 3


def test_long_curves_are_thinned_and_lose_no_spike_and_no_gap(tmp_path):
  steps = np.arange(1.0, 200_001)
  values = 1 + 0.1 * np.sin(steps)
  values[123_456], values[777] = 90.0, np.nan
  kept = curves.thinned(steps, values)
  assert len(kept[0]) <= 1000 and kept[0][np.nanargmax(kept[1])] == 123_457
  assert kept[0][np.isnan(kept[1])].tolist() == [778] and (np.diff(kept[0]) > 0).all()
  assert len(curves.thinned(*curves.thinned(steps, np.full_like(steps, np.nan)))[0]) <= 1000
  panel = str(curves.panel('Loss', [curves.Curve('loss', steps, values)]))
  points = [line.split() for line in re.findall(r'points="([^"]*)"', panel)]
  assert max(map(len, points)) <= 1000 and sum(map(len, points)) <= 1000 + curves.SMOOTHED
  assert 'most 90 (step 123,457), 1 not finite' in panel and len(panel) < 30_000


@pytest.mark.parametrize('values', [
  [0.0], [5.0], [1e308, -1e308], [1e-320, 1.0], [-1.0, -1.0], [np.nan, np.inf], [1.0, 1e300], [2.0, 1e-9, 3.0]])
def test_every_curve_lies_within_its_axes(values):
  values = np.array(values)
  text = str(curves.panel('x', [curves.Curve('x', np.arange(1.0, len(values) + 1), values)]))
  for line in re.findall(r'points="([^"]*)"', text):
    for x, y in (map(float, point.split(',')) for point in line.split()):
      assert curves.LEFT - 1 <= x <= curves.WIDTH - curves.RIGHT + 1 and 0 <= y <= curves.HEIGHT
  assert 'nan' not in text and 'inf' not in text


def test_a_running_mean_is_that_of_its_window():
  steps = np.arange(500.0)
  at, means = curves.running_mean(steps, steps**2)
  middle = np.abs(at - 250).argmin()
  window = steps[int(at[middle]) - 10 : int(at[middle]) + 11]
  assert means[middle] == pytest.approx((window**2).mean()) and means[0] == 0 and means[-1] == 499**2
  # A spike tells in its windows alone.
  at, means = curves.running_mean(steps, np.where(steps == 100, 1e20, 1 + steps % 2))
  assert means.min() > 0.9 and means[at > 111].max() < 2.1 and means[at == 100] == pytest.approx(1e20 / 21)


def test_what_the_pointer_is_told_is_what_was_logged():
  steps = np.arange(50.0, 100_001, 50)
  values = 1 + (steps - 50) / 1000
  text = str(curves.panel('x', [curves.Curve('x', steps, values)]))
  (first, last), (low, high) = (map(float, re.search(f'data-{axis}="([^"]*)"', text)[1].split(',')) for axis in 'xy')
  points = np.array([point.split(',') for point in re.search(r'points="([^"]*)"', text)[1].split()], float)
  # As page.js turns places into numbers.
  told = np.rint(first + (points[:, 0] - 46) / (352 - 46) * (last - first))
  assert len(told) == 1000 and set(told) <= set(steps)
  found = low + (166 - points[:, 1]) / (166 - 8) * (high - low)
  np.testing.assert_allclose(10**found if 'data-log="1"' in text else found, np.interp(told, steps, values), rtol=5e-4)


def test_pairs_that_are_inverted_in_the_steps_of_others_cost_the_phase_of_their_noise_nothing(tmp_path):
  folder = write_run(tmp_path, experiment())
  whole = page._phases(read.read(folder), 'run', lambda run, name: 2e6)
  noise_store.write_promise(read.epath.Path(folder / 'invert'), 4500, {'teacher_sha256': 'ab'})
  run = read.read(folder)
  assert [(phase.images, phase.finished) for phase in run.phases if phase.stage == 'invert'] == [(0, True)]
  # Three phases of 32 images at 2 MFLOP.
  assert 'In all 9.19 G FLOPs.' in whole and 'In all 192 M FLOPs.' in page._phases(run, 'run', lambda run, name: 2e6)
  # A sum without a phase that could not be counted says so.
  some = page._phases(run, 'run', lambda run, name: None if name == 'grow_16' else 2e6)
  assert 'In all 128 M FLOPs, but for' in some and 'were not counted' not in some
  assert 'were not counted' in page._phases(run, 'run', lambda run, name: None)


def test_images_a_second_and_mfu_are_of_one_moment(tmp_path):
  folder = write_run(tmp_path, experiment())
  path = folder / 'distill' / 'metrics.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  # Each is a mean since the run began: the mean of them is none of the run.
  for line, rate in zip(lines, (10, 20, 30, 40)):
    line |= {'images_per_second': rate, 'mfu': rate / 100}
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  table = page._phases(read.read(folder), 'run', lambda run, name: None)
  (row,) = [row for row in table.split('<tr>') if '>distill<' in row]
  assert '>40<' in row and '>40.0%<' in row


def test_pictures_never_grow_past_their_room(tmp_path, monkeypatch):
  folder = write_run(tmp_path, experiment(), steps=tuple(range(1, 40)))
  assert [box['max'] for box in page_of(folder).all('input')] == [str(pictures.GRIDS - 1)] * 3
  monkeypatch.setattr(pictures, 'PAGE_BYTES', 60_000)
  shown = page_of(folder)
  carried = sum(len(image['src']) for image in shown.all('img') if 'step' in image['alt'])
  assert carried <= 60_000 and 'more in teacher/samples/' in shown.text
  assert all(int(box['max']) >= 0 for box in shown.all('input'))
  noise = np.random.default_rng(0).integers(0, 256, (2000, 1500, 3), np.uint8)
  uri = pictures.encoded(noise)
  assert uri.startswith('data:image/webp') and len(uri) < 2_000_000


def test_two_runs_stand_side_by_side_with_what_differs(tmp_path, monkeypatch):
  # Counting is planning's; here it is who asks for which phase.
  monkeypatch.setattr(write.plan, 'image_flops', lambda config, name: 1e6 * config.phases[name].batch_size)
  a = write_run(tmp_path / 'a' / 'digits', experiment())
  b = write_run(tmp_path / 'b' / 'digits', experiment(**{'phases.distill.batch_size': 16, 'seed': 7}), lines=3)
  output = tmp_path / 'two.html'
  assert main.main(['report', f'--workdir={a}', f'--against={b}', f'--output={output}']) == 0
  shown = Page(output.read_text())
  assert stands_alone(shown) and str(a) in shown.text and str(b) in shown.text  # their folders have one name
  assert len([p for p in shown.all('svg') if 'A loss' in p['aria-label'] and 'B loss' in p['aria-label']]) == 3
  differing = shown.text.split('What differs between the two')[1].split('What differs from the defaults')[0]
  assert 'phases.distill.batch_size' in differing and 'seed' in differing and 'steps' not in differing
  assert '16 M' in shown.text and '512 M' in shown.text  # of b's distill and of invert
  assert not (a / 'report.html').exists()
  monkeypatch.chdir(a)
  assert page._names([read.read('.')]) == ['digits'] and page._names([read.read('.'), read.read(b)]) == ['.', str(b)]


def test_a_fault_of_the_page_is_a_warning_once_and_never_stops_a_run(tmp_path, caplog):
  folder = write_run(tmp_path, experiment())
  (folder / 'report.html').mkdir()  # it cannot be replaced by a file
  made = write.Page(folder)
  for _ in range(3):
    made._not_before = 0.0
    made.refresh()
  made.finish()
  assert [record.levelname for record in caplog.records] == ['WARNING'] and 'report.html' in caplog.text
  assert not list(folder.glob('*.partial'))
  (folder / 'report.html').rmdir()
  made._not_before = 0.0
  made.refresh()
  assert 'while the run goes on' in (folder / 'report.html').read_text()
  (folder / 'report.html').unlink()
  made.refresh()  # so soon after the last one it is not worth it
  assert not (folder / 'report.html').exists()
  made.finish()
  assert 'while the run goes on' not in (folder / 'report.html').read_text()


def test_a_pause_is_no_training_time():
  times = np.concatenate([np.arange(0, 100, 2.0), 5000 + np.arange(0, 100, 2.0)])
  worked, paused = read._durations(np.arange(100), times)
  assert worked == 2 * 99 and worked + paused == 5098


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here')
def test_in_a_browser_the_script_runs_and_complains_of_nothing(tmp_path):
  folder = write_run(tmp_path / 'run', experiment(rename=HOSTILE))
  write.write(folder, count=False)
  ran = subprocess.run(
    [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path / "profile"}',
     '--enable-logging=stderr', '--dump-dom', f'file://{folder / "report.html"}'],
    capture_output=True, text=True, timeout=300)
  dom = Page(re.sub(r'<(line|polyline)([^>]*)></\1>', r'<\1\2/>', ran.stdout))
  assert [box['aria-valuetext'] for box in dom.all('input')] == ['step 4 of 4'] * 3
  assert not [div for div in dom.all('div') if div.get('class') == 'slide' and 'hidden' in div]
  assert 'CONSOLE' not in ran.stderr
  assert len(dom.scripts) == 1


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here')
def test_without_scripts_there_is_no_slider_that_does_nothing(tmp_path):
  folder = write_run(tmp_path / 'run', experiment())
  write.write(folder, count=False)
  with browser.browser(tmp_path / 'profile') as shown:
    for off, expected in ((True, {'none'}), (False, {'flex'})):
      shown('Emulation.setScriptExecutionDisabled', value=off)
      shown.open(f'file://{folder / "report.html"}')
      found = shown.run("[...document.querySelectorAll('.slide')].map(each => getComputedStyle(each).display)")
      assert found and set(found) == expected


def test_what_was_counted_is_not_counted_again(tmp_path, monkeypatch):
  run = read.read(write_run(tmp_path, experiment(seed=99)))
  calls = []
  monkeypatch.setattr(write.plan, 'image_flops', lambda config, name: calls.append(name) or 7.0)
  assert write.image_flops(run, 'teacher', count=False) is None
  assert [write.image_flops(run, 'teacher') for _ in range(2)] == [7.0, 7.0] and calls == ['teacher']
