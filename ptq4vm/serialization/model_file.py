"""Writes a converted graph as the bytes of one safetensors file, and reads it.

The header's metadata has one key, `ptq4vm`, whose JSON holds `format_version`, `graph` (see `graph_json`), `tensors`
(facts that a tensor's bytes do not tell), `model` (the quantization metadata) and `sha256`, the digest of all of this
and of the tensors. Reading unpickles nothing, and needs neither the model's code nor a network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4vm import __version__
from ptq4vm.config import QuantConfig
from ptq4vm.graph.insert import attribute, set_tensor
from ptq4vm.metadata import (
    FUSIONS,
    Coverage,
    LinearMetadata,
    ProductMetadata,
    QuantizationMetadata,
    Stage,
    metadata_of,
    set_metadata,
)
from ptq4vm.serialization.allowed_operators import GraphFormatError, operator_name
from ptq4vm.serialization.graph_json import build, check_tensor_name, describe

FORMAT_VERSION = 3
"""Files of version 2 are read too: their record holds the config's flat keys among its own."""
METHOD = "ptq4vm"
KEY = "ptq4vm"


class CheckpointError(ValueError):
    """Raised for a saved model that cannot be loaded."""


class NotPortable(CheckpointError):
    """Raised for a file of weights without a graph: of format version 1, or no model of ptq4vm's."""


class PortableGraph(GraphModule):
    """Graph that pickle, copy and torch.save bring back equal, or refuse at once with the way out."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if FUSIONS in self.meta:
            raise TypeError(
                "a fused model is laid out for this machine: pickle the one that ptq4vm.fuse was given, and fuse it "
                "where it is loaded"
            )
        if metadata_of(self).stage is not Stage.CONVERTED:
            raise TypeError(
                "a prepared graph cannot be pickled: ptq4vm.convert it first; calibrate(resume_dir=…) keeps the "
                "blocks that are finished"
            )
        return loads, (dumps(self), _foreign_operators(self))

    def __copy__(self) -> PortableGraph:
        copied = PortableGraph(self, self.graph, type(self).__name__)
        copied.meta = dict(self.meta)
        return copied


def portable(gm: GraphModule, name: str) -> PortableGraph:
    """Returns the same graph as a `PortableGraph` whose class is called `name`."""
    made = PortableGraph(gm, gm.graph, name)
    made.meta.update(gm.meta)
    return made


def _foreign_operators(gm: GraphModule) -> tuple[str, ...]:
    """Returns the names of the operators of a graph that `loads` does not allow by itself."""
    called = {node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return tuple(sorted(operator_name(target) for target in called if target.namespace not in ("aten", "ptq4vm")))


# --- writing ---


def dumps(gm: GraphModule) -> bytes:
    """Returns the file of a converted graph; raises ValueError, which names anything that a file cannot hold."""
    check_qparams(gm)
    graph = describe(gm)
    stored, facts = _stored_tensors(gm)
    content = {
        "format_version": FORMAT_VERSION,
        "ptq4vm_version": __version__,
        "graph": graph,
        "tensors": facts,
        "model": describe_metadata(metadata_of(gm)),
    }
    data = serialize(stored)
    text = json.dumps({"sha256": "", **content}, separators=(",", ":"), allow_nan=False)
    signed = text.replace(_UNSIGNED, f'"sha256":"{_digest(text, *_split(data))}"', 1)
    return serialize(stored, metadata={KEY: signed})


def _stored_tensors(gm: GraphModule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns every distinct tensor once, by name, and the facts that its bytes do not tell."""
    facts: dict[str, Any] = {"parameters": [], "not_persistent": [], "aliases": {}, "dim_orders": {}, "complex": []}
    stored: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    persistent = set(gm.state_dict(keep_vars=True))
    named = itertools.chain(gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        check_tensor_name(name)
        value = tensor.detach()
        if isinstance(tensor, nn.Parameter):
            facts["parameters"].append(name)
        elif name not in persistent:
            facts["not_persistent"].append(name)
        where = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else name
        if (other := first.setdefault(where, name)) != name:
            facts["aliases"][name] = other
            continue
        if value.is_complex():
            facts["complex"].append(name)
            value = torch.view_as_real(value)
        if not value.is_contiguous() and (order := _dim_order(value)) is not None:
            facts["dim_orders"][name] = order
            value = value.permute(order)
        stored[name] = value.contiguous().cpu().clone()
    return stored, facts


def _dim_order(value: Tensor) -> list[int] | None:
    """Returns the order of axes in which a tensor lies densely in memory; None if there is none."""
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda axis: (-strides[axis], axis))
    return order if value.permute(order).is_contiguous() else None


def describe_metadata(metadata: QuantizationMetadata) -> dict[str, Any]:
    """Returns the metadata in the layout of timm's config.json, with `quantization_config` beside timm's keys."""
    architecture = metadata.architecture or {}
    arguments = architecture.get("arguments", {})
    return {
        "architecture": architecture.get("name"),
        "num_classes": arguments.get("num_classes"),
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": architecture.get("preprocessing", {}),
        "input_shapes": [list(shape) for shape in metadata.input_shapes],
        "quantization_config": {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "ptq4vm_version": __version__,
            "torch_version": torch.__version__,
            "config": metadata.config.to_dict(),
            "linears": [dataclasses.asdict(linear) for linear in metadata.linears],
            "blocks": list(metadata.blocks),
            "coverage": dataclasses.asdict(metadata.coverage),
        },
    }


# --- reading ---


def loads(data: bytes, operators: Sequence[str] = ()) -> GraphModule:
    """Returns the graph of a file that `dumps` made; raises CheckpointError for any other bytes.

    `operators` are names of operators that are allowed beside those of ptq4vm and aten.
    """
    return assemble(read_content(data), data, operators)


def assemble(content: dict[str, Any], data: bytes, operators: Sequence[str] = ()) -> GraphModule:
    """Returns the graph of a file whose `content` `read_content` returned; raises CheckpointError."""
    with _refusing(), torch.inference_mode(False):  # tensors made in that mode cannot be learned or copied
        metadata = read_metadata(content["model"])
        root = _place_tensors(deserialize(data), content["tensors"])
        graph, name = build(content["graph"], root, operators)
        gm = PortableGraph(root, graph, name)
        check_qparams(gm)
    return set_metadata(gm, metadata)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Makes a CheckpointError of every error that a wrong file leads to."""
    try:
        yield
    except CheckpointError:
        raise
    except (GraphFormatError, SafetensorError) as error:
        raise CheckpointError(str(error)) from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"it is corrupt ({type(error).__name__}: {reason})") from error


def read_content(data: bytes) -> dict[str, Any]:
    """Returns the JSON in the header's metadata, after checking its digest; raises CheckpointError."""
    with _refusing():
        table, body = _split(data)
        text = table.pop("__metadata__", {}).get(KEY)
        if text is None:
            raise NotPortable("it holds no graph: it is of format version 1, or no model of ptq4vm's")
        content = json.loads(text)
        version = content["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"it has format version {version!r:.40}, written by ptq4vm {content.get('ptq4vm_version')!r:.40}; this "
                f"is ptq4vm {__version__}, which reads up to {FORMAT_VERSION}: upgrade ptq4vm"
            )
        digest = content["sha256"]
        if digest != _digest(text.replace(f'"sha256":"{digest}"', _UNSIGNED, 1), table, body):
            raise CheckpointError("its SHA-256 differs from the one it was saved with: it was truncated or edited")
        return content


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Returns the header of a safetensors file, and the bytes after it."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise CheckpointError(f"it is truncated: {len(data)} bytes are fewer than its header says")
    return json.loads(data[8 : 8 + size]), memoryview(data)[8 + size :]


_UNSIGNED = '"sha256":""'


def _digest(text: str, table: dict[str, Any], body: memoryview) -> str:
    """Returns the SHA-256 of the text without a digest, of the tensors' names, types and places, and of their bytes."""
    digest = hashlib.sha256(json.dumps([text, sorted(table.items())]).encode())
    digest.update(body)
    return digest.hexdigest()


def _place_tensors(stored: dict[str, Tensor], facts: dict[str, Any]) -> nn.Module:
    """Returns a module with the tensors at their paths, in the memory layouts that they were saved with."""
    root = nn.Module().eval()
    parameters, hidden = set(facts["parameters"]), set(facts["not_persistent"])
    values = {}
    for name, value in stored.items():
        values[name] = _aligned(value)
        if (order := facts["dim_orders"].get(name)) is not None:
            values[name] = values[name].permute([order.index(axis) for axis in range(len(order))])
        if name in facts["complex"]:
            values[name] = torch.view_as_complex(values[name])
    for name in [*stored, *facts["aliases"]]:
        if (source := check_tensor_name(facts["aliases"].get(name, name))) not in values:
            raise CheckpointError(f"there is no tensor {source}")
        value = values[source]
        placed = nn.Parameter(value, requires_grad=False) if name in parameters else value
        set_tensor(root, check_tensor_name(name), placed)
        if name in hidden:
            owner, _, leaf = name.rpartition(".")
            root.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
    return root


def _aligned(value: Tensor) -> Tensor:
    """Copies a tensor by numpy, on one thread: matrix products round differently where memory is not aligned."""
    copied = torch.empty(value.shape, dtype=value.dtype)
    if value.numel():
        copied.view(-1).view(torch.uint8).numpy()[:] = value.reshape(-1).view(torch.uint8).numpy()
    return copied


def read_metadata(model: dict[str, Any]) -> QuantizationMetadata:
    """Undoes `describe_metadata`; raises CheckpointError."""
    with _refusing():
        details = model["quantization_config"]
        return QuantizationMetadata(
            config=QuantConfig.from_dict(details["config"] if "config" in details else _flat_config(details)),
            linears=tuple(LinearMetadata(**linear) for linear in details["linears"]),
            input_shapes=tuple(tuple(shape) for shape in model["input_shapes"]),
            architecture=_architecture(model),
            stage=Stage.CONVERTED,
            blocks=tuple(details["blocks"]),
            coverage=_coverage(details.get("coverage", {})),
        )


def _coverage(records: dict[str, Any]) -> Coverage:
    """Files that were written before there was a coverage have no records."""
    return Coverage(**{kind: tuple(ProductMetadata(**record) for record in found) for kind, found in records.items()})


def _flat_config(details: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of the config from a record of format version 1 or 2."""
    others = ("quant_method", "format_version", "ptq4vm_version", "torch_version", "linears", "blocks", "coverage")
    return {key: value for key, value in details.items() if key not in others}


def _architecture(model: dict[str, Any]) -> dict[str, Any] | None:
    if model["architecture"] is None:
        return None
    classes = {} if model["num_classes"] is None else {"num_classes": model["num_classes"]}
    arguments = classes | model["model_args"]
    return {"name": model["architecture"], "arguments": arguments, "preprocessing": model["pretrained_cfg"]}


# --- numbers ---


def check_qparams(gm: GraphModule) -> None:
    """Raises CheckpointError, which names the tensor, for scales and zero points that no calibration finds."""
    checked = set()
    for node in gm.graph.nodes:
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ptq4vm"):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            name = str(value.target) if isinstance(value, Node) and value.op == "get_attr" else None
            check = next((check for ending, check in _CHECKS if argument.name.endswith(ending)), None)
            if name is None or check is None or (name, check) in checked:
                continue
            checked.add((name, check))
            check(name, attribute(gm, name))


def _check_scale(name: str, value: Tensor) -> None:
    if value.dtype != torch.float32:
        raise CheckpointError(f"{name}: scales are float32, not {value.dtype}")
    if not (torch.isfinite(value) & (value > 0)).all():
        raise CheckpointError(f"{name}: scales are finite and positive, these are not")


def _check_zero_point(name: str, value: Tensor) -> None:
    if value.dtype != torch.int32:
        raise CheckpointError(f"{name}: zero points are int32, not {value.dtype}")
    if value.numel() and not -128 <= int(value.min()) <= int(value.max()) <= 127:
        raise CheckpointError(f"{name}: zero points lie between -128 and 127, these do not")


_CHECKS = (("scale", _check_scale), ("zero_point", _check_zero_point))
"""Checks by the end of the name of an operator's argument."""
