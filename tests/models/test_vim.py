import argparse
import math

import pytest
import torch
from golden.fill import make_input
from helpers.public_models import create, filled

from ptq4vm.models import Vim


def tiny(depth: int = 1, **options) -> Vim:
    return create("vim_tiny_patch16_224", depth=depth, **options)


def test_a_public_checkpoint_loads_with_its_arguments(tmp_path):
    source = filled(tiny())
    path = tmp_path / "vim.pth"
    args = argparse.Namespace(lr=1e-3, nested=argparse.Namespace(depth=24))
    torch.save({"model": source.state_dict(), "epoch": 3, "optimizer": {"state": {}}, "args": args}, path)
    loaded = tiny(checkpoint_path=str(path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path):
    state = tiny().state_dict()
    del state["norm_f.weight"]
    torch.save({"model": state}, tmp_path / "vim.pth")
    with pytest.raises(RuntimeError, match=r"norm_f\.weight"):
        tiny(checkpoint_path=str(tmp_path / "vim.pth"))


@pytest.mark.parametrize(
    ("options", "size", "tokens"),
    [
        ({"num_classes": 7}, 224, 197),
        ({"img_size": 64}, 64, 17),
        ({"img_size": (64, 32)}, (64, 32), 9),
        ({"in_chans": 1}, 224, 197),
    ],
    ids=str,
)
def test_other_classes_and_sizes(options, size, tokens):
    model = tiny(**options).eval()
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.zeros(2, options.get("in_chans", 3), height, width)
    with torch.inference_mode():
        assert model.forward_features(x).shape == (2, tokens, 192)
        assert model(x).shape == (2, options.get("num_classes", 1000))


def test_the_class_token_stands_in_the_middle():
    model = filled(tiny())
    x = torch.from_numpy(make_input(1))
    with torch.inference_mode():
        patches = model.patch_embed(x)
        before = {}
        handle = model.layers[0].register_forward_pre_hook(lambda _, inputs: before.update(tokens=inputs[0]))
        model(x)
        handle.remove()
    tokens = before["tokens"] - model.pos_embed
    assert torch.allclose(tokens[:, 98], model.cls_token[:, 0], atol=1e-6)
    assert torch.allclose(tokens[:, :98], patches[:, :98], atol=1e-5)
    assert torch.allclose(tokens[:, 99:], patches[:, 98:], atol=1e-5)


def test_the_classifier_can_be_replaced_and_removed():
    model = tiny(img_size=32).eval()
    x = torch.zeros(2, 3, 32, 32)
    model.reset_classifier(5)
    assert model.num_classes == 5 and model(x).shape == (2, 5)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert tiny(img_size=32, num_classes=0).eval()(x).shape == (2, 192)


def test_images_of_a_batch_do_not_see_each_other():
    model = filled(tiny(img_size=48))
    x = torch.from_numpy(make_input(3, 48, 48))
    other = x.clone()
    other[1] += 1
    with torch.inference_mode():
        a, b = model(x), model(other)
    assert torch.equal(a[::2], b[::2]) and not torch.equal(a[1], b[1])


def test_every_parameter_learns():
    model = filled(tiny(depth=2, img_size=48)).train()
    model(torch.from_numpy(make_input(2, 48, 48))).square().sum().backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle


def test_a_fresh_model_starts_as_the_official_training_does():
    torch.manual_seed(0)
    mixer = tiny(img_size=32).layers[0].mixer
    states = torch.arange(1, 17).log()
    assert torch.equal(mixer.A_log, states.expand(384, 16)) and torch.equal(mixer.A_b_log, mixer.A_log)
    assert torch.equal(mixer.D, torch.ones(384))
    step = torch.nn.functional.softplus(mixer.dt_proj.bias.detach())
    assert step.min() >= 0.99e-3 and step.max() <= 0.101
    assert math.log(step.max() / step.min()) > 4  # they fill the range


def test_decay_spares_states_and_embeddings():
    names = tiny(img_size=32).no_weight_decay()
    assert names == {"cls_token", "pos_embed"} | {f"layers.0.mixer.{name}" for name in ("A_log", "A_b_log", "D", "D_b")}
