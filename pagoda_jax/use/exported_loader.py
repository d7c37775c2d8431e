"""Draws images with nothing but jax and flatbuffers, by which jax.export reads its own files (pip install both).

`python load.py 3,5 0` writes images.npy: uint8 [2, S, S, C] of labels 3 and 5, seed 0. A network of captions takes in
their place embeddings by the encoder that config.json's "text" names, `python load.py captions.npz 0`: text [N, L, W],
zero where there is no token, text_mask [N, L], True where there is one, text_pooled [N, P].
"""
import hashlib, json, math, pathlib, sys, zlib  # noqa: E401, I001
import jax, numpy as np  # noqa: E401
from jax import export

TEXTS = {'text': 'float32', 'text_mask': bool, 'text_pooled': 'float32'}

def read(folder):
  config = json.loads(pathlib.Path(folder, 'config.json').read_text())
  seal, data = config.pop('seal'), {name: pathlib.Path(folder, name).read_bytes() for name in config['files']}
  wrong = [name for name in data if hashlib.sha256(data[name]).hexdigest() != config['files'][name]['sha256']]
  if wrong or seal != hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest():
    raise ValueError(f'{folder}: damaged: {", ".join(wrong) or "config.json"}')
  weights, start = data['model.safetensors'], 8 + int.from_bytes(data['model.safetensors'][:8], 'little')
  table = {name: t for name, t in json.loads(weights[8:start]).items() if name != '__metadata__'}
  params = {name: np.frombuffer(weights, '<f4', math.prod(t['shape']), start + t['data_offsets'][0]).reshape(t['shape'])
            for name, t in table.items()}
  return config, jax.device_put(params), jax.jit(export.deserialize(bytearray(data['generator.stablehlo'])).call)

def normal(seed, count, shape):
  if not 0 <= seed < 2**32:  # JAX would take the low 32 bits
    raise ValueError(f'seed = {seed}: must be in 0 to {2**32 - 1}')
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b'/prior') % 2**31)
  return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, 'float32'))(np.arange(count))

def load(folder):
  """generate(labels, or {text, text_mask, text_pooled}, seed=0, omega=None): images, as pagoda_jax.load has them."""
  config, params, draw = read(folder)
  def generate(labels, seed=0, omega=None):
    texts, default = [], config['default_omega']
    if omega is not None and default is None:
      raise ValueError(f'omega = {omega}: the program takes no strength of guidance')
    if text := config.get('text'):
      if {*TEXTS} - {*getattr(labels, 'keys', list)()}:
        raise ValueError(f"{folder}: draws what captions say: give {', '.join(TEXTS)}, made of them by "
                         f"the encoder {text['encoder']}, which is not in the folder")
      texts = [np.asarray(labels[name], kind) for name, kind in TEXTS.items()]
      labels = [-1] * len(texts[0])
    elif wrong := [x for x in labels if config['num_classes'] and float(x) not in range(config['num_classes'])]:
      raise ValueError(f"labels: {wrong[0]} is no class; there are 0 to {config['num_classes'] - 1}")
    noise = config['diffusion']['sigma_max'] * normal(seed, len(labels), config['noise_shape'])
    omegas = [] if default is None else [np.full(len(labels), default if omega is None else omega, 'float32')]
    images = draw(params, noise, np.array(labels, 'int32'), *omegas, *texts)
    return np.clip(np.round((np.asarray(images) + 1) * 127.5), 0, 255).astype('uint8')
  return generate

if __name__ == '__main__':
  generate = load(pathlib.Path(__file__).parent)
  given = np.load(sys.argv[1]) if sys.argv[1].endswith('.npz') else sys.argv[1].split(',')
  np.save('images.npy', generate(given, int(sys.argv[2])))
