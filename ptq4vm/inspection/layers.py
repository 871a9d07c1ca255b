"""Measures the error of each quantized linear, and the inputs of the linears of any model.

Graphs run node by node, a quantized one side by side with its floating-point original, so that no more is held than one
forward of each needs. Shapes: B images, L tokens, D channels in, N out.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ptq4vm import ops
from ptq4vm.config import QuantConfig
from ptq4vm.formatting import linear_rows
from ptq4vm.graph.insert import attribute
from ptq4vm.inspection.statistics import Activation, Fidelity
from ptq4vm.metadata import metadata_of
from ptq4vm.ops import layouts, quantization
from ptq4vm.passes.lower.patterns import source_of
from ptq4vm.passes.prepare.pipeline import prepared_graph
from ptq4vm.passes.quantized_nodes import quantized_linears, weight_of
from ptq4vm.quantization_specs import IntegerRange

COLUMNS = {
    "output_sqnr_db": "output SQNR dB",
    "output_cosine": "output cosine",
    "input_sqnr_db": "input SQNR dB",
    "input_cosine": "input cosine",
    "clipped_percent": "clipped %",
    "weight_sqnr_db": "weight SQNR dB",
    "peak": "max / RMS",
    "token_variance": "token variance",
    "channel_outliers": "channel outliers",
}
"""Headings of the figures, by their keys."""


@dataclass(slots=True, kw_only=True)
class Layer:
    """Measurements of one linear."""

    name: str
    input: Fidelity = field(default_factory=Fidelity)
    """Compares x · inv_smooth with the values of its codes."""
    values: int = 0
    clipped: int = 0
    """Values whose code was out of bounds before it was clamped."""
    output: Fidelity | None = None
    """Compares the output in the floating-point model with the output in the quantized one."""
    weight: Fidelity | None = None
    """Compares W · s with the values of its integers."""
    activation: Activation | None = None

    def row(self) -> dict[str, Any]:
        """Returns the figures by the keys of `COLUMNS`."""
        row: dict[str, Any] = {"name": self.name}
        if self.output is not None:
            row |= {"output_sqnr_db": self.output.sqnr, "output_cosine": self.output.cosine}
        row |= {"input_sqnr_db": self.input.sqnr, "input_cosine": self.input.cosine}
        row |= {"clipped_percent": 100 * self.clipped / max(1, self.values)}
        return row if self.weight is None else row | {"weight_sqnr_db": self.weight.sqnr}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Contents of the pictures and of the HTML page."""

    title: str
    facts: Mapping[str, str]
    columns: Mapping[str, str]
    """Keys of the rows that a table shows, and their headings."""
    rows: Sequence[Mapping[str, Any]]
    """One row per linear, the worst first."""
    layers: Sequence[Layer]
    """Linears in graph order, each with its activation."""


def original(quantized: GraphModule, model: nn.Module, images: Tensor) -> GraphModule:
    """Returns the graph of the floating-point model that `quantized` was made from, for images (B, C, H, W).

    Raises ValueError where the linears of `model` are not those of `quantized`.
    """
    metadata = metadata_of(quantized)
    # those saved before there was a coverage left linears outside their blocks
    only = None if metadata.coverage.products else frozenset(linear.name for linear in metadata.linears)
    config = metadata.config
    graph = floating(model, images, only, exclude=config.exclude, pooled=config.pooled, rotation=config.rotation)
    have, want = metadata_of(graph).linears, metadata.linears
    if have != want:
        pairs = ((a, b) for a, b in zip(have, want, strict=False) if a != b)
        a, b = next(pairs, (None, None))
        where = f"; it has {_shape(a)} where the quantized one has {_shape(b)}" if a and b else ""
        raise ValueError(
            f"the models differ: {len(have)} linears in {type(model).__name__}, {len(want)} in the quantized one"
            f"{where}; compare with the model that was quantized"
        )
    return graph


def _shape(linear: Any) -> str:
    return f"{linear.name} ({linear.tokens} tokens, {linear.in_features} → {linear.out_features})"


def floating(model: nn.Module, images: Tensor, only: frozenset[str] | None = None, **changes: Any) -> GraphModule:
    """Returns the graph of a model for images (B, C, H, W), in which the linears to quantize are marked.

    `only` names those that a saved model has quantized; `changes` are options of `QuantConfig`, such as `rotation`.

    Example:
        >>> import timm, torch, ptq4vm.models
        >>> model, images = timm.create_model("vim_nano_patch4_32").eval(), torch.randn(4, 3, 32, 32)
        >>> layers = watch(floating(model, images), [images])
        >>> layers[0].name, layers[0].activation.tokens
        ('layers.0.mixer.in_proj', 65)
    """
    return prepared_graph(model, (images,), QuantConfig.minmax(8, **changes), only)


def measure(
    quantized: GraphModule, batches: Sequence[Tensor], *, against: GraphModule | None = None, figures: bool = False
) -> list[Layer]:
    """Measures every integer linear of a lowered graph on images (B, C, H, W), in graph order.

    `against` is the floating-point graph that `original` returns; without it only the inputs are measured. `figures`
    keeps the activations, of which pictures are drawn. Raises ValueError where the graph is not lowered, or values in
    it are not finite.

    Example:
        >>> import torch, ptq4vm
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.randn(4, 5, 8)
        >>> quantized = ptq4vm.quantize(model, [images], ptq4vm.QuantConfig.minmax(8), progress=False)
        >>> (layer,) = measure(quantized, [images], against=original(quantized, model, images))
        >>> layer.output.sqnr > 30
        True
    """
    sites = {node: _Site(node) for node in quantized.graph.find_nodes(op="call_function", target=ops.linear.default)}
    if not sites:
        raise ValueError("only lowered models are measured: call ptq4vm.convert(prepared) without lower=False")
    layers = {node: Layer(name=site.name) for node, site in sites.items()}
    if against is not None:
        for site, layer, linear in zip(sites.values(), layers.values(), quantized_linears(against), strict=True):
            layer.output, layer.weight = Fidelity(), _weight_fidelity(quantized, site, weight_of(linear))
    watched = {node: site.watched for node, site in sites.items()}
    with torch.inference_mode():
        for images in _bar(batches):
            outputs = repeat(None) if against is None else (y for _, (_, y) in _see(against, images))
            # the quantized graph first, since it is the one that ends
            for (node, values), exact in zip(walk(quantized, images, watched), outputs, strict=False):
                _add_batch(layers[node], sites[node], values, exact, figures)
    return list(layers.values())


def watch(model: GraphModule, batches: Sequence[Tensor]) -> list[Layer]:
    """Measures the inputs of the linears of a graph that `floating` returns, in graph order, as their activations.

    Raises ValueError for an input with values that are not finite.
    """
    layers = {
        linear.name: Layer(name=linear.name, activation=Activation(linear.tokens, linear.in_features))
        for linear in metadata_of(model).linears
    }
    with torch.inference_mode():
        for images in _bar(batches):
            for name, (x, _) in _see(model, images):
                activation = layers[name].activation
                assert activation is not None
                _check_finite(name, x)
                activation.add(x)
    return list(layers.values())


def quantized_rows(quantized: GraphModule, layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Returns the figures of each linear, and the choices of the recipe for it, the worst first."""
    choices = {row["name"]: row for row in linear_rows(quantized)}
    rows = [layer.row() | choices[layer.name] for layer in layers]
    return sorted(rows, key=_badness)


def _badness(row: dict[str, Any]) -> float:
    value = row.get("output_sqnr_db", row["input_sqnr_db"])
    return math.inf if value is None else value


def floating_rows(model: GraphModule, layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Returns the figures of each linear's input, the hardest to quantize with one range first."""
    facts = {linear.name: linear for linear in metadata_of(model).linears}
    rows: list[dict[str, Any]] = []
    for layer in layers:
        activation, fact = layer.activation, facts[layer.name]
        assert activation is not None
        row = {key: getattr(activation, key) for key in ("peak", "token_variance", "channel_outliers")}
        rows.append({"name": fact.name, **row, "tokens": fact.tokens, "in": fact.in_features, "out": fact.out_features})
    return sorted(rows, key=lambda row: -row["peak"])


class _Site:
    """`ops.linear` in a lowered graph, and the nodes whose values are measured."""

    def __init__(self, node: Node) -> None:
        codes, scale, zero_point, weight, weight_scale, *_ = node.args
        assert isinstance(codes, Node) and isinstance(weight, Node) and isinstance(weight_scale, Node)
        self.name = str(weight.target).removesuffix(".weight_q")
        self.weight, self.weight_scale = str(weight.target), str(weight_scale.target)
        x, inv_scale, _, inv_smooth, bits = codes.args
        assert isinstance(bits, int)
        self.bits = bits
        source = source_of(codes)
        self.rotated = source.rotate is not None
        self.inv_smooth = None if source.inv_smooth is None else str(source.inv_smooth.target)
        self.watched = (x, inv_scale, inv_smooth, codes, scale, zero_point, node)


def _add_batch(layer: Layer, site: _Site, values: Sequence[Any], exact: Tensor | None, figures: bool) -> None:
    x, inv_scale, inv_smooth, codes, scale, zero_point, output = values
    _check_finite(layer.name, x)
    smoothed = x.float() if inv_smooth is None else x.float() * inv_smooth
    dequantized = quantization.dequantize(codes, scale, zero_point)
    layer.input.add(smoothed, dequantized)
    unclamped = quantization.unclamped_codes(x, inv_scale, zero_point, inv_smooth)
    low, high = IntegerRange(bits=site.bits, narrow_range=False).bounds
    layer.clipped += int(((unclamped < low) | (unclamped > high)).sum())
    layer.values += x.numel()
    if layer.output is not None and exact is not None:
        _check_finite(layer.name, exact, "output in floating point")
        layer.output.add(exact, output)
    if figures:
        layer.activation = layer.activation or Activation(*x.shape[1:])
        layer.activation.add(x, inv_smooth, dequantized)


def _check_finite(name: str, x: Tensor, what: str = "input") -> None:
    if not x.isfinite().all():
        raise ValueError(f"{name}: its {what} has values that are not finite; do weights and images fit the model?")


def _weight_fidelity(quantized: GraphModule, site: _Site, weight: Tensor) -> Fidelity:
    """Compares W · s, rotated if the input is, with the integers times their scales; `weight` is W (N, D)."""
    integers = attribute(quantized, site.weight)
    if integers.dtype == torch.uint8:
        integers = layouts.unpack_int4(integers, weight.shape[1])
    if site.inv_smooth is not None:
        inverse = attribute(quantized, site.inv_smooth)
        weight = ops.rotate(ops.rotate(weight) / inverse) if site.rotated else weight / inverse
    fidelity = Fidelity()
    fidelity.add(weight, integers * attribute(quantized, site.weight_scale).unsqueeze(-1))
    return fidelity


def _see(model: GraphModule, images: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields name, input and output of every linear of a prepared graph."""
    names = {linear.node: linear.name for linear in quantized_linears(model)}
    for node, values in walk(model, images, {node: (node.args[0], node) for node in names}):
        yield names[node], values


def walk(gm: GraphModule, images: Tensor, watched: Mapping[Node, Sequence[Any]]) -> Iterator[tuple[Node, list[Any]]]:
    """Runs a graph; yields each watched node and the values of the nodes that `watched` lists for it.

    An entry that is no node is its own value. A value is freed as soon as nothing needs it.
    """
    last: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        for used in (*node.all_input_nodes, *watched.get(node, ())):
            if isinstance(used, Node):
                last[used] = node
    spent = defaultdict(list)
    for used, node in last.items():
        spent[node].append(used)
    run = Interpreter(gm, garbage_collect_values=False)
    run.args_iter = iter((images,))
    for node in gm.graph.nodes:
        run.env[node] = run.run_node(node)
        if node in watched:
            yield node, [run.env[value] if isinstance(value, Node) else value for value in watched[node]]
        for used in spent.pop(node, ()):
            del run.env[used]


def _bar(batches: Sequence[Tensor]) -> Any:
    from tqdm import tqdm

    return tqdm(batches, desc="inspect", disable=None, unit="batch")  # None: no bar where there is no terminal
