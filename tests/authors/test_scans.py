"""`selective_scan_fn` against the recurrence in float64."""

import pytest
import torch
from helpers.recurrence import STATES, drawn, recurrence, states_of
from helpers.strategies import normal
from hypothesis import given
from hypothesis import strategies as st

from ptq4vm.authors.scans import selective_scan_fn, selective_scan_without_gate


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 7]), st.sampled_from(range(16)), st.integers(0, 99))
def test_it_is_the_recurrence(groups, tokens, given_ones, seed):
    u, delta, A, B, C, *optional = drawn(groups, tokens, seed=seed)
    D, z, bias = (value if given_ones >> k & 1 else None for k, value in enumerate(optional))
    softplus = bool(given_ones >> 3)
    close(
        selective_scan_fn(u, delta, A, B, C, D, z, bias, softplus), recurrence(u, delta, A, B, C, D, z, bias, softplus)
    )


def test_groups_may_be_left_out_where_there_is_one():
    u, delta, A, B, C, D, z, bias = drawn(1, width=4, per_group=False)
    close(selective_scan_fn(u, delta, A, B, C, D, z, bias, True), recurrence(u, delta, A, B, C, D, z, bias, True))


def test_b_may_be_shared_by_the_groups_of_c():
    u, delta, A, _, C, *_ = drawn(4)
    B = drawn(1, seed=1)[3]
    close(selective_scan_fn(u, delta, A, B, C), recurrence(u, delta, A, B, C))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_last_state(groups):
    u, delta, A, B, C, D, z, bias = drawn(groups)
    y, state = selective_scan_fn(
        u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True
    )
    close(y, recurrence(u, delta, A, B, C, D, z, bias, True))
    close(state, states_of(u, delta, A, B, bias, True)[..., -1])


def test_none_asks_for_no_state():
    u, delta, A, B, C, *_ = drawn(1)
    assert isinstance(selective_scan_fn(u, delta, A, B, C, return_last_state=None), torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_have_the_type_of_u_and_states_are_float32(dtype):
    u, delta, A, B, C, D, z, bias = drawn(2, dtype=dtype)
    y, state = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    one_rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(
        y.double(), recurrence(u, delta, A, B, C, D, z, bias, True), rtol=one_rounding, atol=one_rounding
    )
    torch.testing.assert_close(state.double(), states_of(u, delta, A, B, bias, True)[..., -1], rtol=1e-5, atol=1e-5)


def test_the_package_selective_scan_has_no_gate():
    u, delta, A, B, C, D, _, bias = drawn(4)
    close(
        selective_scan_without_gate(u, delta, A, B, C, D, bias, True, 2),
        recurrence(u, delta, A, B, C, D, None, bias, True),
    )


def test_the_order_of_the_arguments_is_the_originals():
    u, delta, A, B, C, D, z, bias = drawn(1)
    named = selective_scan_fn(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=False
    )
    assert torch.equal(named, selective_scan_fn(u, delta, A, B, C, D, z, bias, True, False))


def refuses(change, error, match):
    values = dict(zip(("u", "delta", "A", "B", "C"), drawn(2), strict=False))
    with pytest.raises(error, match=match):
        selective_scan_fn(**values | {change[0]: change[1](values[change[0]])})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (("A", lambda A: A.to(torch.complex128)), NotImplementedError, "complex A"),
        (("B", lambda B: normal(4, STATES)), NotImplementedError, r"B of shape \(4, 3\).*constant"),
        (("C", lambda C: normal(4, STATES)), NotImplementedError, r"C of shape \(4, 3\).*constant"),
        (("B", lambda B: B[:, [0, 0, 0]]), ValueError, "4 channels cannot be divided among 3 groups of B and 2 of C"),
    ],
    ids=["complex A", "constant B", "constant C", "groups"],
)
def test_what_it_does_not_compute_is_refused(change, error, match):
    refuses(change, error, match)
