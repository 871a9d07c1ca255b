import threading
import warnings

import pytest
import torch
from helpers.strategies import normal
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from ptq4vm import QuantConfig, calibrate, prepare
from ptq4vm.graph.model_copy import copied_model, own_tensors
from ptq4vm.metadata import metadata_of

X = normal(3, 5, 6)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def pruned_twice(linear):
    prune.l1_unstructured(linear, "weight", 0.3)
    prune.random_structured(linear, "weight", 2, dim=0)
    prune.l1_unstructured(linear, "bias", 0.5)


KINDS = {
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.3),
    "pruned twice": pruned_twice,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrized": lambda linear: parametrize.register_parametrization(linear, "weight", Doubled()),
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
}


def computed(kind):
    """Two linears whose weights are computed before every forward, once in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        KINDS[kind](model[0])
        KINDS[kind](model[2])
    model(X)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_computed_before_every_forward_are_quantized(kind):
    model = computed(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = prepare(model, (X,), QuantConfig.recipe("pts", 8))
    assert [linear.name for linear in metadata_of(prepared).linears] == ["0", "2"]
    assert torch.equal(prepared(X), model(X))
    error = calibrate(prepared, [X], progress=False)(X) - model(X)
    assert 0 < error.norm() < 0.05 * model(X).norm()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model[0]._forward_pre_hooks) + len(getattr(model[0], "parametrizations", ())) > 0


def test_tensors_with_a_history_of_gradients_are_copied():
    model = nn.Sequential(nn.Linear(6, 6))
    model.cache = {"last": [model(X)]}
    copied = copied_model(model)
    assert torch.equal(copied.cache["last"][0], model.cache["last"][0]) and copied.cache["last"][0].is_leaf


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))
    model[1][0].lock = threading.Lock()
    with pytest.raises(ValueError, match=r"cannot be copied: attribute 'lock' of 1\.0 is of type lock .*delete that"):
        prepare(model, (X,))


def test_inference_tensors_become_ordinary_ones_and_what_is_shared_stays_so():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(5))
        model[1].weight = model[0].weight
    values = {name: value.clone() for name, value in model.state_dict().items()}
    own_tensors(model)
    assert model[1].weight is model[0].weight and isinstance(model[0].weight, nn.Parameter)
    assert not any(value.is_inference() for value in (*model.parameters(), *model.buffers()))
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    model(X).sum().backward()
    assert model[0].weight.grad.any()
