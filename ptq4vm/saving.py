"""Saves and loads quantized models: folders with `model.safetensors` and `config.json`, never unpickled.

`model.safetensors` is the model: its tensors, graph and metadata (`ptq4vm.serialization.model_file`). One rename
replaces it, so that readers find the old model or the new one, and loading reads no other file. `config.json` repeats
the metadata for people and for programs that look for it.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ptq4vm.files import leftovers, replace_file
from ptq4vm.graph.verify import is_lowered
from ptq4vm.hub.download import download
from ptq4vm.hub.failures import HubError
from ptq4vm.hub.names import HubName, hint, is_hub_name, parse_name
from ptq4vm.metadata import FUSIONS, Stage, metadata_of
from ptq4vm.serialization import version_1
from ptq4vm.serialization.model_file import (
    METHOD,
    CheckpointError,
    NotPortable,
    assemble,
    describe_metadata,
    dumps,
    read_content,
)

WEIGHTS, CONFIG = "model.safetensors", "config.json"

TIMM_NAME = "quantized_by_ptq4vm. Run 'import ptq4vm.models' before timm.create_model, or use ptq4vm.load"
"""Architecture in the config.json of a repository. timm looks for what is before the first dot, which `ptq4vm.models`
registers, and repeats the whole where nobody did."""

_log = logging.getLogger(__name__)


def save(quantized: GraphModule, folder: str | Path) -> Path:
    """Writes a lowered model: `model.safetensors`, which is all of it, and `config.json`, which describes it.

    A reader finds the old model or the new one, even if this process is killed; other files in the folder stay.

    Args:
        quantized: a lowered graph, from `convert` or `load`.
        folder: the folder to write to; it is made, with its parents, if it is missing.

    Returns:
        The folder's real path.

    Raises:
        ValueError: the graph is not lowered, or has something that a file cannot hold, which is named.
        FileExistsError: the folder has a model or a config.json that ptq4vm did not write.

    Example:
        >>> import tempfile, torch, ptq4vm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.randn(4, 5, 8)
        >>> quantized = ptq4vm.quantize(model, [images], ptq4vm.QuantConfig.minmax(8), progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in ptq4vm.save(quantized, folder).iterdir())
        ['config.json', 'model.safetensors']
    """
    metadata, folder = metadata_of(quantized), free_folder(folder)
    if FUSIONS in quantized.meta:
        raise ValueError("a fused model is laid out for this machine: save the one that ptq4vm.fuse was given")
    if metadata.stage is not Stage.CONVERTED or not is_lowered(quantized):
        raise ValueError("only lowered models are saved: call ptq4vm.convert(prepared) without lower=False")
    data = dumps(quantized)
    config = describe_metadata(metadata) | {"model_sha256": read_content(data)["sha256"]}
    for path in leftovers(folder):
        _log.warning("%s was left by a process that was killed while it saved a model here: delete it", path)
    replace_file(folder / WEIGHTS, lambda temporary: temporary.write_bytes(data))
    replace_file(folder / CONFIG, lambda temporary: temporary.write_text(json.dumps(config, indent=2) + "\n"))
    return folder


def free_folder(folder: str | Path) -> Path:
    """Returns the folder's real path if it has no model, or one of ptq4vm's; else raises FileExistsError."""
    if is_hub_name(folder):
        raise ValueError(f"{folder} is no folder: save the model in one, or upload it with ptq4vm.push_to_hub")
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder")
    held = [name for name in (WEIGHTS, CONFIG) if (path / name).exists()]
    if held and not is_saved(path):
        raise FileExistsError(f"{folder} has a {' and a '.join(held)} that ptq4vm did not write; choose another folder")
    return path


def is_saved(folder: str | Path) -> bool:
    """Whether a folder holds a quantized model of ptq4vm's, whole or damaged."""
    config, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    try:
        if json.loads(config.read_text())["quantization_config"]["quant_method"] == METHOD:
            return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    try:
        with weights.open("rb") as file:
            return b'"ptq4vm"' in file.read(200)
    except OSError:
        return False


def load(folder: str | Path, *, model: nn.Module | None = None, operators: Sequence[str] = ()) -> GraphModule:
    """Loads a saved model; its outputs equal those of the saved one bit for bit on the same machine and threads.

    The model's code is not needed, nor timm, nor a network, and nothing is unpickled. Only a name that begins with
    `hf-hub:` opens the network, and then two files are fetched, neither of which is code.

    Args:
        folder: a folder that `save` wrote; `model.safetensors` alone is enough. Or a repository of the Hub,
            "hf-hub:org/name" or "hf-hub:org/name@revision"; what was downloaded once is found without a network.
        model: the floating-point model, of any weights, for a folder of format version 1, which has no graph, if timm
            cannot build the model. Later folders need none.
        operators: names of operators that your code registers and the graph may call, such as "mylib::filter.default".
            Operators of ptq4vm, and those of aten that do nothing but compute, are always allowed.

    Returns:
        The lowered graph, on the CPU. Outputs that were in a class of their own come in a dict.

    Raises:
        CheckpointError: the model is missing, truncated, edited or newer, or calls an operator that is not allowed; the
            message names the file and the way out. For a repository of the Hub that cannot be read it is a `HubError`,
            which is an OSError too.
        ValueError: what follows `hf-hub:` is no name of a repository.

    Example:
        >>> import tempfile, torch, ptq4vm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.randn(4, 5, 8)
        >>> quantized = ptq4vm.quantize(model, [images], ptq4vm.QuantConfig.minmax(8), progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = ptq4vm.load(ptq4vm.save(quantized, folder))
        >>> torch.equal(loaded(images), quantized(images))
        True
    """
    if is_hub_name(folder):
        name = parse_name(str(folder))
        path = _downloaded(name)
        try:
            return _load(path, model, operators)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
    try:
        return _load(Path(folder), model, operators)
    except version_1.OtherVersionError:  # a model of version 2 was written between the reads of the two files
        return _load(Path(folder), model, operators)


def _downloaded(name: HubName) -> Path:
    """Returns the cached folder of a repository; the weights of a model that is not ours are not fetched."""
    another = HubError(f"{name} holds no model that ptq4vm quantized; load it as its card says, and quantize that")
    folder = download(name, CONFIG)
    if (folder / CONFIG).exists() and not is_saved(folder):
        raise another
    folder = download(name._replace(revision=folder.name), WEIGHTS)  # of the same commit
    if not (folder / WEIGHTS).exists():
        raise HubError(f"{name} holds no model: it has no {WEIGHTS}; ptq4vm.push_to_hub uploads one")
    if not is_saved(folder):
        raise another
    return folder


def for_timm(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json with which timm loads the quantized model, or says how, and makes no other one.

    By the architecture's own name timm would make the floating-point model, of random weights.
    """
    return config | {"architecture": TIMM_NAME, "model_args": {}}


def _load(folder: Path, model: nn.Module | None, operators: Sequence[str]) -> GraphModule:
    data = _read(folder)
    try:
        content = read_content(data)
        _compare_config(folder / CONFIG, content)
        return assemble(content, data, operators)
    except NotPortable:
        return version_1.load(folder, data, model)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {error}; copy the folder again or quantize the model again"
        ) from error


def _compare_config(path: Path, content: dict[str, Any]) -> None:
    """Refuses a config.json of this model that says something else: it was edited, which has no effect."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # a config.json of version 1 is left if a process was killed while it replaced such a model
        same = (config.get("model_sha256") or config["weights_sha256"]) == content["sha256"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} beside it is corrupt ({type(error).__name__}: {error}); delete it") from error
    if not same:
        _log.warning("%s describes another model than %s beside it; it is not read", path, WEIGHTS)
        return
    wanted = for_timm(content["model"]) if config.get("architecture") == TIMM_NAME else content["model"]
    changed = [key for key, value in wanted.items() if config.get(key) != value]
    if changed:
        raise CheckpointError(
            f"{path} beside it was edited ({', '.join(changed)}); it only repeats {WEIGHTS}, so that an edit changes "
            "nothing: undo it or delete the file"
        )


def _read(folder: Path) -> bytes:
    try:
        return (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        found = ", ".join(str(path) for path in leftovers(folder))
        left = f"; a process that was killed while it saved a model left {found}" if found else ""
        raise CheckpointError(
            f"{folder} is not a saved model: it has no {WEIGHTS}{left}{'' if folder.exists() else hint(folder)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
