"""Norms that add a residual: values against float64, types as the Triton functions have them."""

import pytest
import torch
from helpers.strategies import normal

from ptq4vm.authors.norms import RMSNorm, layer_norm_fn, rms_norm_fn

X, RESIDUAL = normal(2, 5, 8, seed=1), normal(2, 5, 8, seed=2)
WEIGHT, BIAS = normal(8, seed=3), normal(8, seed=4)


def wanted(total, bias, rms):
    x = total.double()
    x = x if rms else x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * WEIGHT.double()
    return (y if bias is None else y + bias.double()).to(total.dtype)


@pytest.mark.parametrize("residual", [None, RESIDUAL], ids=["alone", "residual"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
@pytest.mark.parametrize(("norm", "rms"), [(rms_norm_fn, True), (layer_norm_fn, False)])
def test_values(norm, rms, bias, residual):
    total = X if residual is None else X + residual
    y = norm(X, WEIGHT, bias, residual=residual, eps=1e-5)
    torch.testing.assert_close(y, wanted(total, bias, rms))
    y, kept = norm(X, WEIGHT, bias, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True)
    torch.testing.assert_close(y, wanted(total, bias, rms))
    assert torch.equal(kept, total)


def test_layer_norm_may_be_told_to_be_the_other():
    assert torch.equal(layer_norm_fn(X, WEIGHT, None, is_rms_norm=True), rms_norm_fn(X, WEIGHT, None))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", ["float", "half"])
def test_the_sum_is_computed_in_float32_and_kept_in_the_residuals_type(half, weight):
    x, scale = X.to(half), WEIGHT if weight == "float" else WEIGHT.to(half)
    y, kept = rms_norm_fn(x, scale, None, RESIDUAL, prenorm=True, eps=1e-5)
    assert (y.dtype, kept.dtype) == (half, torch.float32)
    assert torch.equal(kept, x.float() + RESIDUAL)
    assert torch.equal(y, rms_norm_fn(kept, scale, None, eps=1e-5).to(half))
    _, kept = rms_norm_fn(x, scale, None, RESIDUAL.to(half), prenorm=True)
    assert torch.equal(kept, (x.float() + RESIDUAL.to(half).float()).to(half))


@pytest.mark.parametrize(("in_float", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_first_residual_may_be_widened(in_float, dtype):
    x = X.bfloat16()
    _, kept = layer_norm_fn(x, WEIGHT, BIAS, prenorm=True, residual_in_fp32=in_float)
    assert kept.dtype == dtype and torch.equal(kept, x.to(dtype))


def test_the_module_has_a_weight_and_no_bias():
    norm = RMSNorm(8, eps=1e-5)
    assert {name: value.shape for name, value in norm.named_parameters()} == {"weight": (8,)} and norm.bias is None
    norm.load_state_dict({"weight": WEIGHT})
    torch.testing.assert_close(norm(X), wanted(X, None, True))
    y, kept = norm(X, RESIDUAL, prenorm=True)
    torch.testing.assert_close(y, wanted(X + RESIDUAL, None, True))
    assert torch.equal(kept, X + RESIDUAL)


@pytest.mark.parametrize(("name", "value"), [("x1", X), ("rowscale", X[..., 0]), ("dropout_p", 0.1)])
@pytest.mark.parametrize("norm", [rms_norm_fn, layer_norm_fn])
def test_what_language_models_add_is_refused(norm, name, value):
    with pytest.raises(NotImplementedError, match=f"{norm.__name__} does not take {name}"):
        norm(X, WEIGHT, None, **{name: value})
    with pytest.raises(NotImplementedError, match="RMSNorm does not take dropout_p"):
        RMSNorm(8, dropout_p=0.1)
