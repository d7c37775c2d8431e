"""Which precision the products of a step ask for: a CPU computes them all alike, a TPU or GPU does not."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.extend import core

from pagoda_jax.planning import programs
from pagoda_jax.runtime import sharding
from pagoda_jax.stages import models, sampler


def precisions(jaxpr):
  """The precision of each matrix product and convolution in a jaxpr, those of loops and calls included, in order."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
      found.append(str((eqn.params['precision'] or ('none',))[0]))
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)):
      if hasattr(value, 'jaxpr') or hasattr(value, 'eqns'):
        found += precisions(getattr(value, 'jaxpr', value))
  return found


def of_phase(config, name):
  return precisions(programs.make(config, name).trace().jaxpr.jaxpr)


def test_inversion_is_float32_on_every_chip_inside_a_training_step_too():
  config = tiny.get_config()
  assert set(of_phase(config, 'invert')) == {'HIGHEST'}
  stored = of_phase(config, 'distill')
  config.phases.invert.store = False
  inverting = of_phase(config, 'distill')
  assert inverting.count('DEFAULT') == stored.count('DEFAULT') > 0
  assert inverting.count('HIGHEST') > stored.count('HIGHEST')


@pytest.mark.parametrize('name', ['teacher', 'distill', 'grow_16'])
def test_training_takes_the_precision_that_its_phase_asks_for(name):
  config = tiny.get_config()
  assert 'DEFAULT' in of_phase(config, name)
  config.phases[name].matmul_precision = 'highest'
  assert set(of_phase(config, name)) == {'HIGHEST'}


@pytest.mark.parametrize('form', ['edm', 'edm2'])
def test_the_head_after_layers_in_bfloat16_is_exact_where_that_is_asked_for(form):
  config = tiny.get_config()
  config.network.form, config.precision = form, 'bfloat16'
  unet = models.make_unet(config, 'teacher')
  variables = jax.eval_shape(lambda: {'params': models.fresh_params(unet, jax.random.key(0))})
  for asked in ('default', 'highest'):
    with jax.default_matmul_precision(asked):
      run = jax.jit(unet.apply).trace(variables, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), {'label': jnp.zeros(1, int)})
    head = [eqn for eqn in run.jaxpr.eqns if 'out_conv' in str(eqn.source_info.name_stack)
            and eqn.primitive.name == 'conv_general_dilated']
    assert [str(eqn.params['precision'][0]) for eqn in head] == [asked.upper()]
    assert {variable.aval.dtype for eqn in head for variable in (*eqn.invars, *eqn.outvars)} == {jnp.dtype('float32')}


def test_images_are_drawn_in_float32_and_the_head_always_computes_in_it():
  config = tiny.get_config()
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  unet = models.make_unet(config, 'teacher')
  params = jax.eval_shape(lambda: models.fresh_params(unet, jax.random.key(0)))
  noise, labels = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32)
  drawn = sampler.Sampler(config, 'teacher', mesh, 1)._draw.trace(params, noise, labels)
  assert set(precisions(drawn.jaxpr.jaxpr)) == {'HIGHEST'}
  with jax.default_matmul_precision('default'):
    run = jax.jit(unet.apply).trace({'params': params}, noise, jnp.zeros(1), {'label': labels})
  *others, head = precisions(run.jaxpr.jaxpr)
  assert head == 'HIGHEST' and others.count('DEFAULT') > len(others) / 2
