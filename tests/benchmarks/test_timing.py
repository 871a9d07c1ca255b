import contextlib
import csv
import doctest
import json
import time

import pytest
import torch
from helpers.public_models import create
from helpers.strategies import normal
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speed import graphs, picture
from benchmarks.speed.layers import Category
from ptq4vm.backend import native
from ptq4vm.benchmark import compare, machine, timing
from ptq4vm.benchmark.run import Plan, run
from ptq4vm.config import QuantConfig
from ptq4vm.formatting import write_csv
from ptq4vm.serialization.empty_model import empty_quantized_model

seconds = st.integers(1, 1000)


class Clock:
    """Time passes only in models: each call takes the next of its durations, on the CPU twice as long."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def model(self, name, durations):
        remaining = iter(durations)

        def call(images):
            self.calls.append(name)
            self.now += next(remaining)

        return call


def timed(durations, batch=4, threads=1, **options):
    clock = Clock()
    models = {name: clock.model(name, values) for name, values in durations.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock.now)
        patch.setattr(time, "process_time", lambda: 2 * clock.now)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        return compare(models, torch.zeros(batch, 1), **options), clock.calls


@given(seconds, seconds, st.integers(0, 3), st.integers(1, 5))
def test_models_take_turns_and_the_warm_up_does_not_count(one, other, warmup, repeats):
    slow_start = [10_000] * warmup
    durations = {"one": slow_start + [one] * repeats, "other": slow_start + [other] * repeats}
    (a, b), calls = timed(durations, warmup=warmup, repeats=repeats)
    assert calls == [name for i in range(warmup + repeats) for name in (("one", "other"), ("other", "one"))[i % 2]]
    assert (a.name, a.median, a.spread, a.ratio, a.ratio_spread) == ("one", one, 0, 1, 0)
    assert (b.name, b.median, b.cpu, b.spread, b.cpu_spread) == ("other", other, 2 * other, 0, 0)
    assert b.ratio == other / one
    assert (b.images_per_second, b.batch_size, b.repeats) == (4 / other, 4, repeats)


@given(st.permutations([1, 2, 3, 4, 100]))
def test_one_slow_round_moves_neither_median_nor_spread(durations):
    (timing,), _ = timed({"model": durations}, warmup=0, repeats=5)
    assert (timing.median, timing.spread) == (3, 2)


@given(st.lists(seconds, min_size=1, max_size=9), st.integers(1, 8))
def test_a_ratio_is_of_the_same_round(durations, factor):
    """However the machine's speed varies, one that takes three times as long does."""
    slower = [factor * value for value in durations]
    (_, timing), _ = timed({"a": durations, "b": slower}, warmup=0, repeats=len(durations))
    assert (timing.ratio, timing.ratio_spread) == (factor, 0)


def test_with_more_than_one_thread_the_ratio_is_of_the_time_on_the_wall():
    timings, _ = timed({"a": [1], "b": [2]}, warmup=0, repeats=1, threads=2)
    assert [(timing.clock, timing.threads) for timing in timings] == [("wall", 2)] * 2
    assert timed({"a": [1]}, warmup=0, repeats=1)[0][0].clock == "cpu"


def test_every_call_is_told():
    calls = []
    compare({"a": len, "b": len}, torch.zeros(1, 1), warmup=1, repeats=2, tick=lambda: calls.append(1))
    assert len(calls) == 6


def test_examples_run():
    assert doctest.testmod(timing).failed == 0


def test_real_time_passes_without_gradients():
    def model(images):
        assert torch.is_inference_mode_enabled()

    (timing,) = compare({"model": model}, torch.zeros(2, 1), warmup=1, repeats=2)
    assert timing.median > 0 and json.loads(json.dumps(timing.to_dict()))["name"] == "model"


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """It waits until what it is to do is there, then events stand around that."""
    done = []

    class Event:
        def __init__(self, enable_timing) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append(self)

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end) -> float:
            assert (done[1], done[3], done[4]) == (self, end, "wait")
            return 8.0

    for name in ("synchronize", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("busy"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model, images = {"model": lambda images: done.append("model")}, torch.zeros(2, 1)
    (timing,) = compare(model, images, warmup=0, repeats=1, stopwatch=graphs.stopwatch)
    assert (timing.median, timing.clock) == (0.008, "wall") and (done[0], done[2]) == ("busy", "model")


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


@pytest.fixture(scope="module")
def nano():
    """A model in floating point, and quantized with scales of one."""
    torch.manual_seed(0)
    model = create("vim_nano_patch4_32", depth=2).eval()
    return model, empty_quantized_model(model, (normal(2, 3, 32, 32, seed=0),), QuantConfig(range_search=False))


@pytest.fixture(scope="module")
def findings(nano):
    plan = Plan(
        kinds=("quantized", "eager-fp32", "twin"),
        others={"twin": nano[1]},
        batch_sizes=(1, 3),
        threads=(2, 1),
        repeats=2,
        sections=("layers",),
    )
    return run("vim_nano", (3, 32, 32), *nano, plan)


@pytest.mark.parametrize("threads", [0, -1, 100_000, 2**63])
def test_a_number_of_threads_that_no_machine_has_is_named(threads):
    with pytest.raises(ValueError, match=f"threads must be between 1 and .* processors, got {threads}"):
        Plan(kinds=("quantized",), threads=(1, threads))


def test_every_setting_is_measured_and_torch_keeps_its_threads(findings):
    threads = torch.get_num_threads()
    settings = [(timings[0].batch_size, timings[0].threads) for timings in findings.settings]
    assert settings == [(1, 2), (1, 1), (3, 2), (3, 1)] and torch.get_num_threads() == threads
    for timings, layers in zip(findings.settings, findings.sections["layers"].found, strict=True):
        assert [timing.name for timing in timings] == ["quantized", "eager-fp32", "twin"]
        assert {timing.clock for timing in timings} == {"cpu" if timings[0].threads == 1 else "wall"}
        assert timings[0].ratio == 1 and all(timing.ratio > 0 for timing in timings)
        assert list(layers) == ["FP32", "quantized", "fused"]


def test_the_first_columns_are_those_of_timm(findings, tmp_path):
    write_csv(tmp_path / "times.csv", findings.rows())
    with (tmp_path / "times.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "model infer_samples_per_sec infer_step_time infer_batch_size infer_img_size infer_gmacs param_count"
    assert list(rows[0])[:7] == columns.split()
    assert {"kind", "threads", "isa", "ratio", "spread", "clock"} <= set(rows[0])
    assert len(rows) == 12 and {row["isa"] for row in rows} == {native.isa()}
    for row in rows:
        seconds = 1e-3 * float(row["infer_step_time"])
        assert float(row["infer_samples_per_sec"]) == pytest.approx(int(row["infer_batch_size"]) / seconds, rel=0.01)
    assert rows[0]["infer_img_size"] == "32" and rows[0]["param_count"] == "0.09"


def test_json_has_everything(findings):
    result = findings.to_dict()
    assert json.loads(json.dumps(result)) == result
    assert len(result["timings"]) == 12 and result["memory"] == [] and result["unknown_operators"] == []
    whole = [row["share"] for row in result["layers"] if (row["batch_size"], row["threads"]) == (3, 1)]
    assert sum(whole) == pytest.approx(3)  # of three graphs
    patches, tokens = 64 * 48 * 64, 65 * (64 * 256 + 2 * (128 * (4 + 2 * 16) + 4 * 128) + 128 * 64)
    assert 1e9 * result["gmacs"] == patches + 2 * tokens + 64 * 10
    assert result["parameters"] < result["file_bytes"] < 2 * result["parameters"] + 100_000
    assert result["float16_bytes"] == 2 * result["parameters"]


def test_text_names_threads_instruction_set_and_ratio(findings):
    text = "\n".join(findings.lines())
    for words in (
        f"batch 3, 1 thread, {native.isa()} kernels",
        "2 threads",
        "time / quantized",
        "FP32: slowest",
        "GOP/s",
        "in FP16",
    ):
        assert words in text
    assert all(f"\n{kind}" in text for kind in Category)


def test_a_picture_is_one(findings, tmp_path):
    from PIL import Image

    findings.sections["layers"].draw(tmp_path / "time.png", findings.model)
    with Image.open(tmp_path / "time.png") as picture:
        width, height = picture.size
        assert picture.format == "PNG" and width > 1200 and height > 600
        assert len(picture.convert("RGB").getcolors(2**24)) > 7  # a bar has parts
    assert [path.name for path in tmp_path.iterdir()] == ["time.png"]


@pytest.mark.parametrize("name", ["time.txt", "time", "png"])
def test_a_file_that_is_no_picture_is_refused(name):
    with pytest.raises(ValueError, match=r"is no picture: its name must end with .png, .svg, .pdf"):
        picture.check_picture(name)
