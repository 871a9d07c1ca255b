import dataclasses

import pytest
import torch
from strategies import normal
from torch import nn

from ptq4vm import QuantConfig, calibrate, convert, prepare, save
from ptq4vm.config import Tuning
from ptq4vm.record import record_of

UNTUNED = QuantConfig(weight_bits=4, activation_bits=4)
TUNED = dataclasses.replace(UNTUNED, tuning=Tuning(epochs=4, batch_size=4, rate=3e-3))


def divergence(found, wanted) -> float:
    return nn.functional.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")


def test_the_logits_come_nearer(roads, small_vim, images):
    tuned, untuned = roads.calibrated(TUNED), roads.calibrated(UNTUNED)
    wanted = small_vim(images)
    report = record_of(tuned).blocks[-1]
    assert report["block"] == "all" and report["divergence_after"] < report["divergence_before"]
    assert report["divergence_before"] == pytest.approx(divergence(untuned(images), wanted).item(), rel=1e-3)
    assert report["divergence_after"] == pytest.approx(divergence(tuned(images), wanted).item(), rel=1e-3)
    assert torch.allclose(convert(tuned)(images), tuned(images), atol=1e-5)


def test_norms_move_and_calibrating_again_forgets_it(roads, images, tmp_path):
    tuned, norm = roads.calibrated(TUNED), "layers.0.norm.weight"
    assert not torch.equal(tuned.get_parameter(norm), roads.prepared(TUNED).get_parameter(norm))
    save(convert(tuned), tmp_path / "once")
    again = calibrate(calibrate(tuned, [images[:4]], progress=False), images.split(5), progress=False)
    save(convert(again), tmp_path / "again")
    names = ("model.safetensors", "config.json")
    assert [(tmp_path / "once" / n).read_bytes() for n in names] == [
        (tmp_path / "again" / n).read_bytes() for n in names
    ]


def test_nothing_learns_any_more(roads):
    assert not any(parameter.requires_grad for parameter in roads.calibrated(TUNED).parameters())


def test_what_makes_it_worse_is_put_back(roads, images):
    wild = dataclasses.replace(TUNED, tuning=Tuning(epochs=1, batch_size=4, rate=0.9))
    report = record_of(roads.calibrated(wild)).blocks[-1]
    assert report["divergence_after"] == report["divergence_before"]
    assert torch.equal(roads.calibrated(wild)(images), roads.calibrated(UNTUNED)(images))


def test_a_model_without_classes_is_refused(images):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(16, 16)])

        def forward(self, x):
            return self.blocks[0](x)

    x = normal(4, 5, 16)
    prepared = prepare(Maps(), (x,), TUNED)
    with pytest.raises(ValueError, match=r"tuning needs a classifier that gives \(images, classes\)"):
        calibrate(prepared, [x], progress=False)
