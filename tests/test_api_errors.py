"""Errors of the verbs: the thing, the value, the way out."""

import gc
import weakref

import pytest
import torch
from helpers.api import CONFIGS
from helpers.strategies import normal
from torch import nn

import ptq4vm
from ptq4vm import Learning, QuantConfig, calibrate, convert, fuse, prepare
from ptq4vm.graph.capture import CaptureError
from ptq4vm.metadata import metadata_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_is_not_float32_is_refused_by_name(dtype):
    model = nn.Sequential(nn.Linear(6, 4)).to(dtype)
    with pytest.raises(ValueError, match=rf"^0: its weight is {dtype}.*call model\.float\(\)"):
        prepare(model, (normal(2, 5, 6).to(dtype),))


def test_a_pattern_that_matches_nothing_is_an_error(small_vim, images):
    with pytest.raises(ValueError, match=r"exclude pattern 'layers\.9\.\*' matches no linear; there are layers\.0"):
        prepare(small_vim, (images,), QuantConfig(exclude=("layers.9.*",)))
    with pytest.raises(ValueError, match=r"learning\.only=\['\*\.fc9'\] matches no linear; there are layers\.0"):
        prepare(small_vim, (images,), QuantConfig(learning=Learning(epochs=1, only=("*.fc9",))))


def test_nothing_left_to_quantize_is_an_error(small_vim, images):
    with pytest.raises(ValueError, match=r"no linear to quantize.*exclude="):
        prepare(small_vim, (images,), QuantConfig(exclude=("*",)))
    with pytest.raises(ValueError, match=r"no linear to quantize.*found 0"):
        prepare(nn.Conv2d(3, 4, 3), (images,))


def test_an_accumulator_that_could_overflow_is_an_error():
    model, x = nn.Sequential(nn.Linear(65536, 1, bias=False)), torch.zeros(2, 1, 65536)
    with pytest.raises(ValueError, match="65536 channels at W8A8 can overflow an int32 accumulator; use fewer bits"):
        prepare(model, (x,))
    assert len(metadata_of(prepare(model, (x,), QuantConfig.w8a8(weights={"bits": 7}))).linears) == 1


def test_converting_before_calibrating_is_an_error(roads):
    with pytest.raises(RuntimeError, match=r"not calibrated: call ptq4vm\.calibrate\(prepared, loader\) before"):
        convert(roads.prepared(QuantConfig()))


@pytest.mark.parametrize("verb", [convert, lambda gm: calibrate(gm, [])])
def test_a_graph_of_another_origin_is_an_error(verb):
    with pytest.raises(TypeError, match=r"expected a graph from ptq4vm\.prepare or ptq4vm\.convert, got Linear"):
        verb(nn.Linear(2, 2))


def test_a_bare_tensor_for_the_examples_is_an_error(small_vim, images):
    with pytest.raises(TypeError, match=r"must be a tuple of the model's inputs: write \(images,\)"):
        prepare(small_vim, images)


def test_an_empty_loader_is_an_error(small_vim):
    with pytest.raises(ValueError, match="the calibration loader is empty"):
        ptq4vm.quantize(small_vim, [])


def test_a_model_without_a_graph_is_an_error():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"0 \(Branch\)"):
        prepare(nn.Sequential(Branch(), nn.Linear(6, 6)), (normal(2, 5, 6),))


def test_another_resolution_is_an_error(roads):
    with pytest.raises(
        ValueError, match=r"captured for inputs of 3×16×16 \(16 patches\) and given 3×16×20 \(20 patches\)"
    ):
        convert(roads.calibrated(CONFIGS["w8a8"]))(normal(2, 3, 16, 20))


def test_calibrating_a_converted_graph_is_an_error(roads):
    quantized = convert(roads.calibrated(CONFIGS["w8a8"]))
    with pytest.raises((TypeError, RuntimeError), match="prepare"):
        calibrate(quantized, [roads.images], progress=False)
    with pytest.raises((TypeError, RuntimeError), match="prepare"):
        convert(quantized)


def test_models_are_freed_when_nobody_holds_them(small_vim, images):
    """torchao's caches would keep every model that was ever prepared."""

    def road() -> list[weakref.ref]:
        config = QuantConfig(range_search=False)
        prepared = calibrate(prepare(small_vim, (images[:2],), config), [images[:2]], progress=False)
        return [weakref.ref(prepared), weakref.ref(convert(prepared))]

    references = road()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("stage", ["between quantize and dequantize", "integers", "fused"])
def test_no_gradient_of_an_input_is_zero_or_left_out_in_silence(roads, stage):
    """Rounding has the gradient zero, that of the calibrated model is straight through."""
    calibrated = roads.calibrated(QuantConfig.w8a8(range_search=False))
    model = convert(calibrated, lower=stage != "between quantize and dequantize")
    model = fuse(model) if stage == "fused" else model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = roads.images[:2].clone().requires_grad_()
    assert not model(roads.images[:2]).requires_grad  # gradients are on, and none is asked for
    with pytest.raises(RuntimeError, match=r"no gradient.* requires one: .*gradients of the prepared model"):
        model(images)
    with torch.no_grad():
        assert torch.equal(model(images), model(roads.images[:2]))
    calibrated(images).sum().backward()
    assert images.grad.abs().max() > 0
