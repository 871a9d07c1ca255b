"""A directory of finished blocks: bound to one run by its manifest, locked while a run uses it, verified when read."""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.fx import GraphModule

from ptq4vm.backend import native
from ptq4vm.config import QuantConfig
from ptq4vm.files import replace_file
from ptq4vm.graph.insert import attribute
from ptq4vm.graph.partition import Block, NamedTensors
from ptq4vm.passes.quantized_nodes import quantizer_settings

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

MANIFEST, LOCK = "calibration.json", "calibration.lock"


class Finished:
    """The finished blocks in a folder; without a folder there are none, and none is kept."""

    def __init__(self, folder: Path | None, fingerprint: str = "") -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block_{index:03d}.safetensors"

    def read(self, index: int) -> tuple[NamedTensors, dict[str, Any]] | None:
        """Returns the state and the report of a block, or None; raises ValueError unless every bit is as it was."""
        if self.folder is None or not self._path(index).exists():
            return None
        try:
            return self._decoded(index, self._path(index).read_bytes())
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self._path(index)} cannot be read ({error}); delete it and calibrate again") from error

    def write(self, index: int, tensors: NamedTensors, report: dict[str, Any]) -> None:
        if self.folder is not None:
            data = self._encoded(index, {name: value.cpu().clone() for name, value in tensors.items()}, report)
            replace_file(self._path(index), lambda temporary: temporary.write_bytes(data))

    def _encoded(self, index: int, tensors: NamedTensors, report: dict[str, Any]) -> bytes:
        """Returns a safetensors file, the same for the same block; tensors may share memory, so they come as copies."""
        text = json.dumps(report)
        digest = _digest({"run": self.fingerprint, "index": index, "report": text}, tensors)
        return save(tensors, {"block": json.dumps({"digest": digest, "report": text})})

    def _decoded(self, index: int, data: bytes) -> tuple[NamedTensors, dict[str, Any]]:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        report = json.loads(json.loads(header["__metadata__"]["block"])["report"])
        if self._encoded(index, tensors, report) != data:
            raise ValueError("it is not what this run wrote as that block")
        return tensors, report


@contextlib.contextmanager
def finished_blocks(
    folder: Path | None, prepared: GraphModule, blocks: Sequence[Block], images: NamedTensors, config: QuantConfig
) -> Iterator[Finished]:
    """Opens a folder for one run, which nobody else may use meanwhile.

    Raises ValueError for the folder of another run, naming what differs, and for one in use, naming the process.
    """
    if folder is None:
        yield Finished(None)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"resume_dir {folder} is a file; give it a folder") from error
    with _locked(folder):
        for leftover in (*folder.glob(".block_*.tmp"), *folder.glob(f".{MANIFEST}.*.tmp")):
            leftover.unlink()
        facts = run_facts(prepared, blocks, images, config)
        path = folder / MANIFEST
        if path.exists():
            _check_manifest(path, facts)
        elif any(folder.glob("block_*.safetensors")):
            raise ValueError(
                f"{folder} holds blocks without their {MANIFEST}, so of an unknown run; give resume_dir another "
                "folder or delete this one"
            )
        else:
            replace_file(path, lambda temporary: temporary.write_text(json.dumps(facts, indent=2) + "\n"))
        yield Finished(folder, _digest(facts, {}))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system takes back from a process that dies."""
    with (folder / LOCK).open("a+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read() or 'another process'}; wait for it, or give resume_dir another "
                "folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def run_facts(
    prepared: GraphModule, blocks: Sequence[Block], images: NamedTensors, config: QuantConfig
) -> dict[str, str | int]:
    """Returns all that decides the bytes of a calibration: digests of what is large, the rest as it is."""
    paths = [str(node.target) for node in prepared.graph.find_nodes(op="get_attr")]
    values = {path: attribute(prepared, path) for path in paths} | dict(prepared.named_buffers())
    tensors = {path: value for path, value in values.items() if isinstance(value, Tensor)}
    parameters = dict(prepared.named_parameters())
    import ptq4vm  # its version; the package imports this module

    graph = [prepared.code, quantizer_settings(prepared), [(b.name, b.inputs, b.outputs) for b in blocks]]
    device = next(iter(images.values())).device.type
    return {
        "config": config.to_json(),
        "images": _digest(None, images),
        "parameters": _digest(None, parameters),
        "buffers": _digest(None, {name: value for name, value in tensors.items() if name not in parameters}),
        "graph": hashlib.sha256(repr(graph).encode()).hexdigest(),
        "ptq4vm": ptq4vm.__version__,
        "torch": torch.__version__,
        "kernels": f"{native.isa()} and torch's for {torch.backends.cpu.get_cpu_capability()} on {device}",
        "threads": torch.get_num_threads(),
    }


_WAYS = {
    "config": "another config",
    "images": "other images",
    "parameters": "other parameters",
    "buffers": "other buffers or constants",
    "graph": "another graph",
    "ptq4vm": "ptq4vm {have} (this is {want})",
    "torch": "torch {have} (this is {want})",
    "kernels": "the kernels {have} (this run has {want})",
    "threads": "{have} threads (this run has {want}: call torch.set_num_threads({have}))",
}
"""The words for a fact that differs."""


def _check_manifest(path: Path, facts: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} and calibrate again") from error
    if not isinstance(found, dict) or set(found) != set(facts):
        raise ValueError(f"{path} is no manifest of this version of ptq4vm; delete {path.parent} and calibrate again")
    told = [_WAYS[key].format(have=found[key], want=facts[key]) for key in facts if found[key] != facts[key]]
    if told:
        raise ValueError(
            f"{path.parent} holds a calibration of {', '.join(told)}; give resume_dir another folder or delete this one"
        )


def _digest(facts: Any, tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of facts and of the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
