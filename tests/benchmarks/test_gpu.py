"""benchmarks/gpu.py, on a CPU: what it measures, keeps, leaves out and prints."""

import functools
import json
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from benchmarks import gpu, gpu_models, gpu_rows
from ptq4vm import ops
from ptq4vm.ops import convolution_1d, scans

SETUP = gpu_rows.Setup(torch.device("cpu"), gpu.bounds.GPUS["RTX 3090"], smoke=True)
FACTS = {"code": "a", "gpu": "none", "kernels": "none", "machine": {"torch": "2"}}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def row(name, calls, suite="linears", importance=1):
    """Its candidates call `calls`, by name lists of functions."""
    made = {key: (lambda own=own: gpu_rows.Candidate(own, 1e-6)) for key, own in calls.items()}
    return gpu_rows.Row(suite, name, 32, importance, lambda setup: made)


def test_a_row_is_begun_if_the_longest_one_so_far_would_end_in_time():
    clock = Clock()
    budget = gpu.Budget(10, clock)

    def work(seconds):
        clock.now += seconds
        return seconds

    assert budget.run("a", lambda: work(4)) == 4 and budget.run("a", lambda: work(1)) == 1
    assert budget.has_time_for("a")
    clock.now = 6.0
    assert not budget.has_time_for("a") and budget.has_time_for("b")
    clock.now = 10.0
    assert not budget.has_time_for("b")
    with pytest.raises(ZeroDivisionError):
        gpu.Budget(1, clock).run("c", lambda: 1 / 0)


def test_what_was_measured_is_kept_for_the_same_code_alone(tmp_path):
    path = tmp_path / "folder" / "rows.json"
    gpu.Results(path, FACTS).add("one", {"x": 1})
    again = gpu.Results(path, FACTS)
    again.add("two", {"x": 2})
    assert json.loads(path.read_text())["rows"] == {"one": {"x": 1}, "two": {"x": 2}}
    assert gpu.Results(path, FACTS | {"code": "b"}).rows == {}
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_times_are_of_one_call_and_of_every_candidate_that_can_be_made(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(gpu.compare.__globals__["time"], "perf_counter", clock)
    monkeypatch.setattr(gpu.compare.__globals__["time"], "process_time", clock)

    def takes(seconds):
        def call():
            clock.now += seconds

        return call

    made = row("r", {"base": [takes(2e-3)] * 4, "fast": [takes(1e-3), takes(1e-3)], "long": [takes(3e-3)]})
    broken = {"broken": lambda: 1 / 0, **made.candidates(SETUP)}
    found = gpu.measure(gpu_rows.Row("linears", "r", 32, 1, lambda setup: broken), SETUP, 0.1)
    times = {name: value["us"] for name, value in found["candidates"].items()}
    assert times == pytest.approx({"base": 2000, "fast": 1000, "long": 3000})
    ratios = {name: value["ratio"] for name, value in found["candidates"].items()}
    assert ratios == pytest.approx({"base": 1, "fast": 0.5, "long": 1.5})
    assert found["failed"] == {"broken": "ZeroDivisionError: division by zero"}
    assert found["candidates"]["base"]["bound"] == pytest.approx(1)
    with pytest.raises(RuntimeError, match="broken: ZeroDivisionError"):
        gpu.measure(gpu_rows.Row("linears", "r", 32, 1, lambda setup: {"broken": broken["broken"]}), SETUP, 0.1)


def test_an_interrupted_run_goes_on_and_the_least_important_rows_are_dropped(tmp_path):
    clock, calls = Clock(), []

    def call(name, seconds):
        def run():
            calls.append(name)
            clock.now += seconds / 12

        return {"only": [run]}

    def stop():
        raise KeyboardInterrupt

    path = tmp_path / "rows.json"
    first, second, third = (row(name, call(name, 100)) for name in "abc")
    interrupted = [first, row("b", {"only": [stop]}), third]
    with pytest.raises(KeyboardInterrupt):
        gpu.run(interrupted, gpu.Results(path, FACTS), SETUP, gpu.Budget(1000, clock), 0.0)
    assert set(calls) == {"a"}
    calls.clear()
    results = gpu.Results(path, FACTS)
    left = gpu.run([first, second, third], results, SETUP, gpu.Budget(150, clock), 0.0)
    assert set(calls) == {"b"} and left == {third.key: "no time"} and set(results.rows) == {first.key, second.key}
    bad = row("d", {"only": [lambda: 1 / 0]})
    assert "ZeroDivisionError" in str(gpu.run([bad], results, SETUP, gpu.Budget(150, clock), 0.0)[bad.key])


def candidate(us, ratio, bound=None):
    return {"us": us, "ratio": ratio, "bound": bound, "spread": 0.0, "ratio_spread": 0.0, "rounds": 5}


MEASURED = {
    "suite": "models",
    "name": "vim_base",
    "batch": 32,
    "failed": {"compiled bf16": "OutOfMemoryError: no"},
    "candidates": {
        "fp16": candidate(8000.0, 1.0),
        "W8A8 dynamic": candidate(6000.0, 0.75),
        "W8A8 per tensor": candidate(3960.0, 0.495),
        "W8A8 per token": candidate(4000.0, 0.5, 2500.0),
    },
}


def test_the_table_is_the_papers_with_bounds(tmp_path):
    results = gpu.Results(tmp_path / "rows.json", FACTS)
    results.rows = {"models, vim_base, batch 32": MEASURED}
    said = gpu.report(results, {"blocks, vim_base, batch 256": "no time"}, ["no mamba"])
    line = next(line for line in said.splitlines() if line.startswith("vim_base"))
    assert line.split("  ")[0] == "vim_base"
    assert "4 / 2.5 (2.00×)" in line and "6 (1.33×)" in line and " 8 " in line
    assert "Vim over fp16 with our scan: 2.00× (median of 1)" in said and "wanted 1.60×" in said
    assert "per token over per tensor: 0.99×" in said and "per token static over per token dynamic: 1.50×" in said
    assert "mamba-ssm" not in said.replace("no mamba", "") and "no mamba" in said
    assert "left out: blocks, vim_base, batch 256 (no time)" in said
    assert "failed: models, vim_base, batch 32, compiled bf16 (OutOfMemoryError: no)" in said


def test_verdicts_name_the_worst_row():
    slower = MEASURED | {"name": "vim_tiny", "candidates": MEASURED["candidates"] | {"fp16": candidate(4000.0, 1.0)}}
    slower["candidates"]["W8A8 per token"] = candidate(3600.0, 0.9)
    said = next(line for line in gpu.verdicts([MEASURED, slower]) if line.startswith("Vim over fp16 with our"))
    assert "worst 1.11× (vim_tiny, batch 32)" in said and "1.56× (median of 2)" in said


def test_rows_come_by_importance_and_have_keys_of_their_own():
    made = gpu.rows(gpu_models.MODELS)
    assert len({row.key for row in made}) == len(made) == 2 * (20 + 9 + 6 + 6)
    order = [(row.suite, row.batch) for row in made]
    assert order.index(("models", 32)) < order.index(("models", 256)) < order.index(("blocks", 256))
    assert [row.name for row in made if row.suite == "models"][:2] == list(gpu_models.MODELS[:2])


def test_one_operator_after_another_computes_what_the_fused_one_does():
    torch.manual_seed(0)
    cases = gpu_rows.operator_cases(2, smoke=True)
    for name, (ours, theirs, make) in cases.items():
        arguments = make()
        one, other = (call(*arguments) for call in (ours, theirs))
        if name == "Vim-B convolutions":  # which leaves its second direction reversed
            one, other = (y[1][0] for y in (one, other))
        if name == "VMamba-B s0 convolution":
            one, other = one[1], torch.stack(other[1])
        if name.endswith("norm"):
            one, other = one[1], other[1]
        assert one.shape == other.shape, name
        assert (one.double() - other).abs().max() <= 0.1 * other.double().abs().max(), name
        if one.dtype is torch.int8:
            assert (one.int() - other.int()).abs().float().mean() <= 0.2, name
            assert one.unique().numel() > 20, name


@given(st.booleans(), st.integers(0, 2**20))
def test_the_kernels_of_mamba_ssm_are_called_with_channels_before_tokens(optional, seed):
    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        turned = [None if x is None else x.transpose(1, 2) for x in (u, delta, B, C, z)]
        assert all(x is None or x.is_contiguous() for x in (u, delta, B, C, z))
        u, delta, B, C, z = turned
        return scans.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus).transpose(1, 2)

    def causal_conv1d_fn(x, weight, bias, activation):
        return convolution_1d.causal_conv1d(x.transpose(1, 2), weight, bias, activation == "silu").transpose(1, 2)

    interface = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    modules = {"mamba_ssm": types.ModuleType("mamba_ssm"), "mamba_ssm.ops": types.ModuleType("ops")}
    modules |= {"mamba_ssm.ops.selective_scan_interface": interface}
    modules |= {"causal_conv1d": types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)}
    random = torch.Generator().manual_seed(seed)
    u, delta, z, B, C = (torch.randn(2, 7, size, generator=random) for size in (5, 5, 5, 3, 3))
    A, D, bias = (
        -torch.rand(5, 3, generator=random),
        *(torch.randn(2, 5, generator=random) if optional else (None, None)),
    )
    inputs = (u, 3 * delta, A, B, C, D, z if optional else None, bias)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.testing.assert_close(gpu_models.mamba_scan(*inputs, True), scans.selective_scan(*inputs, True))
        conv = (inputs[0], torch.randn(5, 4, generator=random), None, optional)
        assert torch.equal(gpu_models.mamba_conv1d(*conv), convolution_1d.causal_conv1d(*conv))
    assert set(gpu_models.WITH_MAMBA) == {ops.selective_scan.default, ops.causal_conv1d.default}


def test_blocks_that_are_alike_are_compiled_once(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    monkeypatch.setitem(gpu_models.SMOKE, "vim_nano_patch4_32", {"depth": 3, "embed_dim": 16})
    setup = gpu_rows.Setup(torch.device("cpu"), None, smoke=True)
    (name,) = (name for name in gpu_models.names_of(whole=True) if name in gpu_models.COMPILED)
    candidate = gpu_models.model_row("vim_nano_patch4_32", 32, 0).candidates(setup)[name]()
    assert candidate.recorded(setup.device)() is None and counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_to_try_it_is_told(capsys):
    assert gpu.main([]) == 1 and "--device cpu --smoke" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_runs_on_a_cpu_once(tmp_path, capsys):
    options = ["--device", "cpu", "--smoke", "--output", str(tmp_path / "rows.json"), "--minutes", "60"]
    assert gpu.main(options) == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert {row["suite"] for row in kept["rows"].values()} == set(gpu.UNITS) and kept["left_out"] == {}
    assert all(row["failed"] == {} for row in kept["rows"].values())
    names = gpu_models.names_of(whole=True)
    assert all(list(row["candidates"]) == names for row in kept["rows"].values() if row["suite"] == "models")
    assert "vim_nano_patch4_32" in said and "left out" not in said
    assert gpu.main([*options, "--minutes", "0"]) == 0  # nothing is left to do
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == kept["rows"]
