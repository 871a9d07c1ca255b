"""Laws of activations in bfloat16: what is recorded of values is what they are, and outputs keep their types."""

import pytest
import torch
from helpers.portable_models import Tokens, made
from helpers.public_models import slow_but
from helpers.strategies import normal
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

import ptq4vm
from ptq4vm import QuantConfig


class Wide(Tokens):
    """An operator with keyword arguments behind the blocks, and a block's output that is returned as it is."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.body(x)
        return self.head(y.mean(1)), y.sum(-1, dtype=torch.float64), self.layers[0].fc1(x)


class Compared(fx.Interpreter):
    """Runs a graph and compares every value's type and shape with what is recorded."""

    compared = 0

    def run_node(self, n: fx.Node):
        value, recorded = super().run_node(n), n.meta.get("val")
        if isinstance(value, Tensor) and isinstance(recorded, Tensor):
            assert value.dtype == recorded.dtype and value.shape[1:] == recorded.shape[1:], n
            self.compared += n.op == "call_function"
        return value


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", slow_but(("wide",), ("wide", "vim_nano_patch4_32", "vmamba_nano_32")))
def test_values_are_as_recorded_and_outputs_keep_their_types(name, activations):
    torch.manual_seed(0)
    model, inputs = (Wide().eval(), (normal(4, 5, 8),)) if name == "wide" else made(name)
    quantized = ptq4vm.quantize(model, [inputs], QuantConfig(range_search=False, learning=None), progress=False)
    fused = ptq4vm.fuse(quantized, activations=activations)
    run = Compared(fused)
    with torch.no_grad():
        outputs = run.run(*inputs)
        wanted = quantized(*inputs)
    assert run.compared > 10
    assert [value.dtype for value in tree_leaves(outputs)] == [value.dtype for value in tree_leaves(wanted)]
