"""Pipelines: named passes in order, each followed by cleaning up and verifying."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from ptq4vm.graph.verify import GraphStage, verify

Pass = Callable[[GraphModule], GraphModule]
"""A function, or a frozen dataclass where it has parameters. It neither cleans up nor verifies."""


def clean_up(gm: GraphModule) -> GraphModule:
    """Drops dead code and unused modules, checks the graph's structure and compiles its code anew."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    gm.delete_all_unused_submodules()
    return gm


@dataclass(frozen=True)
class Pipeline:
    """Passes in a row, after each of which a graph is one of `stage`; itself a pass.

    >>> def nothing(gm): return gm
    >>> print(Pipeline(GraphStage.CAPTURED, (nothing,)))
    captured
      nothing
    """

    stage: GraphStage
    passes: tuple[Pass, ...]

    def __call__(self, gm: GraphModule) -> GraphModule:
        for apply in self.passes:
            gm = apply(gm)
            if not isinstance(apply, Pipeline):
                gm = verify(clean_up(gm), self.stage, str(_named(apply)))
        return gm

    def __str__(self) -> str:
        lines = [str(self.stage)]
        for apply in self.passes:
            lines += [f"  {line}" for line in str(_named(apply)).split("\n")]
        return "\n".join(lines)


def _named(apply: Pass) -> object:
    return getattr(apply, "__name__", apply)
