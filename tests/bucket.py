"""A bucket on this machine: an emulator of Google Cloud Storage in a process of its own."""

import contextlib
import http
import os
import subprocess
import sys

NAME = 'bucket'


@contextlib.contextmanager
def emulated(monkeypatch):
  """The address of an emulator, which gs:// is of within the block, here and in processes that are started."""
  server = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  try:
    address = server.stdout.readline().strip()
    for name, value in environment(address).items():
      monkeypatch.setenv(name, value)
    yield address
  finally:
    server.kill()
    server.communicate()


def environment(address):
  """What gcsfs (through epath) and tensorstore (through Orbax) are told of an emulator."""
  return {'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address,
          'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none', 'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}


def serve():
  """Serves an empty bucket, in memory, until it is killed; prints its address."""
  from gcp_storage_emulator import server
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects

  def move(request, response, storage):
    """The emulator lacks it: an object gets another name, in one step."""
    bucket, name, to = (request.params[key] for key in ('bucket_name', 'object_id', 'to'))
    moved = storage.get_file_obj(bucket, name) | {'name': to}
    storage.create_file(bucket, to, storage.get_file(bucket, name), moved)
    storage.delete_file(bucket, name)
    response.json(moved)

  def download(request, response, storage, plain=objects.download):
    """The emulator leaves out a header that tensorstore asks for."""
    plain(request, response, storage)
    if response.status.value < 300:
      there = request.params
      response['x-goog-generation'] = storage.get_file_obj(there['bucket_name'], there['object_id'])['generation']

  def conditionally(change):
    """The emulator takes no notice of conditions, by which those who write one object keep each other's changes."""

    def changed(request, response, storage, *args, **kwargs):
      wanted = request.query.get('ifGenerationMatch')
      name = request.params.get('object_id') or request.query.get('name', [None])[0]
      if wanted and name:
        try:
          there = storage.get_file_obj(request.params['bucket_name'], name)['generation']
        except NotFound:
          there = '0'
        if there != wanted[0]:
          _ = request.data  # or the connection would be closed before the client has sent it
          response.status = http.HTTPStatus.PRECONDITION_FAILED
          return
      change(request, response, storage, *args, **kwargs)

    return changed

  objects.download = download
  server.HANDLERS = tuple((route, {method: conditionally(change) if method in ('POST', 'DELETE', 'PUT') else change
                                   for method, change in changes.items()}) for route, changes in server.HANDLERS)
  route = r'^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<to>.*[^/]+)$'
  server.HANDLERS = ((route, {server.POST: move}), *server.HANDLERS)
  emulator = server.create_server('127.0.0.1', int(os.environ.get('PORT', 0)), True, NAME)
  emulator.start()
  print('http://{}:{}'.format(*emulator._api._httpd.server_address), flush=True)
  sys.stdin.read()


if __name__ == '__main__':
  serve()
