"""Draws images with nothing but numpy and onnxruntime: `python load_onnx.py 3,5 0` writes images.npy.

A network of captions takes in place of labels embeddings by the encoder that onnx.json's "text" names, `python
load_onnx.py captions.npz 0`: text [N, L, W], zero where there is no token, text_mask [N, L], True where there is one,
text_pooled [N, P].
"""
import hashlib, json, pathlib, sys  # noqa: E401, I001
import numpy as np

def digest(data):
  return hashlib.sha256(data).hexdigest()

def seal(values):
  return digest(json.dumps(values, sort_keys=True).encode())

def load(folder):
  """generate(labels, or {text, text_mask, text_pooled}, seed=0, omega=None) -> uint8 [N, S, S, C]; its noise is
  NumPy's, not JAX's of the same seed."""
  import onnxruntime
  config = json.loads(pathlib.Path(folder, 'onnx.json').read_text())
  model = pathlib.Path(folder, config['file']).read_bytes()
  if config.pop('seal') != seal(config) or digest(model) != config['sha256']:
    raise ValueError(f'{folder}: damaged: onnx.json or {config["file"]}')
  session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
  def generate(labels, seed=0, omega=None):
    if text := config.get('text'):
      kinds = {'text': 'float32', 'text_mask': bool, 'text_pooled': 'float32'}
      if {*kinds} - {*getattr(labels, 'keys', list)()}:
        raise ValueError(f"{folder}: draws what captions say: give {', '.join(kinds)}, made of them by "
                         f"the encoder {text['encoder']}, which is not in the folder")
      given = {name: np.asarray(labels[name], kind) for name, kind in kinds.items()}
    elif wrong := [x for x in labels if config['num_classes'] and float(x) not in range(config['num_classes'])]:
      raise ValueError(f"labels: {wrong[0]} is no class; there are 0 to {config['num_classes'] - 1}")
    else:
      given = {'label': np.array(labels, np.int32)}
    count = len(next(iter(given.values())))
    normal = np.random.default_rng(seed).standard_normal((count, *config['noise_shape']), np.float32)
    given['noise'] = np.float32(config['sigma_max']) * normal
    if omega is not None and config['default_omega'] is None:
      raise ValueError(f'omega = {omega}: the model takes no strength of guidance')
    if config['default_omega'] is not None:
      given['omega'] = np.full(count, config['default_omega'] if omega is None else omega, np.float32)
    return np.clip(np.round((session.run(['images'], given)[0] + 1) * 127.5), 0, 255).astype(np.uint8)
  return generate

if __name__ == '__main__':
  generate = load(pathlib.Path(__file__).parent)
  given = np.load(sys.argv[1]) if sys.argv[1].endswith('.npz') else sys.argv[1].split(',')
  np.save('images.npy', generate(given, int(sys.argv[2])))
