"""The operators of the CUDA library on emulated kernels: results of the references, and what is said of bad input."""

import faulthandler
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from emulated.cuda_glue import NAMESPACE, Emulated, on_gpu
from helpers.draws import directional_inputs, draw, linear_inputs
from helpers.operator_laws import WITHOUT_CUDA, laws_of, name_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptq4vm import ops

pytestmark = pytest.mark.slow

DRAWN = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
KERNELS = laws_of(set(map(name_of, ops.SCHEMAS)) - WITHOUT_CUDA)
LINEARS = [name for name, law in KERNELS.items() if any("linear" in operator for operator in law.operators)]


@pytest.fixture(scope="session")
def gpu(compiled):
    """The operators. All memory that torch allocates is poisoned."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield Emulated(compiled)
    torch.use_deterministic_algorithms(False)


def test_every_other_operator_has_a_kernel(gpu):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = {name for name in map(name_of, ops.SCHEMAS) if not has(f"{NAMESPACE}::{name}", "CPU")}
    assert missing == WITHOUT_CUDA


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in LINEARS])
@given(st.data())
@settings(DRAWN, max_examples=60)
def test_a_law_holds(gpu, name, data):
    KERNELS[name].check(gpu, **data.draw(KERNELS[name].arguments()))


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("name", LINEARS)
@given(st.data())
@DRAWN
def test_a_law_of_linears_holds_on_every_gpu(gpu, name, capability, data):
    with gpu.on(capability):
        KERNELS[name].check(gpu, **data.draw(KERNELS[name].arguments()))


def test_launches_and_their_streams_are_seen(gpu):
    gpu.launches()
    x, one, zero = torch.randn(1, 2, 3), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with gpu.on(stream=5):
        codes = gpu.quantize(x, one, zero, None, 8)
        gpu.linear(codes, one, zero, torch.ones(4, 3).char(), torch.ones(4), None, x.dtype)
    gpu.rotate(x)
    assert sorted(gpu.launches()) == [0, 5, 5, 5, 5, 5]  # of the linear: sums, both in padded rows, the product


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
@given(st.data())
@settings(DRAWN, max_examples=6)
def test_every_kernel_is_on_the_current_stream(gpu, name, capability, data):
    gpu.launches()
    stream = data.draw(st.sampled_from([0x70, 0x1_0000_0070]))
    with gpu.on(capability, stream):
        KERNELS[name].check(gpu, **data.draw(KERNELS[name].arguments()))
    assert set(gpu.launches()) <= {stream}


# --- one of several GPUs ---

several = pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA has no tensors of GPUs")


@several
@pytest.mark.parametrize("name", KERNELS)
@given(st.data())
@settings(DRAWN, max_examples=6)
def test_a_law_holds_on_the_gpu_of_the_tensors(gpu, name, data):
    """Its stream, its compute capability, and its memory."""
    gpu.launches()
    device = data.draw(st.sampled_from([0, 1]))
    with gpu.on(80, 0x70, device=0), gpu.on(90, 0x71, device=1):
        KERNELS[name].check(gpu.of(device), **data.draw(KERNELS[name].arguments()))
    assert set(gpu.launches()) <= {0x70 + device}


@several
def test_an_error_has_the_number_of_the_gpu(gpu):
    with pytest.raises(RuntimeError, match="ptq4vm::rotate on GPU 1: so many channels"):
        gpu.of(1).rotate(torch.zeros(1, 65536))
    zero_point = on_gpu(torch.zeros(1, dtype=torch.int32), 0)
    with pytest.raises(RuntimeError, match="the first is on GPU 1, another on GPU 0"):
        gpu.of(1).quantize(torch.ones(2, 3), torch.ones(1), zero_point, None, 8)


# --- bad input ---


def test_what_is_wrong_is_named(gpu):
    x, order = torch.randn(1, 6, 4), torch.arange(6, dtype=torch.int32)[None]
    one, tokens = (torch.ones(1), torch.ones(1, dtype=torch.int32)), (torch.ones(6), torch.ones(6, dtype=torch.int32))
    linear = linear_inputs(None, 1, 6, 4, 5, 8, "token", True, draw(0))
    scan = [torch.randn(1, 6, 4), torch.randn(1, 6, 4), -torch.rand(4, 2), torch.randn(1, 6, 2), torch.randn(1, 6, 2)]
    stacked = directional_inputs(draw(0), 2, False, 1, 6, 4, 3, 2, True, 8, 0, torch.float32)
    wide = x.double()
    wrong = {
        "bits must be between 2 and 8, got 9": lambda: gpu.quantize(x, *one, None, 9),
        "calibrated for 6 tokens, the input has 5": lambda: gpu.quantize(x[:, :5], *tokens, None, 8),
        "1 scales and 6 zero points": lambda: gpu.quantize(x, one[0], tokens[1], None, 8),
        "inv_smooth has another shape": lambda: gpu.quantize(x, *one, torch.ones(5), 8),
        "x needs channels": lambda: gpu.choose_qparams(x[..., :0], None, 8),
        "x_q must be int8 codes": lambda: gpu.dequantize(x, *one),
        "x needs a channel axis": lambda: gpu.rotate(torch.tensor(1.0)),
        "the input has 3; calibrate": lambda: gpu.rotate_quantize(x[:, :3], True, *tokens, None, 8),
        "an RMS norm has no bias": lambda: gpu.norm_quantize(
            x, None, None, torch.ones(4), 1e-5, True, False, *one, None, 8
        ),
        "residual has another shape": lambda: gpu.norm_quantize(
            x, x[:, :5], None, None, 1e-5, True, False, *one, None, 8
        ),
        "order is int64": lambda: gpu.conv1d_quantize(
            x, torch.ones(1, 4, 3), None, order.long(), *(q[None] for q in tokens), None, 8
        ),
        "order has another shape": lambda: gpu.conv1d_quantize(
            x, torch.ones(1, 4, 3), None, order[:, :5], *(q[None] for q in tokens), None, 8
        ),
        "must be odd": lambda: gpu.conv2d_quantize(
            x, torch.ones(4, 2, 3), None, 2, 3, *(q[None] for q in tokens), None, 8
        ),
        "at least one tap": lambda: gpu.causal_conv1d(x, torch.ones(4, 0), None, True),
        "causal_conv1d has no float64 on a GPU": lambda: gpu.causal_conv1d(wide, torch.ones(4, 2), None, True),
        "selective_scan has no float64 on a GPU": lambda: gpu.selective_scan(wide, *scan[1:], None, None, None, True),
        "delta has another shape": lambda: gpu.selective_scan(
            scan[0], scan[1][:, :5], *scan[2:], None, None, None, True
        ),
        "u has 3 directions, the order 2": lambda: gpu.directional_scan(
            torch.zeros(3, 1, 6, 4), *stacked[1:], True, 1.0
        ),
        "pack it with ptq4vm.ops.layouts.pack_weight": lambda: gpu.linear_packed(
            *linear[:3], linear[3][:, :, :8], *linear[4:], torch.float32
        ),
        "a weight of 5 × 4 channels": lambda: gpu.linear_packed(
            *linear[:3], torch.zeros(5, 4, dtype=torch.int8), *linear[4:], torch.float32
        ),
        "a int8 weight for 4 channels has 4 columns, this one 7": lambda: gpu.linear(
            *linear[:3], torch.zeros(5, 7, dtype=torch.int8), linear[5], None, torch.float32
        ),
        "GELU follows one linear": lambda: gpu.linear_gelu_quantize(
            *linear_inputs(2, 1, 6, 4, 5, 8, "token", True, draw(0)), False, *one, None, 8
        ),
        r"ptq4vm::selective_scan on GPU -?\d+: so many channels or states": lambda: gpu.selective_scan(
            x, x, torch.zeros(4, 900), torch.zeros(1, 6, 900), torch.zeros(1, 6, 900), None, None, None, True
        ),
        r"ptq4vm::rotate on GPU -?\d+: so many channels": lambda: gpu.rotate(torch.zeros(1, 65536)),
    }
    for message, call in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_tensors_of_two_devices_are_refused(gpu):
    """Seen as the GPU's dispatcher sees it: the CPU's kernel, whatever the devices."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    scale, zero_point = torch.ones(1), torch.ones(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="all tensors must be on one device: the first is on the CPU, another on"):
        gpu.quantize.default.redispatch(keys, torch.ones(2, 3), scale.to("meta"), zero_point, None, 8)
    with pytest.raises(RuntimeError, match="all tensors must be on one device"):
        gpu.quantize.default.redispatch(keys, torch.ones(2, 3), scale, zero_point, torch.ones(3, device="meta"), 8)


@pytest.mark.parametrize("token", [-1, 6, 2**31 - 1, -(2**31)])
def test_a_token_that_is_none_stops_the_kernel(gpu, token):
    """Before it reads or writes; the host, which would have to wait, does not look at orders."""
    order = torch.tensor([[0, 1, 2, 3, 4, token]], dtype=torch.int32)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    child = os.fork()
    if not child:
        faulthandler.disable()
        gpu.conv1d_quantize(torch.ones(1, 6, 4), torch.ones(1, 4, 3), None, order, one, zero, None, 8)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGABRT


def test_silu_and_orders_are_those_of_the_weights(gpu):
    """By hand: two directions, one backwards, one tap."""
    x, weight = torch.randn(1, 5, 3), torch.ones(2, 3, 1)
    order = torch.stack([torch.arange(5), torch.arange(5).flip(0)]).int()
    u, _ = gpu.conv1d_quantize(x, weight, None, order, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), None, 8)
    assert torch.allclose(u, F.silu(x).expand(2, 1, 5, 3), atol=1e-6)
