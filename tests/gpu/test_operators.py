"""Every operator on a GPU: the reference's integers, its floats but for rounding. operator_laws.py has the laws."""

import pytest
import torch
from helpers.draws import assert_same_codes, relative
from helpers.gpu_operators import SEED, OnDevice, OnStream, drawn, in_triton
from helpers.laws import tolerance
from helpers.operator_laws import LAWS, laws_of, name_of
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu_rows
from ptq4vm import doctor, ops
from ptq4vm.backend import triton as triton_kernels
from ptq4vm.ops import linears, quantization

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", LAWS)
@given(st.data())
@drawn()
def test_a_law_holds(device, name, data):
    LAWS[name].check(OnDevice(device), **data.draw(LAWS[name].arguments()))


@pytest.mark.parametrize("name", laws_of(triton_kernels.MODULES))
@given(st.data())
@drawn(4)  # each compiles kernels of its own
def test_a_law_holds_for_kernels_in_triton(device, name, data):
    if device.type == "cpu":
        pytest.skip("tests/test_triton.py interprets them")
    if triton_kernels.unavailable_reason() is not None:
        pytest.skip(triton_kernels.unavailable_reason())
    LAWS[name].check(OnDevice(device, in_triton), **data.draw(LAWS[name].arguments()))


@pytest.mark.parametrize("name", LAWS)
@given(st.data())
@drawn(2)
def test_operators_run_on_the_current_stream(streams, name, data):
    if "backward" in str(LAWS[name].operators):
        pytest.skip("gradients have no kernel: PyTorch's own may wait")
    LAWS[name].check(OnStream(streams), **data.draw(LAWS[name].arguments()))


@pytest.mark.parametrize("name", LAWS)
@given(st.data())
@drawn(2)
def test_operators_run_where_their_tensors_are(second_device, name, data):
    LAWS[name].check(OnDevice(second_device), **data.draw(LAWS[name].arguments()))
    assert second_device.type == "cpu" or torch.cuda.current_device() == 0


CASES = gpu_rows.operator_cases(1, smoke=True)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_has_the_references_results_at_a_models_size(device, name):
    torch.manual_seed(SEED)
    operator, _, make = gpu_rows.operator_cases(3, smoke=device.type == "cpu")[name]
    arguments, called = make(), operator.__name__
    found = getattr(OnDevice(device), called)(*arguments)
    want = ops.REFERENCES[called].__wrapped__(*arguments)
    for ours, theirs in zip(*((y,) if isinstance(y, torch.Tensor) else y for y in (found, want)), strict=True):
        assert ours.dtype is theirs.dtype
        if ours.dtype is torch.int8:
            assert_same_codes(ours, theirs)
        else:
            assert relative(ours, theirs.double()) <= tolerance(ours.dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name, tokens, channels, features", gpu_rows.LINEARS)
def test_a_linear_has_the_references_results_at_a_models_size(device, name, tokens, channels, features, bits):
    torch.manual_seed(SEED)
    codes = gpu_rows.activations((1 if device.type == "cpu" else 3, tokens, channels), bits, tokens)
    weight = gpu_rows.weights(features, channels, bits, device)
    for dtype in (torch.bfloat16, torch.float32):
        arguments = (*codes, *weight, torch.randn(features), dtype)
        assert torch.equal(OnDevice(device).linear_packed(*arguments), linears.linear_packed(*arguments))


def test_every_operator_has_a_law(device):
    assert {name for law in LAWS.values() for name in law.operators} == set(map(name_of, ops.SCHEMAS))


def test_the_doctor_finds_nothing_wrong(device):
    assert doctor.wrong_bits() == []


def test_more_numbers_than_32_bits_count(device):
    """Codes, and a linear's results; the last rows are those that an int would miss."""
    rows, channels, features = (2**20 + 5, 64, 2100) if device.type == "cuda" else (99, 64, 70)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    x = torch.randn(rows, channels, device=device, dtype=torch.bfloat16).repeat(1, 33)
    scale, zero_point = torch.full((1,), 30.0, device=device), torch.zeros(1, device=device, dtype=torch.int32)
    codes = ops.quantize(x, scale, zero_point, None, 8)
    assert codes.numel() > 2**31 or device.type == "cpu"
    ends = slice(0, 9), slice(rows - 9, rows)
    for end in ends:
        assert torch.equal(codes[end], quantization.quantize(x[end], scale, zero_point, None, 8))
    weight = torch.randint(-127, 128, (features, channels), device=device, dtype=torch.int8)
    few = codes[:, :channels].contiguous()
    del x, codes
    rest = scale, zero_point, weight, torch.ones(features, device=device), None, torch.bfloat16
    y = ops.linear(few, *rest)
    assert y.numel() > 2**31 or device.type == "cpu"
    for end in ends:
        assert torch.equal(y[end], linears.linear(few[end], *rest))
