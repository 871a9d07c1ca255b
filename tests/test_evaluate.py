import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ptq4vm
from ptq4vm import convert
from ptq4vm.config import QuantConfig
from ptq4vm.evaluate import evaluate, predictions


def batches(logits: torch.Tensor, target: torch.Tensor, size: int):
    """Evaluates the identity, whose logits are its inputs."""
    return list(zip(logits.split(size), target.split(size), strict=True))


def quiet(logits, target, size=4, **options):
    return evaluate(nn.Identity(), batches(logits, target, size), progress=False, **options)


def one_hot(target: torch.Tensor, classes: int) -> torch.Tensor:
    return nn.functional.one_hot(target, classes).float()


@st.composite
def tasks(draw):
    images, classes = draw(st.integers(1, 20)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(images, classes, generator=generator)
    return logits, torch.randint(0, classes, (images,), generator=generator)


@given(tasks(), st.integers(1, 20), st.integers(1, 20))
def test_the_size_of_the_batches_does_not_matter(task, one, other):
    a, b = quiet(*task, size=one), quiet(*task, size=other)
    assert (a.images, a.top1, a.top5) == (b.images, b.top1, b.top5)
    assert math.isclose(a.loss, b.loss, rel_tol=1e-5, abs_tol=1e-6)


@given(tasks())
def test_the_figures_are_those_of_the_definition(task):
    logits, target = task
    result = quiet(logits, target)
    place = logits.argsort(dim=1, descending=True).eq(target[:, None]).int().argmax(dim=1)
    assert result.images == len(target)
    assert result.top1 == 100 * (place < 1).sum().item() / len(target)
    assert result.top5 == (100 * (place < 5).sum().item() / len(target) if logits.shape[1] > 5 else None)
    assert math.isclose(result.loss, nn.functional.cross_entropy(logits, target).item(), rel_tol=1e-5, abs_tol=1e-6)


@given(tasks())
def test_a_model_agrees_with_itself_and_predicts_what_it_says(task):
    logits, target = task
    reference = predictions(nn.Identity(), batches(logits, target, 3))
    assert torch.equal(reference, logits)
    assert quiet(logits, target, reference_predictions=reference).agreement == 100
    assert quiet(logits, target).agreement is None


@given(tasks())
def test_agreement_with_the_truth_is_accuracy(task):
    logits, target = task
    result = quiet(logits, target, reference_predictions=one_hot(target, logits.shape[1]))
    assert result.agreement == result.top1


@given(tasks(), st.integers(0, 2**31))
def test_divergence_is_that_of_the_model_from_the_reference(task, seed):
    """KL(reference ‖ model) = Σ p (log p - log q); the other direction is another number."""
    logits, target = task
    reference = 3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    p, q = reference.double().softmax(1), logits.double().softmax(1)
    expected = float((p * (p.log() - q.log())).sum(1).mean())
    result = quiet(logits, target, reference_predictions=reference)
    assert result.divergence == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(tasks(), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_no_figure_hides_what_is_not_finite(task, value, data):
    """Images with NaN count as wrong and agree with nothing, whether it comes from the model or from the reference."""
    logits, target = task
    images, classes = logits.shape
    broken = {
        who: data.draw(st.sets(st.integers(0, images - 1)), label=who) for who in ("pixels", "logits", "reference")
    }
    tables = {who: logits.clone() for who in broken}
    for who, rows in broken.items():
        for row in rows:
            tables[who][row, data.draw(st.integers(0, classes - 1))] = value
    bad = set().union(*broken.values())
    loader = list(zip(torch.arange(images).split(3), target.split(3), strict=True))
    loader = [(tables["pixels"][index], classes) for index, classes in loader]
    given, model = iter(torch.arange(images).split(3)), nn.Module()
    model.forward = lambda x: tables["logits"][next(given)]
    result = evaluate(model, loader, reference_predictions=tables["reference"], progress=False)
    good = [row for row in range(images) if row not in bad]
    assert result.nonfinite == len(bad)
    assert result.agreement == 100 * len(good) / images
    assert result.top1 == 100 * int((logits.argmax(1) == target)[good].sum()) / images
    if classes > 5:
        among = (logits.topk(5, dim=1).indices == target[:, None]).any(1)
        assert result.top5 == 100 * int(among[good].sum()) / images
    assert (result.divergence, result.loss) == (None, None) if bad else (result.divergence == 0 and result.loss >= 0)
    assert "NaN" not in json.dumps(result.to_dict(), allow_nan=False)
    given = iter(torch.arange(images).split(3))
    options = {"reference_predictions": tables["reference"], "progress": False, "check_finite": True}
    if not bad:
        assert evaluate(model, loader, **options).to_dict() | {"seconds": 0} == result.to_dict() | {"seconds": 0}
        return
    with pytest.raises(ValueError, match=r"image \d+: its (pixels|logits|reference logits) hold NaN") as error:
        evaluate(model, loader, **options)
    assert int(str(error.value).split()[1].rstrip(":")) in bad


def test_a_quantized_model_that_hides_nan_does_not_equal_its_original(roads, images):
    """A quantized model's logits are finite where they are NaN in floating point: codes have no value for NaN."""
    quantized = convert(roads.calibrated(QuantConfig.minmax(8)))
    spoiled, target = images.clone(), torch.zeros(len(images), dtype=torch.int64)
    spoiled[2, 0, 3, 3], spoiled[7, 1, 0, 0] = math.nan, math.inf
    loader = list(zip(spoiled.split(5), target.split(5), strict=True))
    result = evaluate(quantized, loader, reference_predictions=predictions(quantized, loader), progress=False)
    assert result.nonfinite == 2 and result.agreement == 100 * 10 / 12 and result.divergence is None


def test_codes_have_no_value_for_nan_and_infinity():
    x = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]]])
    codes = torch.ops.ptq4vm.quantize(x, torch.tensor([10.0]), torch.tensor([3], dtype=torch.int32), None, 8)
    assert codes.tolist() == [[[0, 127, -128, 13]]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite_refuses_what_the_codes_would_hide(roads, images, value):
    quantized = ptq4vm.check_finite(convert(roads.calibrated(QuantConfig.minmax(8))))
    assert torch.equal(quantized(images), convert(roads.calibrated(QuantConfig.minmax(8)))(images))
    spoiled = images.clone()
    spoiled[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"the input of image 3 of the batch, \(12, 3, 16, 16\), holds NaN or inf"):
        quantized(spoiled)
    model = ptq4vm.check_finite(nn.Linear(2, 2))
    with torch.no_grad():
        model.bias.fill_(value)
    with pytest.raises(ValueError, match="Linear: the output of image 0 of the batch"):
        model(input=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="Linear: the input of image 1 of the batch"):
        model(input=torch.tensor([[0.0, 0.0], [value, 0.0]]))


def test_predictions_of_other_classes_are_an_error():
    target = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"predictions are \(6, 3\), and the model has 2 classes"):
        quiet(one_hot(target, 2), target, reference_predictions=torch.zeros(6, 3))


@pytest.mark.parametrize("have", [3, 5, 9])
def test_predictions_of_other_images_are_an_error(have):
    target = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"predictions for {have} images, the loader has 6"):
        quiet(one_hot(target, 2), target, reference_predictions=torch.zeros(have, 2))


def test_an_empty_loader_is_an_error():
    for run in (evaluate, predictions):
        with pytest.raises(ValueError, match="no batches"):
            run(nn.Identity(), [])


def test_a_class_the_model_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=r"has the class -1, the model only 3 classes"):
        quiet(torch.zeros(2, 3), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"has the class 7, the model only 3 classes \(0 to 2\)"):
        quiet(torch.zeros(2, 3), torch.tensor([0, 7]))


def test_a_model_that_is_not_a_classifier_is_an_error():
    with pytest.raises(ValueError, match=r"this model returned \(2, 3, 4\)"):
        quiet(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))


def test_nothing_is_recorded_and_the_model_is_left_alone():
    model = nn.Linear(3, 2)
    assert not predictions(model, [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))]).requires_grad
    assert model.training


def test_an_interrupt_goes_through():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), batches(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1))


def test_an_evaluation_is_ready_for_json():
    target = torch.tensor([0, 1, 1])
    result = json.loads(json.dumps(quiet(one_hot(target, 2), target).to_dict()))
    assert result["top1"] == 100 and result["top5"] is None and result["images"] == 3


@given(tasks())
def test_the_references_accuracy_is_what_it_has_alone(task):
    logits, target = task
    alone = quiet(logits.flip(1), target)
    found = quiet(logits, target, reference_predictions=logits.flip(1))
    assert found.reference_top1 == alone.top1 and alone.reference_top1 is None
