"""A short way to write ONNX nodes: `b.Add(x, 1.0)` appends a node and returns its output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

Operand = ir.Value | np.ndarray | np.generic | float | int | Sequence[int] | None
"""A value, or a constant: a float is float32, an int and a list of ints are int64."""


@dataclass(frozen=True, slots=True)
class Constants:
    """Initializers, equal ones once; but no two products share a weight.

    ONNX Runtime refuses those where it makes weights unsigned, for processors without VNNI.
    """

    known: dict[Any, ir.Value] = field(default_factory=dict)
    weights: set[Any] = field(default_factory=set)
    """Keys of the constants that a product has."""


class Builder:
    """Appends nodes and constants to a part of a graph; builders may share their constants.

    >>> b = Builder()
    >>> y = b.Add(ir.val("x"), 1.0)
    >>> [node.op_type for node in b.nodes], [constant.dtype.name for constant in b.constants]
    (['Add'], ['FLOAT'])
    """

    def __init__(self, constants: Constants | None = None) -> None:
        self._tape = Tape()
        self._names = itertools.count()
        self._constants = constants or Constants()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    @property
    def constants(self) -> Sequence[ir.Value]:
        return list(self._constants.known.values())

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.op(op_type, *inputs, **attributes)

    def op(self, op_type: str, *inputs: Operand, node: str | None = None, **attributes: Any) -> ir.Value:
        """Appends a node with one output, named `node`."""
        return self._tape.op(op_type, [self.value(each) for each in inputs], attributes, name=node)

    def several(self, op_type: str, count: int, *inputs: Operand, **attributes: Any) -> Sequence[ir.Value]:
        """Appends a node with several outputs."""
        return self._tape.op_multi_out(op_type, [self.value(each) for each in inputs], attributes, num_outputs=count)

    def value(self, operand: Operand) -> ir.Value | None:
        """Returns the value, or a constant, the same for equal ones."""
        if operand is None or isinstance(operand, ir.Value):
            return operand
        return self.constant(np.asarray(operand, np.float32 if isinstance(operand, float) else None))

    def constant(self, array: np.ndarray, dtype: ir.DataType | None = None, *, weight: bool = False) -> ir.Value:
        """Returns an initializer, `weight` where it is a product's; int8 codes may be written as INT4, two a byte."""
        known, key = self._constants.known, (str(dtype or array.dtype), array.shape, array.tobytes(), 0)
        while weight and key in self._constants.weights:
            key = (*key[:-1], key[-1] + 1)
        if weight:
            self._constants.weights.add(key)
        if key not in known:
            tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape))
            if dtype is ir.DataType.INT4:
                low, high = np.append(array.ravel(), [0] * (array.size % 2)).astype(np.uint8).reshape(-1, 2).T & 15
                tensor = ir.PackedTensor(low | high << 4, dtype, shape=ir.Shape(array.shape))
            known[key] = ir.val(None, dtype=tensor.dtype, shape=array.shape, const_value=tensor)
        return known[key]

    def scan(
        self,
        body: Builder,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        states: Sequence[ir.Value],
        sequences: Sequence[Operand],
    ) -> Sequence[ir.Value]:
        """Appends a Scan: `body` computes outputs from inputs, both states first; sequences are read along axis 0."""
        for constant in body.constants:
            constant.name = f"step_{next(self._names)}"
        graph = ir.Graph(inputs, outputs, nodes=body.nodes, initializers=body.constants, name="step")
        return self.several("Scan", len(outputs), *states, *sequences, body=graph, num_scan_inputs=len(sequences))
