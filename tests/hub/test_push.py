"""Pushing to a Hub on the loopback address: what arrives, and what happens where it may not."""

import json

import pytest
import torch
from helpers.loopback_hub import TOKEN
from huggingface_hub import ModelCard, constants

import ptq4vm
from ptq4vm import optional_packages
from ptq4vm.hub.failures import HubError
from ptq4vm.saving import CheckpointError


def test_what_is_pushed_is_loaded_again_with_the_bytes_that_save_writes(server, vim, pictures, tmp_path):
    url = ptq4vm.push_to_hub(vim, "org/vim", metrics={"top1": 75.5}, licence="mit")
    repo = server.repos["org/vim"]
    assert url == f"{server.url}/org/vim/commit/{repo.branches['main']}"
    assert repo.files().keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    saved = ptq4vm.save(vim, tmp_path / "model")
    assert repo.files()["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert ModelCard(repo.files()["README.md"].decode()).data.license == "mit"
    assert torch.equal(ptq4vm.load("hf-hub:org/vim")(pictures), vim(pictures))


def test_it_is_one_commit_and_other_files_stay(server, vim, plain):
    ptq4vm.push_to_hub(vim, "hf-hub:org/vim")
    server.repos["org/vim"].commit({"notes.txt": b"mine"}, "my own")
    ptq4vm.push_to_hub(plain, "org/vim", commit_message="Another model")
    repo = server.repos["org/vim"]
    assert repo.messages == ["initial commit", "Upload a model quantized by ptq4vm", "my own", "Another model"]
    assert repo.files()["notes.txt"] == b"mine"
    assert torch.equal(ptq4vm.load("hf-hub:org/vim")(torch.ones(1, 5, 8)), plain(torch.ones(1, 5, 8)))


def test_a_revision_is_a_branch_of_its_own(server, vim, plain):
    ptq4vm.push_to_hub(plain, "org/model")
    ptq4vm.push_to_hub(vim, "org/model", revision="w4a4")
    ptq4vm.push_to_hub(vim, "org/model", revision="w4a4", licence="mit")
    repo = server.repos["org/model"]
    assert repo.files("main")["model.safetensors"] != repo.files("w4a4")["model.safetensors"]
    assert b'ptq4vm.load("hf-hub:org/model@w4a4")' in repo.files("w4a4")["README.md"]
    ptq4vm.load("hf-hub:org/model@w4a4")


@pytest.mark.parametrize("private", [True, False])
def test_who_may_see_it_is_said_when_it_is_made(server, plain, private):
    ptq4vm.push_to_hub(plain, "org/model", private=private)
    assert server.repos["org/model"].private is private


def test_a_token_may_be_given(server, plain, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"pushing to org/model failed: .* refuses it \(401\): log in with"):
        ptq4vm.push_to_hub(plain, "org/model")
    ptq4vm.push_to_hub(plain, "org/model", token=TOKEN)
    assert "model.safetensors" in server.repos["org/model"].files()


# --- nothing is uploaded ---


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("name", {}, "'name' names no repository of the Hub: write hf-hub:org/name"),
        ("org/a b", {}, "names no repository"),
        ("org/name@v1", {}, "the branch to push to is given by revision='v1'"),
        ("org/name", {"revision": "a b"}, "names no revision"),
        ("org/name", {"metrics": {"top1": "75"}}, "metrics: top1 is a finite number"),
    ],
)
def test_what_is_wrong_is_said_before_the_network_is_opened(server, plain, repo, options, message):
    with pytest.raises(ValueError, match=message):
        ptq4vm.push_to_hub(plain, repo, **options)
    assert server.requests == []


def test_a_model_that_cannot_be_saved_makes_no_repository(server, vim):
    with pytest.raises(ValueError, match="a fused model is laid out for this machine"):
        ptq4vm.push_to_hub(ptq4vm.fuse(vim), "org/vim")
    assert server.requests == []


@pytest.mark.parametrize("place", ["repos/create", "preupload", "objects/batch", "uploads/", "commit/"])
def test_a_hub_that_breaks_leaves_the_repository_and_the_model_as_they_were(server, vim, plain, pictures, place):
    ptq4vm.push_to_hub(plain, "org/model")
    before, logits = dict(server.repos["org/model"].branches), vim(pictures)
    server.broken = place
    with pytest.raises(HubError, match=r"pushing to org/model failed: .* answered with 507") as caught:
        ptq4vm.push_to_hub(vim, "org/model")
    assert "\n" not in str(caught.value)
    assert server.repos["org/model"].branches == before
    assert torch.equal(vim(pictures), logits)
    server.broken = None
    ptq4vm.push_to_hub(vim, "org/model")


def test_offline_nothing_can_be_pushed(server, plain, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"pushing to org/model failed: HF_HUB_OFFLINE is set, .*: unset it$"):
        ptq4vm.push_to_hub(plain, "org/model")
    assert server.requests == []


def test_metadata_that_the_hub_refuses_are_told_in_its_words(server, plain, monkeypatch):
    monkeypatch.setattr("ptq4vm.hub.card.Card.text", lambda card: "---\nlicense: [mit]\n---\n")
    with pytest.raises(HubError, match=r'Invalid metadata in README\.md\. - "license" is no text'):
        ptq4vm.push_to_hub(plain, "org/model")


def test_without_the_package_the_extra_is_named(plain, monkeypatch):
    monkeypatch.setattr(optional_packages, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=r"pushing to the Hub needs huggingface_hub: pip install 'ptq4vm\[hub\]'"):
        ptq4vm.push_to_hub(plain, "org/model")


def test_an_edit_of_the_config_is_refused_as_in_a_folder(server, vim, tmp_path):
    ptq4vm.push_to_hub(vim, "org/vim")
    files = {name: data for name, data in server.repos["org/vim"].files().items() if not name.startswith(".")}
    for key, value in (("input_shapes", [[3, 64, 64]]), ("model_args", {"depth": 2}), ("architecture", "resnet18")):
        folder = tmp_path / key
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        ptq4vm.load(folder)
        config = json.loads(files["config.json"]) | {key: value}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=rf"config\.json beside it was edited \(.*{key}"):
            ptq4vm.load(folder)


def test_a_repository_of_another_is_refused_and_not_said_to_be_missing(server, plain, monkeypatch):
    ptq4vm.push_to_hub(plain, "org/secret", private=True)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **options: None)  # it exists
    with pytest.raises(
        HubError, match=r"refuses it \(401\): log in with .* as an account with the right to org/secret"
    ):
        ptq4vm.push_to_hub(plain, "org/secret", token="hf_another")
