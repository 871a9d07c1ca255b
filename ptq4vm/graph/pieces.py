"""Cuts a graph without numbered blocks into pieces, behind the sums of its residual stream."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from torch.fx import GraphModule, Node

from ptq4vm.graph.batch_axis import BatchAxis, batch_axes, depend_on_images
from ptq4vm.graph.insert import PIECE, aten
from ptq4vm.graph.sites import LinearSite, numbered
from ptq4vm.graph.views import scope

MOST_ALIVE = 2
"""Values that a piece may hand on: the residual stream, and one beside it."""


def with_pieces(gm: GraphModule, linears: Mapping[Node, LinearSite]) -> dict[Node, LinearSite]:
    """Returns the sites with the piece of each linear as its block, and notes in every node to which piece it belongs.

    A graph with numbered blocks stays as it is, and so does one without a place to cut.
    """
    pieces = [] if any(site.block is not None for site in linears.values()) else _pieces(gm, set(linears))
    if len(pieces) < 2:
        return dict(linears)
    sites, seen = dict(linears), dict[str, int]()
    for index, nodes in enumerate(pieces):
        inside = [node for node in nodes if node in linears]
        name = numbered(_common_path(inside) or f"piece {index}", seen)
        for node in nodes:
            node.meta[PIECE] = name
        sites |= {node: dataclasses.replace(linears[node], block=name) for node in inside}
    return sites


def _pieces(gm: GraphModule, linears: set[Node]) -> list[list[Node]]:
    """Returns the operators of each piece, which hold linears: from the first that computes with an image on."""
    images, axes = depend_on_images(gm.graph), batch_axes(gm.graph)
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    nodes = [node for node in gm.graph.nodes if node in images and node.op.startswith("call")]
    last = {node: max((place[user] for user in node.users), default=-1) for node in images}
    pieces: list[list[Node]] = [[]]
    alive: set[Node] = set()
    ahead = len(linears)
    for node in nodes:
        pieces[-1].append(node)
        ahead -= node in linears
        alive = {value for value in (*alive, node) if last[value] > place[node]}
        crossing = len(alive) <= MOST_ALIVE and all(axes.get(value) == BatchAxis(0) for value in alive)
        if ahead and crossing and _is_sum(node, images) and not linears.isdisjoint(pieces[-1]):
            pieces.append([])
    return pieces


def _is_sum(node: Node, images: set[Node]) -> bool:
    return node.target is aten.add.Tensor and all(isinstance(value, Node) and value in images for value in node.args)


def _common_path(nodes: Sequence[Node]) -> str:
    """Returns the path of the innermost module that all nodes were called in."""
    parts = zip(*(scope(node).split(".") for node in nodes), strict=False)
    common = itertools.takewhile(lambda names: len({*names}) == 1, parts)
    return ".".join(names[0] for names in common)
