import pytest

from ptq4vm.evaluate import Evaluation
from ptq4vm.hub.metrics import Figure, Metrics, read_metrics


def test_nothing_is_known_of_nothing():
    assert read_metrics(None) == read_metrics({}) == read_metrics({"top1": None}) == Metrics()


@pytest.mark.parametrize("start", ["float_", "reference_"])
def test_figures_of_both_models_stand_together(start):
    found = read_metrics({"top1": 75, "mAP": 41.5, f"{start}mAP": 42, f"{start}top5": 99.5})
    assert found.figures == (
        Figure(key="top1", quantized=75),
        Figure(key="mAP", quantized=41.5, floating=42),
        Figure(key="top5", floating=99.5),
    )


def test_what_evaluate_says_is_taken_without_names_on_this_machine():
    figures = Evaluation(
        images=10, top1=70, top5=90, agreement=80, divergence=0.5, loss=1, seconds=3, reference_top1=75
    )
    found = read_metrics({"model": "/home/me/model", "against": "/x", "split": "test", **figures.to_dict()}, "cifar10")
    assert (found.images, found.split, found.dataset, found.task) == (10, "test", "cifar10", "image-classification")
    assert found.figures[0] == Figure(key="top1", quantized=70, floating=75)
    assert {figure.key for figure in found.figures} == {"top1", "top5", "agreement", "divergence", "loss"}


def test_images_that_are_not_finite_are_told():
    assert read_metrics({"nonfinite": 3}).figures == (Figure(key="nonfinite", quantized=3),)


def test_the_metrics_name_their_own_dataset_and_task():
    found = read_metrics({"dataset": " coco \n 2017", "task": "object-detection", "mAP": 41.5}, "imagenet-1k")
    assert (found.dataset, found.task) == ("coco 2017", "object-detection")
    assert read_metrics({"mAP": 41.5}).task is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top1": "75"}, "metrics: top1 is a finite number, got '75'"),
        ({"loss": float("nan")}, "metrics: loss is a finite number, got nan"),
        ({"top1": True}, "metrics: top1 is a finite number, got True"),
        ({"float_top5": 100.5}, "metrics: float_top5 is in percent, from 0 to 100, got 100.5"),
        ({"dataset": 3}, "metrics: dataset is a text, got 3"),
        ({"images": 0}, "metrics: images is a count, got 0"),
        ({3: 0.5}, "metrics: names of figures are texts, got 3"),
    ],
)
def test_what_is_no_figure_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        read_metrics(values)
