"""The bundled models: what the demo and the README say of them."""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers.lowering import check
from torch.utils.data import Subset

from ptq4vm import QuantConfig, calibrate, convert, prepare
from ptq4vm.data import calibration_batches, loader, open_dataset, transform_for
from ptq4vm.evaluate import evaluate, predictions
from ptq4vm.inspection.phenomena import observe
from ptq4vm.metadata import metadata_of
from ptq4vm.quantization_specs import Learning

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
    config = QuantConfig(weights={"bits": 4}, activations={"bits": 4})
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


@pytest.mark.slow
def test_at_four_bits_minmax_fails_on_it_and_ptq4vm_does_not(digits, hard, hard_w4a4):
    _, calibration, test = digits
    minmax = calibrate(prepare(hard, (test[0][0][:2],), QuantConfig.minmax(4)), calibration, progress=False)
    assert evaluate(convert(minmax), test, progress=False).top1 < 50
    assert evaluate(convert(hard_w4a4), test, progress=False).top1 > 98


@pytest.mark.slow
def test_w8a8_stays_within_a_third_of_a_point(digits):
    model, calibration, test = digits
    quantized = convert(calibrate(prepare(model, (test[0][0][:2],), QuantConfig()), calibration, progress=False))
    exact = evaluate(model, test, progress=False).top1
    found = evaluate(quantized, test, reference_predictions=predictions(model, test), progress=False)
    assert found.top1 >= exact - 0.3
    assert found.agreement >= 99.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "right"), [("vmamba_nano_32", 449), ("local_vim_nano_patch4_32", 446), ("local_vmamba_nano_32", 449)]
)
def test_w8a8_of_the_other_families_agrees_with_floating_point(name, right, digits):
    _, calibration, test = digits
    model = timm.create_model(name, pretrained=True).eval()
    quantized = convert(calibrate(prepare(model, (test[0][0][:2],), QuantConfig()), calibration, progress=False))
    exact, expected = evaluate(model, test, progress=False).top1, predictions(model, test)
    found = evaluate(quantized, test, reference_predictions=expected, progress=False)
    assert exact == pytest.approx(100 * right / 450)  # as the card says
    assert found.agreement >= 99 and found.top1 >= exact - 0.5


@pytest.mark.slow
def test_learning_streams_across_downsampling(digits):
    """Four bits, all three stages of a VMamba: every block learns on what the quantized blocks before it give."""
    _, calibration, test = digits
    model = timm.create_model("vmamba_nano_32", pretrained=True).eval()
    config = QuantConfig(weights={"bits": 4}, activations={"bits": 4}, learning=Learning(epochs=4, batch_size=16))
    prepared = calibrate(prepare(model, (test[0][0][:2],), config), calibration, progress=False)
    blocks = metadata_of(prepared).blocks
    assert [block["block"] for block in blocks] == [
        f"layers.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1))
    ]
    assert all(block["loss_after"] < block["loss_before"] for block in blocks)
    plain = calibrate(prepare(model, (test[0][0][:2],), replace(config, learning=None)), calibration, progress=False)
    expected = predictions(model, test)
    learned, searched = (
        evaluate(convert(graph), test, reference_predictions=expected, progress=False) for graph in (prepared, plain)
    )
    assert learned.divergence < searched.divergence


@pytest.mark.slow
def test_no_code_and_no_accumulator_differs_over_the_whole_test_set(digits, hard_w4a4):
    _, _, test = digits
    assert sum(len(images) for images, _ in test) == 450
    for images, _ in test:
        assert check(hard_w4a4, images) == 36


CIFAR10 = Path(__file__).parents[3] / "shared/data/cifar10.tar.xz"
CARD = {
    "vim_micro_patch4_32": (415_882, 81.23),
    "local_vim_micro_patch4_32": (179_786, 76.70),
    "vmamba_micro_32": (1_238_602, 80.35),
    "local_vmamba_micro_32": (669_060, 75.74),
}
"""Parameters and top-1 of the models of CIFAR-10, as their card says."""


@pytest.mark.parametrize("name", CARD)
def test_the_models_of_cifar10_are_those_of_their_card(name):
    model = timm.create_model(f"{name}.cifar10", pretrained=True).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == CARD[name][0]
    with torch.inference_mode():
        assert torch.isfinite(model(torch.zeros(2, 3, 32, 32))).all()


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="needs CIFAR-10, which is not part of the repository")
@pytest.mark.parametrize("name", CARD)
def test_they_have_the_accuracy_of_their_card(name, tmp_path):
    """Accuracy on 1000 test images: within three standard deviations of that of all."""
    with tarfile.open(CIFAR10) as archive:
        archive.extractall(tmp_path, filter="data")
    model = timm.create_model(f"{name}.cifar10", pretrained=True).eval()
    test = open_dataset(str(tmp_path / "cifar10"), "test", transform_for(model))
    found = evaluate(model, loader(Subset(test, range(0, len(test), 10)), 250), progress=False)
    assert found.images == 1000 and found.top1 == pytest.approx(CARD[name][1], abs=3.8)
