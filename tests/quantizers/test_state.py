"""Results of a fake-quantizer are in its buffers: they are saved with the model and move with it."""

import pytest
import torch

from ptq4vm.quantization_specs import Granularity, IntegerRange
from ptq4vm.quantizers import ActivationFakeQuantize, WeightFakeQuantize


def activation():
    fake = ActivationFakeQuantize(IntegerRange(bits=4, narrow_range=False), Granularity.PER_TOKEN)
    fake.set_qparams(torch.ones(3), torch.zeros(3, dtype=torch.int32))
    return fake


def weight():
    fake = WeightFakeQuantize(IntegerRange(bits=4, narrow_range=True))
    fake.scale = torch.ones(3)
    return fake


@pytest.mark.parametrize(("make", "names"), [(activation, {"scale", "zero_point"}), (weight, {"scale"})])
def test_it_is_in_the_state_and_moves(make, names):
    assert names <= make().state_dict().keys()
    assert all(value.device.type == "meta" for value in make().to("meta").state_dict().values())


@pytest.mark.parametrize("make", [activation, weight])
def test_before_it_is_calibrated_nothing_is_there(make):
    fake = type(make())(*((make().spec, Granularity.PER_TOKEN) if make is activation else (make().spec,)))
    assert fake.scale is None and fake.log_factor is None and not fake.observations and fake.name == ""
    assert not {"scale", "zero_point"} & fake.state_dict().keys()


def fresh(fake):
    return type(fake)(fake.spec, granularity=Granularity.PER_TOKEN)


@pytest.mark.parametrize("make", [activation, weight])
def test_what_was_found_is_loaded_where_nothing_was(make):
    fake = make()
    loaded = fresh(fake)
    loaded.load_state_dict(fake.state_dict())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in fake.state_dict().items())
    assert loaded.scale is not fake.scale and loaded.scale.dtype == fake.scale.dtype


@pytest.mark.parametrize("make", [activation, weight])
def test_loading_what_holds_no_scale_is_an_error_and_resetting_none(make):
    fake = make()
    with pytest.raises(RuntimeError, match="Missing key"):
        fake.load_state_dict(fresh(fake).state_dict())
    fake.reset()
    fake.load_state_dict(fresh(fake).state_dict())
    assert fake.scale is None
