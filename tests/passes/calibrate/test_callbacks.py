"""Callbacks hear of every block and epoch, in order, and change nothing."""

import dataclasses
import doctest

import pytest
import torch
from helpers.small_models import LEARNED, blocks
from helpers.strategies import normal

from ptq4vm import CalibrationCallback, calibrate, prepare, quantize
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.calibrate import callbacks as module
from ptq4vm.quantization_specs import Loss

X = normal(8, 5, 8)
EPOCHS = LEARNED.learning.epochs
BLOCKS = ["layers.0", "layers.1"]


class Events(CalibrationCallback):
    """All events; raises KeyboardInterrupt at the one it is told."""

    def __init__(self, stop=None):
        self.heard, self.stop = [], stop

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def hear(*values):
            self.heard.append((name, *values))
            if (name, *values[:1]) == self.stop:
                raise KeyboardInterrupt

        return hear


def run(*callbacks, config=LEARNED, **options):
    return calibrate(prepare(blocks(), (X,), config), [X], progress=False, callbacks=callbacks, **options)


def names(events):
    return [name for name, *_ in events.heard]


def test_every_block_and_epoch_is_told_in_order():
    events = Events()
    gm = run(events)
    assert events.heard[0] == ("on_start", BLOCKS, EPOCHS) and events.heard[-1] == ("on_end",)
    one = ["on_block_start", *["on_epoch"] * EPOCHS, "on_block_end"]
    assert names(events)[1:-1] == one * 2
    epochs = [values for name, *values in events.heard if name == "on_epoch"]
    assert [(block, epoch) for block, epoch, _ in epochs] == [(block, e) for block in BLOCKS for e in range(EPOCHS)]
    assert all(0 < loss < 2 for *_, loss in epochs)
    reports = [values for name, *values in events.heard if name == "on_block_end"]
    assert reports == [[report["block"], report] for report in metadata_of(gm).blocks]


def test_callbacks_change_nothing_and_each_is_told_the_same():
    first, second = Events(), Events()
    told, alone = run(first, CalibrationCallback(), second), run()
    assert first.heard == second.heard
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in told.state_dict().items())


def test_batches_for_the_fisher_diagonal_are_told():
    events = Events()
    run(events, config=dataclasses.replace(LEARNED, learning=dataclasses.replace(LEARNED.learning, loss=Loss.FISHER)))
    assert events.heard[1:3] == [("on_fisher_batch", 1, 1), ("on_block_start", "layers.0")]


@pytest.mark.parametrize(
    "stop", [("on_block_start", "layers.1"), ("on_epoch", "layers.1"), ("on_block_end", "layers.0")]
)
def test_a_callback_may_end_the_calibration_which_then_goes_on(tmp_path, stop):
    events, again = Events(stop), Events()
    with pytest.raises(KeyboardInterrupt):
        run(events, resume_dir=tmp_path)
    assert events.heard[-1] == ("on_end",) and names(events).count("on_end") == 1
    resumed, whole = run(again, resume_dir=tmp_path), run()
    assert names(again)[1:3] == ["on_block_start", "on_block_end"]  # without learning
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_quantize_takes_callbacks_too():
    events = Events()
    quantize(blocks(), [X], LEARNED, progress=False, callbacks=[events])
    assert names(events).count("on_block_end") == 2


def test_the_example_runs():
    assert doctest.testmod(module).failed == 0
