"""Loading from a Hub on the loopback address: what is fetched, what the cache serves, and every error."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers.loopback_hub import TOKEN
from huggingface_hub import constants
from safetensors.torch import save_file

import ptq4vm
from ptq4vm import optional_packages
from ptq4vm.hub.failures import HubError
from ptq4vm.saving import CheckpointError

FILES = {"config.json", "model.safetensors"}


@pytest.fixture
def folder(vim, tmp_path):
    path = ptq4vm.save(vim, tmp_path / "model")
    (path / "README.md").write_text("a card")
    (path / "modeling.py").write_text("raise SystemExit")
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    return path


def failure(name: str) -> str:
    """Returns the one sentence that loading fails with."""
    with pytest.raises(HubError) as caught:
        ptq4vm.load(name)
    assert isinstance(caught.value, CheckpointError | OSError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_model_is_the_saved_one_and_only_its_files_are_fetched(server, folder, vim, pictures):
    server.add("org/vim", folder)
    assert torch.equal(ptq4vm.load("hf-hub:org/vim")(pictures), vim(pictures))
    assert server.fetched() == FILES


def test_weights_alone_are_enough(server, folder, vim, pictures):
    (folder / "config.json").unlink()
    server.add("org/vim", folder)
    assert torch.equal(ptq4vm.load("hf-hub:org/vim")(pictures), vim(pictures))


def test_a_second_load_fetches_nothing(server, folder):
    server.add("org/vim", folder)
    ptq4vm.load("hf-hub:org/vim")
    server.requests.clear()
    ptq4vm.load("hf-hub:org/vim")
    assert server.fetched() == set() and server.requests  # it asked for the newest commit


def test_a_revision_is_a_branch_or_a_commit(server, folder, vim, plain, pictures, tmp_path):
    first = server.add("org/model", folder)
    server.repos["org/model"].branches["v1"] = first
    server.add("org/model", ptq4vm.save(plain, tmp_path / "plain"))
    for revision in ("v1", first):
        assert torch.equal(ptq4vm.load(f"hf-hub:org/model@{revision}")(pictures), vim(pictures))
    x = torch.randn(1, 5, 8)
    assert torch.equal(ptq4vm.load("hf-hub:org/model")(x), plain(x))


def test_offline_the_cache_answers_and_the_network_stays_closed(server, folder, vim, pictures, monkeypatch):
    commit = server.add("org/vim", folder)
    ptq4vm.load("hf-hub:org/vim")
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("hf-hub:org/vim", f"hf-hub:org/vim@{commit}"):
        assert torch.equal(ptq4vm.load(name)(pictures), vim(pictures))
    assert "not in the cache, or not whole, and HF_HUB_OFFLINE is set" in failure("hf-hub:org/other")
    assert "not in the cache, or not whole, and HF_HUB_OFFLINE is set" in failure("hf-hub:org/vim@v1")
    assert server.requests == []


def test_a_hub_that_is_down_is_replaced_by_the_cache(server, folder, vim, pictures, monkeypatch):
    server.add("org/vim", folder)
    ptq4vm.load("hf-hub:org/vim")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert torch.equal(ptq4vm.load("hf-hub:org/vim")(pictures), vim(pictures))
    message = failure("hf-hub:org/other")
    assert message.startswith(f"loading hf-hub:org/other failed: {address} cannot be reached (")
    assert message.endswith("): check the network")


def test_a_fresh_process_needs_no_timm_and_follows_the_environment(server, folder, vim, pictures, tmp_path):
    server.add("org/vim", folder)
    torch.save((pictures, vim(pictures)), tmp_path / "pair.pt")
    code = "import sys, torch, ptq4vm; model = ptq4vm.load('hf-hub:org/vim'); x, y = torch.load(sys.argv[1])"
    code += "\nprint(torch.equal(model(x), y), [name for name in ('timm', 'torchao') if name in sys.modules])"
    for offline in ("0", "1"):
        variables = os.environ | server.environment(tmp_path / "fresh", HF_HUB_OFFLINE=offline)
        command = [sys.executable, "-c", code, str(tmp_path / "pair.pt")]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)
        assert (done.returncode, done.stdout) == (0, "True []\n"), done.stderr
        assert bool(server.requests) == (offline == "0")
        server.requests.clear()


# --- errors ---


def test_a_repository_that_is_not_there_or_not_for_me(server, folder, monkeypatch):
    server.add("org/secret", folder, private=True)
    ptq4vm.load("hf-hub:org/secret")  # logged in
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    server.add("org/hidden", folder, private=True)
    for name in ("org/hidden", "org/none"):
        assert f"there is no repository {name} on {server.url}, or it is private" in failure(f"hf-hub:{name}")
        assert "HF_TOKEN" in failure(f"hf-hub:{name}")


def test_a_gated_repository(server, folder, monkeypatch):
    server.add("org/gated", folder, gated=True)
    monkeypatch.delenv("HF_TOKEN")
    assert f"org/gated is gated: accept its terms on {server.url}/org/gated, and log in" in failure("hf-hub:org/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ptq4vm.load("hf-hub:org/gated")


def test_a_revision_that_is_not_there(server, folder):
    server.add("org/vim", folder)
    assert "org/vim has no revision v9;" in failure("hf-hub:org/vim@v9")


def test_a_hub_that_is_out_of_order(server, folder):
    server.add("org/vim", folder)
    server.broken = "revision"
    assert f"{server.url} answered with 507" in failure("hf-hub:org/vim")


def test_the_weights_of_a_floating_point_model_are_not_fetched(server, tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 10}))
    server.add("org/float", tmp_path)
    assert "hf-hub:org/float holds no model that ptq4vm quantized" in failure("hf-hub:org/float")
    assert server.fetched() == {"config.json"}


def test_weights_of_another_without_a_config(server, tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    server.add("org/float", tmp_path)
    assert "hf-hub:org/float holds no model that ptq4vm quantized" in failure("hf-hub:org/float")


def test_a_repository_without_a_model(server, folder):
    (folder / "model.safetensors").unlink()
    server.add("org/empty", folder)
    assert "hf-hub:org/empty holds no model: it has no model.safetensors" in failure("hf-hub:org/empty")


def test_a_damaged_model_is_named_by_its_repository(server, folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    server.add("org/vim", folder)
    with pytest.raises(CheckpointError, match=r"hf-hub:org/vim"):
        ptq4vm.load("hf-hub:org/vim")


def test_a_name_without_the_prefix_opens_no_network_and_is_told_it(server, folder, tmp_path, monkeypatch):
    server.add("org/vim", folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; if it is a repository .* hf-hub:org/vim$"):
        ptq4vm.load("org/vim")
    (tmp_path / "org" / "vim").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors$"):
        ptq4vm.load("org/vim")
    assert server.requests == []


def test_without_the_package_the_extra_is_named(server, monkeypatch):
    monkeypatch.setattr(optional_packages, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=r"loading hf-hub:org/vim needs huggingface_hub: pip install 'ptq4vm\[hub\]'"):
        ptq4vm.load("hf-hub:org/vim")


def test_a_folder_is_not_saved_under_a_repositorys_name(vim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"hf-hub:org/vim is no folder: .* ptq4vm\.push_to_hub"):
        ptq4vm.save(vim, "hf-hub:org/vim")
    assert not list(tmp_path.iterdir())
