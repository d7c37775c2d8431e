"""DINO's transformer and StyleGAN-T's heads against the original code."""

import functools

import golden_tools
import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.networks import token_heads
from pagoda_jax.networks.frozen import dino, projections
from pagoda_jax.weights.convert import mapping, timm

# Where a head's layers are in ours.
PLACES = {'main.0.0': ('block0', 'conv'), 'main.0.1': ('block0', 'norm'), 'main.1.fn.0': ('block1', 'conv'),
          'main.1.fn.1': ('block1', 'norm'), 'cls': ('logits',)}


def cases():
  """(name, check) of this file."""
  if not golden_tools.exists('dino'):
    return []
  checks = [(f'dino vit {side}', functools.partial(check_transformer, side)) for side in (64, 112)]
  checks += [(f'dino heads {tag}', functools.partial(check_heads, tag)) for tag in ('cond', 'plain')]
  return [(name, golden_tools.in_float32(check)) for name, check in checks]


def check_transformer(side):
  """Tokens as embedded and after two of the blocks; at 112 px the position grid is enlarged from 4 to 7."""
  arrays, meta = golden_tools.load('dino')
  meta = meta['vit']
  state_dict = golden_tools.rule_state_dict(meta['params'], meta['prefix'])
  options = timm.options(state_dict, head_channels=meta['kwargs']['embed_dim'] // meta['kwargs']['num_heads'])
  assert not options['distilled'] and options['grid'] == 4
  variables, carried = mapping.to_ours(state_dict, timm.leaves(options), timm.carried)
  assert set(carried) == {'norm.weight', 'norm.bias'}
  x = golden_tools.nhwc(np.random.default_rng(side).standard_normal((meta['batch'], 3, side, side)).astype(np.float32))
  module = projections.backbone(options, resized_positions=dino.bicubic_positions)
  sequences = module.apply(variables, x, method='tokens')
  for tap in (0, 2, 4):
    golden_tools.assert_close(sequences[tap], arrays[f'vit/{side}/tokens{tap}'], 1e-4, f'tokens after {tap} blocks')
  mean, deviation = projections.NORMALIZATION['deit']
  images = (x * np.float32(deviation) + np.float32(mean)) * 2 - 1  # those whose normalisation gives x
  seen = dino.DINO(options, taps=(4,), input_size=None).apply({'params': {'backbone': variables['params']}}, images)
  golden_tools.assert_close(seen[0], arrays[f'vit/{side}/seen4'], 1e-4, 'what the heads see')


def check_heads(tag):
  """Logits in both modes; gradients' norms, one whole gradient, the input's; a singular vector after a pass."""
  arrays, meta = golden_tools.load('dino')
  meta = meta[tag]
  heads, batch, width, length, classes = meta['sizes']
  rng = np.random.default_rng(meta['input_seed'])
  features = list(rng.standard_normal((heads, batch, width, length)).astype(np.float32).swapaxes(2, 3))
  labels = rng.integers(0, classes, batch)
  weights = rng.standard_normal((batch, heads * length)).astype(np.float32)
  np.testing.assert_array_equal(labels, arrays['heads/label'])
  module = token_heads.TokenDiscriminator(classes if tag == 'cond' else 0)
  variables, cond = head_variables(meta, heads, classes), {'label': labels}
  logits = module.apply(variables, features, cond, train=False)
  golden_tools.assert_close(logits, arrays[f'heads/{tag}/eval'], 1e-3, 'logits in evaluation')

  def weighed(params, features):
    logits, updated = module.apply({**variables, 'params': params}, features, cond, train=True, mutable=['spectral'])
    return jnp.sum(logits * weights), (logits, updated['spectral'])

  grad = jax.grad(weighed, argnums=(0, 1), has_aux=True)
  (grads, input_grads), (logits, spectral) = grad(variables['params'], features)
  golden_tools.assert_close(logits, arrays[f'heads/{tag}/train'], 1e-3, 'logits in training')
  input_grads = np.stack(input_grads).swapaxes(2, 3)
  golden_tools.assert_close(input_grads, arrays[f'heads/{tag}/input_grad'], 3e-3, "the input's gradient")
  kernel_grad = grads['head1_block1']['conv']['kernel'][0].transpose(2, 1, 0)
  golden_tools.assert_close(kernel_grad, arrays[f'heads/{tag}/grad/kernel9'], 3e-3, "the long kernel's gradient")
  golden_tools.assert_close(spectral['head1_block1']['conv']['u'], arrays[f'heads/{tag}/u'], 1e-4, 'left vector')
  leaves = {'weight_orig': 'kernel', 'bias': 'bias', 'weight': 'scale'}
  for name, norm in zip(meta['grad_names'], arrays[f'heads/{tag}/grad_norms']):
    _, head, rest = name.split('.', 2)
    theirs, leaf = rest.rsplit('.', 1)
    if theirs != 'cmapper':  # theirs is an equalised layer on a one-hot vector
      value = grads[f'head{head}_{PLACES[theirs][0]}']
      value = (value[PLACES[theirs][1]] if theirs != 'cls' else value)[leaves[leaf]]
      # A bias before a norm moves by rounding alone.
      np.testing.assert_allclose(np.linalg.norm(value), norm, rtol=3e-3, atol=1e-3, err_msg=name)


def head_variables(meta, heads, classes):
  """The heads' variables by the weight rule."""
  variables = {'params': {}, 'spectral': {}}
  for head in range(heads):
    prefix = f'heads.{head}.'
    theirs = {name.removeprefix(prefix): golden_tools.rule_tensor(meta['prefix'], name, shape)
              for name, shape in meta['params'] if name.startswith(prefix)}
    for layer, (block, *part) in PLACES.items():
      if part == ['norm']:
        found = {'params': {'scale': theirs[f'{layer}.weight'], 'bias': theirs[f'{layer}.bias']}}
      else:
        kernel, left, right = (theirs[f'{layer}.weight_{name}'] for name in ('orig', 'u', 'v'))
        right = right.reshape(-1, kernel.shape[2]).T.reshape(-1)  # ours runs over places first, then channels
        unit = lambda vector: vector / np.linalg.norm(vector)
        found = {'params': {'kernel': kernel.transpose(2, 1, 0)[None], 'bias': theirs[f'{layer}.bias']},
                 'spectral': {'u': unit(left), 'v': unit(right)}}
      for collection, values in found.items():
        place = variables[collection].setdefault(f'head{head}_{block}', {})
        place.update({part[0]: values} if part else values)
    if 'cmapper.weight' in theirs:  # an equalised layer on a one-hot vector: a table
      table = theirs['cmapper.weight'].T / np.float32(np.sqrt(classes)) + theirs['cmapper.bias']
      variables['params'][f'head{head}_embedding'] = {'embedding': table}
  return variables
