import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.benchmark import compare, machine

seconds = st.integers(1, 1000)


class Clock:
    """Time passes only in models: each call takes the next of its durations."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def model(self, name, durations):
        remaining = iter(durations)

        def call(images):
            self.calls.append(name)
            self.now += next(remaining)

        return call


def timed(durations, batch=4, **options):
    clock = Clock()
    models = {name: clock.model(name, values) for name, values in durations.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock.now)
        return compare(models, torch.zeros(batch, 1), **options), clock.calls


@given(seconds, seconds, st.integers(0, 3), st.integers(1, 5))
def test_models_take_turns_and_the_warm_up_does_not_count(one, other, warmup, repeats):
    slow_start = [10_000] * warmup
    durations = {"one": slow_start + [one] * repeats, "other": slow_start + [other] * repeats}
    (a, b), calls = timed(durations, warmup=warmup, repeats=repeats)
    assert calls == ["one", "other"] * (warmup + repeats)
    assert (a.name, a.median, a.spread, a.ratio) == ("one", one, 0, 1)
    assert (b.name, b.median, b.spread, b.ratio) == ("other", other, 0, one / other)
    assert (b.images_per_second, b.batch_size, b.repeats) == (4 / other, 4, repeats)


@given(st.permutations([1, 2, 3, 4, 100]))
def test_one_slow_round_moves_neither_median_nor_spread(durations):
    (timing,), _ = timed({"model": durations}, warmup=0, repeats=5)
    assert (timing.median, timing.spread) == (3, 2)


def test_real_time_passes_without_gradients():
    def model(images):
        assert torch.is_inference_mode_enabled()

    (timing,) = compare({"model": model}, torch.zeros(2, 1), warmup=1, repeats=2)
    assert timing.median > 0 and json.loads(json.dumps(timing.to_dict()))["name"] == "model"


@pytest.mark.parametrize(
    "models, options, message",
    [
        ({}, {}, "nothing to compare"),
        ({"a": len}, {"repeats": 0}, "repeats must be at least 1 .* got 0 and 3"),
        ({"a": len}, {"warmup": -1}, "warmup at least 0, got 20 and -1"),
    ],
)
def test_what_cannot_be_timed_is_said(models, options, message):
    with pytest.raises(ValueError, match=message):
        compare(models, torch.zeros(1, 1), **options)


def test_the_machine_is_named():
    facts = machine()
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
    assert json.loads(json.dumps(facts)) == facts
