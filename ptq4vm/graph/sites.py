"""Sites: what is quantized around a node, as one frozen record in its metadata.

Shapes: B images (dynamic), L tokens (static), D channels in, N channels out.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.fx import Graph, GraphModule, Node

from ptq4vm import ops
from ptq4vm.graph.batch_axis import batch_symbol, depend_on_images, per_image
from ptq4vm.graph.element_numbers import moves_elements
from ptq4vm.graph.insert import aten
from ptq4vm.graph.views import module_paths, parameter_of, root_of, scope
from ptq4vm.quantization_specs import Granularity

SITE = "ptq4vm.site"
"""The key of a node's metadata; torchao's passes and copies of graphs keep it."""

LEFT = "ptq4vm.left"
"""The key of the reason for which a product of a weight is no linear on tokens, and stays in floating point."""

POOLED = "pooled: one value per image, no tokens"
"""The reason of products that a config may quantize nevertheless."""

CONVOLUTIONS = (ops.causal_conv1d.default, aten.conv2d.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSite:
    """Quantization of a value where it is made."""

    granularity: Granularity
    axis: int = 1
    """Axis of the tokens or channels that have scales of their own."""
    power_of_two: bool = False
    """Whether the ratios of its scales may be powers of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A node where something is quantized: its result, or what a subclass names."""

    name: str
    output: OutputSite | None = None
    """None where the result stays in floating point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite(Site):
    """One canonical linear: x (B, L, D) times a parameter (N, D).

    Its name is the path of the module whose `weight` it is, such as `layers.0.mixer.in_proj`; of a bare parameter `w`,
    `w_linear`; `name@1` at a second call of one weight.
    """

    weight: str
    """Path of the weight parameter."""
    tokens: int
    in_features: int
    out_features: int
    block: str | None
    """Path of the block around it; None in the stem, the head, and between the blocks of a stage."""
    float_token_index: int | None = None
    """The class token's position, where its row stays in floating point."""
    shares_qparams_with: str | None = None
    """Name of the site whose quantized output is this input too."""
    log_smooth: str | None = None
    """Path of log s (D,), which x is divided by; None without smoothing."""
    rotated: bool = False
    """Whether x / s and W · s are rotated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvolutionSite(Site):
    """A convolution with a quantized weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSite(Site):
    """A selective scan with a quantized state."""


_Site = TypeVar("_Site", bound=Site)


def sites_of(gm: GraphModule, kind: type[_Site]) -> dict[Node, _Site]:
    """Returns the sites of one kind by their node, in graph order.

    A piece of a graph has the metadata of the values that it reads too: its placeholders are no sites.
    """
    calls = (node for node in gm.graph.nodes if node.op.startswith("call"))
    return {node: site for node in calls if isinstance(site := node.meta.get(SITE), kind)}


def update_site(node: Node, **changes: Any) -> None:
    """Replaces the record of a node by one with some fields changed."""
    node.meta[SITE] = dataclasses.replace(node.meta[SITE], **changes)


def find_linears(gm: GraphModule) -> dict[Node, LinearSite]:
    """Returns every `aten.linear` of a parameter on (B, L, D), in graph order."""
    sites: dict[Node, LinearSite] = {}
    seen: dict[str, int] = {}
    nodes: list[Any] = [n for n in gm.graph.find_nodes(op="call_function", target=aten.linear.default) if on_tokens(n)]
    for node, block in zip(nodes, block_paths(nodes), strict=True):
        weight = str(parameter_of(node.args[1]))
        out_features, in_features = node.args[1].meta["val"].shape
        sites[node] = LinearSite(
            name=numbered(weight_label(weight), seen),
            weight=weight,
            tokens=node.args[0].meta["val"].shape[1],
            in_features=in_features,
            out_features=out_features,
            block=block,
        )
    return sites


def weight_label(weight: str) -> str:
    """Returns the name of the linear with a weight: the path of its module, or `w_linear` for a bare parameter `w`."""
    owner, _, leaf = weight.rpartition(".")
    return owner if owner and leaf == "weight" else f"{weight}_linear"


def numbered(label: str, seen: dict[str, int]) -> str:
    """Returns the label, at a second call with the same `seen` `label@1`, and so on."""
    count = seen[label] = seen.get(label, -1) + 1
    return f"{label}@{count}" if count else label


def on_tokens(linear: Node) -> bool:
    """Returns whether a linear multiplies a parameter with x (B, L, D), B the images and all else fixed."""
    x: Any = linear.args[0]
    batch, *sizes = x.meta["val"].shape
    fixed = len(sizes) == 2 and all(isinstance(size, int) for size in sizes)
    images = per_image(batch, batch_symbol(linear.graph)) == 1
    return fixed and images and LEFT not in linear.meta and parameter_of(linear.args[1]) is not None


def block_paths(nodes: Sequence[Node]) -> list[str | None]:
    """Returns the block around each node: the innermost numbered module (`layers.3`, `layers.0.blocks.1`).

    A module that is a bare linear is none. None where there is none, and in a stage, which is a numbered module around
    other nodes' blocks (`layers.0` around `layers.0.blocks.1`). A linear that is a site has its own recorded.
    """
    if all(isinstance(node.meta.get(SITE), LinearSite) for node in nodes):
        return [node.meta[SITE].block for node in nodes]
    computing = _computing_modules(nodes[0].graph)
    paths = [_numbered_module(node, computing) for node in nodes]
    blocks = {path for path in paths if path is not None}
    stages = {path for path in blocks if any(other.startswith(f"{path}.") for other in blocks)}
    return [None if path in stages else path for path in paths]


def _numbered_module(node: Node, computing: set[str]) -> str | None:
    own, paths = scope(node), [path for path in module_paths(node) if _is_numbered(path)]
    return next((path for path in reversed(paths) if path != own or path in computing), None)


def _is_numbered(path: str) -> bool:
    return re.search(r"(^|\.)\d+$", path) is not None


def _computing_modules(graph: Graph) -> set[str]:
    """Returns the numbered modules that compute more than one product and views of its operands: no bare linears."""
    reached = depend_on_images(graph)
    products: dict[str, set[Node]] = {}
    found: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node not in reached or moves_elements(node):
            continue
        numbers = [path for path in module_paths(node) if _is_numbered(path)]
        if node.target is aten.linear.default:
            for path in numbers:
                products.setdefault(path, set()).add(root_of(node.args[0]))
        elif node.target is not aten.stack.default and not _adds_bias(node, reached):
            found.update(numbers)
    return found | {path for path, inputs in products.items() if len(inputs) > 1}


def _adds_bias(node: Node, reached: set[Node]) -> bool:
    return node.target is aten.add.Tensor and not reached.issuperset(node.args)
