"""Leaves in a model what a runtime reads: no words of the exporter's, and short names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_PRODUCTS = ("MatMul", "MatMulInteger")
"""Nodes that keep their name, which may be that of a linear."""


def tidy(model: ir.Model) -> ir.Model:
    """Drops what nothing reads, lines of code and notes among it; inputs, outputs and weights keep their names."""
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    numbers = itertools.count()
    for each in (graph, *graph.subgraphs()):
        inner = () if each is graph else (*each.inputs, *each.initializers.values())
        made = (value for node in each for value in node.outputs if value not in graph.outputs)
        for value in (*inner, *made):
            value.name = f"v{next(numbers)}"
        for node in each:
            node.name = node.name if node.op_type in _PRODUCTS else None
        _number_uses([node for node in each if node.name])
        for part in _parts(each):
            part.metadata_props.clear()
            part.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
    used = {node.domain for node in graph.all_nodes()} | {""}
    for domain in [domain for domain in model.opset_imports if domain not in used]:
        del model.opset_imports[domain]
    return model


def _number_uses(products: list[ir.Node]) -> None:
    """Names products of one weight, which came with one name for all, as their linears: `name`, `name@1`, `name@2` …"""
    uses: dict[str, list[ir.Node]] = {}
    for node in products:
        uses.setdefault((node.name or "").partition("@")[0], []).append(node)
    for name, nodes in uses.items():
        if len({node.name for node in nodes}) < len(nodes):
            for i, node in enumerate(nodes):
                node.name = f"{name}@{i}" if i else name


def _parts(graph: ir.Graph) -> Iterator[ir.Graph | ir.Node | ir.Value]:
    yield graph
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield node
        yield from node.outputs
