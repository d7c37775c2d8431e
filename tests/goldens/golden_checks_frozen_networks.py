"""Golden checks of the frozen networks, the discriminator and the autoencoder."""

import fnmatch
import functools
import re

import golden_tools
import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import latents
from pagoda_jax.networks.frozen import projections
from pagoda_jax.stages import decoding
from pagoda_jax.weights.convert import diffusers, inception, lpips, mapping, random_projections, stylegan_xl


def cases():
  """Yields (id, check); those of one configuration follow each other, so that its weights are made once."""
  for file, checks in (
      ('proj_disc', projected_checks),
      ('inception_fid', inception_checks),
      ('lpips_vgg', lpips_checks),
      ('vae', autoencoder_checks),
      ('vae_shift', shifted_autoencoder_checks),
  ):
    if golden_tools.exists(file):
      yield from ((name, golden_tools.in_float32(check)) for name, check in checks())


def projected_checks():
  _, meta = golden_tools.load('proj_disc')
  for name, config in meta['configs'].items():
    yield f'projected-{name}-backbone-names', lambda name=name: check_backbone_names(name)
    for size in sorted(int(key.removeprefix('x_')) for key in config if re.fullmatch(r'x_\d+', key)):
      for check in (check_features, check_logits, check_input_gradient, check_training):
        what = check.__name__.removeprefix('check_')
        yield f'projected-{name}-{size}-{what}', lambda check=check, name=name, size=size: check(name, size)
    yield f'projected-{name}-e2e', lambda name=name: check_end_to_end(name)
    for what in ('features', 'discriminator'):
      yield f'round-trip-{name}-{what}', lambda name=name, what=what: check_round_trip(*projected_parts(name)[what])


def inception_checks():
  for size in golden_sizes('inception_fid', r's(\d+)/img_uint8'):
    yield f'inception-{size}', lambda size=size: check_inception(size)
  yield 'round-trip-inception', lambda: check_round_trip(*inception_parts())


def lpips_checks():
  yield 'lpips-features', check_lpips_features
  for weights in ('package_lin', 'rule_lin'):
    yield f'lpips-{weights}', lambda weights=weights: check_lpips(weights)
  yield 'round-trip-lpips', lambda: check_round_trip(*lpips_parts('package_lin'))


def autoencoder_checks():
  yield 'autoencoder', check_autoencoder
  yield 'round-trip-autoencoder', lambda: check_round_trip(*autoencoder_parts())


def shifted_autoencoder_checks():
  yield 'autoencoder-shifted', check_shifted_autoencoder


def golden_sizes(file, pattern):
  """The sizes in names of arrays, as strings."""
  return [match[1] for name in golden_tools.load(file)[0].files if (match := re.fullmatch(pattern, name))]


def converted(fmt, state_dict, options):
  """(module, variables) from a state dict in the format of a convert module."""
  variables, _ = mapping.to_ours(state_dict, fmt.leaves(options), fmt.carried)
  network = projections.projected if fmt is random_projections else fmt.network
  return network(options), variables


def check_round_trip(fmt, state_dict, options):
  """torch -> ours -> torch is bit-identical, counters included."""
  counter = {name.replace('running_var', 'num_batches_tracked') for name in state_dict if 'running_var' in name}
  state_dict = dict(state_dict) | {name: np.array(7, np.int64) for name in counter}
  leaves = fmt.leaves(options)
  tree, extras = mapping.to_ours(state_dict, leaves, fmt.carried)
  back = mapping.to_theirs(tree, leaves, extras)
  assert back.keys() == state_dict.keys()
  for name, value in state_dict.items():
    assert back[name].dtype == value.dtype and np.array_equal(back[name], value), name


def stats(x):
  """The goldens' five numbers of an array."""
  x = np.asarray(x, np.float64)
  return np.array([x.mean(), x.std(), np.abs(x).max(), x.min(), x.max()])


def check_map(x, prefix, arrays, tolerance, channels, cells):
  """Statistics, strided slice and channel means of a map [B, H, W, C] against the arrays at `prefix`."""
  x = golden_tools.nchw(x)
  rows, columns = (max(1, side // cells) for side in x.shape[2:])
  golden_tools.assert_close(stats(x), arrays[f'{prefix}/stats'], tolerance, f'{prefix} stats')
  if f'{prefix}/slice' in arrays.files:
    part = x[:, :channels, ::rows, ::columns]
    golden_tools.assert_close(part, arrays[f'{prefix}/slice'], tolerance, f'{prefix} slice')
  if f'{prefix}/chan_mean' in arrays.files:
    reference = arrays[f'{prefix}/chan_mean']
    means = x.mean((0, 2, 3))[: len(reference)]
    # Means cancel; what they are made of sets the scale of their rounding.
    np.testing.assert_allclose(means, reference, rtol=0, atol=tolerance * np.sqrt(np.mean(x**2)))


# The projected discriminator.


@functools.lru_cache(maxsize=1)
def projected_parts(name):
  """'features' and 'discriminator' of a configuration: (format, state dict by the rule, options) each."""
  config = golden_tools.load('proj_disc')[1]['configs'][name]
  features = golden_tools.rule_state_dict([p[:2] for p in config['F_params']], config['F_prefix'], config['F_gain'])
  heads = discriminator_state_dict(config)
  return {
      'features': (random_projections, features, random_projections.options(features)),
      'discriminator': (stylegan_xl, heads, stylegan_xl.options(heads)),
  }


def discriminator_state_dict(config):
  """The rule with its three special cases: unit-scale embeddings and the two singular vectors."""
  prefix, state_dict = config['D_prefix'], {}
  for name, shape, kind in config['D_params']:
    if kind == 'kept':
      continue
    gain = config['D_gain']
    if any(fnmatch.fnmatch(name, pattern) for pattern in config['D_unit_scale']):
      gain = np.sqrt(np.prod(shape[1:]))
    state_dict[name] = golden_tools.rule_tensor(prefix, name, shape, gain)
    if kind == 'sn_u':
      z = np.random.default_rng(golden_tools.zlib.crc32((prefix + name).encode())).standard_normal(shape)
      state_dict[name] = (z / np.linalg.norm(z)).astype(np.float32)
  for name, _, kind in config['D_params']:
    if kind == 'sn_v':
      names = (name.replace('weight_v', part) for part in ('weight_orig', 'weight_u'))
      kernel, u = (state_dict[name].astype(np.float64) for name in names)
      v = kernel.reshape(len(u), -1).T @ u
      state_dict[name] = (v / np.linalg.norm(v)).astype(np.float32)
  return state_dict


@functools.lru_cache(maxsize=1)
def projected_networks(name):
  """(feature network, its variables, discriminator, its variables)."""
  parts = projected_parts(name)
  return *converted(*parts['features']), *converted(*parts['discriminator'])


def golden_input(name, size):
  """The input that json describes in words, NHWC."""
  arrays, meta = golden_tools.load('proj_disc')
  words = meta['configs'][name][f'x_{size}']
  scale, seed, shape = re.match(r'([\d.]+) \* default_rng\((\d+)\)\.standard_normal\(\(([\d, ]+)\)\)', words).groups()
  z = np.random.default_rng(int(seed)).standard_normal([int(side) for side in shape.split(',')])
  x = (float(scale) * z).astype(np.float32)
  head = arrays[f'{name}/{size}/x_head']
  np.testing.assert_allclose(x.ravel()[: len(head)], head, rtol=1e-6)
  return golden_tools.nhwc(x)


@functools.lru_cache(maxsize=1)
def evaluated(name, size):
  """(maps at the three stages, logits, gradient of the mean logit) in evaluation mode."""
  arrays, _ = golden_tools.load('proj_disc')
  net, variables, disc, disc_variables = projected_networks(name)
  label = jnp.asarray(arrays[f'{name}/{size}/y'], jnp.int32)

  @jax.jit
  def evaluate(variables, disc_variables, x):
    def mean_logit(x):
      maps = net.apply(variables, x, method='stages_of_features')
      logits = disc.apply(disc_variables, maps['mixed'], {'label': label}, train=False)
      return jnp.mean(logits), (maps, logits)

    gradient, (maps, logits) = jax.grad(mean_logit, has_aux=True)(x)
    return maps, logits, gradient

  return evaluate(variables, disc_variables, golden_input(name, size))


def check_backbone_names(name):
  """Our table of names gives the golden's, and the golden knows no other names of the backbone."""
  config = golden_tools.load('proj_disc')[1]['configs'][name]
  ours = {key: random_projections.backbone_name(key) for key, *_ in config['F_params']}
  assert {key: value for key, value in ours.items() if value} == config['F_to_timm']
  leaves = random_projections.leaves(projected_parts(name)['features'][2])
  assert {leaf.theirs for leaf in leaves} == {key for key in ours if not random_projections.carried(key)}


def check_features(name, size):
  arrays, meta = golden_tools.load('proj_disc')
  maps, _, _ = evaluated(name, size)
  for theirs, ours in (('raw', 'raw'), ('ccm', 'channels'), ('csm', 'mixed')):
    for index, x in enumerate(maps[ours]):
      shape = meta['configs'][name]['shapes'][f'{size}/{theirs}/{index}']
      assert list(golden_tools.nchw(x).shape) == shape
      check_map(x, f'{name}/{size}/{theirs}/{index}', arrays, 1e-3, channels=6, cells=5)


def check_logits(name, size):
  arrays, _ = golden_tools.load('proj_disc')
  maps, logits, _ = evaluated(name, size)
  golden_tools.assert_close(logits, arrays[f'{name}/{size}/logits_eval'], 1e-3)
  _, _, disc, disc_variables = projected_networks(name)
  other = (arrays[f'{name}/{size}/y'] + 1) % disc.num_classes
  logits = disc.apply(disc_variables, maps['mixed'], {'label': other}, train=False)
  golden_tools.assert_close(logits, arrays[f'{name}/{size}/logits_eval_other_label'], 1e-3)


def check_input_gradient(name, size):
  """Within 3e-2 in root mean square, and its deviation within 1e-2.

  A maximum would test luck: a ReLU whose input rounding takes across zero changes the gradient in its
  whole receptive field. Half a unit in the last place of the input does up to 1.3e-2 rms and 0.26 in
  the maximum with EfficientNet-lite0, and the golden is as far from the same gradient in float64.
  """
  arrays, _ = golden_tools.load('proj_disc')
  gradient = golden_tools.nchw(evaluated(name, size)[2])
  prefix, step = f'{name}/{size}/dmeanlogit_dx', size // 16
  reference = arrays[f'{prefix}/slice']
  error = np.linalg.norm(gradient[:, :, ::step, ::step] - reference) / np.linalg.norm(reference)
  assert error <= 3e-2, f'relative error {error:.1e}'
  np.testing.assert_allclose(stats(gradient)[1], arrays[f'{prefix}/stats'][1], rtol=1e-2)


def check_training(name, size):
  """Logits, gradients and stored statistics of one forward in train mode from the initial state."""
  arrays, meta = golden_tools.load('proj_disc')
  features = evaluated(name, size)[0]['mixed']
  _, _, disc, variables = projected_networks(name)
  label = jnp.asarray(arrays[f'{name}/{size}/y'], jnp.int32)

  @jax.jit
  def train(variables, features):
    def real_loss(params):
      inputs = variables | {'params': params}
      collections = ['batch_stats', 'spectral']
      logits, updated = disc.apply(inputs, features, {'label': label}, train=True, mutable=collections)
      return jnp.mean(jax.nn.relu(1 - logits)), (logits, updated)

    return jax.grad(real_loss, has_aux=True)(variables['params'])

  gradient, (logits, updated) = train(variables, features)
  golden_tools.assert_close(logits, arrays[f'{name}/{size}/logits_train'], 1e-3)
  options = projected_parts(name)['discriminator'][2]
  theirs = mapping.to_theirs({'params': gradient, **updated}, stylegan_xl.leaves(options))
  norms = [np.linalg.norm(theirs[key].astype(np.float64)) for key in meta['configs'][name]['train_grad_names']]
  # Batch statistics cancel the biases before them: those gradients are rounding, 1e-8.
  np.testing.assert_allclose(norms, arrays[f'{name}/{size}/train_grad_norms'], rtol=3e-3, atol=1e-6)
  after = f'{name}/{size}/after_train_step/'
  compared = [key.removeprefix(after) for key in arrays.files if key.startswith(after)]
  assert compared
  for key in compared:
    golden_tools.assert_close(theirs[key], arrays[after + key], 1e-4, key)


def check_end_to_end(name):
  arrays, _ = golden_tools.load('proj_disc')
  net, variables, disc, disc_variables = projected_networks(name)
  images = arrays[f'{name}/e2e/img_uint8'].astype(np.float32) / 127.5 - 1
  # The golden does not name these images' labels: they are those of the inputs.
  size = min(int(s) for s in golden_sizes('proj_disc', rf'{name}/(\d+)/y'))
  label = arrays[f'{name}/{size}/y'][: len(images)]
  features = jax.jit(net.apply)(variables, images)
  logits = disc.apply(disc_variables, features, {'label': label}, train=False)
  golden_tools.assert_close(logits, arrays[f'{name}/e2e/logits_eval'], 1e-3)


# Inception.


@functools.lru_cache(maxsize=1)
def inception_parts():
  """(format, state dict by the rule, options)."""
  _, meta = golden_tools.load('inception_fid')
  state_dict = golden_tools.rule_state_dict([p[:2] for p in meta['params']], meta['prefix'], meta['gain'])
  return inception, state_dict, inception.options(state_dict)


def check_inception(size):
  arrays, meta = golden_tools.load('inception_fid')
  fmt, state_dict, options = inception_parts()
  _, variables = converted(fmt, state_dict, options)
  net = inception.network(options, graph='pytorch_fid')
  images = arrays[f's{size}/img_uint8'].astype(np.float32) / 127.5 - 1
  out = jax.jit(net.apply)(variables, images)
  resized = golden_tools.nchw(net.apply(variables, images, method='preprocessed'))
  corner = arrays[f's{size}/resized_corner']
  golden_tools.assert_close(resized[:, :, ::23, ::23], arrays[f's{size}/resized_slice'], 1e-5)
  golden_tools.assert_close(resized[0, :, : corner.shape[1], : corner.shape[2]], corner, 1e-5)
  for index, x in enumerate(out['maps']):
    assert list(golden_tools.nchw(x).shape) == meta[f's{size}/block{index}/shape']
    check_map(x, f's{size}/block{index}', arrays, 1e-4, channels=8, cells=6)
  golden_tools.assert_close(out['features'], arrays[f's{size}/features'], 1e-4)
  if golden_tools.exists('evaluation') and f'inception/s{size}/spatial' in golden_tools.load('evaluation')[0]:
    spatial = golden_tools.load('evaluation')[0][f'inception/s{size}/spatial']  # what sFID is of
    golden_tools.assert_close(out['spatial'], spatial, 1e-4)
  nobias, bias, probabilities = (
      arrays[f's{size}/{key}'] for key in ('logits_nobias', 'logits_bias', 'softmax_nobias_top')
  )
  count = nobias.shape[1]
  golden_tools.assert_close(out['logits'][:, :count], nobias, 1e-4)
  golden_tools.assert_close((out['logits'] + out['bias'])[:, :count], bias, 1e-4)
  golden_tools.assert_close(jax.nn.softmax(out['logits'])[:, :count], probabilities, 1e-4)


# LPIPS.


@functools.lru_cache(maxsize=2)
def lpips_parts(weights):
  """(format, state dict, options) with the linear weights of the package or of the rule."""
  arrays, meta = golden_tools.load('lpips_vgg')
  state_dict = {}
  for name, shape, *_ in meta['params']:
    if name.startswith('net.'):
      state_dict[name] = golden_tools.rule_tensor(meta['prefix'], name, shape, meta['gain'])
  for level in range(len(lpips.options(state_dict)['widths'])):
    name = f'lin{level}.model.1.weight'
    package = arrays[f'package_lin_weights/{name}'].reshape(1, -1, 1, 1)
    rule = np.abs(golden_tools.rule_tensor(meta['prefix'], name, package.shape))
    state_dict[name] = package if weights == 'package_lin' else rule
  state_dict['scaling_layer.shift'] = np.array(meta['shift'], np.float32).reshape(1, 3, 1, 1)
  return lpips, state_dict, lpips.options(state_dict)


def lpips_images():
  """The two image batches, NHWC in [-1, 1]."""
  arrays, _ = golden_tools.load('lpips_vgg')
  return [golden_tools.nhwc(arrays[f'img{i}_uint8']).astype(np.float32) / 127.5 - 1 for i in (0, 1)]


def check_lpips_features():
  arrays, meta = golden_tools.load('lpips_vgg')
  net, variables = converted(*lpips_parts('package_lin'))
  maps = jax.jit(lambda v, x: net.apply(v, x, method='features'))(variables, lpips_images()[0])
  for index, x in enumerate(maps):
    check_map(x, f'vgg/relu{index}', arrays, 1e-4, channels=6, cells=5)
  names = {name: name.split('.', 2)[2] for name in meta['to_torchvision_vgg16']}
  torchvision = {f'features.{rest}': np.zeros(1) for rest in names.values()}
  assert sorted(torchvision) == sorted(meta['to_torchvision_vgg16'].values())
  assert lpips.from_torchvision(torchvision, {}).keys() == names.keys()


def check_lpips(weights):
  arrays, _ = golden_tools.load('lpips_vgg')
  net, variables = converted(*lpips_parts(weights))
  per_layer = jax.jit(lambda v, a, b: net.apply(v, a, b, method='per_layer'))(variables, *lpips_images())
  golden_tools.assert_close(per_layer, arrays[f'{weights}/per_layer'], 1e-4)
  golden_tools.assert_close(jnp.sum(per_layer, 0), arrays[f'{weights}/distance'], 1e-4)


# The autoencoder.


@functools.lru_cache(maxsize=2)
def autoencoder_parts(file='vae'):
  """(format, state dict by the rule, options)."""
  _, meta = golden_tools.load(file)
  state_dict = golden_tools.rule_state_dict([p[:2] for p in meta['params']], meta['prefix'], meta['gain'])
  config = meta['config']
  return diffusers, state_dict, diffusers.options(
    state_dict, config['norm_num_groups'], config['scaling_factor'], config.get('shift_factor') or 0.0)


def check_autoencoder():
  arrays, _ = golden_tools.load('vae')
  net, variables = converted(*autoencoder_parts())
  encode, decode = (jax.jit(functools.partial(net.apply, method=name)) for name in ('encode', 'decode'))
  mean, log_variance = encode(variables, golden_tools.nhwc(arrays['x']))
  deviation = jnp.exp(0.5 * log_variance)
  sample = mean + deviation * golden_tools.nhwc(arrays['eps'])
  results = {
      'mean': mean,
      'logvar': log_variance,
      'std': deviation,
      'sample': sample,
      'decode_mean': decode(variables, golden_tools.nhwc(arrays['mean'])),
      'decode_z2': decode(variables, golden_tools.nhwc(arrays['z2'])),
  }
  for name, value in results.items():
    golden_tools.assert_close(golden_tools.nchw(value), arrays[name], 2e-4, name)


def check_shifted_autoencoder():
  """As Stable Diffusion 3 and Flux have it: latents are shifted, no 1x1 convolutions; as the networks here see them."""
  arrays, meta = golden_tools.load('vae_shift')
  net, variables = converted(*autoencoder_parts('vae_shift'))
  assert not net.quant_conv and not net.post_quant_conv and net.latent_channels == 6
  mean, log_variance = jax.jit(functools.partial(net.apply, method='encode'))(variables, golden_tools.nhwc(arrays['x']))
  golden_tools.assert_close(golden_tools.nchw(mean), arrays['mean'], 2e-4, 'mean')
  golden_tools.assert_close(golden_tools.nchw(jnp.exp(log_variance / 2)), arrays['std'], 2e-4, 'std')
  sample = np.asarray(mean + jnp.exp(log_variance / 2) * golden_tools.nhwc(arrays['eps']))
  shift, scaling = (meta['config'][f'{name}_factor'] for name in ('shift', 'scaling'))
  nothing = np.zeros_like(sample)
  seen = latents.Sampling(0, scaling, shift).sampled(latents.Moments(sample, nothing), key=0, epoch=0)
  golden_tools.assert_close(golden_tools.nchw(seen), arrays['seen'], 2e-4, 'seen')
  network = {key: getattr(net, key) for key in spaces.NETWORK_KEYS} | {'channels': net.latent_channels}
  config = configs.experiment(autoencoder=configs.autoencoder_network(scaling=scaling, shift=shift, **network))
  decoded = jax.jit(decoding.make_decoder(config, jnp.float32))(variables, golden_tools.nhwc(arrays['seen']))
  golden_tools.assert_close(golden_tools.nchw(decoded), arrays['decoded'], 2e-4, 'decoded')
