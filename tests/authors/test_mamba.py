"""`mamba_ssm.Mamba` of our own: parameters, values and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers.recurrence import convolved, recurrence
from helpers.strategies import normal

from ptq4vm.authors.mamba import Mamba


def test_parameters_have_the_originals_names_and_shapes():
    layer = Mamba(8, d_state=4, d_conv=3, expand=3, bias=True)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "A_log": (24, 4),
        "D": (24,),
        "in_proj.weight": (48, 8),
        "in_proj.bias": (48,),
        "conv1d.weight": (24, 1, 3),
        "conv1d.bias": (24,),
        "x_proj.weight": (9, 24),
        "dt_proj.weight": (24, 1),
        "dt_proj.bias": (24,),
        "out_proj.weight": (8, 24),
        "out_proj.bias": (8,),
    }
    assert "conv1d.bias" not in Mamba(8, conv_bias=False).state_dict()
    assert Mamba(40).dt_rank == 3 and Mamba(40, dt_rank=5).x_proj.out_features == 37


def test_it_computes_mambas_mixer():
    layer, x = Mamba(8, d_state=4).double(), normal(2, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        for seed, value in enumerate(layer.parameters()):
            value.copy_(normal(*value.shape, seed=seed, dtype=torch.float64) / 2)
        xz = (x @ layer.in_proj.weight.t()).transpose(1, 2)
        u, z = xz.chunk(2, 1)
        u = F.silu(convolved(u, layer.conv1d.weight.squeeze(1), layer.conv1d.bias))
        dt, B, C = torch.einsum("nd,bdl->bnl", layer.x_proj.weight, u).split([1, 4, 4], 1)
        delta = torch.einsum("dr,brl->bdl", layer.dt_proj.weight, dt)
        A = -layer.A_log.exp()
        y = recurrence(u, delta, A, B, C, layer.D, z, layer.dt_proj.bias, True)
        wanted = y.transpose(1, 2) @ layer.out_proj.weight.t()
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)  # A, D and the bias of Δ are float32


def test_initial_values():
    torch.manual_seed(0)
    layer = Mamba(64, d_state=4, dt_min=0.01, dt_max=0.1)
    steps = F.softplus(layer.dt_proj.bias)
    assert 0.0099 < steps.min() < 0.02 and 0.05 < steps.max() < 0.1001
    assert layer.dt_proj.weight.abs().max() <= 0.5 and layer.dt_proj.weight.abs().max() > 0.45
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 5).expand(128, 4))
    assert torch.equal(Mamba(64, dt_init="constant").dt_proj.weight, torch.full((128, 4), 0.5))
    with pytest.raises(NotImplementedError, match="dt_init must be 'constant' or 'random', got 'zeros'"):
        Mamba(8, dt_init="zeros")


def test_what_it_does_not_do_is_refused():
    layer, x = Mamba(8), torch.zeros(1, 2, 8)
    with pytest.raises(NotImplementedError, match="does not take inference_params"):
        layer(x, inference_params=object())
    with pytest.raises(NotImplementedError, match="no step"):
        layer.step(x)
    with pytest.raises(TypeError, match=r"no argument bimamba_type, which a fork's has: put .* on sys\.path"):
        Mamba(8, bimamba_type="v2")
