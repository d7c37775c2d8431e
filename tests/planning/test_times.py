"""How long steps take on published chips, and what is recommended, against sums by hand."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pagoda_jax import config as c
from pagoda_jax.planning import costs, lanes, passes, plan, programs, sends, times
from pagoda_jax.runtime import topologies
from pagoda_jax.stages import models

FLOAT32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


class State(NamedTuple):
  params: dict
  ema: dict
  opt_state: dict


def counted_of(images, parameters, flops, image_bytes, **more):
  """A made-up phase of one parameter array with two Adam moments and an EMA, counted."""
  tree = {'kernel': FLOAT32(*parameters)}
  state, batch = State(tree, tree, {'mu': tree, 'nu': tree}), {'label': jax.ShapeDtypeStruct((images,), jnp.int32)}
  program = programs.Program(None, state, batch, {}, None, True)
  sent = sends.Sends({'params': 2}, {'params': 3}, {'params': 2}, own_losses=1, joined=set())
  found = plan.Counted(program, {'params': tree}, {}, 4, sent, 5 * math.prod(parameters), images * flops, 0.0, {},
                       image_bytes)
  return dataclasses.replace(found, **more)


def on(data, fsdp=1, zero1=1):
  return {'data': data, 'zero1': zero1, 'fsdp': fsdp}


# ADM-64 in distill: 296 M parameters, 1.84 TFLOP an image.
ADM = counted_of(256, (296, 1000, 1000), 1.84e12, 1.1e9)


def test_a_step_of_one_image_a_chip_on_256_v5e_by_hand():
  topology = topologies.Topology('v5e', 256)
  step = times.step_time(ADM.on(on(256)).costs(0), topology)
  assert step.compute == pytest.approx(1.84e12 / 0.59 / 197e12) == pytest.approx(15.8e-3, rel=0.01)
  # A pass forward, two backward, each for parameters and for what they were given.
  assert step.passes == pytest.approx(5 * 14 * 296e6 / 819e9) == pytest.approx(25.3e-3, rel=0.01)
  # Two trees of gradients in a ring; parameters, moments and EMA read and written, gradients read.
  assert step.collectives == pytest.approx(2 * 2 * 255 / 256 * 4 * 296e6 / 200e9) == pytest.approx(24e-3, rel=0.02)
  assert step.update == pytest.approx((4 * 2 + 1) * 4 * 296e6 / 819e9) == pytest.approx(13e-3, rel=0.01)
  assert step.bound == 'passes' and step.total == pytest.approx(78e-3, rel=0.01)
  assert step.hidden == pytest.approx(step.compute + step.passes + step.update)
  # Parts of a batch pass through the network each; the chips' peak of another maker's is reached to another share.
  parts = times.step_time(ADM.on(on(32)).costs(2), topologies.Topology('h100', 32))
  assert parts.passes == pytest.approx(4 * 5 * 14 * 296e6 / 3350e9)
  assert parts.compute == pytest.approx(8 * 1.84e12 / 0.4 / 989e12)
  assert all(topologies.Topology(name, 1).platform in times.MFU for name, chip in topologies.CHIPS.items() if chip.peak)
  assert times.step_time(ADM.on(on(256)).costs(0), topology, 0.5).compute == pytest.approx(1.84e12 / 0.5 / 197e12)


def test_parameters_are_passed_as_often_as_the_step_is_written():
  """Growth of a frozen trunk, by hand: three generators, two losses, seven pictures through the feature networks."""
  tree = lambda count: {'kernel': FLOAT32(count)}
  trained = {'params': tree(27), 'discriminator': tree(5), 'pairs_discriminator': {}}
  held = {'fixed': tree(270), 'frozen': {'features': tree(90)}}
  assert passes.parameters(trained, held, 2, True, {}) == 7 * 27 + 8 * 5 + 3 * 270 + 7 * 90
  assert passes.parameters(trained, held, 2, False, {}) == 6 * 27 + 8 * 5 + 2 * 270 + 6 * 90
  paired = trained | {'pairs_discriminator': tree(5)}  # a loss, fresh fakes and a turn more
  assert passes.parameters(paired, held, 3, True, {}) == 11 * 27 + 16 * 5 + 5 * 270 + 11 * 90
  teacher = {'params': tree(27), 'discriminator': {}, 'pairs_discriminator': {}}
  assert passes.parameters(teacher, {'fixed': {}, 'frozen': {}}, 1, False, {}) == 3 * 27
  # Networks that a step draws or inverts with, or asks once, are passed as often as it evaluates them.
  of_others = {'teacher': tree(1000), 'guide': tree(100), 'null_text': tree(7)}
  for frozen, more in ((of_others, 0), (of_others | held['frozen'], 7 * 90)):
    found = passes.parameters(trained, held | {'frozen': frozen}, 2, True, {'teacher': 78, 'guide': 1, 'x': 5})
    assert found == 7 * 27 + 8 * 5 + 3 * 270 + 78 * 1000 + 100 + more


def test_evaluations_of_others_networks_in_a_step():
  config = tiny.get_config('guided')  # two levels draw, three invert
  assert [passes.evaluations(config, name) for name in ('teacher', 'guide', 'invert', 'distill')] == [
    {}, {'teacher': 3}, {'teacher': 4}, {'teacher': 4, 'guide': 1}]
  config = tiny.get_config('roads')
  assert [passes.evaluations(config, name) for name in ('encode', 'encoded', 'distill')] == [
    {'teacher': 4}, {'teacher': 1}, {'teacher': 1}]
  config.phases.distill.update({'pairs': 'teacher', 'noise': 'invert'})
  assert passes.evaluations(config, 'distill') == {'teacher': 5}
  # They count in what is planned: an encoder's four passes, and inversion by it, which is one.
  found = {name: plan.count(config, name, topologies.Topology('v5e', 1)) for name in ('encode', 'encoded')}
  of_unet = models.count(found['encoded'].program.state)
  assert found['encoded'].passed == of_unet and found['encode'].passed == (3 + 4) * of_unet


def test_mfu_falls_with_the_images_of_a_chip():
  reached = []
  for chips in (256, 64, 16):
    topology = topologies.Topology('v5e', chips)
    step = times.step_time(ADM.on(on(chips)).costs(0), topology)
    reached.append(topologies.utilisation(256 / step.total, 1.84e12, topology))
  assert reached == sorted(reached) and reached[0] < 0.15 and 0.35 < reached[-1] < times.MFU['tpu'][0]


def test_split_parameters_are_gathered_and_updated_in_parts():
  whole, split = ADM.on(on(8)).costs(0), ADM.on(on(1, fsdp=8)).costs(0)
  parameters = 4 * 296e6
  assert split.state == whole.state / 8 and split.updated == whole.updated / 8
  assert whole.sent == 2 * 2 * 7 / 8 * parameters and split.sent == (3 + 2) * 7 / 8 * parameters
  both = ADM.on(on(2, fsdp=4)).costs(0)
  assert both.sent == 3 * 3 / 4 * parameters + 2 * (3 / 4 + 2 / 2 / 4) * parameters
  # Every part of a batch sums its gradients, but where parameters are whole.
  assert ADM.on(on(8)).costs(8).sent == whole.sent
  assert ADM.on(on(1, fsdp=8)).costs(8).sent == (3 + 4 * 2) * 7 / 8 * parameters
  assert ADM.on(on(8)).costs(8).activations == whole.activations / 4 == 8 * 1.1e9


def test_devices_that_share_an_update_gather_what_they_made():
  whole, shared = ADM.on(on(8)).costs(0), ADM.on(on(1, zero1=8)).costs(0)
  parameters = 4 * 296e6
  assert shared.state == whole.state / 4 * (1 + 3 / 8) and shared.gradients == whole.gradients
  # Read: gradients, old parameters; both ways: the other three quarters of the state; written: new parameters.
  assert shared.updated == (1 / 8 + 1 / 8 + 2 * 3 / 8 + 1) * parameters
  # Of one tree of gradients each device sums its part, the other is XLA's; new parameters twice, for fresh fakes too.
  assert shared.sent == (1 + 2 + 2) * 7 / 8 * parameters == 5 / 4 * whole.sent
  both = ADM.on(on(2, zero1=2, fsdp=2)).costs(0)
  assert both.state == (1 / 2 + 3 / 4) * parameters
  assert both.sent == (3 / 2 + 2 * (1 / 2) / 2 + 2 * (1 / 2 + 2 * 3 / 4 / 2)) * parameters
  # What is summed by each device itself, or over the parts of a batch, is float32, whatever the computation is in.
  half = dataclasses.replace(ADM, itemsize=2)
  assert half.on(on(8)).costs(0).sent == whole.sent / 2
  assert half.on(on(8)).costs(8).sent == whole.sent and half.on(on(1, zero1=8)).costs(8).sent == shared.sent
  assert half.on(on(1, zero1=8)).costs(0).sent == (1 + 2 / 2 + 2) * 7 / 8 * parameters


def test_gradients_that_xla_adds_before_it_sums_them_are_sent_once():
  joined = dataclasses.replace(ADM, itemsize=2, sends=ADM.sends._replace(joined={'params'}))
  assert joined.on(on(8)).costs(0).sent == ADM.on(on(8)).costs(0).sent / 2  # in float32
  # Not where each device sums those of one loss itself, nor in the turns of a loop.
  half = dataclasses.replace(ADM, itemsize=2)
  for mesh, microbatch in ((on(8), 8), (on(1, zero1=8), 0), (on(1, zero1=8), 8), (on(1, fsdp=8), 8)):
    assert joined.on(mesh).costs(microbatch).sent == half.on(mesh).costs(microbatch).sent


def test_what_is_joined_follows_from_the_weights():
  config = tiny.get_config()
  phase = config.phases.distill
  assert phase.adversarial.adaptive and phase.discriminator.spectral_norm
  assert sends.of_phase(phase, pairs=False, fresh=False).joined == set()
  phase.adversarial.adaptive = phase.discriminator.spectral_norm = False
  assert sends.of_phase(phase, pairs=False, fresh=False).joined >= {'params', 'discriminator'}
  assert 'params' not in sends.of_phase(phase, pairs=True, fresh=False).joined  # the pairs' weight is adaptive
  phase['update'] = 'separate'
  assert 'params' not in sends.of_phase(phase, pairs=False, fresh=False).joined


def test_hosts_share_a_network():
  assert topologies.parse('8xh100').link == 450e9 and topologies.parse('16xh100').link == 400e9
  assert topologies.parse('v5e-256').link == topologies.parse('v5e-4').link == 200e9


def test_recommended_is_the_most_chips_that_are_worth_their_hours():
  best = times.recommended(ADM, topologies.parse('v5e-8'))
  every = [times.best_on(ADM, topology) for topology in topologies.parse('v5e-8').sizes]
  fitting = [choice for choice in every if choice]
  assert all(choice.memory <= 0.8 * 16e9 for choice in fitting)
  fewest = min(choice.chip_seconds for choice in fitting)
  worth = [choice for choice in fitting if choice.chip_seconds <= 1.5 * fewest]
  assert best == worth[-1] and best.topology.count < 256
  # One chip holds 4.7 GB of state and 3.6 GB of gradients, those of a part among them; eight images leave no room.
  one = times.best_on(ADM, topologies.parse('v5e-1'))
  assert (one.mesh, one.microbatch) == (on(1), 4)
  # On more, moments and averages take a share each: nothing else is as quick.
  assert best.mesh['zero1'] > 1 == best.mesh['fsdp']
  assert times.recommended(dataclasses.replace(ADM, image_bytes=20e9), topologies.parse('v5e-8')) is None
  # There are no fewer than 4 chips of v5p (v5p-8); a batch of 2 splits over no such.
  assert times.recommended(counted_of(4, (8, 8), 1e9, 1e6), topologies.parse('v5p-64')).topology.count == 4
  assert times.recommended(counted_of(2, (8, 8), 1e9, 1e6), topologies.parse('v5p-64')) is None
  assert times.best_on(counted_of(96, (8, 8), 1e9, 1e6), topologies.parse('v5e-64')) is None  # 96 images on 64


def test_float32_products_take_longer_where_they_are_to_be_exact():
  def f(x, kernel):
    with jax.default_matmul_precision('highest'):
      x = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    rough = x.astype(jnp.bfloat16)
    x = jax.lax.scan(lambda x, _: (x @ kernel[0, 0], None), x, length=3)[0]
    return jnp.sum(x), jnp.sum(rough @ rough.swapaxes(2, 3))

  once = 2 * 4 * 10 * 10 * 5 * 5
  products = costs.float32_products(jax.make_jaxpr(f)(FLOAT32(4, 10, 10, 5), FLOAT32(3, 3, 5, 5)).jaxpr)
  assert products == {'highest': 9 * once, 'default': 3 * once}
  seconds = lambda products, chip: times.step_time(
    dataclasses.replace(ADM.on(on(1)).costs(0), flops=1e15, products=products), topologies.Topology(chip, 1), 0.5
  ).compute
  assert seconds({'default': 1e15}, 'v5e') == seconds({}, 'v5e') == pytest.approx(2e15 / 197e12)
  assert seconds({'highest': 1e15}, 'v5e') == pytest.approx(7e15 / 197e12)  # six products of bfloat16 in place of one
  assert seconds({'default': 1e15}, 'h100') == pytest.approx(3e15 / 989e12)  # TF32


def unet(**network):
  config = tiny.get_config()
  config.base_resolution = 64
  config.data.resolution = 128
  config.network = c.network(**network)
  config.phases.grow_16.update({'resolution': 128, 'channels': 192, 'num_blocks': 2})
  return config


def test_widths_that_leave_lanes_empty_are_named_with_what_would_be_right():
  assert lanes.useful_share(192, 192, 128) == 0.75**2 and lanes.useful_share(256, 256, 128) == 1
  # What XLA reaches for TPU v5e with 192 lies between padding both widths and one of them.
  assert 0.75**2 < 0.65 < 0.75
  config = unet(channels=192, channel_mult=(1, 2), num_blocks=1)
  found = lanes.wasteful(models.make_unet(config, 'teacher'), 128)
  assert [(level.name, level.widths, level.right) for level in found][0] == ('enc_64', (192,), (128, 256))
  assert {level.name for level in found} == {'enc_64', 'dec_64'} and found[0].useful == pytest.approx(0.5625)
  (grown,) = lanes.wasteful(models.make_unet(config, 'grow_16'), 128, grown_above=64)
  assert (grown.name, grown.widths, grown.right) == ('dec_128', (192,), (128, 256))
  assert grown.useful == pytest.approx(0.5625)
  for width in (128, 256):
    config.phases.grow_16.channels = width
    assert not lanes.wasteful(models.make_unet(config, 'grow_16'), 128, grown_above=64)
  assert lanes.wasteful(models.make_unet(unet(channels=128), 'teacher'), topologies.CHIPS['v6e'].lanes)
  assert not lanes.wasteful(models.make_unet(config, 'teacher'), topologies.CHIPS['h100'].lanes)
  guided = tiny.get_config('guided')
  assert [level.name for level in lanes.wasteful(models.make_unet(guided, 'guide'), 128)] == ['enc_8']  # no decoder
  assert np.all([chip.lanes > 0 for chip in topologies.CHIPS.values()])
