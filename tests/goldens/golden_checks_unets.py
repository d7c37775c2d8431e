"""Golden checks of the U-Nets, their conversions and the diffusion maths (goldens/README, sections 2 and 3)."""

import functools
import re

import golden_tools
import jax
import jax.numpy as jnp
import numpy as np
from golden_tools import assert_close, in_float32, nchw, nhwc

from pagoda_jax.method import diffusion
from pagoda_jax.networks import growth
from pagoda_jax.networks.unet import UNet
from pagoda_jax.weights.convert import edm, mapping, pagoda


def cases():
  """(id, check) of every golden file of this subject that the folder holds."""
  for file, checks in {
      'edm_adm': edm_checks, 'edm_ddpmpp': edm_checks, 'edm_loss': loss_checks,
      'pagoda_unet': pagoda_checks, 'pagoda_inversion': inversion_checks,
  }.items():
    if (golden_tools.FOLDER / f'{file}.npz').exists():
      yield from ((f'{file}/{name}', in_float32(check)) for name, check in checks(file))


class Network:
  """A U-Net with a golden file's rule weights, converted; one compilation for every call of one shape."""

  def __init__(self, convert, config, asked, leaves_asked):
    self.theirs = golden_tools.rule_state_dict(config['params'], config['prefix'], config['gain'])
    self.options = convert.options(self.theirs, **asked)
    self.leaves = convert.leaves(self.options, **leaves_asked)
    self.module = UNet(**self.options)
    self.params, self.carried = mapping.to_ours(self.theirs, self.leaves, convert.carried)
    self.block_names = convert.block_names(self.module)

  @functools.cached_property
  def traced_apply(self):
    def traced_apply(params, x, c_noise, cond, augment=None):
      output, state = self.module.apply(
          {'params': params}, x, c_noise, cond, augment=augment, mutable='intermediates',
          capture_intermediates=lambda module, _: module.name == 'in_conv' or module.name in self.block_names)
      return output, {name: calls['__call__'][0] for name, calls in state['intermediates'].items()}

    return jax.jit(traced_apply)

  def apply(self, params, x, c_noise, cond, augment=None):
    return self.traced_apply(params, x, c_noise, cond, augment)[0]

  def check_round_trip(self):
    back = mapping.to_theirs(self.params, self.leaves, self.carried)
    assert back.keys() == self.theirs.keys()
    for name, value in back.items():
      np.testing.assert_array_equal(value, self.theirs[name], err_msg=name)


def network_of_edm(json):
  # EDM's label-free call is a zero label vector: our -1. No augmentation is a zero vector, as there is no bias.
  return Network(edm, json, {}, {})


@functools.cache
def network_of_config(file, config):
  json = golden_tools.load(file)[1]
  return network_of_edm(json['configs'][config] if config else json)


def edm_checks(file):
  for config in golden_tools.load(file)[1]['configs']:
    yield f'{config}/round_trip', lambda config=config: network_of_config(file, config).check_round_trip()
    yield f'{config}/raw', lambda config=config: check_edm_raw(file, config)
    yield f'{config}/denoised', lambda config=config: check_edm_denoised(file, config)


def edm_inputs(file, config):
  arrays, network = golden_tools.load(file)[0], network_of_config(file, config)
  batch = arrays[f'{config}/x'].shape[1]
  cond = {'label': arrays[f'{config}/class_idx']} if network.module.num_classes else {}
  augment = np.zeros((batch, network.module.augment_dim), np.float32)
  return arrays, network, cond, arrays.get(f'{config}/augment_labels', augment), augment


def check_edm_raw(file, config):
  arrays, network, cond, augment, _ = edm_inputs(file, config)
  # The raw network and its inner values are recorded at the middle noise level; D's coefficients tell which.
  sigma = jnp.full(arrays[f'{config}/x'].shape[1], arrays[f'{config}/sigmas'][1])
  x = nhwc(arrays[f'{config}/x'][1])
  _, _, c_in, c_noise = diffusion.coefficients(diffusion.broadcast(sigma, x))
  output, _ = network.traced_apply(network.params, x * np.sqrt(2), c_noise.reshape(-1), cond, augment)
  assert_close(nchw(output), arrays[f'{config}/F_raw'], 1e-4, 'F_raw')
  _, inner = network.traced_apply(network.params, x * c_in, c_noise.reshape(-1), cond, augment)
  theirs = {ours: name for ours, name in network.block_names.items()}
  theirs['in_conv'] = f'model.enc.{network.module.resolution}x{network.module.resolution}_conv'
  for ours, name in theirs.items():
    if f'{config}/act/{name}' in arrays:
      check_inner(arrays, f'{config}/act/{name}', inner[ours], 1e-4)


def check_inner(arrays, name, value, tolerance):
  """A block's output: leading channels of the first image, and mean, std, max|.|, min, max of the batch."""
  recorded = arrays[name]
  assert_close(nchw(value)[0, :len(recorded)], recorded, tolerance, name)
  assert_close(stats(value), arrays[f'{name}/stats'], tolerance, f'{name}/stats')


def stats(x):
  return jnp.stack([x.mean(), x.std(), jnp.abs(x).max(), x.min(), x.max()])


def check_edm_denoised(file, config):
  arrays, network, cond, augment, no_augment = edm_inputs(file, config)
  denoise = diffusion.precondition(network.apply)
  for x, sigma, expected in zip(*(arrays[f'{config}/{name}'] for name in ('x', 'sigmas', 'D'))):
    denoised = denoise(network.params, nhwc(x), sigma, cond, augment=augment)
    assert_close(nchw(denoised), expected, 1e-4, f'D at {sigma}')
  no_label = {name: np.full_like(value, -1) for name, value in cond.items()}
  x, sigma = nhwc(arrays[f'{config}/x_mixed']), arrays[f'{config}/sigma_mixed']
  for name, given in {
      'D_mixed': (cond, no_augment), 'D_mixed_nolabel': (no_label, no_augment), 'D_mixed_augment': (cond, augment),
  }.items():
    if f'{config}/{name}' in arrays:
      denoised = denoise(network.params, x, sigma, given[0], augment=given[1])
      assert_close(nchw(denoised), arrays[f'{config}/{name}'], 1e-4, name)


def loss_checks(file):
  yield 'loss', lambda: check_loss(file)
  yield 'gradients', lambda: check_gradients(file)
  for run in sampler_runs(golden_tools.load(file)[1]):
    if f'sampler/{run}/x' in golden_tools.load(file)[0]:
      yield f'sampler/{run}', lambda run=run: check_sampler(file, run)


@functools.cache
def loss_and_gradients(file):
  """(sigma, error map, objective, gradients) of the golden loss; nothing but the raw draws is taken from the file."""
  arrays, json = golden_tools.load(file)
  network, terms = network_of_config(file, None), json['loss']
  denoise = diffusion.precondition(lambda params, *args: network.module.apply({'params': params}, *args),
                                   terms['sigma_data'])
  images, noise = nhwc(arrays['loss/images']), nhwc(arrays['loss/noise'])
  cond = {'label': arrays['loss/class_idx']} if network.module.num_classes else {}
  sigma = diffusion.training_sigma(arrays['loss/rnd_normal'].ravel(), terms['P_mean'], terms['P_std'])

  def objective(params):
    error = diffusion.weighted_error(denoise, params, images, cond, sigma, noise, terms['sigma_data'])
    return error.sum() / len(images), error

  (value, error), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(network.params)
  return sigma, error, value, gradients


def check_loss(file):
  arrays = golden_tools.load(file)[0]
  sigma, error, value, _ = loss_and_gradients(file)
  assert_close(sigma, arrays['loss/sigma'].ravel(), 1e-6, 'sigma')
  assert_close(nchw(error), arrays['loss/loss_map'], 1e-4, 'loss_map')
  np.testing.assert_allclose(value, arrays['loss/objective'], rtol=1e-5)


def check_gradients(file):
  arrays, json = golden_tools.load(file)
  network = network_of_config(file, None)
  gradients = mapping.to_theirs(loss_and_gradients(file)[-1], network.leaves)
  norms = [np.linalg.norm(gradients[name].astype(np.float64)) for name in json['grad_names']]
  np.testing.assert_allclose(norms, arrays['loss/grad_norms'], rtol=1e-4)
  np.testing.assert_allclose(np.linalg.norm(norms), arrays['loss/grad_total_norm'], rtol=1e-4)
  for name in arrays:
    if name.startswith('loss/grad/'):
      assert_close(gradients[name.removeprefix('loss/grad/')], arrays[name], 1e-4, name)


def sampler_runs(json):
  """Name -> (levels, churn options), as goldens/README lists them."""
  settings = json['sampler']
  levels = diffusion.sigmas(settings['num_steps'], settings['sigma_min'], settings['sigma_max'], settings['rho'])
  return {
      'det': (levels, {}),
      'churn40_full': (levels, {'churn': 40.0}),
      'churn40_imagenet': (
          levels, {'churn': 40.0, 'churn_min': 0.05, 'churn_max': 50.0, 'churn_scale': 1.003}),
      'det7': (diffusion.sigmas(7, 0.01, 40.0, 5.0), {}),
  }


def check_sampler(file, run):
  arrays, json = golden_tools.load(file)
  network = network_of_config(file, None)
  levels, churn = sampler_runs(json)[run]
  if churn:
    churn['churn_noise'] = nhwc(arrays['sampler/churn_noise'])
  cond = {'label': arrays['sampler/class_idx']} if network.module.num_classes else {}
  calls = []
  denoise = recorded(diffusion.precondition(network.apply), calls)
  images = diffusion.heun_sample(
      functools.partial(denoise, network.params), nhwc(arrays['sampler/latents']) * levels[0], levels, cond, **churn)
  # 1e-3: our state is float32, theirs float64.
  assert_close(nchw(images), arrays[f'sampler/{run}/x'], 1e-3, run)
  check_calls(calls, arrays, f'sampler/{run}/call_', ('sigma', 'x_stats', 'D_stats'))


def recorded(function, calls):
  """`function(params, x, level, cond)` that appends (level, stats of x, stats of the output) at every call."""
  def recording(params, x, level, cond):
    output = function(params, x, level, cond)
    jax.debug.callback(lambda *values: calls.append(values), jnp.max(level), stats(x), stats(output), ordered=True)
    return output

  return recording


def check_calls(calls, arrays, prefix, names):
  jax.effects_barrier()
  for name, values in zip(names, zip(*calls)):
    if prefix + name in arrays:
      assert_close(values, arrays[prefix + name][:len(calls)], 1e-3, prefix + name)


def pagoda_config(file, config):
  """A config's json with its list of parameters, which configs of equal weights share."""
  json = golden_tools.load(file)[1]
  entry = json if config is None else json['configs'][config]
  if 'params' not in entry:
    entry = next(e for e in json['configs'].values() if e['prefix'] == entry['prefix'] and 'params' in e) | entry
  return entry


@functools.cache
def network_of_pagoda(file, config=None):
  # One config reads legacy weights in the order of flash attention; only its name and note say so.
  return pagoda_network(pagoda_config(file, config), flash='flash_order' in (config or ''))


def pagoda_network(entry, flash=False):
  """The network of a json entry with constructor kwargs, prefix, gain and params."""
  kwargs = entry['kwargs']
  order = {'attention_order': 'flash' if flash else kwargs['attention_type'].removeprefix('vanilla_')}
  by_width = kwargs['num_head_channels'] != -1
  asked = {
      'resolution': kwargs['input_size'],
      'num_heads': 0 if by_width else kwargs['num_heads'],
      'channels_per_head': kwargs['num_head_channels'] if by_width else 64,
      'grown_num_blocks': kwargs['num_res_blocks_high'],
  }
  return Network(pagoda, entry, asked | order, order)


def pagoda_checks(file):
  arrays, json = golden_tools.load(file)
  for config in json['configs']:
    yield f'{config}/round_trip', lambda config=config: network_of_pagoda(file, config).check_round_trip()
    yield f'{config}/output', lambda config=config: check_pagoda_output(file, config)
    if f'{config}/out_gen_after_transfer' in arrays:
      yield f'{config}/growth', lambda config=config: check_growth(file, config)


def labels(network, y):
  return {'label': y} if network.module.num_classes else {}


def check_pagoda_output(file, config):
  arrays, network = golden_tools.load(file)[0], network_of_pagoda(file, config)
  x, cond = nhwc(arrays[f'{config}/x']), labels(network, arrays.get(f'{config}/y'))
  for time in ('mixed', 'gen'):
    c_noise = diffusion.coefficients(jnp.asarray(arrays[f'{config}/t_{time}']))[-1]
    if f'{config}/t_{time}_scaled_timestep' in arrays:
      scaled = network.module.time_scale * c_noise
      np.testing.assert_allclose(scaled, arrays[f'{config}/t_{time}_scaled_timestep'], rtol=1e-6)
    output, inner = network.traced_apply(network.params, x, c_noise, cond)
    assert_close(nchw(output), arrays[f'{config}/out_{time}'], 1e-3, time)
  if f'{config}/out_t0' in arrays:  # the scaled time is given, as float32 log(0 + 1e-44) depends on denormals
    c_noise = arrays[f'{config}/t0_scaled_timestep'] / np.float32(network.module.time_scale)
    assert_close(nchw(network.apply(network.params, x, c_noise, cond)), arrays[f'{config}/out_t0'], 1e-3, 't0')
  # Inner values are those of the t_gen call. A sequence of theirs ends with its last residual block.
  ends = {'input_blocks.0': 'in_conv'}
  ends |= {sequence: ours for ours, (sequence, _) in network.block_names.items()}
  for sequence, ours in ends.items():
    if f'{config}/act/{sequence}' in arrays:
      check_inner(arrays, f'{config}/act/{sequence}', inner[ours], 1e-3)


def check_growth(file, config):
  arrays, json = golden_tools.load(file)
  base_config = next(name for name, entry in json['configs'].items()
                     if entry['kwargs']['input_size'] == entry['kwargs']['output_size'])
  base, grown = network_of_pagoda(file, base_config), network_of_pagoda(file, config)
  names = json['name_maps'][config]
  params, report = growth.grow_params(grown.params, base.params)
  theirs = {leaf.ours: leaf.theirs for leaf in [*base.leaves, *grown.leaves]}
  for ours, expected in {
      'copied': names['copied'],
      'other_shape': [name for name, *_ in names['same_name_other_shape']],
      'new': [name for name, _ in names['new']],
      'left_out': [name for name, *_ in names['base_only']],
  }.items():
    assert sorted(theirs[path] for path in getattr(report, ours)) == sorted(expected), ours
  assert theirs['/'.join(growth.last_layer(params))] == names['last_layer_for_adaptive_weight']
  back = mapping.to_theirs(params, grown.leaves)
  for name, value in back.items():
    source = base.theirs if name in names['copied'] else grown.theirs
    np.testing.assert_array_equal(value, source[name], err_msg=name)
  c_noise = diffusion.coefficients(jnp.asarray(arrays[f'{config}/t_gen']))[-1]
  cond = labels(grown, arrays.get(f'{config}/y'))
  output = grown.apply(params, nhwc(arrays[f'{config}/x']), c_noise, cond)
  assert_close(nchw(output), arrays[f'{config}/out_gen_after_transfer'], 1e-3, 'out_gen_after_transfer')


def inversion_checks(file):
  runs = sorted({found[0] for name in golden_tools.load(file)[0] if (found := re.match(r'(inv|heun)\d+\w*', name))})
  yield 'denoiser', lambda: check_denoiser(file)
  yield 'one_step', lambda: check_one_step(file)
  for run in runs:
    yield run, lambda run=run: check_path(file, run)


def check_denoiser(file):
  arrays, json = golden_tools.load(file)
  network, sigma_data = network_of_pagoda(file), json['diffusion_args']['sigma_data']
  t, images, cond = arrays['denoiser/t'], nhwc(arrays['x0']), labels(network, arrays.get('y'))
  for name, value in zip(('c_skip', 'c_out', 'c_in'), diffusion.coefficients(jnp.asarray(t), sigma_data)):
    np.testing.assert_allclose(value, arrays[f'denoiser/{name}'], rtol=1e-6)
  denoise = diffusion.precondition(network.apply, sigma_data)
  assert_close(nchw(denoise(network.params, images, t, cond)), arrays['denoiser/D'], 1e-3, 'D')
  error = diffusion.weighted_error(
      denoise, network.params, images, cond, arrays['ode_loss/t'], nhwc(arrays['ode_loss/noise']), sigma_data)
  assert_close(error.mean(axis=(1, 2, 3)), arrays['ode_loss/loss'], 1e-3, 'ode_loss')


def check_one_step(file):
  arrays, json = golden_tools.load(file)
  network, args = network_of_pagoda(file), json['diffusion_args']
  z, cond = nhwc(arrays['inv40/z']), labels(network, arrays.get('y'))
  first = float(arrays['inv40/sigmas_with_zero'][0])  # sigma_max up to rounding
  for name, sigma_max in {'onestep': first, 'get_T_to_0': args['sigma_max']}.items():
    images = diffusion.one_step(network.apply, network.params, z, cond, sigma_max, args['sigma_data'])
    assert_close(nchw(images), arrays[f'{name}/x'], 1e-3, name)


def check_path(file, run):
  """A solution of the ODE: 'inv' or 'heun' (from the noise of inv40), the number of levels, clipped or not."""
  arrays, json = golden_tools.load(file)
  network, args = network_of_pagoda(file), json['diffusion_args']
  direction, num_levels, noclip = re.fullmatch(r'(inv|heun)(\d+)(_noclip)?', run).groups()
  levels = diffusion.sigmas(int(num_levels), args['sigma_min'], args['sigma_max'], args['rho'])
  if f'{run}/sigmas_with_zero' in arrays:
    np.testing.assert_allclose(np.append(levels, 0), arrays[f'{run}/sigmas_with_zero'], rtol=2e-6)
  calls = []
  denoise = diffusion.precondition(recorded(network.apply, calls), args['sigma_data'])
  solve, start, end = (
      (diffusion.invert, 'x0', 'z') if direction == 'inv' else (diffusion.heun_sample, 'inv40/z', 'x'))
  state = solve(functools.partial(denoise, network.params), nhwc(arrays[start]), levels,
                labels(network, arrays.get('y')), clip=not noclip)
  assert_close(nchw(state), arrays[f'{run}/{end}'], 1e-3, run)
  calls = [(np.exp(4 * c_noise), *values) for c_noise, *values in calls]
  assert len(calls) == 2 * len(levels) - (2 if direction == 'inv' else 1)
  check_calls(calls, arrays, f'{run}/call_', ('sigma', 'net_in_stats', 'net_out_stats'))
