"""Causal convolutions in every way that releases of causal_conv1d are called, and depth-wise ones of images."""

import pytest
import torch
import torch.nn.functional as F
from helpers.recurrence import convolved
from helpers.strategies import normal

from ptq4vm.authors import convolutions
from ptq4vm.authors.convolutions import causal_conv1d_fn, causal_conv1d_fwd

X, WEIGHT, BIAS = (normal(*shape, seed=len(shape), dtype=torch.float64) for shape in ((2, 3, 6), (3, 4), (3,)))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
def test_plain_and_with_silu(bias):
    wanted = convolved(X, WEIGHT, bias)
    close(causal_conv1d_fn(X, WEIGHT, bias), wanted)
    close(causal_conv1d_fn(x=X, weight=WEIGHT, bias=bias, activation="silu"), F.silu(wanted))
    close(causal_conv1d_fn(X, WEIGHT, bias, activation="swish"), F.silu(wanted))


def test_the_fourth_argument_of_old_releases_is_the_activation():
    close(causal_conv1d_fn(X, WEIGHT, BIAS, "silu"), F.silu(convolved(X, WEIGHT, BIAS)))
    close(causal_conv1d_fn(X, WEIGHT, BIAS, None, None, False, None, activation=None), convolved(X, WEIGHT, BIAS))


@pytest.mark.parametrize("states", [(), (None,), (None, None, None)])
def test_the_compiled_function_takes_silu_last(states):
    close(causal_conv1d_fwd(X, WEIGHT, BIAS, *states, True), F.silu(convolved(X, WEIGHT, BIAS)))
    close(causal_conv1d_fwd(X, WEIGHT, BIAS, *states, False), convolved(X, WEIGHT, BIAS))


def test_states_and_other_activations_are_refused():
    with pytest.raises(NotImplementedError, match="causal_conv1d_fn does not take seq_idx"):
        causal_conv1d_fn(X, WEIGHT, BIAS, torch.zeros(2, 6))
    with pytest.raises(NotImplementedError, match="causal_conv1d_fn does not take initial_states"):
        causal_conv1d_fn(X, WEIGHT, BIAS, initial_states=X)
    with pytest.raises(NotImplementedError, match="causal_conv1d_fwd does not take initial_states"):
        causal_conv1d_fwd(X, WEIGHT, BIAS, None, X, None, True)
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'gelu'"):
        causal_conv1d_fn(X, WEIGHT, activation="gelu")


def test_depth_wise_convolutions_of_images():
    x, weight = normal(2, 3, 6, 5, seed=1), normal(3, 1, 3, 5, seed=2)
    wanted = torch.cat([F.conv2d(x[:, k : k + 1], weight[k : k + 1], padding=(1, 2)) for k in range(3)], 1)
    torch.testing.assert_close(convolutions.dwconv2d_fp32(x, weight, 1, 2), wanted)
    bias = normal(3, seed=3)
    torch.testing.assert_close(convolutions.dwconv2dbias_fp32(x, weight, bias, 1, 2), wanted + bias[:, None, None])
    apply = convolutions.DepthwiseFunction.apply
    torch.testing.assert_close(apply(x, weight, bias, 1, 2, True), wanted + bias[:, None, None])
    torch.testing.assert_close(apply(x, weight, None, 1, 2, False), wanted)
    layer = convolutions.DwConv2d(3, (3, 5), (1, 2))
    layer.load_state_dict({"weight": weight, "bias": bias})
    torch.testing.assert_close(layer(x), wanted + bias[:, None, None])
