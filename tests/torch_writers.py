"""Writing the file formats of PyTorch without torch, for tests: zip, the older format, NVIDIA's pickles.

`np.ndarray`s in the content become tensors; `Global`, `Reduced` and `Built` stand for what pickles name,
call and restore.
"""

import io
import pickle
import zipfile

import numpy as np

STORAGE_CLASSES = {
  'float64': 'DoubleStorage',
  'float32': 'FloatStorage',
  'float16': 'HalfStorage',
  'bfloat16': 'BFloat16Storage',
  'int64': 'LongStorage',
  'uint8': 'ByteStorage',
  'bool': 'BoolStorage',
}


class Global:
  """A name that the pickle imports."""

  def __init__(self, module: str, name: str):
    self.module, self.__name__ = module, name

  def __call__(self):
    raise AssertionError('never called: only its name is written')


class Reduced:
  """An object that the pickle makes by calling `function` with `args`."""

  def __init__(self, function, args):
    self.function, self.args = function, args


class Built:
  """An object of the class `cls` that the pickle makes empty and gives `state`."""

  def __init__(self, cls, state):
    self.cls, self.state = cls, state


class OldParameter:
  """A torch.nn.Parameter as PyTorch before 0.4 pickled it."""

  def __init__(self, array):
    self.array = array


class View:
  """A tensor that is a strided view (in elements) of an array's storage."""

  def __init__(self, base, offset, shape, strides):
    self.base, self.offset, self.shape, self.strides = base, offset, shape, strides


class _StorageOf:
  """The storage of an array, referred to by key."""

  def __init__(self, array):
    self.array = array


class Pickler(pickle._Pickler):
  """Python's pickler with names of modules that are not here.

  `inline`: storages are written as bytes inside (plain pickle.dump), not referred to by key.
  `references_end`: what the older format adds to a reference to a storage.
  """

  def __init__(self, file, protocol=2, inline=False, references_end=()):
    super().__init__(file, protocol)
    self.inline, self.references_end, self.storages = inline, references_end, {}

  def persistent_id(self, obj):
    if not isinstance(obj, _StorageOf) or self.inline:
      return None
    key = str(list(self.storages).index(id(obj.array)) if id(obj.array) in self.storages else len(self.storages))
    self.storages[id(obj.array)] = obj.array
    cls = Global('torch', STORAGE_CLASSES[obj.array.dtype.name])
    return ('storage', cls, key, 'cpu', obj.array.size, *self.references_end)

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, Global):
      self.write(f'c{obj.module}\n{obj.__name__}\n'.encode())
    elif isinstance(obj, Reduced):
      self.save_reduce(obj.function, obj.args)
    elif isinstance(obj, Built):
      self.save(obj.cls)
      self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
      self.save(obj.state)
      self.write(pickle.BUILD)
    elif isinstance(obj, OldParameter):
      self.save_reduce(Global('torch.nn.parameter', 'Parameter'), (obj.array, True), (True, False, {}))
    elif isinstance(obj, np.ndarray):
      strides = tuple(s // obj.itemsize for s in np.zeros(obj.shape, obj.dtype).strides)
      self.save(View(obj, 0, obj.shape, strides))
    elif isinstance(obj, View):
      args = (_StorageOf(obj.base), obj.offset, obj.shape, obj.strides, False, {})
      self.save_reduce(Global('torch._utils', '_rebuild_tensor_v2'), args)
    elif isinstance(obj, _StorageOf) and self.inline:
      file = io.BytesIO()
      save_legacy(file, obj)
      self.save_reduce(Global('torch.storage', '_load_from_bytes'), (file.getvalue(),))
    else:
      super().save(obj, save_persistent_id)


def save_zip(path, content, root='archive', compression=zipfile.ZIP_STORED):
  """As torch.save does since 1.6."""
  file = io.BytesIO()
  pickler = Pickler(file)
  pickler.dump(content)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr(f'{root}/data.pkl', file.getvalue())
    archive.writestr(f'{root}/byteorder', 'little')
    for key, array in enumerate(pickler.storages.values()):
      archive.writestr(f'{root}/data/{key}', array.tobytes())
    archive.writestr(f'{root}/version', '3\n')


def save_legacy(file, content):
  """As torch.save did before 1.6, into an open file."""
  system = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'short': 2, 'int': 4, 'long': 4}}
  for header in (0x1950A86A20F9469CFC6C, 1001, system):
    pickle.dump(header, file, protocol=2)
  pickler = Pickler(file, references_end=(None,))
  pickler.dump(content)
  pickle.dump([str(key) for key in range(len(pickler.storages))], file, protocol=2)
  for array in pickler.storages.values():
    file.write(array.size.to_bytes(8, 'little') + array.tobytes())


def save_pickle(path, content, protocol=4):
  """As pickle.dump does with tensors and modules in it."""
  with open(path, 'wb') as file:
    Pickler(file, protocol, inline=True).dump(content)


def module(parameters=None, buffers=None, children=None, unsaved=(), cls='Net', **attributes):
  """A network object as torch pickles it."""
  state = {
    '_parameters': parameters or {},
    '_buffers': buffers or {},
    '_modules': children or {},
    '_non_persistent_buffers_set': set(unsaved),
    'training': False,
  }
  return Built(Global('somewhere.networks', cls), state | attributes)


def persistent_module(parameters=None, children=None, cls='Net'):
  """A network object as NVIDIA's persistence pickles it: with its source code."""
  state = {'_parameters': parameters or {}, '_buffers': {}, '_modules': children or {}}
  meta = {'type': 'class', 'version': 6, 'module_src': 'raise SystemExit', 'class_name': cls, 'state': state}
  return Reduced(Global('torch_utils.persistence', '_reconstruct_persistent_obj'), (meta,))
