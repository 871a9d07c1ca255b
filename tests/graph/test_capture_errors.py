"""What cannot be captured is refused with the module, the line of the user's code, and the rewrite that helps."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.strategies import normal
from torch import nn

from ptq4vm.graph.capture import CaptureError, capture


class Act(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        return self.act(self, x)


def refused(act) -> str:
    """Returns the message for a model whose third module computes `act`."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Act(lambda m, x: x), Act(act)))
    with pytest.raises(CaptureError) as caught:
        capture(model, (normal(2, 5, 8),))
    return str(caught.value)


def branch(m, x):
    return x if x.sum() > 0 else -x  # here


def number(m, x):
    return x[: int(x.max())]  # here


def selection(m, x):
    y = x[x > 0]
    return y if len(y) > 3 else x  # here


def as_numpy(m, x):
    return torch.from_numpy(x.numpy())  # here


def numpy_of_size(m, x):
    return x * np.sqrt(x.shape[0])  # here


def math_of_size(m, x):
    return x * math.sqrt(x.shape[0])  # here


def loop(m, x):
    return torch.stack([x[i] * i for i in range(x.shape[0])])  # here


def images(m, x):
    parts = []
    for image in x:  # here
        parts.append(image)
    return torch.stack(parts)


def copies(m, x):
    caches = [None] * x.shape[0]  # here
    return x if caches else -x


def one_image(m, x):
    return x.squeeze(0).unsqueeze(0) if x.shape[0] == 1 else x  # here


def several_images(m, x):
    if x.shape[0] > 1:  # here
        return x - x.mean(1, keepdim=True)
    return x


def odd_batch(m, x):
    assert x.shape[0] % 2 == 0  # here
    return x


def fixed_batch(m, x):
    return x + torch.zeros(2, 1, 1)  # here


def inexact(m, x):
    size = int(x.shape[0] * 0.3)  # here
    return x * size


def key(m, x):
    return x * {x.shape[0]: 2}.get(2, 1)  # here


def elsewhere(m, x):
    return x + torch.zeros(1, device="cuda")  # here


ADVICE = {
    branch: "torch.where",
    number: r"\.item\(\)",
    selection: "mask for a selection",
    as_numpy: "torch's operators",
    numpy_of_size: "torch's operators",
    math_of_size: r"\*\* 0\.5",
    loop: "loop over images",
    images: "loop over images",
    copies: "loop over images|Keep it a size",
    one_image: "without a branch on the number of images",
    several_images: "without a branch on the number of images",
    odd_batch: "without a branch on the number of images",
    fixed_batch: "right for every batch",
    inexact: r"Leave out int\(\)",
    key: "key of a dict",
    elsewhere: r"x\.device",
}


@pytest.mark.parametrize("act", ADVICE, ids=lambda act: act.__name__)
def test_the_line_and_the_rewrite_are_named(act):
    code = act.__code__
    lines = Path(__file__).read_text().splitlines()
    line = next(n for n in range(code.co_firstlineno, len(lines) + 1) if "# here" in lines[n - 1])
    message = refused(act)
    assert f"cannot capture 1.1 (Act), at {__file__}:{line} in `{lines[line - 1].strip()}`" in message
    assert re.search(ADVICE[act], message)


def test_a_state_that_results_depend_on_is_refused_with_its_line():
    def average(m, x):
        m.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
        return x - m.mean

    message = refused(average)
    assert re.search(r"^1\.1 changes its tensor '1\.1\.mean' in every forward, at .*:\d+ in `.*no state", message)


def test_autocast_that_changes_numbers_is_refused_with_its_line():
    def act(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.transpose(1, 2)

    assert re.search(r"^1\.1, at .*:\d+ in `.*keeps apart \(wrap_with_autocast\)", refused(act))


def test_an_error_inside_a_module_of_torch_names_the_line_that_calls_it():
    message = refused(lambda m, x: nn.functional.linear(x, torch.zeros(3, 5)))
    assert re.search(r"cannot capture 1\.1 \(Act\), at .*test_capture_errors\.py:\d+ in `message = refused", message)


def test_without_a_line_of_the_user_the_module_is_named():
    with pytest.raises(CaptureError, match=r"cannot capture 1 \(Linear\): "):
        capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(5, 5)), (normal(2, 5, 8),))


def test_keyword_arguments_have_advice_of_their_own():
    class Keyword(nn.Module):
        def forward(self, *, x):
            return x

    with pytest.raises(CaptureError, match="passed by position"):
        capture(Keyword(), (normal(2, 5, 8),))
