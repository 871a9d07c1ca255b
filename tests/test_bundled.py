"""The bundled models: what the demo and the README say of them."""

import pytest
import timm
import torch
from lowering import check

from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.data import calibration_batches, loader, open_dataset, transform_for
from ptq4vm.evaluate import evaluate, predictions
from ptq4vm.observers import observe

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    model = timm.create_model("vim_nano_patch4_32.digits", pretrained=True).eval()
    transform = transform_for(model)
    train, test = (open_dataset("digits", split, transform) for split in ("train", "test"))
    return model, calibration_batches(train, 32, 32, 0), list(loader(test, 150))


@pytest.fixture(scope="module")
def hard():
    return timm.create_model("vim_nano_patch4_32.digits_hard", pretrained=True).eval()


@pytest.fixture(scope="module")
def hard_w4a4(hard, digits):
    """Calibrated for W4A4 without learning."""
    _, calibration, test = digits
    config = QuantConfig(weight_bits=4, activation_bits=4)
    return calibrate(prepare(hard, (test[0][0][:2],), config), calibration, progress=False)


def test_the_model_reads_digits_as_its_card_says(digits):
    model, _, test = digits
    assert evaluate(model, test, progress=False).top1 == pytest.approx(100 * 446 / 450)


def test_the_hard_model_computes_the_same(digits, hard):
    model, _, test = digits
    images = test[0][0]
    with torch.inference_mode():
        assert (model(images) - hard(images)).abs().max() <= 1e-4
    assert not torch.equal(model.layers[0].mixer.in_proj.weight, hard.layers[0].mixer.in_proj.weight)


def test_the_hard_model_has_the_three_phenomena(digits, hard):
    _, calibration, test = digits
    figures = observe(prepare(hard, (test[0][0][:2],)), calibration)
    assert max(figure.channel_outliers for name, figure in figures.items() if "in_proj" in name) > 30
    assert max(figure.channel_outliers for name, figure in figures.items() if "dt_proj" in name) > 10
    assert max(figure.token_variance for name, figure in figures.items() if "out_proj" in name) > 4
    assert max(figure.long_tail for name, figure in figures.items() if "out_proj" in name) > 20


def test_at_four_bits_minmax_fails_on_it_and_ptq4vm_does_not(digits, hard, hard_w4a4):
    _, calibration, test = digits
    minmax = calibrate(prepare(hard, (test[0][0][:2],), QuantConfig.minmax(4)), calibration, progress=False)
    assert evaluate(convert(minmax), test, progress=False).top1 < 50
    assert evaluate(convert(hard_w4a4), test, progress=False).top1 > 98


def test_w8a8_stays_within_a_third_of_a_point(digits):
    model, calibration, test = digits
    quantized = convert(calibrate(prepare(model, (test[0][0][:2],), QuantConfig()), calibration, progress=False))
    exact = evaluate(model, test, progress=False).top1
    found = evaluate(quantized, test, reference_predictions=predictions(model, test), progress=False)
    assert found.top1 >= exact - 0.3
    assert found.agreement >= 99.5


def test_no_code_and_no_accumulator_differs_over_the_whole_test_set(digits, hard_w4a4):
    _, _, test = digits
    assert sum(len(images) for images, _ in test) == 450
    for images, _ in test:
        assert check(hard_w4a4, images) == 36
