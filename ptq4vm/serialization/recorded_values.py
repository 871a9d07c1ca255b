"""Works out types and shapes of the values of a loaded graph, which records only dtypes and shapes of its inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vm.graph.insert import attribute, to_fake, value_of

RECORDED = "ptq4vm.input"
"""Key in the meta of a loaded graph's placeholder: dtype and shape, in which dynamic axes have a name."""


def example_inputs(gm: GraphModule, batch: int) -> tuple[Any, ...]:
    """Returns zeros of the dtypes and shapes that a graph takes; inputs that are no tensors, as they were captured."""
    made = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        dtype, shape = (value.dtype, value.shape) if isinstance(value, Tensor) else node.meta.get(RECORDED, (None, ()))
        sizes = [size if isinstance(size, int) else batch for size in shape]
        made.append(value if dtype is None else torch.zeros(sizes, dtype=dtype))
    return tuple(made)


def with_values(gm: GraphModule) -> GraphModule:
    """Works out type and shape of every value of a loaded graph, and keeps them in its nodes' meta."""
    placeholders = [node for node in gm.graph.find_nodes(op="placeholder") if RECORDED in node.meta]
    if all("val" in node.meta for node in placeholders):
        return gm
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    device = next((value.device for value in gm.state_dict().values()), torch.device("cpu"))
    for node in placeholders:
        dtype, shape = node.meta[RECORDED]
        node.meta["val"] = _fake_input(dtype, shape, node.name, device, mode)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = to_fake(attribute(gm, str(node.target)), mode)
        elif node.op == "call_function":
            node.meta["val"] = value_of(gm, node.target, node.args, node.kwargs)
    return gm


_BATCH_HINT = 13
"""Example of a dynamic size that equals no other size."""


def _fake_input(dtype: torch.dtype, shape: Sequence[int | str], name: str, device: torch.device, mode: Any) -> Tensor:
    """Returns an input whose named axes are dynamic; axes of one name share a symbol."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    example = torch.empty(
        [size if isinstance(size, int) else _BATCH_HINT for size in shape], dtype=dtype, device=device
    )
    axes = [DimDynamic.STATIC if isinstance(size, int) else DimDynamic.DUCK for size in shape]
    context: Any = StatelessSymbolicContext(dynamic_sizes=axes)
    return mode.from_tensor(example, symbolic_context=context, source=ConstantSource(name))
