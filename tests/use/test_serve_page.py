"""The page in a real browser: by mouse and by keys, at a server and as a folder; its noise beside JAX's."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import browser
import captioned
import numpy as np
import pytest
from PIL import Image
from runs import pagoda
from serving import by_command
from test_generator import made_up_run
from test_to_published import trained_phase

import pagoda_jax
from pagoda_jax.method import guidance
from pagoda_jax.stages import sampler
from pagoda_jax.use import onnx_loader, sample
from pagoda_jax.use.serve import page_files, static

needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason='no Chromium here')
STATUS = "document.querySelector('#status').textContent"


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return trained_phase(tmp_path_factory.mktemp('run') / 'run', 'guided', 'grow_16')[0].parent


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  with browser.browser(tmp_path_factory.mktemp('profile')) as found:
    yield found


def view(page, kind, buttons):
  """Waits until a view of so many pictures is shown and nothing is under way."""
  page.wait(f"document.querySelector('#tiles').className === '{kind}' && "
            f"document.querySelectorAll('button.tile').length === {buttons} && "
            "document.querySelector('#pictures').getAttribute('aria-busy') === 'false'")
  return page.run(STATUS)


def focused(page):
  return page.run("document.activeElement.getAttribute('aria-label') || document.activeElement.id")


def shown(page, place=0) -> np.ndarray:
  """Pixels of a tile, as the browser has them."""
  url = page.run(f"document.querySelectorAll('.tile img')[{place}].src")
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(',')[1]))).convert('L'))[..., None]


def through_it_by_keys(page):
  """From the seed to the way between two neighbours, and back, without a mouse."""
  page.run("document.querySelector('#seed').focus()")
  page.press('Tab')
  assert focused(page) == 'Next seed'
  page.press('Enter')
  page.wait("document.querySelector('#view-title').textContent === '16 pictures, seed 1'")
  page.press('Tab', '4', 'Enter')
  assert '4 pictures in ' in view(page, 'many', 4)
  page.run("document.querySelector('button.tile[tabindex=\"0\"]').focus()")
  assert focused(page) == 'label 0, 1 of 4'
  page.press('ArrowRight', 'ArrowRight')
  assert focused(page) == 'label 2, 3 of 4'
  outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
  assert outline == 'solid'  # it is seen where the focus is
  page.press('Enter')
  assert '8 neighbours in' in view(page, 'around', 9) and focused(page) == 'here, label 2, 5 of 9'
  page.press('ArrowLeft', 'i')
  assert 'Now the other one' in page.run(STATUS)
  page.press('Home', 'I')
  assert '16 pictures in' in view(page, 'path', 16) and focused(page) == 'slider'
  first = page.run("document.querySelector('#large').src")
  page.press('ArrowRight')
  assert page.run("document.querySelector('#large').src") != first
  assert page.run("document.querySelector('#slider').getAttribute('aria-valuetext')") == '7 %'
  page.run("document.querySelector('button.tile[tabindex=\"0\"]').focus()")
  page.press('Backspace')
  view(page, 'around', 9)
  page.press('i', 'Escape')
  assert page.run(STATUS) == 'Let go.'
  page.press('Backspace')
  view(page, 'many', 4)


@needs_browser
def test_the_page_by_mouse_and_by_keys(run, page, tmp_path, tmp_path_factory):
  page.complaints.clear()
  page.fetched.clear()
  generator = pagoda_jax.load(run)
  picture = generator(3, seed=9)[0]
  Image.fromarray(picture[..., 0]).resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / 'own.png')
  with by_command(tmp_path / 'log', f'--workdir={run}', '--rate=100000') as served:
    page.open(served.url)
    view(page, 'many', 16)
    assert np.abs(shown(page, 5).astype(int) - generator(list(range(10)), num_images=6)[5]).max() <= 1
    through_it_by_keys(page)
    # By mouse: wander, elsewhere, further, back; drag; the button for two.
    page.click('li:nth-child(4) .tile')
    view(page, 'around', 9)
    near = page.run("document.querySelector('.tile img').src")
    page.click('#more')
    page.wait(f"document.querySelector('.tile img').src !== {json.dumps(near)}")
    page.run("(s => { s.value = 0.9; s.dispatchEvent(new Event('input')); })(document.querySelector('#slider'))")
    page.wait("document.querySelector('#slider-value').textContent === '0.90'")
    view(page, 'around', 9)
    page.click('#back')
    view(page, 'many', 4)
    page.drag('li:nth-child(1) .tile', 'li:nth-child(4) .tile')
    view(page, 'path', 16)
    assert page.run("document.querySelector('#view-title').textContent") == 'From label 0 to label 3'
    page.click('#back')
    # Another view comes while one of nine is dragged: it is joined to what it is dropped on.
    page.click('li:nth-child(4) .tile')
    view(page, 'around', 9)
    page.drag('li:nth-child(9) .tile', 'li:nth-child(1) .tile', by=(-20, -20),
              meanwhile="document.querySelector('#back').click()")
    view(page, 'path', 16)
    assert page.run("document.querySelector('#view-title').textContent") == 'From label 3 to label 0'
    page.click('#back')
    for press in ('#pick', 'li:nth-child(2) .tile', 'li:nth-child(1) .tile'):
      page.click(press)
    view(page, 'path', 16)
    # A picture of the user's: its mask by mouse and by keys, then both edits.
    page.choose_file('#file', tmp_path / 'own.png')
    page.wait(f"!document.querySelector('#editor').hidden && {STATUS}.includes('32 x 32 pixels')")
    assert page.run("document.querySelector('#inpaint').disabled")
    page.run("document.querySelector('#own').value = '3'")
    page.drag('#mask', by=(30, 10))
    assert not page.run("document.querySelector('#inpaint').disabled")
    page.click('#clear')
    assert page.run("document.querySelector('#inpaint').disabled")
    page.run("document.querySelector('#mask').focus()")
    page.press('ArrowUp', 'ArrowLeft', ' ')
    said = page.run("document.querySelector('#mask-said').textContent")
    assert re.fullmatch(r'row \d+, column \d+; [1-9]\d* pixels marked', said)
    page.click('#inpaint')
    assert 'What is known is met to' in view(page, 'few', 1)
    painted = shown(page, 1)
    assert 0 < np.count_nonzero(painted != picture) < 20  # nothing but what was marked
    page.click('#reconstruct')
    page.wait("document.querySelector('#view-title').textContent === 'Reconstructed'")
    view(page, 'few', 1)
    page.click('button.tile')  # and it can be wandered from
    view(page, 'around', 9)
    # What is refused is said; the page goes on.
    (tmp_path / 'text.png').write_text('no picture')
    page.choose_file('#file', tmp_path / 'text.png')
    page.wait("document.querySelector('#status').textContent.includes('no picture')")
    page.complaints[:] = [each for each in page.complaints if '415' not in each]  # the browser's own note of it
    for width, dark in ((1280, False), (1280, True), (360, True), (320, False)):
      page.look_as(width, 800, dark, phone=width < 500)
      page.shoot(tmp_path / f'{width}_{dark}.png')
      assert page.run('document.documentElement.scrollWidth') <= width
      assert np.asarray(Image.open(tmp_path / f'{width}_{dark}.png').convert('L')).mean() > 128 or dark
    page.look_as(1280, 900)
    assert page.complaints == []
    assert all(url.startswith((served.url, 'data:')) for url in page.fetched)


SPY = """
  window.sent = [];
  const before = window.fetch;
  window.fetch = (path, how) => { window.sent.push([path, how?.body ?? '']); return before(path, how); };
"""


@needs_browser
def test_the_page_with_prompts(page, tmp_path):
  """What a picture of the user's shows is said beside it; all that is made of an edit is drawn with that prompt."""
  run = made_up_run(tmp_path / 'run', captioned.config_of_digits('ngrams'), 'distill')
  generator = pagoda_jax.load(run)
  Image.fromarray(generator(prompts='blue cat')[0, ..., 0]).save(tmp_path / 'own.png')
  page.complaints.clear()
  page.fetched.clear()
  with by_command(tmp_path / 'log', f'--workdir={run}', '--rate=100000') as served:
    page.open(served.url)
    view(page, 'many', 16)
    page.run(SPY)

    def sent():
      """The prompts of all requests since the last look, and what they were."""
      found = [(path, json.loads(body)) for path, body in page.run('window.sent.splice(0)')]
      return [(path, values.get('prompt'), 'label' in values or 'labels' in values) for path, values in found]

    assert page.run("document.querySelector('#view-title').textContent") == '16 pictures, seed 0'
    page.run("document.querySelector('#prompt').focus()")
    page.press(*'red', 'Enter', *'flag')  # lines are one
    page.run("document.querySelector('#count').value = 2")
    page.click('#draw .main')
    view(page, 'many', 2)
    assert sent() == [('draw', 'red flag', False)]
    assert page.run("document.querySelector('#view-title').textContent") == '2 pictures, “red flag”, seed 0'
    assert np.abs(shown(page, 1).astype(int) - generator(prompts='red flag', num_images=2)[1]).max() <= 1
    page.choose_file('#file', tmp_path / 'own.png')
    page.wait(f"!document.querySelector('#editor').hidden && {STATUS}.includes('8 x 8 pixels')")
    hidden = "['#own-field', '#own-prompt-field'].map(each => document.querySelector(each).hidden)"
    assert page.run(hidden) == [True, False]
    assert page.run("document.querySelector('#own-prompt').labels[0].textContent") == 'What the picture shows'
    page.run("document.querySelector('#mask').focus()")
    page.press(' ', 'Tab', 'Tab', 'Tab', 'Tab')
    assert focused(page) == 'own-prompt'
    page.press(*'blue cat', 'Tab', 'Enter')
    page.wait("document.querySelector('#view-title').textContent === 'Reconstructed'")
    assert 'What is known is met to' in view(page, 'few', 1)
    assert [each for each in sent() if each[0] != 'square'] == [('edit', 'blue cat', False)]
    assert page.run("document.querySelector('button.tile').textContent") == 'reconstructed, as “blue cat”'
    assert focused(page) == 'Reconstructed, “blue cat”, 2 of 2'
    made = page.run("document.querySelector('button.tile img').src")
    page.press('Enter')  # around it, the form saying something else all the while
    view(page, 'around', 9)
    assert page.run("document.querySelector('#view-title').textContent") == 'Around a picture of “blue cat”'
    assert focused(page) == 'here, “blue cat”, 5 of 9'
    page.press('i', 'Home', 'i')
    view(page, 'path', 16)
    assert sent() == [('draw', 'blue cat', False)] * 2
    assert page.run("document.querySelector('.tile img').src") == made  # the way begins at what the edit made
    page.click('#back')
    view(page, 'around', 9)
    page.click('#more')
    page.wait('window.sent.length === 1')
    view(page, 'around', 9)
    page.click('#back')
    view(page, 'few', 1)
    page.click('button.tile')
    view(page, 'around', 9)
    assert sent() == [('draw', 'blue cat', False)] * 2
    # Nothing said is the empty caption; what is refused is said.
    page.run("document.querySelector('#own-prompt').value = '  '")
    page.click('#inpaint')
    page.wait("document.querySelector('#view-title').textContent === 'Inpainted'")
    view(page, 'few', 1)
    assert page.run("document.querySelector('button.tile').textContent") == 'inpainted'
    page.click('button.tile')
    view(page, 'around', 9)
    assert sent() == [('edit', '', False), ('draw', '', False)]
    assert page.run("document.querySelector('#prompt').value") == 'red\nflag'
    page.run("document.querySelector('#own-prompt').value = 'x'.repeat(1001)")
    page.click('#reconstruct')
    page.wait(f"{STATUS}.includes('at most 1000 characters')")
    page.complaints[:] = [each for each in page.complaints if '422' not in each]  # the browser's own note of it
    page.run("document.querySelector('#own-prompt').value = 'w'.repeat(100)")
    page.click('#reconstruct')
    page.wait("document.querySelector('#view-title').textContent === 'Reconstructed'")
    view(page, 'few', 1)
    for width in (1280, 320):
      page.look_as(width, 800, phone=width < 500)
      button = page.run("(e => [e.scrollWidth, e.clientWidth])(document.querySelector('button.tile'))")
      assert page.run('document.documentElement.scrollWidth') <= width and button[0] <= button[1]
    page.look_as(1280, 900)
    assert page.complaints == []
    assert all(url.startswith((served.url, 'data:')) for url in page.fetched)


FAKE_RUNTIME = """
export const env = {wasm: {}};
export class Tensor { constructor(type, data, dims) { Object.assign(this, {type, data, dims}); } }
export const InferenceSession = {create: async content => ({
  inputNames: ['noise', 'label'],
  // Its images are as bright as their label, and hold their noise in the corner.
  run: async ({noise, label}) => {
    if (content.length !== 5 || noise.dims[1] !== 8 || label.type !== 'int32') throw new Error('wrong inputs');
    const data = new Float32Array(label.data.length * 256);
    label.data.forEach((one, index) => {
      data.fill(2 * one / 9 - 1, 256 * index, 256 * (index + 1));
      for (let k = 0; k < 64; k++) data[256 * index + 16 * (k >> 3) + k % 8] = noise.data[64 * index + k] / 160;
    });
    return {images: {data}};
  }})};
"""


@pytest.fixture
def folder_served(tmp_path):
  """folder_served(folder) -> URL of a plain web server of it."""
  servers = []

  class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *unused):
      pass

  def serve(folder):
    servers.append(ThreadingHTTPServer(('127.0.0.1', 0), lambda *given: Quiet(*given, directory=str(folder))))
    threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{servers[-1].server_port}/'

  yield serve
  for each in servers:
    each.shutdown()
    each.server_close()


def made_folder(run, tmp_path, runtime=FAKE_RUNTIME):
  """A folder of `pagoda serve --static`, whose model and runtime are stand-ins."""
  exported = tmp_path / 'exported'
  assert pagoda('export', f'--workdir={run}', f'--output={exported}') == 0
  return with_model(exported, tmp_path, runtime)


def with_model(exported, tmp_path, runtime):
  """The folder with a stand-in for its model, and a package of one for what runs it."""
  model = b'model'
  values = {'file': 'generator.onnx', 'sha256': onnx_loader.digest(model),
            'config_sha256': onnx_loader.digest((exported / 'config.json').read_bytes())}
  (exported / 'onnx.json').write_text(json.dumps(values | {'seal': onnx_loader.seal(values)}))
  (exported / 'generator.onnx').write_bytes(model)
  dist = tmp_path / 'package' / 'dist'
  dist.mkdir(parents=True)
  for name in static.RUNTIME:
    (dist / name).write_text(runtime)
  (tmp_path / 'package' / 'LICENSE').write_text('its licence')
  return exported, tmp_path / 'package'


def test_the_folder_of_the_page(run, tmp_path, capsys, monkeypatch):
  exported, package = made_folder(run, tmp_path)
  made = tmp_path / 'page'
  flags = f'--weights={exported}', f'--static={made}'
  assert pagoda('serve', *flags, f'--onnxruntime={package}') == 0
  assert 'python -m http.server' in capsys.readouterr().out
  assert sorted(path.name for path in made.rglob('*') if path.is_file()) == sorted([
    'index.html', 'report.css', 'page.css', 'page.js', 'tiles.js', 'noise.js', 'mask.js', 'backend.js',
    'model.json', 'generator.onnx', 'LICENSE', *static.RUNTIME])
  assert (made / 'generator.onnx').read_bytes() == b'model'
  assert json.loads((made / 'model.json').read_text())['edits'] == []
  assert static.NEEDS in (made / 'index.html').read_text()  # for those who open it as a file

  def refused(*flags):
    assert pagoda('serve', *flags) == 1
    return capsys.readouterr().err

  assert 'exists already' in refused(*flags, f'--onnxruntime={package}')
  flags = f'--weights={exported}', f'--static={tmp_path / "other"}'
  monkeypatch.chdir(tmp_path)
  missing = refused(*flags)
  assert 'npm pack onnxruntime-web' in missing and missing.count('\n') == 1
  assert 'no onnxruntime-web there' in refused(*flags, f'--onnxruntime={tmp_path}/page')
  (exported / 'generator.onnx').write_bytes(b'modem')
  assert 'onnx.json or its model is damaged' in refused(*flags, f'--onnxruntime={package}')
  # A conversion that fails says why; nothing is left.
  (tmp_path / 'bin').mkdir()
  monkeypatch.setattr(static, 'ROOT', tmp_path)
  (tmp_path / 'launch').mkdir()
  (tmp_path / 'launch' / 'onnx.sh').write_text('echo no such network; exit 3')
  flags = f'--workdir={run}', f'--static={tmp_path / "other"}', f'--onnxruntime={package}'
  assert 'no such network' in refused(*flags)
  (tmp_path / 'launch' / 'onnx.sh').unlink()
  monkeypatch.delenv('ONNX_VENV', raising=False)
  assert 'set ONNX_VENV' in refused(*flags)
  assert 'was not trained with captions; give labels' in refused(*flags, '--prompts=a red flag')
  assert '--prompts=a: is of --static' in refused(f'--workdir={run}', '--prompts=a')
  assert not [path for path in tmp_path.iterdir() if 'other' in path.name]


ONE_AT_A_TIME = """
export * from './own.js';
import {draw as own} from './own.js';
export const draw = async (values, signal) => {
  const count = values.noise?.length ?? values.count;
  if (count !== 1) throw new Error(`${count} images: at most 1 a request`);
  return own(values, signal);
};
"""


@needs_browser
def test_the_page_without_a_server(run, page, tmp_path, folder_served):
  exported, package = made_folder(run, tmp_path)
  assert pagoda('serve', f'--weights={exported}', f'--static={tmp_path / "page"}', f'--onnxruntime={package}') == 0
  page.complaints.clear()
  page.fetched.clear()
  url = folder_served(tmp_path / 'page')
  page.open(url)
  view(page, 'many', 16)
  noise = np.asarray(sampler.noise_of(0, np.arange(16), (8, 8, 1), 80.0))
  for place in (0, 3, 15):
    expected = np.full((16, 16, 1), round(255 * (place % 10) / 9), int)
    expected[:8, :8] = np.clip(np.round((noise[place] / 160 + 1) * 127.5), 0, 255)
    assert np.abs(shown(page, place) - expected).max() <= 1  # the seed's own noise, label by label
  through_it_by_keys(page)
  assert page.run("document.querySelector('#upload').hidden && !document.querySelector('#no-upload').hidden")
  assert page.complaints == [] and all(each.startswith((url, 'data:')) for each in page.fetched)
  # A way between two is shown where one image a request is the most that is drawn, too.
  one = shutil.copytree(tmp_path / 'page', tmp_path / 'one')  # of another address: browsers keep what they have read
  described = json.loads((one / 'model.json').read_text())
  described['limits']['images'] = 1
  (one / 'model.json').write_text(json.dumps(described))
  (one / 'backend.js').rename(one / 'own.js')
  (one / 'backend.js').write_text(ONE_AT_A_TIME)
  page.open(folder_served(one))
  view(page, 'many', 1)
  page.click('button.tile')
  assert '1 neighbour in' in view(page, 'around', 2) and focused(page) == 'here, label 0, 2 of 2'
  page.press('i', 'Home', 'i')
  assert '2 pictures in' in view(page, 'path', 2)
  assert page.complaints == []


OF_CAPTIONS = """
export const env = {wasm: {}};
export class Tensor { constructor(type, data, dims) { Object.assign(this, {type, data, dims}); } }
const size = shape => shape.reduce((a, b) => a * b);
export const InferenceSession = {create: async () => ({
  inputNames: ['noise', 'omega', 'text', 'text_mask', 'text_pooled'],
  // Its images hold, from above, a row of each: text, mask, pooled; then omega.
  run: async given => {
    const count = given.noise.dims[0], data = new Float32Array(count * 64).fill(-1);
    for (const [name, {type, data: values, dims}] of Object.entries(given)) {
      if (size(dims) !== values.length || dims[0] !== count) throw new Error(name);
      if (type !== (name === 'text_mask' ? 'bool' : 'float32')) throw new Error(`${name}: ${type}`);
    }
    for (let k = 0; k < count; k++) {
      [given.text, given.text_mask, given.text_pooled, given.omega].forEach(({data: values, dims}, row) => {
        const each = size(dims) / count;
        for (let j = 0; j < Math.min(8, each); j++) data[64 * k + 8 * row + j] = values[k * each + j] / 4;
      });
    }
    return {images: {data}};
  }})};
"""


@needs_browser
def test_the_page_of_prompts_without_a_server(page, tmp_path, folder_served, capsys):
  """Embeddings of the prompts that were asked for are in the folder; the page offers these."""
  run = made_up_run(tmp_path / 'run', captioned.config_of_digits('ngrams'), 'distill')
  exported = tmp_path / 'exported'
  exported.mkdir()
  (exported / 'config.json').write_text('{}')
  _, package = with_model(exported, tmp_path, OF_CAPTIONS)
  generator, prompts = pagoda_jax.load(run), ('a red flag', '“blue” <b>cat</b>', 'bird')
  runtime = static.runtime_folder(package)
  assert pagoda('serve', f'--workdir={run}', f'--static={tmp_path / "page"}', f'--onnxruntime={package}') == 1
  assert "a browser has no encoder of them: give --prompts='a red flag;" in capsys.readouterr().err
  static.write(generator, exported, tmp_path / 'page', runtime, prompts)
  page.complaints.clear()
  page.fetched.clear()
  url = folder_served(tmp_path / 'page')
  page.open(url)
  view(page, 'many', 16)
  expected = generator.texts(prompts, 3)['text']

  def drawn_of(row):
    values = np.full((8, 8), -1, np.float32)
    for place, array in enumerate((*(expected[name][row].reshape(-1)[:8] for name in guidance.TEXT), np.ones(1))):
      values[place, : array.size] = np.float32(array) / 4
    return np.clip(np.round((values + 1) * 127.5), 0, 255)[..., None]

  hidden = "['#prompt-field', '#prompts-field'].map(each => document.querySelector(each).hidden)"
  assert page.run(hidden) == [True, False]
  assert page.run("[...document.querySelector('#prompts').options].map(each => each.text)") == list(prompts)
  assert np.abs(shown(page, 15) - drawn_of(0)).max() <= 1
  page.run("document.querySelector('#prompts').focus()")
  page.press('ArrowDown')
  page.click('#draw .main')
  page.wait("document.querySelector('#view-title').textContent.includes('blue')")
  view(page, 'many', 16)
  assert np.abs(shown(page, 2) - drawn_of(1)).max() <= 1
  page.run("document.querySelector('#prompts').value = 'bird'")
  page.click('li:nth-child(3) .tile')  # what was drawn goes on with its own
  view(page, 'around', 9)
  assert np.abs(shown(page, 0) - drawn_of(1)).max() <= 1
  assert page.complaints == [] and all(each.startswith((url, 'data:')) for each in page.fetched)
  embeddings = tmp_path / 'page' / 'prompts.bin'
  embeddings.write_bytes(embeddings.read_bytes()[:-1])
  os.utime(embeddings, (2e9, 2e9))  # servers tell changes by seconds
  page.open(url)
  page.wait(f"{STATUS}.startsWith('prompts.bin: ')")


@needs_browser
@pytest.mark.skipif('ONNX_VENV' not in static.os.environ or 'ONNXRUNTIME_WEB' not in static.os.environ,
                    reason='needs $ONNX_VENV, of launch/onnx.sh, and $ONNXRUNTIME_WEB, an npm package')
def test_the_model_itself_in_a_browser(run, page, tmp_path, folder_served):
  package = static.os.environ['ONNXRUNTIME_WEB']
  assert pagoda('serve', f'--workdir={run}', f'--static={tmp_path / "page"}', f'--onnxruntime={package}') == 0
  page.complaints.clear()
  page.open(folder_served(tmp_path / 'page'))
  view(page, 'many', 16)
  expected = pagoda_jax.load(run)(num_images=16)
  found = np.stack([shown(page, place) for place in range(16)])
  assert np.abs(found.astype(int) - expected).max() <= 1 and page.complaints == []
  through_it_by_keys(page)


@pytest.mark.skipif(shutil.which('node') is None, reason='no Node here')
def test_noise_and_great_circles_are_those_of_python(tmp_path):
  shutil.copyfile(page_files.FOLDER / 'noise.js', tmp_path / 'noise.mjs')
  (tmp_path / 'ask.mjs').write_text("""
    import {noise, slerp} from './noise.mjs';
    const ends = [noise(5, 0, 48, 80), noise(5, 1, 48, 80)];
    console.log(JSON.stringify({
      far: [...noise(4294967295, 70000, 3000, 80)], near: [...noise(0, 0, 64, 1)],
      ways: [0, 0.25, 1].map(t => [...slerp(...ends, t)]), same: [...slerp(ends[0], ends[0], 0.3)]}));
  """)
  said = subprocess.run(['node', tmp_path / 'ask.mjs'], capture_output=True, text=True, check=True).stdout
  found = json.loads(said)
  far = np.asarray(sampler.noise_of(2**32 - 1, np.array([70000]), (3000,), 80.0))[0]
  np.testing.assert_allclose(found['far'], far, rtol=1e-5, atol=1e-4)
  near = np.asarray(sampler.noise_of(0, np.array([0]), (8, 8, 1), 1.0)).reshape(-1)
  np.testing.assert_allclose(found['near'], near, rtol=1e-5, atol=1e-6)
  first, second = np.asarray(sampler.noise_of(5, np.arange(2), (48,), 80.0))
  for t, way in zip((0, 0.25, 1), found['ways']):
    np.testing.assert_allclose(way, sample.slerp(first[None], second[None], t)[0], rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(found['same'], first, rtol=1e-4)
