"""The ladders of ImageNet as they are shipped fit the chips that their files name: `pytest -m slow`, minutes."""

import pathlib

import pytest
import test_experiments

from pagoda_jax.planning import plan
from pagoda_jax.runtime import topologies

FILES = ('imagenet_64_to_512', 'imagenet_32_to_512')
ROOT = pathlib.Path(__file__).parent.parent.parent / 'experiments'


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize('topology', ['v5e-256', 'v5p-64', '8xh100'])
@pytest.mark.parametrize('file', FILES)
def test_every_phase_fits(file, topology):
  config, topology = test_experiments.load(ROOT / f'{file}.py').get_config(''), topologies.parse(topology)
  for name in config.order:
    costs = plan.phase_costs(config, name, topology)
    assert 0 < costs.memory < 0.9 * topology.chip.memory, name
