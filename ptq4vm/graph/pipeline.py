"""Passes in a row, with cleaning up and verifying after each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from ptq4vm import ops


def finish(gm: GraphModule) -> GraphModule:
    """Clean up and verify: every pass ends here, so passes need not."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    gm.delete_all_unused_submodules()
    return gm


Pass = Callable[[GraphModule], GraphModule]


@dataclass(frozen=True)
class Pipeline:
    """Passes in a row; itself a pass."""

    passes: tuple[Pass, ...]

    def __call__(self, gm: GraphModule) -> GraphModule:
        for apply in self.passes:
            gm = finish(apply(gm))
        return gm


def is_lowered(gm: GraphModule) -> bool:
    """Whether the graph computes with integers."""
    integer = (ops.linear.default, ops.selective_scan_quantized.default)
    return any(gm.graph.find_nodes(op="call_function", target=target) for target in integer)
