"""`pagoda serve` as a process on loopback: its pictures, crowds, odd pictures, edits; how it begins and ends."""

import concurrent.futures
import io
import json
import signal
import sys
import threading
import time
import zlib

import captioned
import numpy as np
import pytest
import tiny
from PIL import Image
from runs import pagoda
from serving import alive, by_command, text, wait_until
from test_edit import encoded, odd_pictures
from test_generator import made_up_run
from test_to_published import trained_phase

import pagoda_jax
from pagoda_jax.runtime import sharding
from pagoda_jax.use import picture_files
from pagoda_jax.use.generator import Generator
from pagoda_jax.use.serve import calls, limits


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A work directory with a grown generator of made-up numbers."""
  return trained_phase(tmp_path_factory.mktemp('run') / 'run', 'guided', 'grow_16')[0].parent


@pytest.fixture(scope='module')
def generator(run):
  return pagoda_jax.load(run, mesh=sharding.make_mesh(devices=sharding.make_mesh().devices.flat[:1].tolist()))


@pytest.fixture(scope='module')
def served(run, tmp_path_factory):
  log = tmp_path_factory.mktemp('log') / 'served.log'
  with by_command(log, f'--workdir={run}', '--rate=1000000', '--max_queue=64') as found:
    yield found


def pixels(png: str) -> np.ndarray:
  image = np.asarray(Image.open(io.BytesIO(calls.base64.b64decode(png))))
  return image if image.ndim == 3 else image[..., None]


def images_of(answer) -> np.ndarray:
  return np.stack([pixels(image['png']) for image in answer['images']])


def close(found, expected) -> bool:
  """But for rounding: the server's program is another compilation."""
  return found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 1


def test_the_page_and_what_it_is_told(served, run):
  status, page, headers = served.get('/')
  assert status == 200 and b'<form' in page and headers['content-type'].startswith('text/html')
  for path in ('/report.css', '/page.css', '/page.js', '/tiles.js', '/mask.js', '/noise.js',
               '/backend.js'):
    assert served.get(path)[0] == 200 and b'://' not in served.get(path)[1].replace(b'http://www.w3.org', b'')
  assert "default-src 'none'" in headers['content-security-policy'] and headers['x-content-type-options'] == 'nosniff'
  told = json.loads(served.get('/model.json')[1])
  assert (told['name'], told['resolution'], told['num_classes'], told['omega'], told['text']) == (
    'grow_16', 16, 10, None, False)
  assert told['noise_shape'] == [8, 8, 1] and told['edits'] == ['reconstruct', 'inpaint']
  assert str(run.parent) not in json.dumps(told)  # no folder of this machine


def test_pictures_are_those_of_the_seed_and_noise_is_taken_back(served, generator):
  status, answer, _ = served.post('/draw', {'seed': 7, 'labels': [3, 5], 'count': 5})
  expected = generator([3, 5], seed=7, num_images=5)
  assert status == 200 and close(images_of(answer), expected) and expected.std() > 2
  assert [image['label'] for image in answer['images']] == [3, 5, 3, 5, 3]
  assert answer['milliseconds']['device'] > 0
  noise = np.stack([np.frombuffer(calls.base64.b64decode(image['noise']), '<f4') for image in answer['images']])
  np.testing.assert_allclose(noise.reshape(5, 8, 8, 1), generator.noise(7, 5), rtol=1e-6)
  again = served.post('/draw', {'noise': text(noise.tobytes()), 'labels': [3, 5, 3, 5, 3]})[1]
  assert [image['png'] for image in again['images']] == [image['png'] for image in answer['images']]
  for values in ({'seed': 1, 'count': 64}, {'seed': 2, 'labels': 'random', 'count': 3}, {}):
    answer = served.post('/draw', values)[1]
    expected = generator(values.get('labels'), seed=values.get('seed', 0), num_images=values.get('count'))
    assert close(images_of(answer), expected)


def test_200_at_once_are_answered_and_nothing_is_lost(served, generator):
  wanted = [{'seed': index % 10, 'labels': [index % 7]} for index in range(200)]
  expected = {(values['seed'], values['labels'][0]): None for values in wanted}
  expected = {key: generator(key[1], seed=key[0]) for key in expected}
  together, refused = threading.Barrier(200), []

  def one(values):
    together.wait(120)
    while True:
      status, answer, headers = served.post('/draw', values)
      if status == 200:
        return images_of(answer)
      assert status == 503 and int(headers['retry-after']) >= 1 and 'requests wait already' in answer['error']
      refused.append(status)
      time.sleep(0.05)

  with concurrent.futures.ThreadPoolExecutor(200) as pool:
    found = list(pool.map(one, wanted))
  assert all(close(image, expected[values['seed'], values['labels'][0]]) for image, values in zip(found, wanted))


HOSTILE = [
  (b'', 400), (b'{"seed":', 400), (b'[1]', 400), (b'\xff\xfe', 400), (b'[' * 100_000, 400), (b'{"seed": NaN}', 400),
  (b'{"seed": ' + b'9' * 10_000 + b'}', 400),
  (b'{"labels": [' + b'[],' * 2**22 + b'[]]}', 413), ({'seed': -1}, 422), ({'seed': 2**32}, 422), ({'seed': True}, 422),
  ({'seed': '0'}, 422), ({'seed': 1.5}, 422), ({'count': 0}, 422), ({'count': -5}, 422), ({'count': True}, 422),
  ({'count': 65}, 413), ({'count': 10**12}, 413), ({'labels': [1] * 65}, 413), ({'labels': '1,' * 64 + '1'}, 413),
  ({'labels': [10]}, 422), ({'labels': [-1]}, 422), ({'labels': []}, 422), ({'labels': ['a']}, 422),
  ({'labels': [[1]]}, 422), ({'labels': 'three'}, 422), ({'labels': '1' * 5000}, 422), ({'labels': {'a': 1}}, 422),
  ({'labels': 10**30}, 422), ({'omega': 2}, 422), ({'omega': 'x'}, 422), ({'omega': 10**400}, 422),
  (b'{"omega": 1e400}', 422), ({'prompt': 'a dog'}, 422),
  ({'sedd': 1}, 422), ({'noise': 'AAAA'}, 422), ({'noise': '???'}, 422), ({'noise': 7}, 422), ({'noise': ''}, 422),
  ({'noise': text(np.full(64, np.nan, '<f4').tobytes())}, 422),
  ({'noise': text(np.full(64, 1e30, '<f4').tobytes())}, 422),
  ({'noise': text(np.zeros(64, '<f4').tobytes()), 'count': 2}, 422),
  ({'noise': text(np.zeros(65 * 64, '<f4').tobytes())}, 413),
]  # fmt: skip


@pytest.mark.parametrize('label', [0, 3, 'three'])
def test_a_label_for_an_edit_of_a_network_without_classes_is_refused_as_such(label):
  config = tiny.get_config()
  config.data.num_classes = 0
  what = calls.Calls(Generator(config, 'grow_16', '', {}, dict), limits.Limits())
  with pytest.raises(limits.Refusal, match=f'label = "?{label}"?: grow_16 knows no classes'):
    what.edit(json.dumps({'edit': 'reconstruct', 'label': label, 'picture': ''}).encode())


def test_what_cannot_be_drawn_is_refused(served):
  for values, expected in HOSTILE:
    status, answer, _ = served.post('/draw', values)
    assert status == expected, (str(values)[:80], status, answer)
    assert answer['error'] and len(answer['error']) < 300
  assert alive(served) and 'Traceback' not in served.log.read_text()


@pytest.mark.parametrize('name', odd_pictures())
def test_any_picture_comes_in(served, name):
  content = odd_pictures()[name]
  status, answer, _ = served.post('/square', {'picture': text(content)})
  expected = picture_files.square(picture_files.of_bytes(content, name), 16, 1)
  assert status == 200, answer
  np.testing.assert_array_equal(pixels(answer['png']), expected)
  assert (answer['width'], answer['height']) == ((1, 1) if name == 'one pixel' else (20, 24))


def claiming(width, height) -> bytes:
  """A PNG whose head says another size."""
  found = bytearray(encoded(Image.new('1', (8, 8)), 'PNG'))
  found[16:24] = width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
  found[29:33] = zlib.crc32(found[12:29]).to_bytes(4, 'big')
  return bytes(found)


def test_what_is_no_picture_is_refused_and_memory_stays_bounded(served):
  whole = odd_pictures()['grey']
  large = encoded(Image.new('1', (10_000, 10_000)), 'PNG')
  thin = encoded(Image.new('1', (300_000, 1)), 'PNG')
  assert len(large) < 2**20
  before = served.resident
  for content, expected, said in (
      (large, 413, '10000 x 10000 pixels; at most'), (claiming(10_000, 10_000), 413, '10000 x 10000'),
      (claiming(2**31 - 1, 2**31 - 1), 413, 'pixels'), (thin, 422, 'scaled to a short side'),
      (b'no picture', 415, 'no picture'), (b'', 415, 'no picture'), (b'%!PS-Adobe-3.0 EPSF-3.0\n' * 9, 415, 'PNG'),
      (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, 'no picture'), (whole[: len(whole) // 2], 422, 'no picture'),
      (whole[:30], 415, 'no picture'), (whole[:40] + bytes(100) + whole[40:], 415, 'no picture')):
    for _ in range(3):
      status, answer, _ = served.post('/square', {'picture': text(content)})
      assert (status, said in answer['error']) == (expected, True), (content[:40], status, answer)
  for values in ({}, {'picture': 5}, {'picture': '*'}, {'picture': text(whole), 'more': 1}):
    assert served.post('/square', values)[0] == 422
  assert served.resident - before < 2**29
  assert alive(served) and 'Traceback' not in served.log.read_text()


def test_edits(served, generator):
  picture = generator(3, seed=9)[0]
  own = text(encoded(Image.fromarray(picture[..., 0]), 'PNG'))
  quick = {'picture': own, 'label': 3, 'steps': 25}
  status, answer, _ = served.post('/edit', quick | {'edit': 'reconstruct'})
  assert status == 200 and answer['steps'] == 25 and answer['images'][0]['label'] == 3 and answer['misfit'] > 0
  (image,) = answer['images']
  again = served.post('/draw', {'noise': image['noise'], 'labels': [3]})[1]
  assert again['images'][0]['png'] == image['png']  # to wander from
  hole = np.zeros((16, 16), np.uint8)
  hole[4:9, 3:12] = 255
  mask = {'edit': 'inpaint', 'mask': text(encoded(Image.fromarray(hole), 'PNG'))}
  status, answer, _ = served.post('/edit', quick | mask)
  painted = images_of(answer)[0]
  assert status == 200 and np.array_equal(painted[hole == 0], picture[hole == 0]) and np.any(painted != picture)
  other = text(encoded(Image.new('L', (8, 8), 255), 'PNG'))
  for values, said in (
      (mask | {'mask': other}, 'mask of 8 x 8 pixels, picture of 16 x 16'),
      (mask | {'mask': text(encoded(Image.fromarray(0 * hole), 'PNG'))}, 'marks nothing'),
      (mask | {'mask': text(encoded(Image.fromarray(hole | 255), 'PNG'))}, 'marks everything'),
      ({'edit': 'inpaint'}, 'mask: must be bytes in base64'), ({'edit': 'colorize'}, 'must be reconstruct or inpaint'),
      ({'edit': 'reconstruct', 'mask': other}, 'no such field'), ({'edit': 'reconstruct', 'label': 10}, 'label = 10'),
      ({'edit': 'reconstruct', 'steps': 10**6}, 'steps = 1000000: must be a whole number in 25 to 400'),
      ({'edit': 'reconstruct', 'tries': 0}, 'tries = 0'), ({'edit': ['inpaint']}, 'must be reconstruct')):
    status, answer, _ = served.post('/edit', quick | values)
    assert status == 422 and said in answer['error'], answer
  assert alive(served)


def test_too_many_of_one_client_and_signals_that_end_it(run, tmp_path):
  log = tmp_path / 'log'
  with by_command(log, f'--workdir={run}', '--rate=60', '--max_images=8') as found:
    found_all = [found.post('/draw', {}) for _ in range(40)]
    refused = [headers for status, _, headers in found_all if status == 429]
    assert refused and all(int(headers['retry-after']) >= 1 for headers in refused)
    assert {status for status, _, _ in found_all} == {200, 429}
    wait_until(lambda: found.post('/draw', {'count': 9})[0] == 413)
    assert found.get('/')[0] == 200  # looking costs nothing
    with found.connect():  # somebody who only listens does not hold it up
      found.process.send_signal(signal.SIGINT)
      assert found.process.wait(120) == 0
    assert 'ended: ' in found.process.stdout.read() and 'Traceback' not in log.read_text()


def test_sigterm_while_it_works(run, tmp_path):
  own = text(encoded(Image.new('L', (16, 16), 200), 'PNG'))
  with by_command(tmp_path / 'log', f'--workdir={run}') as found, concurrent.futures.ThreadPoolExecutor(4) as pool:
    long = {'edit': 'reconstruct', 'picture': own, 'label': 3, 'steps': 400, 'tries': 4}
    asked = [pool.submit(found.post, '/edit', long) for _ in range(3)]
    time.sleep(0.5)
    found.process.send_signal(signal.SIGTERM)
    answers = [each.result(300) for each in asked]
    assert found.process.wait(300) == 0
    assert {status for status, _, _ in answers} <= {200, 503}, answers
  assert 'Traceback' not in (tmp_path / 'log').read_text()


def test_command_lines_that_cannot_be(served, run, tmp_path, capsys, monkeypatch):
  here = f'--workdir={run}'

  def refused(*flags):
    assert pagoda('serve', *flags) in (1, 2)
    said = capsys.readouterr().err
    assert 'Traceback' not in said
    return said

  taken = refused(here, f'--port={served.port}')
  assert f'127.0.0.1:{served.port}: Address already in use; choose another --port' in taken and taken.count('\n') == 1
  assert 'give an address of this machine as --host' in refused(here, '--host=203.0.113.7')
  assert '--host' in refused(here, '--host=no-such-name.invalid')
  assert 'give --workdir=RUN or --weights=FOLDER' in refused()
  assert 'no phase of any experiment there' in refused(f'--workdir={tmp_path}', '--port=0')
  for flag in ('--port=65536', '--max_images=0', '--max_queue=0', '--rate=0', '--rate=nan'):
    assert flag.split('=')[0][2:] in refused(here, flag)
  assert '--onnxruntime' in refused(here, f'--onnxruntime={tmp_path}')
  assert '--port=8001: is of a server' in refused(here, f'--static={tmp_path / "new"}', '--port=8001')
  monkeypatch.setitem(sys.modules, 'uvicorn', None)
  monkeypatch.delitem(sys.modules, 'pagoda_jax.use.serve.server')
  monkeypatch.delattr('pagoda_jax.use.serve.server')
  monkeypatch.delitem(sys.modules, 'pagoda_jax.use.serve.connections')
  monkeypatch.delattr('pagoda_jax.use.serve.connections')
  assert "pip install 'pagoda_jax[serve]'" in refused(here)


def test_guided_generators_and_teachers(tmp_path):
  loaded = pagoda_jax.load(made_up_run(tmp_path / 'g', tiny.get_config('guided'), 'distill'))
  guided = calls.Calls(loaded, limits.Limits())
  assert calls.describe(guided.generator, limits.Limits())['omega'] == {'low': 1.0, 'high': 4.0, 'default': 1.0}
  for omega in (0.5, 4.5, '2', True, 1e400):
    with pytest.raises(limits.Refusal):
      guided.draw(json.dumps({'omega': omega}).encode())
  assert callable(guided.draw(b'{"omega": 2.5}')) and callable(guided.draw(b'{"omega": null, "labels": 3}'))
  teacher = pagoda_jax.load(made_up_run(tmp_path / 't', tiny.get_config(), 'teacher'))
  assert calls.describe(teacher, limits.Limits())['edits'] == []
  with pytest.raises(limits.Refusal, match='a teacher draws here'):
    calls.Calls(teacher, limits.Limits()).edit(b'{"edit": "inpaint"}')
  assert limits.Limits().images_of(512) == 16 and limits.Limits().images_of(8192) == 1


def test_all_that_a_teacher_draws_is_compiled_before_it_begins(tmp_path):
  mesh = sharding.make_mesh(devices=sharding.make_mesh().devices.flat[:1].tolist())
  teacher = pagoda_jax.load(made_up_run(tmp_path / 'run', tiny.get_config('guided'), 'teacher'), mesh=mesh)
  what = calls.Calls(teacher, limits.Limits())
  what.warm_up()
  compiled = lambda: [each._draw._cache_size() for each in teacher._programs.values()]
  before = compiled()
  for values in ({}, {'omega': 2}, {'count': 5}, {'count': 5, 'omega': 3.5}):
    what.draw(json.dumps(values).encode())(None)
  assert len(before) == len(calls.SIZES) and compiled() == before


@pytest.fixture(scope='module')
def of_captions(tmp_path_factory):
  """A work directory with a generator of captions, whose encoder every process has."""
  return made_up_run(tmp_path_factory.mktemp('captions') / 'run', captioned.config_of_digits('ngrams'), 'distill')


def test_edits_of_networks_of_captions_take_a_prompt(of_captions, tmp_path):
  generator = pagoda_jax.load(of_captions)
  with by_command(tmp_path / 'log', f'--workdir={of_captions}', '--rate=100000') as found:
    told = json.loads(found.get('/model.json')[1])
    assert told['text'] and told['edits'] == ['reconstruct', 'inpaint'] and not told['tries_labels']
    drawn = {prompt: found.post('/draw', {'prompt': prompt, 'omega': 3})[1]['images'][0]
             for prompt in ('red flag', 'blue cat', '')}
    for prompt, image in drawn.items():
      assert close(pixels(image['png'])[None], generator(prompts=prompt, guidance=3))
    assert len({image['png'] for image in drawn.values()}) == 3
    # The search begins at the noise that made the picture, which under its own prompt explains it.
    edited = lambda image, more: found.post('/edit', {'edit': 'reconstruct', 'picture': image['png'], 'omega': 3,
                                                      'steps': 25} | more)[1]
    by_own, by_other = (edited(drawn['red flag'], {'prompt': prompt}) for prompt in ('red flag', 'blue cat'))
    assert by_own['misfit'] < by_other['misfit']
    # What comes of it is drawn again, to wander from, with its prompt.
    (image,) = by_own['images']
    again = {'noise': image['noise'], 'omega': 3}
    assert image['label'] == -1
    assert found.post('/draw', again | {'prompt': 'red flag'})[1]['images'][0]['png'] == image['png']
    assert found.post('/draw', again)[1]['images'][0]['png'] != image['png']
    # Nothing said is the empty caption.
    nothing = [edited(drawn[''], more) for more in ({}, {'prompt': ''}, {'prompt': None}, {'prompt': 'blue cat'})]
    assert nothing[0]['misfit'] == nothing[1]['misfit'] == nothing[2]['misfit'] < nothing[3]['misfit']
    own = pixels(drawn['red flag']['png'])[..., 0]
    hole = np.uint8(255 * (np.indices(own.shape)[0] < 3))
    asked = {'edit': 'inpaint', 'picture': drawn['red flag']['png'], 'steps': 25,
             'mask': text(encoded(Image.fromarray(hole), 'PNG'))}
    painted = [pixels(found.post('/edit', asked | {'prompt': prompt})[1]['images'][0]['png'])[..., 0]
               for prompt in ('red flag', 'blue cat')]
    assert all(np.array_equal(each[3:], own[3:]) for each in painted) and np.any(painted[0] != painted[1])
    status, answer, _ = found.post('/edit', asked | {'prompt': 'red\nflag'})
    assert status == 422 and answer['error'].startswith('prompt = "red\\nflag": must be one line of text; U+000A')
    assert found.post('/edit', b'{"edit": "reconstruct", "prompt": "\xff"}')[0] == 400
    assert found.post('/draw', {'prompt': 'red flag'})[0] == 200 and 'Traceback' not in found.log.read_text()


WORDLESS = [
  (3, 'must be a text of at most 1000 characters'), (True, 'must be a text'), (['red flag'], 'must be a text'),
  ({'text': 'red flag'}, 'must be a text'), ('a' * 1001, 'must be a text of at most 1000 characters'),
  ('red\x00flag', 'must be one line of text; U+0000 is a control'), ('red flag\n', 'U+000A'), ('\x1b[2J', 'U+001B'),
  ('\x7f', 'U+007F'), ('\x85', 'U+0085'), ('\ud83d', 'U+D83D'),
]  # fmt: skip


def test_what_is_no_prompt_and_labels_in_its_place_are_refused(of_captions, generator):
  drawing = calls.Calls(pagoda_jax.load(of_captions), limits.Limits())
  picture = text(odd_pictures()['grey'])

  def refused(what, path, values) -> str:
    with pytest.raises(limits.Refusal) as refusal:
      getattr(what, path)(json.dumps(values).encode())
    assert refusal.value.status == 422 and len(str(refusal.value)) < 200 and str(refusal.value).isprintable()
    return str(refusal.value)

  ways = (('draw', {}, 'labels'), ('edit', {'edit': 'reconstruct', 'picture': picture}, 'label'))
  for path, rest, key in ways:
    for prompt, said in WORDLESS:
      found = refused(drawing, path, rest | {'prompt': prompt})
      assert found.startswith('prompt = ') and said in found
    for label in (3, 0, 'cycle', [1]):
      found = refused(drawing, path, rest | {key: label, 'prompt': 'red flag'})
      assert found.startswith(f'{key} = ') and 'distill draws what captions say; give a prompt' in found
    labelled = calls.Calls(generator, limits.Limits())
    assert refused(labelled, path, rest | {'prompt': ''}) == (
      f'prompt = "": grow_16 was not trained with captions; give {key}')
    # Emoji of several characters are text, and so is as much as may be.
    for prompt in ('\U0001f469\u200d\U0001f692', 'a' * 1000, '', None):
      assert callable(getattr(drawing, path)(json.dumps(rest | {'prompt': prompt}).encode()))
