"""The page as a folder: the generator as ONNX, which draws in the browser by onnxruntime-web; any web server will do.

    index.html, *.css, *.js   the page; backend.js is static.js and not server.js
    model.json                what it draws
    generator.onnx            of `to_onnx`, checked there against our own pictures
    ort/                      onnxruntime-web, copied from its npm package
    prompts.bin               of a network of captions: embeddings of the prompts that the page offers
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile

from pagoda_jax.method import guidance
from pagoda_jax.runtime import buckets, files
from pagoda_jax.use import exported
from pagoda_jax.use.onnx_loader import digest, seal
from pagoda_jax.use.serve import calls, page_files
from pagoda_jax.use.serve.limits import Limits

ROOT = pathlib.Path(__file__).parents[3]
RUNTIME = ('ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm')
NOTICES = ('LICENSE', 'ThirdPartyNotices.txt', 'README.md')
RULES = ("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' data:; "
         "connect-src 'self'; base-uri 'none'; form-action 'none'")
WAITING = 'Asking what draws here …'  # in page.html, until the script runs
NEEDS = 'Loading … If this stays: open the page through a web server, such as python -m http.server, and not as a file.'


class StaticError(ValueError):
  """The folder cannot be made."""


def runtime_folder(folder) -> pathlib.Path:
  """Where onnxruntime-web's files lie, given its package, what holds that, or its dist; None: node_modules here.

  Raises:
    StaticError: not there; says how it is got.
  """
  given = pathlib.Path('node_modules/onnxruntime-web' if folder is None else folder)
  for place in (given, given / 'dist', given / 'package' / 'dist', given / 'node_modules' / 'onnxruntime-web' / 'dist'):
    if all((place / name).is_file() for name in RUNTIME):
      return place
  raise StaticError(f'{given}: no onnxruntime-web there, by which browsers run ONNX: `npm pack onnxruntime-web && '
                    'tar xzf onnxruntime-web-*.tgz`, then --onnxruntime=package')


def check(folder) -> None:
  """Refuses a folder that is there, or that is not local."""
  if buckets.is_in_bucket(folder):
    raise StaticError(f'{folder}: write a local folder, and copy it there')
  if pathlib.Path(folder).exists():
    raise StaticError(f'{folder} exists already; remove it, or choose another --static')


def write(generator, weights, folder, runtime: pathlib.Path, prompts: tuple[str, ...] = ()) -> str:
  """Writes the folder, whole or not at all; says what is in it and how it is opened.

  Args:
    generator: a `use.generator.Generator` that draws in one step.
    weights: folder that it comes from, whose generator.onnx is taken where it has one; or None.
    folder: to write.
    runtime: of `runtime_folder`.
    prompts: of a network of captions, those that the page offers.

  Raises:
    StaticError: the generator cannot be converted, or the folder is there; or it takes prompts and there are none.
    ValueError: it takes no prompts, or as `Generator.texts`.
  """
  check(folder)
  if generator.kind != 'generator':
    raise StaticError(f'{generator.where}: a teacher; only one-step generators become ONNX')
  if generator.takes_text and not prompts:
    raise StaticError(f'{generator.where}: draws what captions say, and a browser has no encoder of them: give '
                      "--prompts='a red flag;a smiling cat', which the page is to offer")
  texts = generator.texts(prompts, len(prompts))
  folder = pathlib.Path(folder).absolute()
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}.') as place:
    made = pathlib.Path(place) / 'page'
    made.mkdir()
    with files.naming(folder, instead_of=place):
      model = _onnx(generator, weights, pathlib.Path(place) / 'exported')
      (made / 'generator.onnx').write_bytes(model)
      described = calls.describe(generator, Limits()) | {'edits': []}
      if texts:
        described |= {'prompts': prompts, 'text_shape': _write_embeddings(made / 'prompts.bin', texts['text'])}
      (made / 'model.json').write_text(json.dumps(described, indent=2) + '\n')
      page = (page_files.FOLDER / 'page.html').read_text().replace(WAITING, NEEDS)
      rules = f'<meta http-equiv="Content-Security-Policy" content="{RULES}">\n<title>'
      (made / 'index.html').write_text(page.replace('<title>', rules))
      for name, file in (page_files.FILES | {'backend.js': page_files.FOLDER / 'static.js'}).items():
        shutil.copyfile(file, made / name)
      (made / 'ort').mkdir()
      for name in RUNTIME:
        shutil.copyfile(runtime / name, made / 'ort' / name)
      for name in NOTICES:  # the licence of what is copied
        if (runtime.parent / name).is_file():
          shutil.copyfile(runtime.parent / name, made / 'ort' / name)
    made.rename(folder)
  size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
  return (f'{folder}: {size:,} bytes, of which the generator {len(model):,}; any web server will do, such as\n'
          f'  python -m http.server --bind 127.0.0.1 --directory {folder} 8000')


def _write_embeddings(path, text) -> dict[str, list[int]]:
  """Writes one array after the other, little endian: {name: shape of one prompt's}, in that order."""
  arrays = {name: text[name].astype('u1' if text[name].dtype == bool else '<f4') for name in guidance.TEXT}
  path.write_bytes(b''.join(array.tobytes() for array in arrays.values()))
  return {name: list(array.shape[1:]) for name, array in arrays.items()}


def _onnx(generator, weights, place) -> bytes:
  """The model, from the folder of weights or converted at `place`."""
  if weights is None or not (pathlib.Path(weights) / 'onnx.json').is_file():
    exported.write(generator, place)
    _convert(place)
    weights = place
  weights = pathlib.Path(weights)
  try:
    described = json.loads((weights / 'onnx.json').read_text())
    model = (weights / described['file']).read_bytes()
    whole = described.pop('seal') == seal(described) and digest(model) == described['sha256']
  except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
    whole = False
  if not whole or described['config_sha256'] != digest((weights / exported.CONFIG).read_bytes()):
    raise StaticError(f'{weights}: onnx.json or its model is damaged, or made of another generator; '
                      f'`bash launch/onnx.sh {weights}` makes them again')
  return model


def _convert(folder) -> None:
  """Adds the model to an exported folder, in the environment that launch/onnx.sh makes."""
  script, venv = ROOT / 'launch' / 'onnx.sh', os.environ.get('ONNX_VENV')
  if script.is_file():
    command = ['bash', str(script), str(folder)]
  elif venv:
    command = [os.path.join(venv, 'bin', 'python'), '-m', 'pagoda_jax.use.to_onnx', str(folder)]
  else:
    raise StaticError('converting to ONNX needs an environment of its own: set ONNX_VENV to one with jax2onnx and '
                      'onnxruntime, or give a folder of `pagoda export` that launch/onnx.sh has seen as --weights')
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  ended = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  if ended.returncode:
    last = ' '.join(ended.stdout.strip().splitlines()[-3:])
    raise StaticError(f'converting to ONNX failed ({" ".join(command[:2])}): {last}')
