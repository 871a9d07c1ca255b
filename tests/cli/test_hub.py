"""Commands on a model of the Hub, on the loopback address: as on its folder."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.cli_commands import MODEL, WEIGHTS
from helpers.loopback_hub import Hub, hub, point_to
from huggingface_hub import ModelCard, constants

NAME = "hf-hub:org/vim"


@pytest.fixture
def server(tmp_path, monkeypatch) -> Hub:
    with hub() as running:
        point_to(running, tmp_path / "home", monkeypatch)
        yield running


@pytest.fixture
def pushed(server, run, saved) -> Hub:
    assert run("push", saved, "org/vim")[0] == 0
    return server


def without(result: dict, *keys: str) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", *keys)}


def test_a_model_goes_from_a_folder_to_the_hub_with_its_figures(server, run, saved, photos, tmp_path):
    code, out, _ = run("evaluate", saved, "--data-dir", photos, "--against", MODEL, *WEIGHTS, "--json")
    (tmp_path / "figures.json").write_text(out)
    options = ("--metrics", tmp_path / "figures.json", "--dataset", "photos", "--licence", "mit", "--private")
    more = ("--base-model", "hustvl/Vim", "--revision", "v1", "--message", "The first")
    code, out, _ = run("push", saved, "org/vim", *options, *more, "--json")
    result, repo = json.loads(out), server.repos["org/vim"]
    assert code == 0 and result["model"] == f"{NAME}@v1" and result["url"].startswith(f"{server.url}/org/vim/commit/")
    assert repo.private and repo.messages[-1] == "The first" and repo.branches["v1"] != repo.branches["main"]
    card = ModelCard(repo.files("v1")["README.md"].decode())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert card.data.eval_results[0].metric_value == figures["top1"]
    assert f"| Top-1 accuracy (%) | {figures['top1']:.6g} | {figures['reference_top1']:.6g} |" in card.text
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "hustvl/Vim", ["photos"])
    assert saved not in card.content and str(tmp_path) not in card.content


def test_push_says_where_it_is_and_how_to_load_it(server, run, saved):
    code, out, err = run("push", saved, "org/vim")
    assert code == 0 and out.splitlines()[-1] == f'ptq4vm.load("{NAME}") loads it'
    assert out.startswith(f"pushed to {server.url}/org/vim/commit/") and {"load …", "push …"} <= set(err.splitlines())


def test_a_card_of_my_own_in_the_folder_stays_and_that_is_said(server, run, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "mine"))
    (folder / "README.md").write_text("mine")
    code, _, err = run("push", folder, "org/vim")
    assert code == 0 and f"{folder}/README.md is not uploaded" in err and (folder / "README.md").read_text() == "mine"
    assert server.repos["org/vim"].files()["README.md"] != b"mine"


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "{}"),
        ("inspect", "{}", "--graph"),
        ("inspect", "{}", "--data-dir", "{data}", "--images", "2"),
        ("evaluate", "{}", "--data-dir", "{data}"),
        ("evaluate", MODEL, *WEIGHTS, "--data-dir", "{data}", "--against", "{}"),
    ],
)
def test_a_command_says_the_same_of_a_repository_and_of_the_folder(pushed, run, saved, photos, command):
    found = []
    for name in (saved, NAME):
        code, out, err = run(*(word.format(name, data=photos) for word in command), "--json")
        assert code == 0, err
        found.append(without(json.loads(out), "model", "against"))
    assert found[0] == found[1]


@pytest.mark.slow
def test_benchmark_and_export_take_it_too(pushed, run, tmp_path):
    code, out, err = run("benchmark", NAME, "--batch-size", 1, "--repeats", 1, "--json")
    assert code == 0 and json.loads(out)["timings"][0]["name"] == "quantized", err
    code, _, err = run("export", NAME, tmp_path / "model.pt2")
    assert code == 0 and (tmp_path / "model.pt2").is_file(), err


def test_a_pushed_model_can_be_pushed_again(pushed, run):
    assert run("push", NAME, "org/copy")[0] == 0
    files = [pushed.repos[name].files()["model.safetensors"] for name in ("org/vim", "org/copy")]
    assert files[0] == files[1]


# --- errors ---


def test_each_command_says_what_is_wrong_with_a_repository(server, run, photos, tmp_path):
    for command in (
        ("inspect", "hf-hub:org/none"),
        ("evaluate", "hf-hub:org/none", "--data-dir", photos),
        ("benchmark", "hf-hub:org/none"),
        ("export", "hf-hub:org/none", tmp_path / "out.pt2"),
        ("push", "hf-hub:org/none", "org/other"),
    ):
        code, out, err = run(*command)
        assert code == 1 and not out and f"there is no repository org/none on {server.url}" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "org/vim"),
        ("evaluate", "org/vim", "--data-dir", "digits"),
        ("benchmark", "org/vim"),
        ("export", "org/vim", "out.pt2"),
        ("push", "org/vim", "org/vim"),
    ],
)
def test_a_name_without_the_prefix_is_told_it(server, run, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*command)
    assert code == 1 and "if it is a repository of the Hub, write hf-hub:org/vim" in err and server.requests == []


def test_quantize_wants_a_floating_point_model_and_a_folder(server, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = ("--data-dir", "digits", *WEIGHTS, "--images", "2")
    code, _, err = run("quantize", NAME, "--output", "out", *rest)
    assert code == 1 and "names a quantized model, and a floating-point one is wanted: give timm's name" in err
    code, _, err = run("quantize", MODEL, "--output", NAME, *rest)
    assert (
        code == 1 and f"{NAME} is no folder" in err and not [path for path in Path().iterdir() if path.name != "home"]
    )
    assert server.requests == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--metrics figures.json: Expecting"),
        ("[1]", "--metrics figures.json: it holds a JSON list, and figures are an object"),
        ('{"top1": "x"}', "metrics: top1 is a finite number, got 'x'"),
        (None, "figures.json"),
    ],
)
def test_a_file_that_holds_no_figures(server, run, saved, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("figures.json").write_text(text)
    code, _, err = run("push", saved, "org/vim", "--metrics", "figures.json")
    assert code == 1 and message in err and server.requests == []


def test_push_says_what_is_wrong_before_it_opens_the_network(server, run, saved, photos, monkeypatch):
    for repo, message in (("vim", "names no repository"), ("org/vim@v1", "given by revision='v1'")):
        code, _, err = run("push", saved, repo)
        assert code == 1 and message in err
    code, _, err = run("push", photos, "org/vim")
    assert code == 1 and "is not the folder of a quantized model" in err and server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run("push", saved, "org/vim")
    assert code == 1 and "HF_HUB_OFFLINE is set" in err and server.requests == []
