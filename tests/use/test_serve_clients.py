"""`pagoda serve` and clients that lie, drip, break off or come from elsewhere; its queue, its limits."""

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import select
import socket
import struct
import threading
import warnings

import pytest
from PIL import Image
from serving import alive, by_command, head, received, strictly, text, wait_until
from test_edit import encoded
from test_to_published import trained_phase

from pagoda_jax.use.serve import limits, server
from pagoda_jax.use.serve.device import Device, Stopped


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A work directory with a grown generator of made-up numbers."""
  return trained_phase(tmp_path_factory.mktemp('run') / 'run', 'guided', 'grow_16')[0].parent


@pytest.fixture(scope='module')
def served(run, tmp_path_factory):
  log = tmp_path_factory.mktemp('log') / 'served.log'
  with by_command(log, f'--workdir={run}', '--rate=1000000', '--max_queue=64') as found:
    yield found


@pytest.fixture(scope='module')
def strict(run, tmp_path_factory):
  """A server that has little patience."""
  small = {'head_seconds': 2, 'body_seconds': 2, 'answer_seconds': 3, 'queue': 2, 'rate': 1e6, 'connections': 24}
  with strictly(tmp_path_factory.mktemp('log') / 'strict.log', run, **small) as found:
    yield found


def test_pages_of_other_sites_and_other_names_are_refused(served):
  here = f'http://127.0.0.1:{served.port}'
  for headers, expected in (
      ({'Origin': here}, 200), ({'Sec-Fetch-Site': 'same-origin', 'Origin': here}, 200),
      ({'Sec-Fetch-Site': 'none'}, 200), ({'Host': f'localhost:{served.port}'}, 200),
      ({'Host': '[::1]:99'}, 200), ({'Host': '10.0.0.7'}, 200),
      ({'Origin': 'http://evil.example'}, 403), ({'Origin': 'null'}, 403), ({'Origin': f'{here}.evil.example'}, 403),
      ({'Origin': here.replace('127.0.0.1', 'localhost')}, 403), ({'Origin': 'http://[', 'Host': '['}, 403),
      ({'Origin': 'http://127.0.0.1:1'}, 403), ({'Sec-Fetch-Site': 'cross-site'}, 403),
      ({'Sec-Fetch-Site': 'same-site'}, 403), ({'Host': 'evil.example'}, 403), ({'Host': ''}, 403),
      ({'Host': '127.0.0.1.evil.example'}, 403), ({'Host': 'localhost@evil.example'}, 403),
      ({'Host': '127.0.0.1:x'}, 403),
      ({'Content-Type': 'text/plain'}, 415), ({'Content-Type': 'application/x-www-form-urlencoded'}, 415),
      ({'Content-Type': 'multipart/form-data; boundary=x'}, 415), ({'Content-Type': ''}, 415)):  # fmt: skip
    assert served.post('/draw', {}, headers)[0] == expected, headers
  # Nor may a name that was made to lead here read anything.
  assert served.get('/model.json', Host='evil.example')[0] == 403
  assert b'403' in served.raw(b'GET / HTTP/1.0\r\n\r\n')[:20]
  status, _, headers = served.ask('OPTIONS', '/draw', headers={
    'Origin': 'http://evil.example', 'Access-Control-Request-Method': 'POST'})
  assert status in (403, 405) and not [name for name in headers if name.lower().startswith('access-control')]


def test_names():
  for host in ('localhost', 'LOCALHOST:8000', '127.0.0.1:8000', '[::1]:8000', 'digits.example.org:443'):
    limits.check_host(host, ('digits.example.org',))
  for host in (None, '', 'digits.example.org.evil.example', 'example.org', '[::1', ':8000', 'a b', '0x7f.1'):
    with pytest.raises(limits.Refusal):
      limits.check_host(host, ('digits.example.org',))
def test_no_path_leads_to_a_file(served):
  for target in ('/../../../etc/passwd', '/%2e%2e/%2e%2e/etc/passwd', '//etc/passwd', '/page.css/../../../etc/passwd',
                 '/..%2f..%2fetc%2fpasswd', '/page.js%00.png', '/page.js/', '/PAGE.JS', '/server.py', '/page/page.html',
                 '/.git/config', '/' + 'a' * 10_000, '/%ff%fe', '/?/../x/..', 'http://evil.example/', '*',
                 'file:///etc/passwd', '/model.json/..', '/\\..\\..\\etc\\passwd'):
    found = served.raw(f'GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n'.encode())
    assert b'root:' not in found, target
    assert found[9:12] in ((b'404', b'400', b'405') if target != '/?/../x/..' else (b'200',)), (target, found[:100])
  assert served.ask('POST', '/')[0] == 405 and served.ask('DELETE', '/draw')[0] == 405
  assert served.ask('GET', '/draw')[0] == 405 and served.ask('HEAD', '/')[0] == 200


def test_bodies_that_lie_about_their_length(served):
  body, limit = b'{"seed": 3, "labels": [4]}', limits.Limits().body
  status = lambda found: [part[:3] for part in found.split(b'HTTP/1.1 ')[1:]]
  # Too large by what it says: refused with nothing of the body read, nor asked for.
  assert status(served.raw(head(Content_Length=10**10))) == [b'413']
  assert status(served.raw(head(Content_Length=limit + 1, Expect='100-continue'))) == [b'413']
  assert status(served.raw(head(Content_Length=10**19))) in ([b'413'], [b'400'])
  # By what comes, in chunks, with no end.
  chunk = b'%x\r\n' % 2**20 + bytes(2**20) + b'\r\n'
  assert status(served.raw(head(Transfer_Encoding='chunked') + (limit // 2**20 + 3) * chunk)) == [b'413']
  # Less than it says: nobody is there any more when the end is missed.
  assert served.raw(head(Content_Length=1000) + body, half_close=True) in (b'',)
  # More than it says: the rest is no request.
  assert status(served.raw(head(Content_Length=len(body) - 4) + body + b'\r\n\r\n')) == [b'400', b'400']
  assert status(served.raw(head(Content_Length=len(body)) + body + b'rubbish\r\n\r\n')) == [b'200', b'400']
  for lies in ({'Content_Length': -5}, {'Content_Length': 'ten'}, {'Content_Length': '5, 6'}, {'Content_Length': '1e3'},
               {'Transfer_Encoding': 'gzip'}):
    assert status(served.raw(head(**lies) + body)) in ([b'400'], [b'501'])
  assert status(served.raw(head(Transfer_Encoding='chunked') + b'zz\r\nabc\r\n')) == [b'400'] or alive(served)
  both = served.raw(head(Content_Length=4, Transfer_Encoding='chunked', Connection='close')
                    + b'%x\r\n' % len(body) + body + b'\r\n0\r\n\r\n')
  assert status(both) in ([b'200'], [b'400'])
  assert status(served.raw(head(Content_Length=None, Connection='close'))) == [b'400']  # no body: no JSON
  for rubbish in (b'\0' * 100, b'\x16\x03\x01\x02\x00\x01\x00' + bytes(200), b'GET\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n',
                  b'GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n', b'GET / HTTP/1.1\r\nx: ' + b'y' * 2**17):
    assert b'200 OK' not in served.raw(rubbish)
  assert alive(served) and 'Traceback' not in served.log.read_text()


def test_slow_clients_are_let_go_and_others_are_served(strict):
  """Each wait ends when the server ends the connection; a server without patience would have them hang."""
  def dripping(first, drop):
    with strict.connect() as connection:
      connection.sendall(first)
      with contextlib.suppress(ConnectionError):
        while not select.select([connection], [], [], 0.2)[0]:
          connection.sendall(drop)
      return received(connection)

  def not_reading():
    with strict.connect() as connection:
      ask = b'GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n'
      with contextlib.suppress(ConnectionError):
        for _ in range(3000):  # 53 MB of answers: more than both systems hold for a client that does not read
          connection.sendall(ask)
      ended = select.poll()
      ended.register(connection, select.POLLHUP)
      return bool(ended.poll(120_000))

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    heads = [pool.submit(dripping, b'GET / HT', b'x') for _ in range(3)]
    heads += [pool.submit(dripping, b'GET / HTTP/1.1\r\n', b'a: b\r\n') for _ in range(3)]
    heads += [pool.submit(dripping, b'', b'') for _ in range(2)]
    bodies = [pool.submit(dripping, head(Content_Length=1000), b' ') for _ in range(3)]
    bodies += [pool.submit(dripping, head(Transfer_Encoding='chunked'), b'1\r\n \r\n')]
    endless = pool.submit(dripping, b'GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n', b'1\r\n \r\n')
    unread = pool.submit(not_reading)
    assert alive(strict)  # meanwhile
    assert [each.result(200) for each in heads] == 8 * [b'']
    assert all(b' 408 ' in each.result(200)[:20] for each in bodies)
    assert b' 403 ' in endless.result(200)[:20] and unread.result(200)
  assert alive(strict)


def test_connections_are_counted(strict):
  open_ones = [strict.connect() for _ in range(24)]
  try:
    with strict.connect() as one_more:
      found = received(one_more)
      assert found.startswith(b'HTTP/1.1 503') and b'retry-after' in found and b'too many connections' in found
    for _ in range(50):  # those that do not wait for the answer
      one_more = strict.connect()
      one_more.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
      one_more.close()
  finally:
    for each in open_ones:
      each.close()
  wait_until(lambda: alive(strict))
  assert 'Traceback' not in strict.log.read_text()


def test_cut_connections_leave_the_queue(strict):
  own = text(encoded(Image.new('L', (16, 16), 200), 'PNG'))
  wanted = {'edit': 'reconstruct', 'picture': own, 'label': 3, 'steps': 400, 'tries': 4}
  assert strict.post('/edit', wanted | {'steps': 25}, timeout=600)[0] == 200  # compiled: nothing interrupts that
  body = json.dumps(wanted).encode()
  for _ in range(2):
    cut = []
    while True:  # until both places in the queue are taken
      cut.append(strict.connect())
      cut[-1].sendall(head('/edit', Content_Length=len(body)) + body)
      with contextlib.suppress(TimeoutError):
        if strict.post('/draw', {}, timeout=1)[0] == 503:
          break
    for connection in cut:
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))  # as if a cable were cut
      connection.close()
    wait_until(lambda: strict.post('/draw', {})[0] == 200)


def test_the_device_serves_in_order_and_drops_who_has_gone():
  async def scenario():
    device, order, begun, go = Device(3), [], threading.Event(), threading.Event()

    def first(work):
      begun.set()
      go.wait(60)
      work.check()
      order.append('first')

    never, gone = asyncio.Event(), asyncio.Event()
    one = asyncio.create_task(device.run(first, gone.wait()))
    while not begun.is_set():
      await asyncio.sleep(0.01)
    two = asyncio.create_task(device.run(lambda work: order.append('second'), gone.wait()))
    three = asyncio.create_task(device.run(lambda work: order.append('third') or 3, never.wait()))
    await asyncio.sleep(0.05)
    with pytest.raises(limits.Refusal) as full:
      await device.run(lambda work: order.append('fourth'), never.wait())
    assert full.value.status == 503 and full.value.retry >= 1 and device.length == 3
    gone.set()
    for each in (one, two):
      with pytest.raises(Stopped):
        await each
    assert device.length == 2  # the first is still at the device, and is asked to end
    go.set()
    assert (await three)[0] == 3 and order == ['third']

    def wrong(work):
      raise ValueError('its own error')

    with pytest.raises(ValueError, match='its own error'):
      await device.run(wrong, never.wait())
    waiting = asyncio.create_task(device.run(lambda work: go.clear() or go.wait(1) or work.check(), never.wait()))
    await asyncio.sleep(0.05)
    device.end()
    for ended in (waiting, device.run(lambda work: None, never.wait())):
      with pytest.raises(limits.Refusal, match='about to end'):
        await ended

  asyncio.run(scenario())


def test_what_is_refused_leaves_nothing_behind():
  async def scenario():
    device = Device(0)
    with pytest.raises(limits.Refusal, match='0 requests wait already'):
      await device.run(lambda work: None, asyncio.sleep(600))
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}

  with warnings.catch_warnings(record=True) as complaints:
    warnings.simplefilter('always')
    asyncio.run(scenario())
    gc.collect()
  assert [str(each.message) for each in complaints if issubclass(each.category, RuntimeWarning)] == []


def test_rates():
  now = [0.0]
  rate = limits.Rate(60, lambda: now[0])
  for _ in range(10):
    rate.check('10.0.0.1')
  with pytest.raises(limits.Refusal) as refusal:
    rate.check('10.0.0.1')
  assert (refusal.value.status, refusal.value.retry) == (429, 1)
  rate.check('10.0.0.2')
  now[0] = 2.0
  rate.check('10.0.0.1')
  rate.check('10.0.0.1')
  with pytest.raises(limits.Refusal):
    rate.check('10.0.0.1')
  for index in range(2 * limits.ADDRESSES):  # what is remembered of clients is bounded
    rate.check(f'2001:db8:0:{index:x}::1')
  assert len(rate._left) == limits.ADDRESSES
  assert limits.client_of('2001:db8::1') == limits.client_of('2001:db8::ffff') != limits.client_of('2001:db8:0:1::')
  assert limits.client_of('::ffff:10.0.0.1') == '10.0.0.1'
  held = limits.Memory(100)
  held.take(60)
  with pytest.raises(limits.Refusal):
    held.take(41)
  held.give(60)
  assert held.take(100) and held.used == 100


def test_a_request_that_fails_within_is_an_answer_and_not_the_end():
  async def broken(scope, receive, send):
    raise RuntimeError('within')

  sent = []

  async def send(message):
    sent.append(message)

  async def receive():
    return {'type': 'http.request', 'body': b'', 'more_body': False}

  scope = {'type': 'http', 'method': 'GET', 'path': '/', 'headers': [(b'host', b'localhost')], 'client': ('1.1.1.1', 1)}
  asyncio.run(server.Guard(broken, (), limits.Rate(60))(scope, receive, send))
  assert sent[0]['status'] == 500 and b'within' not in sent[1]['body']
