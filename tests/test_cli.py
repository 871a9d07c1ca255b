import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from public_models import create

import ptq4vm
from ptq4vm import doctor, native
from ptq4vm.cli import main

MODEL = "vim_nano_patch4_32"
WEIGHTS = ("--checkpoint", "random")
CONFIG = {"weight_bits": 4, "activation_bits": 8, "range_search": False}
COMMANDS = ("quantize", "evaluate", "benchmark", "inspect", "export", "doctor")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """Ten classes of two images, wider than high and larger than the model's."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(20):
            path = root / split / f"class_{number % 10}" / f"{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(path)
    return str(root)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, photos, config) -> str:
    """A quantized model, made by the command."""
    folder = str(tmp_path_factory.mktemp("models") / "quantized")
    assert main(calibration(folder, photos, config)) == 0
    return folder


def calibration(output, data="digits", config="w8a8", *more) -> list[str]:
    command = ["quantize", MODEL, "--data-dir", str(data), "--output", str(output), *WEIGHTS]
    return [*command, "--config", str(config), "--images", "4", "--batch-size", "2", *more]


@pytest.fixture
def run(capsys):
    """Code, standard output and standard error of a command."""

    def call(*argv) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return call


def test_quantize_says_what_it_did_and_only_that(run, tmp_path, photos, config):
    resume = tmp_path / "blocks"
    argv = calibration(tmp_path / "out", photos, config, "--resume-dir", resume, "--json")
    code, out, err = run(*argv)
    result = json.loads(out)
    assert code == 0 and [line.split()[0] for line in err.splitlines()] == list(result["seconds"])
    assert result["images"] == 4 and result["linears"] == 36 and len(result["blocks"]) == 6
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


def test_inspect_shows_what_was_saved(run, saved):
    code, out, err = run("inspect", saved, "--json")
    result = json.loads(out)
    assert code == 0 and not err
    assert result["architecture"]["name"] == MODEL and result["input_shapes"] == [[3, 32, 32]]
    assert result["config"] == ptq4vm.QuantConfig(**CONFIG).to_dict()
    assert [row["name"] for row in result["linears"]] == [
        name for block in result["blocks"] for name in block["linears"]
    ]
    assert result["weight_bytes"] == sum(row["weight_bytes"] for row in result["linears"]) < result["bytes"]
    assert "layers.5.mixer.out_proj" in run("inspect", saved)[1]


def test_inspect_measures_every_layer_and_draws(run, saved, tmp_path):
    argv = ("inspect", saved, "--data-dir", "digits", "--images", 4, "--against", MODEL, *WEIGHTS)
    code, out, err = run(*argv, "--output", tmp_path / "out", "--pictures", 1, "--json")
    result = json.loads(out)
    assert code == 0 and [line for line in err.splitlines() if not line.endswith(" …")] == []
    assert (result["against"], result["split"], result["images"]) == (MODEL, "test", 4)
    recorded = json.loads((Path(saved) / "config.json").read_text())["quantization_config"]["linears"]
    found = {row["name"]: row["output_sqnr_db"] for row in result["linears"]}
    assert sorted(found) == sorted(linear["name"] for linear in recorded) and list(found.values()) == sorted(
        found.values()
    )
    assert all(row["weight_sqnr_db"] > 10 and row["clipped_percent"] < 50 for row in result["linears"])
    worst = next(iter(found))
    assert [Path(file).name for file in result["files"]] == ["report.html", "overview.png", f"{worst}.png"]
    assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted(result["files"])
    code, out, _ = run(*argv[:6])
    assert code == 0 and "input SQNR dB" in out and "output SQNR dB" not in out and "wrote" not in out


def test_inspect_shows_what_a_model_sees(run, tmp_path):
    options = ("--data-dir", "digits", "--split", "train", "--images", 4, *WEIGHTS)
    code, out, _ = run("inspect", MODEL, *options, "--output", tmp_path / "out", "--pictures", 1, "--json")
    result = json.loads(out)
    assert code == 0 and len(result["linears"]) == 36 and len(result["files"]) == 3
    peaks = [row["peak"] for row in result["linears"]]
    assert peaks == sorted(peaks, reverse=True) and min(peaks) >= 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<title>{MODEL}, not quantized</title>" in page and "4 of digits, train split" in page


def weights(name: str, **options) -> dict[str, torch.Tensor]:
    """Tensors that take no space in a file."""
    with torch.device("meta"):
        state = create(name, **options).state_dict()
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}


@pytest.fixture
def file(tmp_path):
    """Writes a file of weights."""

    def write(content, name: str = "some weights.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def test_inspect_shows_what_is_fused_and_what_is_left(run, saved):
    result = json.loads(run("inspect", saved, "--graph", "--json")[1])
    patterns = Counter(fusion["pattern"] for fusion in result["fused"])
    assert patterns["projection + step + scan, 2 directions, summed + quantize"] == 6 and not result["left"]
    assert "30 places fused, 0 left" in run("inspect", saved, "--graph")[1]


def test_export_refuses_what_is_not_quantized(run, tmp_path):
    code, _, err = run("export", "vim_nano_patch4_32", tmp_path / "out.pt2")
    assert code == 1 and "is not the folder of a quantized model" in err


def test_inspect_recognizes_a_file_and_says_how_to_use_it(run, file):
    path = file({"model": weights(MODEL), "model_ema": weights(MODEL), "epoch": 3})
    code, out, err = run("inspect", path, "--json")
    result = json.loads(out)
    assert code == 0 and not err
    assert result["container"] == "model" and result["averaged"] == ["model_ema"] and result["left_out"] == 0
    assert result["tensors"] == 109 and result["dtypes"] == {"float32": 109}
    assert result["bytes"] == 4 * result["values"]
    (found,) = result["matches"]
    assert found["name"] == MODEL and found["fits"] and not found["features_only"] and found["agreement"] == 1
    command = shlex.split(found["next"])
    assert command[:5] == ["ptq4vm", "quantize", MODEL, "--checkpoint", str(path)]
    text = run("inspect", path)[1]
    assert "averaged weights too, under model_ema" in text and "every tensor fits" in text and found["next"] in text

    result = json.loads(run("inspect", path, "--ema", "--json")[1])
    assert result["container"] == "model_ema" and " --ema " in result["matches"][0]["next"]
    assert "averaged weights too" not in run("inspect", path, "--ema")[1]


def test_inspect_says_that_twins_cannot_be_told_apart(run, file):
    text = run("inspect", file({"state_dict": weights("local_vim_small")}))[1]
    assert "--checkpoint" in text and text.count("every tensor fits") == 2 and "local_vim_small_searched" in text
    assert "accuracy on images\ndecides" in text


def test_inspect_tells_backbones_and_classifiers_apart(run, file):
    backbone = {f"backbone.{name}": tensor for name, tensor in weights("vmamba_tiny_s1l8", features_only=True).items()}
    text = run("inspect", file({"state_dict": backbone | {"neck.bias": torch.ones(1)}}))[1]
    assert "1 tensors beside those of the backbone" in text
    assert 'timm.create_model("vmamba_tiny_s1l8", features_only=True)' in text and "quantize" not in text
    text = run("inspect", file(weights("vmamba_tiny_s1l8")))[1]
    assert "ptq4vm quantize vmamba_tiny_s1l8 " in text and "strict=False)" in text


def test_inspect_says_what_differs(run, file):
    state = weights(MODEL)
    gone = [state.pop(name) for name in list(state)[-5:]]
    (found,) = json.loads(run("inspect", file(state), "--json")[1])["matches"]
    assert len(found["missing"]) == len(gone) and not found["fits"] and found["next"] is None
    assert re.search(r"the closest, \d\d % of the tensors agree\n  missing: ", run("inspect", file(state))[1])
    code, out, _ = run("inspect", file({"fc.weight": torch.ones(2, dtype=torch.half), "steps": torch.ones(1)}))
    assert code == 0 and "float16 (1), float32 (1)" in out and "of none of the families known here (local_vim" in out


@pytest.mark.slow
def test_a_file_decides_classes_image_size_and_averaging(run, file, tmp_path, photos):
    torch.manual_seed(1)
    model = create(MODEL, num_classes=20, img_size=48)
    path = file({"model": {"unlike": torch.ones(1)}, "ema_model": model.state_dict()})
    options = ("--data-dir", photos, "--checkpoint", path, "--ema")
    code, _, err = run("evaluate", MODEL, *options)
    assert code == 0 and f"{MODEL} with num_classes=20, img_size=48, as {path} has it" in err
    minmax = ("--config", "minmax8", "--images", "4", "--output", tmp_path / "out")
    assert run("quantize", MODEL, *options, *minmax)[0] == 0
    result = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert result["input_shapes"] == [[3, 48, 48]] and result["architecture"]["arguments"]["num_classes"] == 20
    code, out, _ = run("evaluate", tmp_path / "out", *options[:2], "--against", MODEL, *options[2:], "--json")
    assert code == 0 and json.loads(out)["images"] == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.ones(1)}, "args": Path.cwd}, "reading it would have to call .*, which could run any"),
        ({"epoch": 3}, "no weights under model, "),
        ({"model": {"a": 3}}, "not tensors: a"),
        ({"layers.0.mixer.in_proj.weight_q": torch.ones(1)}, "weights of a quantized model: inspect its folder"),
    ],
)
def test_inspect_refuses_a_file_in_one_line(run, file, content, message):
    code, out, err = run("inspect", file(content))
    assert code == 1 and not out and err.count("\n") == 1
    assert err.startswith("ptq4vm: error: ") and re.search(message, err)


def test_inspect_refuses_averaged_weights_that_are_not_there(run, file, saved):
    assert "no averaged weights" in run("inspect", file(weights(MODEL)), "--ema")[2]
    assert "--ema is for a file of weights" in run("inspect", saved, "--ema")[2]
    assert "inspect its folder" in run("inspect", Path(saved) / "model.safetensors")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", MODEL), "--against needs images to run the model on: give --data-dir DIR"),
        (("--output", "x"), "--output needs images to run the model on: give --data-dir DIR"),
        (("--data-dir", "digits", *WEIGHTS), "--checkpoint is for --against or a model's name"),
        (("--data-dir", "digits", "--graph"), "--graph tells what is fused .*: give one of them"),
        (("--data-dir", "digits", "--against", "SAVED"), "is a quantized one; 'ptq4vm evaluate' compares two"),
        (("--data-dir", "digits", "--output", __file__), "is a file; choose a folder for the figures"),
        (("--data-dir", "nowhere"), "nowhere: no such folder"),
        (("--data-dir", "digits", "--images", "451"), "asks for 451 images, the dataset has 450"),
    ],
)
def test_inspect_refuses_options_that_would_do_nothing(run, saved, options, message):
    code, out, err = run("inspect", saved, *(saved if option == "SAVED" else option for option in options))
    assert code == 1 and not out and re.search(message, err.splitlines()[-1])


def test_inspect_of_a_file_or_a_name_takes_no_options_of_a_folder(run, file):
    path = file(weights(MODEL))
    assert "--data-dir is for a model; " in run("inspect", path, "--data-dir", "digits")[2]
    assert "--graph is for the folder" in run("inspect", path, "--graph")[2]
    assert "--against is for the folder" in run("inspect", MODEL, "--data-dir", "digits", "--against", MODEL)[2]
    assert "vim_huge is neither" in run("inspect", "vim_huge", "--data-dir", "digits")[2]


def test_a_file_in_place_of_a_name_is_told(run, file):
    path = file(weights(MODEL))
    code, _, err = run("evaluate", path, "--data-dir", "digits")
    assert (
        code == 1 and f"is a file: give its model's name, which 'ptq4vm inspect' tells, and --checkpoint {path}" in err
    )


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

    monkeypatch.setattr(native, "cuda_problem", lambda: "there is none")
    assert "native kernels for GPUs: none, there is none" in found()
    monkeypatch.setattr(native, "cuda_problem", lambda: None)
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
    kernels = "PyTorch reference" if native.problem() else f"CPU ({native.isa()})"
    assert set(result["operators"].values()) == {kernels}

    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(doctor.reference, "pack_int4", lambda codes: torch.zeros(7, 17, dtype=torch.uint8))
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
        (("benchmark", MODEL, "--against", "resnet18"), "'resnet18' is no way to run a model; there are eager-fp32"),
        (("benchmark", MODEL, "--picture", "a.txt"), "a.txt is no picture"),
        (("benchmark", "resnet18"), "no linear to quantize"),
        (calibration("x", config="w9a9"), "'w9a9' is no config: give w8a8, .* or a .json file"),
        (calibration("x", config="minmax9"), "bits must be .* between 2 and 8, got 9"),
        (calibration("x", config="no.json"), "No such file .*no.json"),
        (calibration("x", "digits", "w8a8", "--seed", "-1"), "seed must be a non-negative integer; got -1"),
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
        ('{"weigth_bits": 4}', "config has no key 'weigth_bits'; it knows weight_bits"),
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
    (tmp_path / "thesis.tex").touch()
    code, _, err = run(*calibration(tmp_path))
    assert code == 1 and err.startswith(f"ptq4vm: error: {tmp_path} exists and holds no quantized model")


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


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def broken(*args):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(doctor, "diagnose", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        main(["doctor"])


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
        "import sys; from ptq4vm.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", program, option], capture_output=True, text=True)
        assert done.returncode == 0 and "ptq4vm" in done.stdout and not done.stderr


@pytest.mark.slow
def test_a_saved_model_is_read_by_a_new_process(saved):
    command = [sys.executable, "-m", "ptq4vm", "inspect", saved, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"]["name"] == MODEL
