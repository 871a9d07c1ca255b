"""Every operator on a GPU: the reference's integers, its floats but for rounding. operator_laws.py has the laws."""

import pytest
import torch
from gpu_operators import OnDevice, OnStream, drawn, in_triton
from hypothesis import given
from hypothesis import strategies as st
from operator_laws import LAWS, laws_of, name_of

from ptq4vm import doctor, ops, reference, triton_kernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", LAWS)
@given(st.data())
@drawn()
def test_a_law_holds(device, name, data):
    LAWS[name].check(OnDevice(device), **data.draw(LAWS[name].arguments()))


@pytest.mark.parametrize("name", laws_of(triton_kernels.MODULES))
@given(st.data())
@drawn(4)  # each compiles kernels of its own
def test_a_law_holds_for_kernels_in_triton(real_gpu, name, data):
    if triton_kernels.problem() is not None:
        pytest.skip(triton_kernels.problem())
    LAWS[name].check(OnDevice(real_gpu, in_triton), **data.draw(LAWS[name].arguments()))


@pytest.mark.parametrize("name", LAWS)
@given(st.data())
@drawn(2)
def test_operators_run_on_the_current_stream(real_gpu, name, data):
    if "backward" in str(LAWS[name].operators):
        pytest.skip("gradients have no kernel: PyTorch's own may wait")
    LAWS[name].check(OnStream(real_gpu), **data.draw(LAWS[name].arguments()))


@pytest.mark.parametrize("name", LAWS)
@given(st.data())
@drawn(2)
def test_operators_run_where_their_tensors_are(real_gpu, name, data):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    LAWS[name].check(OnDevice(torch.device("cuda", 1)), **data.draw(LAWS[name].arguments()))
    assert torch.cuda.current_device() == 0


def test_every_operator_has_a_law(device):
    assert {name for law in LAWS.values() for name in law.operators} == set(map(name_of, ops.SCHEMAS))


def test_the_doctor_finds_nothing_wrong(device):
    assert doctor.wrong_bits() == []


def test_more_numbers_than_32_bits_count(real_gpu):
    """Of codes, and of a linear's results; the last rows are the ones that an int would miss."""
    if torch.cuda.mem_get_info(real_gpu)[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    rows, channels, features = 2**20 + 5, 64, 2100
    x = torch.randn(rows, channels, device=real_gpu, dtype=torch.bfloat16).repeat(1, 33)
    scale, zero_point = torch.full((1,), 30.0, device=real_gpu), torch.zeros(1, device=real_gpu, dtype=torch.int32)
    codes = ops.quantize(x, scale, zero_point, None, 8)
    assert codes.numel() > 2**31
    assert torch.equal(codes[-9:], reference.quantize(x[-9:], scale, zero_point, None, 8))
    assert torch.equal(codes[:9], reference.quantize(x[:9], scale, zero_point, None, 8))
    weight = torch.randint(-127, 128, (features, channels), device=real_gpu, dtype=torch.int8)
    few, ones = codes[:, :channels].contiguous(), torch.ones(features, device=real_gpu)
    del x, codes
    y = ops.linear(few, scale, zero_point, weight, ones, None, torch.bfloat16)
    assert y.numel() > 2**31
    for part in (slice(0, 9), slice(-9, None)):
        assert torch.equal(y[part], reference.linear(few[part], scale, zero_point, weight, ones, None, torch.bfloat16))
