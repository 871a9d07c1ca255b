"""Uploads a quantized model with its card, in one commit."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ptq4vm import __version__
from ptq4vm.hub.card import Card
from ptq4vm.hub.failures import explained
from ptq4vm.hub.metrics import read_metrics
from ptq4vm.hub.names import PREFIX, HubName, parse_name
from ptq4vm.optional_packages import require
from ptq4vm.saving import CONFIG, WEIGHTS, for_timm, save

README = "README.md"


def push_to_hub(
    quantized: GraphModule,
    repo: str,
    *,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    licence: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads a lowered model to the Hub: `model.safetensors`, `config.json`, and the model card in README.md.

    The card says what is known: the recipe, what is quantized, sizes, how to load the model, and what the arguments
    say. What is unknown is left out. The repository is made if there is none; its other files stay, and files of these
    names are replaced in one commit, so that its history keeps them.

    Args:
        quantized: a lowered graph, from `convert` or `load`.
        repo: the repository, "org/name".
        metrics: figures by name, such as {"top1": 75.5, "float_top1": 76.1, "dataset": "imagenet-1k"}, or what
            `ptq4vm evaluate --json` prints. Top-1 and top-5 are in percent; `float_` begins the names of the
            floating-point model's. With a dataset they come into the card's `model-index` too.
        base_model: the model before quantization, "org/name" for one of the Hub.
        dataset: the data it was calibrated with, by its id on the Hub; measured on too, if `metrics` names none.
        licence: its id on the Hub, such as "apache-2.0".
        private: who may see a new repository; None leaves that to the organization's default.
        revision: the branch to write to, which is made if there is none; None for the main one.
        commit_message: the commit's first line.
        token: None takes the one of `hf auth login` or HF_TOKEN.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no repository has such a name, `metrics` holds what is no figure, or `save` refuses the model; then
            nothing was uploaded, nor the repository made.
        HubError: the Hub cannot be reached, or refuses it. The model in memory is as before.
        ImportError: huggingface_hub is not installed.
    """
    name, known = _checked(repo, revision), read_metrics(metrics, dataset)
    require("pushing to the Hub", "hub", "huggingface_hub")
    with tempfile.TemporaryDirectory() as folder:
        path = save(quantized, folder)
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        (path / CONFIG).write_text(json.dumps(for_timm(config), indent=2) + "\n", encoding="utf-8")
        card = Card(
            name=name,
            quantized=quantized,
            file_bytes=(path / WEIGHTS).stat().st_size,
            metrics=known,
            base_model=base_model and base_model.removeprefix(PREFIX),
            dataset=dataset,
            licence=licence,
        )
        (path / README).write_text(card.text(), encoding="utf-8")
        with explained(name, f"pushing to {name.repo}", writes=True):
            return _upload(path, name, private, commit_message, token)


def _checked(repo: str, revision: str | None) -> HubName:
    name = parse_name(repo)
    if name.revision is not None:
        raise ValueError(f"{repo}: the branch to push to is given by revision={name.revision!r}")
    return parse_name(f"{name}@{revision}") if revision is not None else name


def _upload(folder: Path, name: HubName, private: bool | None, message: str | None, token: str | None) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="ptq4vm", library_version=__version__)
    api.create_repo(name.repo, private=private, exist_ok=True)
    if name.revision is not None and not name.revision.startswith("refs/"):
        api.create_branch(name.repo, branch=name.revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name.repo,
        folder_path=folder,
        revision=name.revision,
        allow_patterns=[WEIGHTS, CONFIG, README],
        commit_message=message or "Upload a model quantized by ptq4vm",
    )
    return str(commit.commit_url)
