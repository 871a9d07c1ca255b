"""One node of the domain `ptq4vm`: an operator's arguments by the names of its schema."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq4vm.ops import SCHEMAS

_TENSORS = {
    schema.partition("(")[0]: re.findall(r"Tensor\?? (\w+)", schema.partition(") ->")[0])
    for schema in (*SCHEMAS, "dequantize_per_channel(Tensor input, Tensor scales, Tensor? zero_points) -> Tensor")
}


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an operator of ours."""

    node: ir.Node

    @property
    def operator(self) -> str:
        return self.node.op_type

    def __getitem__(self, name: str) -> ir.Value:
        """Returns a tensor that is there."""
        value = self.get(name)
        assert value is not None, name
        return value

    def get(self, name: str) -> ir.Value | None:
        """Returns a tensor, or None where the call has none."""
        place = _TENSORS[self.operator].index(name)
        return self.node.inputs[place] if place < len(self.node.inputs) else None

    def number(self, name: str) -> Any:
        return self.node.attributes[name].value

    def constant(self, name: str) -> np.ndarray | None:
        """Returns the numbers of a tensor; None where it is computed, or absent."""
        return constant_of(self.get(name))


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """Returns the numbers of a constant; None for what is computed or absent."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def size(value: ir.Value, axis: int) -> int:
    """Returns a size that the graph fixes: every one but the batch's."""
    assert value.shape is not None
    length = value.shape[axis]
    assert isinstance(length, int), (value.name, value.shape)
    return length


def rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)
