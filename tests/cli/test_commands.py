import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.cli_commands import CONFIG, MODEL, WEIGHTS, calibration
from helpers.portable_models import quantized_model
from PIL import Image
from torch import nn

import ptq4vm
from ptq4vm import doctor
from ptq4vm.backend import native
from ptq4vm.cli.main import main

COMMANDS = ("quantize", "evaluate", "benchmark", "inspect", "export", "push", "doctor")


def test_quantize_says_what_it_did_and_only_that(run, tmp_path, photos, config):
    resume = tmp_path / "blocks"
    argv = calibration(tmp_path / "out", photos, config, "--resume-dir", resume, "--json")
    code, out, err = run(*argv)
    result = json.loads(out)
    assert code == 0 and [line.split()[0] for line in err.splitlines()] == list(result["seconds"])
    assert result["images"] == 4 and result["linears"] == 36 and len(result["blocks"]) == 6
    assert [product["left"] for product in result["coverage"]["products"]] == [None] * 36 + ["head"]
    assert result["config"] == ptq4vm.QuantConfig(**CONFIG).to_dict()
    assert result["bytes_after"] < result["bytes_before"] < result["peak_memory_bytes"]
    assert len(list(resume.glob("block_*"))) == 6

    saved = (tmp_path / "out" / "model.safetensors").read_bytes()
    code, out, _ = run(*argv[:-1])  # over the same folder, from the finished blocks
    assert code == 0 and "36 linears" in out and "smaller" in out and str(tmp_path / "out") in out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == saved


@pytest.mark.parametrize("source", ["photos", "digits"])
def test_evaluate_measures_and_compares(run, saved, photos, source):
    data = photos if source == "photos" else source
    options = ("--data-dir", data, "--limit", 10, "--against", MODEL, *WEIGHTS, "--json")
    code, out, _ = run("evaluate", saved, *options)
    result = json.loads(out)
    assert code == 0 and result["images"] == 10 and result["split"] == "test"
    assert 0 <= result["top1"] <= result["top5"] <= 100 and result["agreement"] >= 50


def test_a_model_agrees_with_itself_whatever_the_batch(run, photos):
    argv = ("evaluate", MODEL, "--data-dir", photos, "--split", "train", "--against", MODEL, *WEIGHTS)
    one, other = (json.loads(run(*argv, "--batch-size", size, "--json")[1]) for size in (3, 20))
    assert one["agreement"] == other["agreement"] == 100 and one["images"] == 20
    assert one["top1"] == other["top1"] and one["loss"] == pytest.approx(other["loss"])
    assert run(*argv)[1].splitlines()[0].split()[:3] == ["model", "images", "top-1"]


def test_export_refuses_what_is_not_quantized(run, tmp_path):
    code, _, err = run("export", "vim_nano_patch4_32", tmp_path / "out.pt2")
    assert code == 1 and "is not the folder of a quantized model" in err


def test_export_writes_an_onnx_file(run, tmp_path):
    pytest.importorskip("onnxscript")
    saved = ptq4vm.save(quantized_model("raw")[0], tmp_path / "saved")
    path = tmp_path / "new" / "model.onnx"
    code, out, _ = run("export", saved, path, "--runtime", "onnxruntime", "--json")
    assert code == 0 and json.loads(out) == {
        "output": str(path),
        "bytes": path.stat().st_size,
        "runtime": "onnxruntime",
    }


def test_a_runtime_is_of_an_onnx_file(run, saved, tmp_path):
    code, _, err = run("export", saved, tmp_path / "out.pt2", "--runtime", "portable")
    assert code == 1 and "--runtime is of ONNX files" in err


@pytest.mark.slow
def test_benchmark_compares_kinds_and_saved_models(run, saved, tmp_path):
    copy = str(shutil.copytree(saved, tmp_path / "copy"))
    options = ("--batch-size", 2, "--repeats", 2, "--csv", tmp_path / "out" / "times.csv")
    argv = ("benchmark", saved, "--against", "eager-fp32", copy, *options, "--picture", tmp_path / "time.png")
    code, out, err = run(*argv, "--json")
    result = json.loads(out)
    assert code == 0 and [line for line in err.splitlines() if not line.endswith(" …")] == []
    assert [timing["name"] for timing in result["timings"]] == ["quantized", "eager-fp32", copy]
    assert result["timings"][0]["ratio"] == 1 and result["timings"][0]["threads"] == 1
    assert {row["graph"] for row in result["layers"]} == {"FP32", "quantized", "fused"}  # a picture shows them
    assert result["file_bytes"] == (Path(saved) / "model.safetensors").stat().st_size < result["float16_bytes"]
    heading, *lines = (tmp_path / "out" / "times.csv").read_text().splitlines()
    assert len(lines) == 3 and heading.startswith("model,infer_samples_per_sec,infer_step_time,")
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_benchmark_quantizes_a_model_given_by_name(run):
    code, out, _ = run("benchmark", MODEL, "--batch-size", 1, "--repeats", 1)
    assert code == 0 and "time / quantized" in out and "slowest" not in out


def test_doctor_says_who_serves_a_gpu(run, monkeypatch):
    def found() -> str:
        code, out, _ = run("doctor")
        assert code == 0
        return out

    monkeypatch.setattr(native, "cuda_unavailable_reason", lambda: "there is none")
    assert "native kernels for GPUs: none, there is none" in found()
    monkeypatch.setattr(native, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr(native, "cuda_architectures", lambda: ("8.0", "9.0a"))
    monkeypatch.setattr(doctor, "wrong_bits", lambda: [])  # there are no GPUs to ask
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((8, 6), (12, 0))[device])
    out = found()
    assert "native kernels for GPUs: for 8.0, 9.0a\n" in out
    assert "GPU 0: GPU of 0, compute capability 8.6\n" in out
    assert "GPU 1: GPU of 1, compute capability 12.0, not served by native kernels\n" in out


def test_doctor_finds_the_kernels_and_checks_them(run, monkeypatch):
    code, out, err = run("doctor", "--json")
    result = json.loads(out)
    assert code == 0 and not err and result["self_check"] == "ok"
    assert result["versions"]["ptq4vm"] == ptq4vm.__version__ and result["versions"]["torchao"]
    assert {"ptq4vm::quantize", "ptq4vm::linear", "ptq4vm::selective_scan"} <= result["operators"].keys()
    kernels = "PyTorch reference" if native.unavailable_reason() else f"CPU ({native.isa()})"
    assert set(result["operators"].values()) == {kernels}

    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(doctor.layouts, "pack_int4", lambda codes: torch.zeros(7, 17, dtype=torch.uint8))
    code, out, _ = run("doctor")
    assert code == 1 and "no-such-package is missing" in out and "wrong at [4] bits" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        (("inspect", "nowhere"), "nowhere is neither the folder of a quantized model .* nor a file of weights"),
        (("evaluate", MODEL, "--data-dir", "digits", *WEIGHTS, "--ema"), "--ema .*: give --checkpoint FILE"),
        (("evaluate", "vim_huge", "--data-dir", "digits"), "vim_huge is neither .* it knows vim_base"),
        (("evaluate", "other", "--data-dir", "digits"), r"other is neither .*; timm.list_models\(\)"),
        (("evaluate", f"{MODEL}.roman", "--data-dir", "digits"), f"neither .* {MODEL}.digits"),
        (("evaluate", "vim_tiny_patch16_224", "--data-dir", "digits"), "no weights .* --checkpoint FILE"),
        (("evaluate", MODEL, "--data-dir", "nowhere", *WEIGHTS), "nowhere: no such folder"),
        (("evaluate", MODEL, "--data-dir", "digits", "--split", "eval", *WEIGHTS), "split must be one of"),
        (("evaluate", MODEL, "--data-dir", "digits", "--checkpoint", "no.pth"), "no.pth: no such checkpoint"),
        (("quantize", "resnet18", "--data-dir", "digits", "--output", "x", *WEIGHTS), "no linear to quantize"),
        (("benchmark", MODEL, "--against", "quantized"), "quantized is given twice"),
        (
            ("benchmark", MODEL, "--against", "resnet18"),
            "'resnet18' is no way to run a model; there are quantized, fused",
        ),
        (("benchmark", MODEL, "--picture", "a.txt"), "a.txt is no picture"),
        (("benchmark", "resnet18"), "no linear to quantize"),
        (calibration("x", config="w9a9"), "'w9a9' is no config: give w8a8, .* or a .json file"),
        (calibration("x", config="minmax9"), "bits must be .* between 2 and 8, got 9"),
        (calibration("x", config="no.json"), "No such file .*no.json"),
        (calibration("x", "digits", "w8a8", "--seed", "-1"), "seed must be a non-negative integer of 63 bits; got -1"),
        (calibration("x", "digits", "w8a8", "--images", "2000"), "asks for 2000 images, the dataset has 1347"),
    ],
)
def test_an_expected_error_is_one_line(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv)
    *progress, last = err.splitlines()
    assert code == 1 and not out and all(line.endswith(" …") for line in progress)
    assert last.startswith("ptq4vm: error: ") and re.search(message, last)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"weigth_bits": 4}', "config has no key 'weigth_bits'; it knows weights"),
        ('{"learning": {"epoch": 4}}', "learning has no key 'epoch'; it knows epochs"),
        ("[4]", "a config is a JSON object, got list"),
        ("{", "Expecting property name"),
    ],
)
def test_a_wrong_config_is_refused_before_any_work(run, tmp_path, text, message):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    code, _, err = run(*calibration(tmp_path / "out", "digits", path))
    assert code == 1 and err.startswith(f"ptq4vm: error: {path}: ") and message in err


def test_a_folder_of_something_else_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(*calibration(tmp_path))
    assert code == 1 and err == f"ptq4vm: error: {tmp_path} has a config.json that ptq4vm did not write; " + (
        "choose another folder\n"
    )


def test_a_model_that_timm_does_not_know_is_used_as_far_as_its_folder_tells(run, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2), nn.Linear(16, 16), nn.Flatten(1), nn.Linear(64, 10))
    images = torch.ones(2, 3, 32, 32)
    quantized = ptq4vm.quantize(model.eval(), [images], ptq4vm.QuantConfig.minmax(8), progress=False)
    ptq4vm.save(quantized, tmp_path / "own")
    code, out, err = run("evaluate", tmp_path / "own", "--data-dir", "digits", "--limit", "8", "--json")
    assert code == 0 and json.loads(out)["images"] == 8 and "that of ImageNet's models is taken …" in err
    folder = tmp_path / "images" / "val" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (4, 4)).save(folder / "a.png")
    code, _, err = run("evaluate", tmp_path / "own", "--data-dir", tmp_path / "images")
    assert code == 1 and "1 class folders (a), but the model has 10 classes" in err
    code, _, err = run("benchmark", tmp_path / "own")
    assert code == 1 and "own was made from a model that timm cannot build" in err.splitlines()[-1]


def test_a_damaged_model_is_named(run, saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1])
    code, _, err = run("inspect", copy)
    assert code == 1 and "truncated or edited" in err and err.count("\n") == 1


def test_a_checkpoint_nobody_reads_is_an_error(run, saved):
    code, _, err = run("evaluate", saved, "--data-dir", "digits", *WEIGHTS)
    assert code == 1 and f"--checkpoint is for a model given by name; {saved} has its own weights" in err


def test_a_checkpoint_of_another_model_is_one_line(run, saved):
    weights = Path(saved) / "model.safetensors"
    code, _, err = run("evaluate", MODEL, "--data-dir", "digits", "--checkpoint", weights)
    assert code == 1 and "does not fit Vim" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "more, message",
    [((), "nothing is kept"), (("--resume-dir", "blocks"), "finished blocks are kept in blocks")],
)
def test_an_interrupt_is_one_line_and_130(run, tmp_path, monkeypatch, config, more, message):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ptq4vm, "prepare", interrupted)
    code, out, err = run(*calibration(tmp_path / "out", "digits", config, *more))
    assert code == 130 and not out and message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_interrupt_of_another_command_is_just_that(run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", interrupted)
    assert run("doctor") == (130, "", "ptq4vm: interrupted\n")


@pytest.mark.slow
def test_an_interrupted_benchmark_says_so(run, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ptq4vm.benchmark.run.compare", interrupted)
    code, out, err = run("benchmark", MODEL, "--csv", tmp_path / "times.csv")
    assert code == 130 and not out and err.splitlines()[-1] == "ptq4vm: interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("export",),
        ("inspect",),
        ("quantize", MODEL),
        ("benchmark", MODEL, "--repeats", "0"),
        ("benchmark", MODEL, "--batch-size", "1", "0"),
        ("benchmark", MODEL, "--repeat", "2"),  # no abbreviations: they break when options are added
        ("evaluate", MODEL, "--data-dir", "digits", "--limit", "few"),
    ],
)
def test_wrong_usage_is_code_2(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: ptq4vm" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_shows_defaults(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    options = re.findall(r"^  (--[a-z-]+)(.*)", text, re.MULTILINE)
    assert stop.value.code == 0 and len(options) <= 10 and "--json" in dict(options)
    assert "None" not in text and "False" not in text
    defaults = {"quantize": "w8a8 256 32 0", "evaluate": "test 64", "benchmark": "quantized 20", "inspect": "test 32 4"}
    shown = re.findall(r"\(default:\s+(\S+)\)", text)
    assert shown == defaults.get(command, "").split()


def test_help_and_version_come_without_torch():
    program = (
        "import sys; from ptq4vm.cli.main import main\n"
        "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    for argv in (["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)):
        done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
        assert done.returncode == 0 and "ptq4vm" in done.stdout and not done.stderr


@pytest.mark.slow
def test_a_saved_model_is_read_by_a_new_process(saved):
    command = [sys.executable, "-m", "ptq4vm", "inspect", saved, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"]["name"] == MODEL


def test_a_head_that_was_replaced_by_hand_is_what_evaluation_counts(run, tmp_path):
    """The model's name would tell another number of classes."""
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", depth=1, num_classes=3)
    model.head = torch.nn.Linear(model.head.in_features, 10)
    images = torch.randn(4, 3, 32, 32)
    folder = ptq4vm.save(
        ptq4vm.quantize(model, [images], ptq4vm.QuantConfig.minmax(8), progress=False), tmp_path / "model"
    )
    code, out, error = run("evaluate", folder, "--data-dir", "digits", "--limit", 8, "--json")
    assert code == 0 and json.loads(out)["images"] == 8, error
