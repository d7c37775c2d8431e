"""Draws images with nothing but numpy and onnxruntime: `python load_onnx.py 3,5 0` writes images.npy."""
import hashlib, json, pathlib, sys  # noqa: E401, I001
import numpy as np

def digest(data):
  return hashlib.sha256(data).hexdigest()

def seal(values):
  return digest(json.dumps(values, sort_keys=True).encode())

def load(folder):
  """generate(labels, seed=0, omega=None) -> uint8 [N, S, S, C]; its noise is NumPy's, not JAX's of the same seed."""
  import onnxruntime
  config = json.loads(pathlib.Path(folder, 'onnx.json').read_text())
  model = pathlib.Path(folder, config['file']).read_bytes()
  if config.pop('seal') != seal(config) or digest(model) != config['sha256']:
    raise ValueError(f'{folder}: damaged: onnx.json or {config["file"]}')
  session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
  def generate(labels, seed=0, omega=None):
    normal = np.random.default_rng(seed).standard_normal((len(labels), *config['noise_shape']), np.float32)
    given = {'noise': np.float32(config['sigma_max']) * normal, 'label': np.array(labels, np.int32)}
    if config['default_omega'] is not None:
      given['omega'] = np.full(len(labels), config['default_omega'] if omega is None else omega, np.float32)
    return np.clip(np.round((session.run(['images'], given)[0] + 1) * 127.5), 0, 255).astype(np.uint8)
  return generate

if __name__ == '__main__':
  generate = load(pathlib.Path(__file__).parent)
  np.save('images.npy', generate([int(label) for label in sys.argv[1].split(',')], int(sys.argv[2])))
