"""`torch.compile(model, backend="ptq4vm")`: lowers, fuses, and hands the rest to Inductor.

Installed as an entry point of the group `torch_dynamo_backends`, so that it works without an import.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from ptq4vm.graph.insert import set_tensor
from ptq4vm.graph.pipeline import Pipeline, clean_up
from ptq4vm.graph.verify import GraphStage
from ptq4vm.passes.lower.lower import lower
from ptq4vm.passes.lower.pipeline import fusing_pipeline


def ptq4vm_backend(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compiles a graph that Dynamo has traced; quantized models come as Q/DQ graphs or as integer ones.

    Parameters and buffers are frozen: they are rearranged for the kernels now, and what is loaded into the model later
    is not seen. `options={"inductor": False}` runs what is left after fusing as it is, which compiles at once;
    `options={"activations": torch.bfloat16}` halves the memory of activations, at the price that
    `ptq4vm.passes.lower.pipeline.fusing_pipeline` tells. All other options and `mode` are Inductor's.
    """
    settings = dict(options or {})
    inductor, activations = settings.pop("inductor", True), settings.pop("activations", torch.float32)
    gm, kept = freeze(gm)
    origin = frozenset(value.data_ptr() for value in gm.state_dict().values())
    gm = _share_constants(Pipeline(GraphStage.FUSED, (lower, fusing_pipeline(activations)))(gm), origin)
    inputs = [example_inputs[i] for i in kept]
    if inductor:
        from torch._inductor import compile_fx, list_mode_options

        # constants are frozen already; this lets Inductor arrange those of the stem's convolutions for oneDNN
        patches = {"freezing": True, **(list_mode_options(mode) if mode else {}), **settings}
        run: Any = compile_fx.compile_fx(gm, inputs, config_patches=patches)
    else:
        run = gm.forward

    def compiled(*args: Any) -> Any:
        return run(*(args[i] for i in kept))

    return compiled


_constants: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()


def _share_constants(gm: GraphModule, origin: frozenset[int]) -> GraphModule:
    """Lets all compilations of a model, one for each kind of batch, hold the same rearranged weights."""
    for name, value in list(gm.named_buffers()):
        other = _constants.setdefault((origin, name, value.device), value)
        if other is not value and other.dtype == value.dtype and torch.equal(other, value):
            set_tensor(gm, name, other)
    return gm


def freeze(gm: GraphModule) -> tuple[GraphModule, list[int]]:
    """Dynamo's placeholders of parameters and buffers as tensors of the graph; which placeholders stay inputs."""
    graph = fx.Graph()  # Dynamo goes on to read its own
    graph.output(graph.graph_copy(gm.graph, {}))
    gm = fx.GraphModule(gm, graph)
    kept: list[int] = []
    names: set[str] = set()
    placeholders = gm.graph.find_nodes(op="placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in gm.graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    for i, node in enumerate(placeholders):
        value = _static_value(node)
        if value is None:
            kept.append(i)
            continue
        with gm.graph.inserting_before(first):
            constant = gm.graph.get_attr(set_tensor(gm, _path(node, names), value.detach()))
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
        gm.graph.erase_node(node)
    return clean_up(gm), kept


def _static_value(placeholder: Node) -> Tensor | None:
    """The tensor behind a placeholder that Dynamo made of a parameter or a buffer."""
    static = placeholder.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    argument = placeholder.meta.get("grapharg")
    value = argument.example if static and argument is not None else None
    return value if isinstance(value, Tensor) else None


def _path(placeholder: Node, taken: set[str]) -> str:
    """`layers.0.norm.weight` of L['self']._modules['layers']._modules['0']…, if Dynamo says so and none has it yet."""
    source = placeholder.meta["grapharg"].source.name
    text = source() if callable(source) else source
    path = ".".join(re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", text))
    path = path if path and path not in taken else placeholder.name
    taken.add(path)
    return path
