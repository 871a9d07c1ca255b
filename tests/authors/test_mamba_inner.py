"""The fused inner functions against convolution, projections and recurrence in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers.recurrence import convolved, recurrence
from helpers.strategies import normal

from ptq4vm.authors.mamba_inner import bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj

IMAGES, TOKENS, WIDTH, INNER, RANK, STATES, TAPS = 2, 6, 5, 4, 2, 3, 4


def values(*shape, seed):
    return normal(*shape, seed=seed, dtype=torch.float64)


XZ = values(IMAGES, 2 * INNER, TOKENS, seed=1)
CONV, CONV_BIAS = values(INNER, 1, TAPS, seed=2), values(INNER, seed=3)
X_PROJ, DT_PROJ = values(RANK + 2 * STATES, INNER, seed=4), values(INNER, RANK, seed=5)
OUT, OUT_BIAS = values(WIDTH, INNER, seed=6), values(WIDTH, seed=7)
A, A_B = -values(INNER, STATES, seed=8).exp(), -values(INNER, STATES, seed=9).exp()
D, DT_BIAS = values(INNER, seed=10), values(INNER, seed=11)
B_BIAS, C_BIAS = values(STATES, seed=12), values(STATES, seed=13)
B_RMS, C_RMS, DT_RMS = values(STATES, seed=14), values(STATES, seed=15), values(INNER, seed=16)
INPUTS = (XZ, CONV, CONV_BIAS, X_PROJ, DT_PROJ)


def parts(conv_bias=CONV_BIAS, b_bias=None, c_bias=None):
    """u, delta (B, E, L), B, C (B, S, L), z."""
    x, z = XZ.chunk(2, 1)
    u = F.silu(convolved(x, CONV.squeeze(1), conv_bias))
    dt, b, c = torch.einsum("nd,bdl->bnl", X_PROJ, u).split([RANK, STATES, STATES], 1)
    b, c = (part if bias is None else part + bias[:, None] for part, bias in ((b, b_bias), (c, c_bias)))
    return u, torch.einsum("dr,brl->bdl", DT_PROJ, dt), b, c, z


def projected(y, bias=OUT_BIAS):
    return F.linear(y.transpose(1, 2), OUT, bias)


def rms(x, weight):
    """Over the second axis."""
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight[:, None]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_without_output_projection():
    u, delta, b, c, z = parts()
    ours = mamba_inner_fn_no_out_proj(*INPUTS, A, None, None, D, delta_bias=DT_BIAS, delta_softplus=True)
    close(ours, recurrence(u, delta, A, b, c, D, z, DT_BIAS, True))


def test_with_output_projection():
    u, delta, b, c, z = parts()
    ours = mamba_inner_fn(*INPUTS, OUT, OUT_BIAS, A, None, None, D, delta_bias=DT_BIAS, delta_softplus=True)
    close(ours, projected(recurrence(u, delta, A, b, c, D, z, DT_BIAS, True)))


def test_what_may_be_left_out():
    u, delta, b, c, z = parts(conv_bias=None)
    inputs = (XZ, CONV, None, X_PROJ, DT_PROJ.abs())
    dt = torch.einsum("nd,bdl->bnl", X_PROJ, u)[:, :RANK]
    delta = torch.einsum("dr,brl->bdl", DT_PROJ.abs(), dt)
    ours = mamba_inner_fn(*inputs, OUT, None, A, delta_softplus=False)
    close(ours, projected(recurrence(u, delta, A, b, c, None, z), None))


def test_biases_of_b_and_c_and_checkpoint_level():
    u, delta, b, c, z = parts(b_bias=B_BIAS, c_bias=C_BIAS)
    ours = mamba_inner_fn(*INPUTS, OUT, OUT_BIAS, A, None, None, D, DT_BIAS, B_BIAS, C_BIAS, True, 0)
    close(ours, projected(recurrence(u, delta, A, b, c, D, z, DT_BIAS, True)))


def test_rms_weights():
    u, delta, b, c, z = parts()
    ours = mamba_inner_fn(
        *INPUTS, OUT, OUT_BIAS, A, D=D, delta_bias=DT_BIAS, b_rms_weight=B_RMS, c_rms_weight=C_RMS, dt_rms_weight=DT_RMS
    )
    y = recurrence(u, rms(delta, DT_RMS), A, rms(b, B_RMS), rms(c, C_RMS), D, z, DT_BIAS, True)
    close(ours, projected(y))


def test_both_directions_of_vims_first_version():
    u, delta, b, c, z = parts()
    ours = bimamba_inner_fn(*INPUTS, OUT, OUT_BIAS, A, A_B, None, None, D, delta_bias=DT_BIAS, delta_softplus=True)
    forward = recurrence(u, delta, A, b, c, D, z, DT_BIAS, True)
    flipped = (value.flip(-1) for value in (u, delta, b, c, z))
    u, delta, b, c, z = flipped
    backward = recurrence(u, delta, A_B, b, c, D, z, DT_BIAS, True).flip(-1)
    close(ours, projected(forward + backward))


@pytest.mark.parametrize("name", ["B", "C"])
@pytest.mark.parametrize("function", [mamba_inner_fn, mamba_inner_fn_no_out_proj])
def test_given_b_and_c_are_refused(function, name):
    weights = (OUT, OUT_BIAS) if function is mamba_inner_fn else ()
    with pytest.raises(NotImplementedError, match=f"compute {name} from the input"):
        function(*INPUTS, *weights, A, **{name: values(IMAGES, STATES, TOKENS, seed=0)})


def test_complex_states_are_refused():
    with pytest.raises(NotImplementedError, match="complex A"):
        mamba_inner_fn_no_out_proj(*INPUTS, A.to(torch.complex128))
