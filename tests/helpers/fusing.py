"""Lowered graphs, copied and fused."""

import collections
import copy

import torch

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm.passes.lower.pipeline import fusing_pipeline


def fuse_lowered(gm, activations=torch.float32):
    return fusing_pipeline(activations)(gm)


def copied(gm):
    return copy.deepcopy(gm)


def counted(gm):
    return collections.Counter(
        node.target.name().removeprefix("ptq4vm::")
        for node in gm.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("ptq4vm.")
    )
