"""Packed weights, and the fused operators as compositions of the plain ones."""

import pytest
import torch
from helpers.operator_laws import LAWS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ptq4vm import ops
from ptq4vm.ops import layouts, scans


@given(st.lists(st.integers(1, 3), max_size=1), st.integers(1, 40), st.integers(1, 150), st.sampled_from([4, 8]))
def test_packing_a_weight_is_undone_by_unpacking(leading, features, channels, bits):
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (*leading, features, channels)).to(torch.int8)
    packed = layouts.pack_weight(codes, bits)
    assert packed.shape[-4:-1] == (-(-features // 16), -(-channels // 64), 16)
    assert packed.nbytes * 2 == layouts.pack_weight(codes, 8).nbytes if bits == 4 else packed.dtype == torch.int8
    assert torch.equal(layouts.unpack_weight(packed, features, channels), codes)


def test_one_direction_in_order_is_the_plain_scan():
    torch.manual_seed(0)
    B, L, E, R, S = 2, 9, 5, 3, 4
    u, z, projected = torch.randn(1, B, L, E), torch.randn(B, L, E), torch.randn(1, B, L, R + 2 * S)
    weight, scale = torch.randint(-127, 128, (1, E, R), dtype=torch.int8), torch.rand(1, L) / 50 + 0.01
    zero_point, weight_scale = torch.randint(-9, 9, (1, L), dtype=torch.int32), torch.rand(1, E) / 100
    bias, A, D = torch.randn(1, E), -torch.rand(1, E, S), torch.randn(1, E)
    low_rank, b, c = projected[0].split((R, S, S), -1)
    codes = ops.quantize(low_rank, 1 / scale[0], zero_point[0], None, 8)
    delta = ops.linear(codes, scale[0], zero_point[0], weight[0], weight_scale[0], None, torch.float32)
    packed = (layouts.pack_weight(weight, 8), weight.sum(-1, dtype=torch.int32), weight_scale)
    steps = (u, projected, 1 / scale, scale, zero_point, None, 8, *packed, bias, A, D, z)
    for reverse in (False, True):
        turn = (lambda x: x.flip(1)) if reverse else (lambda x: x)
        inputs = (turn(u[0]), turn(delta), A[0], turn(b), turn(c), D[0], turn(z), bias[0], True)
        want = turn(scans.selective_scan(*inputs))
        order = turn(torch.arange(L)[None]).int()
        torch.testing.assert_close(ops.directional_scan(*steps, order, False, 1.0)[0], want)
        torch.testing.assert_close(ops.directional_scan(*steps, order, True, 0.5), want / 2)


class OnTheGpu(TorchDispatchMode):
    """Every result but a number is on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            assert not isinstance(x, Tensor) or x.dim() == 0 or x.device.type == "cuda", function
        return results


class Watched:
    """The operators on the CPU; each also runs on a GPU that is not here, where tensors have no numbers to look at."""

    def __getattr__(self, name):
        def operator(*arguments):
            with FakeTensorMode() as mode:
                there = tree_map(lambda x: mode.from_tensor(x).cuda() if isinstance(x, Tensor) else x, arguments)
                with OnTheGpu():
                    ops.REFERENCES[name].__wrapped__(*there)
            return getattr(torch.ops.ptq4vm, name)(*arguments)

        return operator


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
@given(st.data())
@settings(max_examples=4)
def test_a_gpu_does_not_wait_for_the_host(name, data):
    """References read nothing of a GPU's memory and bring nothing there, so that a CUDA graph can hold them."""
    LAWS[name].check(Watched(), **data.draw(LAWS[name].arguments()))
