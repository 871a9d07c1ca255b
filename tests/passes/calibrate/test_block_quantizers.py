"""A block's state is all that calibration changes in it, and nothing else."""

import pytest
import torch
from helpers.strategies import EVERYTHING

from ptq4vm import QuantConfig
from ptq4vm.graph.partition import Block, partition_blocks
from ptq4vm.passes.calibrate.block_quantizers import BlockQuantizers
from ptq4vm.passes.quantized_nodes import quantized_linears
from ptq4vm.quantizers import Mode

CONFIGS = [QuantConfig.kscaled(8), EVERYTHING, QuantConfig.w4a4(learning=None, gptq=True)]


def parts_of(gm):
    linears = quantized_linears(gm)
    return [BlockQuantizers.of(gm, block) for block in partition_blocks(gm, [one.node for one in linears])]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("config", CONFIGS)
def test_the_states_of_blocks_are_what_calibration_changes(roads, config):
    before, after = roads.prepared(config).state_dict(), roads.calibrated(config).state_dict()
    changed = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    states = [part.state() for part in parts_of(roads.calibrated(config))]
    assert changed <= set().union(*states)
    assert sum(map(len, states)) == len(set().union(*states))
    assert not any(name.endswith("weight") for state in states for name in state)


@pytest.mark.parametrize("config", CONFIGS)
def test_resetting_undoes_calibration(roads, config):
    gm = roads.calibrated(config)
    with torch.no_grad():
        BlockQuantizers.of(gm, Block("model", gm, (), ())).reset()
    assert same(gm.state_dict(), roads.prepared(config).state_dict())


@pytest.mark.parametrize("config", CONFIGS)
def test_the_state_of_a_calibrated_model_makes_a_prepared_one_calibrated(roads, images, config):
    """Buffers that are None before are made by loading."""
    wanted, gm = roads.calibrated(config), roads.prepared(config)
    gm.load_state_dict(wanted.state_dict())
    for part in parts_of(gm):
        part.set_mode(Mode.QUANTIZE)
    with torch.no_grad():
        assert torch.equal(gm(images), wanted(images))
