"""A real browser, driven over a pipe: pages opened, keys pressed, pictures taken, what it complains of collected."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage',
         '--hide-scrollbars', '--remote-debugging-pipe', 'about:blank')
KEYS = {'Enter': (13, '\r'), ' ': (32, ' '), 'Tab': (9, ''), 'Escape': (27, ''), 'Backspace': (8, ''),
        'Delete': (46, ''), 'Home': (36, ''), 'End': (35, ''), 'ArrowLeft': (37, ''), 'ArrowUp': (38, ''),
        'ArrowRight': (39, ''), 'ArrowDown': (40, '')}


class Page:
  """A tab.

  Attributes:
    complaints: of the console, of exceptions, of what could not be fetched or was forbidden.
    fetched: addresses.
  """

  def __init__(self, send, receive):
    self._send, self._receive, self._number = send, receive, 0
    self.complaints, self.fetched = [], []
    (target,) = [each for each in self('Target.getTargets')['targetInfos'] if each['type'] == 'page']
    self._session = self('Target.attachToTarget', targetId=target['targetId'], flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network', 'DOM'):
      self(f'{domain}.enable')

  _session = None

  def __call__(self, method, **params):
    self._number += 1
    own = {'id': self._number, 'method': method, 'params': params}
    self._send(own | ({'sessionId': self._session} if self._session else {}))
    while (message := self._receive()).get('id') != self._number:
      self._note(message)
    if 'error' in message:
      raise RuntimeError(f'{method}: {message["error"]}')
    return message['result']

  def _note(self, message):
    method, params = message.get('method'), message.get('params', {})
    if method == 'Runtime.exceptionThrown':
      self.complaints.append(json.dumps(params['exceptionDetails'])[:500])
    elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert'):
      self.complaints.append(json.dumps(params['args'])[:500])
    elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
      self.complaints.append(f'{params["entry"]["text"]} {params["entry"].get("url", "")}')
    elif method == 'Network.requestWillBeSent':
      self.fetched.append(params['request']['url'])

  def open(self, url, width=1280, height=900, dark=False, phone=False):
    self.look_as(width, height, dark, phone)
    self('Page.navigate', url=url)
    self.wait("document.readyState === 'complete'")

  def look_as(self, width, height, dark=False, phone=False):
    self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=phone)
    self('Emulation.setTouchEmulationEnabled', enabled=phone)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self('Emulation.setEmulatedMedia', features=[scheme])

  def run(self, expression):
    """The value of a JavaScript expression; a promise's once it is there."""
    found = self('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
    if 'exceptionDetails' in found:
      raise RuntimeError(json.dumps(found['exceptionDetails'])[:800])
    return found['result'].get('value')

  def wait(self, expression, seconds=240):
    """Its value, once an expression holds."""
    ends = time.monotonic() + seconds
    while not (found := self.run(expression)):
      if time.monotonic() > ends:
        raise TimeoutError(f'{expression}; complaints: {self.complaints}; {self.run("document.body.innerText")[:1000]}')
      time.sleep(0.1)
    return found

  def press(self, *keys):
    for key in keys:
      code, text = KEYS[key] if key in KEYS else (ord(key.upper()), key)
      same = {'key': key, 'code': {' ': 'Space'}.get(key, key if key in KEYS else f'Key{key.upper()}'),
              'windowsVirtualKeyCode': code}
      self('Input.dispatchKeyEvent', type='keyDown' if text else 'rawKeyDown', **same, text=text)
      self('Input.dispatchKeyEvent', type='keyUp', **same)

  def middle(self, selector):
    """(x, y) of an element in view that stands still, with nothing before it: pictures that load move what is below."""
    return self.wait(f'''(async () => {{ const e = document.querySelector({json.dumps(selector)});
      e.scrollIntoView({{block: 'center', behavior: 'instant'}});
      const place = () => {{ const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }};
      const [x, y] = place();
      await Promise.all([...document.images].map(image => image.decode().catch(() => 0)));
      await new Promise(done => setTimeout(done, 50));
      return e.contains(document.elementFromPoint(x, y)) && String(place()) === String([x, y]) && [x, y]; }})()''')

  def click(self, selector):
    x, y = self.middle(selector)
    for kind in ('mousePressed', 'mouseReleased'):
      self('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

  def drag(self, selector, to=None, by=(0, 0), meanwhile=''):
    """With the mouse, from the middle of an element to that of another, or by so many pixels.

    meanwhile: JavaScript that is run on the way, before it is looked where `to` is.
    """
    moved = lambda x, y: self('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y, button='left', buttons=1)
    x, y = self.middle(selector)
    end = (x + by[0], y + by[1]) if meanwhile or not to else self.middle(to)
    self('Input.dispatchMouseEvent', type='mousePressed', x=x, y=y, button='left', clickCount=1)
    for part in (0.3, 0.7, 1):
      moved(x + part * (end[0] - x), y + part * (end[1] - y))
    if meanwhile:
      self.run(meanwhile)
      end = self.middle(to)
      moved(*end)
    self('Input.dispatchMouseEvent', type='mouseReleased', x=end[0], y=end[1], button='left', clickCount=1)

  def choose_file(self, selector, path):
    root = self('DOM.getDocument')['root']['nodeId']
    node = self('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
    self('DOM.setFileInputFiles', nodeId=node, files=[str(path)])

  def shoot(self, path, whole=False):
    """A PNG of what is seen, or of the whole page."""
    found = self('Page.captureScreenshot', captureBeyondViewport=whole)
    path.write_bytes(base64.b64decode(found['data']))


@contextlib.contextmanager
def browser(profile, seconds=300):
  """A Page of a new browser, whose profile is an empty folder."""
  (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
  # The browser reads at descriptor 3 and writes at 4; sh knows no descriptors of two digits.
  command = ['bash', '-c', f'exec "$@" 3<&{to_read} 4>&{from_write}', 'bash', CHROMIUM,
             f'--user-data-dir={profile}', *FLAGS]
  process = subprocess.Popen(command, pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
  os.close(to_read)
  os.close(from_write)
  pending = bytearray()

  def send(message):
    os.write(to_write, json.dumps(message).encode() + b'\0')

  def receive():
    while b'\0' not in pending:
      if not select.select([from_read], [], [], seconds)[0]:
        raise TimeoutError('the browser says nothing')
      if not (data := os.read(from_read, 2**16)):
        raise RuntimeError('the browser has ended')
      pending.extend(data)
    message, _, rest = bytes(pending).partition(b'\0')
    pending[:] = rest
    return json.loads(message)

  try:
    yield Page(send, receive)
  finally:
    os.close(to_write)
    os.close(from_read)
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
