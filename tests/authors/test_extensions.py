"""Functions of the compiled modules: what they return, as the Python code around them reads it."""

import pytest
import torch
import torch.nn.functional as F
from helpers.recurrence import drawn, recurrence, states_of

from ptq4vm.authors import stand_ins

WITHOUT_GATE = (
    "selective_scan_cuda_core",
    "selective_scan_cuda_nrow",
    "selective_scan_cuda_ndstate",
    "selective_scan_cuda_oflex",
    "selective_scan_vmamba.selective_scan_cuda_core",
    "selective_scan_vmamba_pt202.selective_scan_cuda_core",
)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def module(name):
    with stand_ins():
        return __import__(name, fromlist=["fwd"])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_mambas_module_returns_the_chunks_ends_and_the_gated_result(groups, gated):
    u, delta, A, B, C, D, z, bias = drawn(groups)
    y, x, *rest = module("selective_scan_cuda").fwd(u, delta, A, B, C, D, z if gated else None, bias, True)
    close(y, recurrence(u, delta, A, B, C, D, None, bias, True))
    assert x.shape == (*u.shape[:2], 1, 2 * A.shape[1])
    close(x[:, :, -1, 1::2], states_of(u, delta, A, B, bias, True)[..., -1])
    dt = F.softplus(delta + bias[:, None])
    close(x[:, :, -1, 0::2], torch.exp(dt[..., None] * A[:, None]).prod(2))
    assert len(rest) == gated
    if gated:
        close(rest[0], recurrence(u, delta, A, B, C, D, z, bias, True))


def test_mambas_module_without_bias_and_softplus():
    u, delta, A, B, C, *_ = drawn(1)
    y, x = module("selective_scan_cuda").fwd(u, delta.abs(), A, B, C, None, None, None, False)
    close(y, recurrence(u, delta.abs(), A, B, C))
    close(x[:, :, -1, 0::2], torch.exp(delta.abs()[..., None] * A[:, None]).prod(2))


@pytest.mark.parametrize("name", WITHOUT_GATE)
def test_the_other_modules_keep_nothing_to_read_of_the_states(name):
    u, delta, A, B, C, D, _, bias = drawn(4)
    y, x = module(name).fwd(u, delta, A, B, C, D, bias, True, 1)
    close(y, recurrence(u, delta, A, B, C, D, None, bias, True))
    with pytest.raises(IndexError):
        x[:, :, -1, 1::2]


@pytest.mark.parametrize(("out_float", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_oflex_returns_floats_where_told(out_float, dtype):
    u, delta, A, B, C, D, _, bias = drawn(2, dtype=torch.bfloat16)
    y, _ = module("selective_scan_cuda_oflex").fwd(u, delta, A, B, C, D, bias, True, 1, out_float)
    assert y.dtype == dtype
    wanted = recurrence(u, delta, A, B, C, D, None, bias, True)
    rounding = 1e-5 if out_float else torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("groups", [1, 2])
def test_oflex_rh_returns_all_states(groups):
    u, delta, A, B, _, _, _, bias = drawn(groups)
    states, x = module("selective_scan_cuda_oflex_rh").fwd(u, delta, A, B, None, bias, True, 1, True)
    wanted = states_of(u, delta, A, B, bias, True)
    close(states, wanted)
    close(x[:, :, -1, 1::2], wanted[..., -1])
    with pytest.raises(NotImplementedError, match="does not take D"):
        module("selective_scan_cuda_oflex_rh").fwd(u, delta, A, B, A[:, 0], bias, True, 1, True)


@pytest.mark.parametrize("name", ["selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex"])
def test_there_is_no_backward_pass(name):
    with pytest.raises(NotImplementedError, match=rf"{name}\.bwd: stand-ins compute the forward pass alone"):
        module(name).bwd(torch.zeros(1))
