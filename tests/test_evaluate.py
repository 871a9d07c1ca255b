import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ptq4vm.evaluate import evaluate, predictions


def batches(logits: torch.Tensor, target: torch.Tensor, size: int):
    """The identity is the model: what it is given are its logits."""
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
    with pytest.raises(ValueError, match=r"has the class 7, the model only 3 classes \(0 to 2\)"):
        quiet(torch.zeros(2, 3), torch.tensor([0, 7]))


def test_a_model_that_is_not_a_classifier_is_an_error():
    with pytest.raises(ValueError, match=r"this model gave \(2, 3, 4\)"):
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
