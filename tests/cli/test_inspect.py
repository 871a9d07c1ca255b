"""`ptq4vm inspect` of folders, models and files of weights, and what else takes such files."""

import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.cli_commands import CONFIG, MODEL, WEIGHTS
from helpers.public_models import create

import ptq4vm


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
    left = {product["name"]: product["left"] for product in result["coverage"]["products"] if product["left"]}
    assert left == {"head": "head"} and len(result["coverage"]["products"]) == 1 + len(result["linears"])
    shown = run("inspect", saved)[1]
    assert "layers.5.mixer.out_proj" in shown
    assert (
        "\nquantizes 36 of 37 products of weights (99.9 % of multiply-adds); left: head because head; 13 conv" in shown
    )


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
    assert "1 tensors beside them are left out: neck.bias" in text
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
    for number in range(10, 20):  # another ten classes
        for split in ("train", "val"):
            shutil.copytree(f"{photos}/{split}/class_{number - 10}", tmp_path / "data" / split / f"class_{number}")
    photos = shutil.copytree(photos, tmp_path / "data", dirs_exist_ok=True)
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
    assert code == 0 and json.loads(out)["images"] == 40


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
        (("--data-dir", "digits", "--output", __file__), "is a file; choose another folder"),
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
