"""Idioms that change nothing are followed: the graph computes what the model does for every batch."""

import importlib
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers.strategies import normal
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptq4vm.graph.capture import CaptureError, capture
from ptq4vm.graph.sites import find_linears

BATCHES = (1, 2, 3, 5, 7)


class Net(nn.Module):
    """A linear before and after `act(model, x)`, for x (B, 64, 8)."""

    def __init__(self, act) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.act = nn.Linear(8, 8), nn.Linear(8, 8), act
        self.register_buffer("mean", torch.randn(1, 1, 8))
        self.register_buffer("scratch", torch.zeros(3))
        self.plain, self.counter = torch.randn(1, 1, 8), torch.zeros(())

    def forward(self, x):
        return self.last(self.act(self, self.first(x)))


def images(count: int) -> torch.Tensor:
    return normal(count, 64, 8)


def check(act, operators=()) -> torch.fx.GraphModule:
    """Captures a model with `act`; asks for its results at all batches."""
    gm = capture(Net(act).eval(), (images(2),))
    for count in BATCHES:
        with torch.no_grad():
            assert torch.equal(gm(images(count)), Net(act).eval()(images(count)))
    targets = {node.target for node in gm.graph.nodes}
    assert set(operators) <= targets
    return gm


def folded(size):
    """An act that folds four windows into the batch, and finds the batch again by `size(windows)`."""

    def act(model, x):
        windows = x.reshape(-1, 16, 8)
        return windows.reshape(size(windows), 64, 8)

    return act


SIZES = {
    "MambaVision and Swin": lambda w: int(w.shape[0] / (8 * 8 / 4 / 4)),
    "int": lambda w: int(w.shape[0]) // 4,
    "a chain": lambda w: int(w.shape[0] / 2 / 2),
    "a floor division": lambda w: int(w.shape[0] // 4),
    "a floor division by a float": lambda w: int(w.shape[0] // 4.0),
    "a factor": lambda w: int(w.shape[0] * 0.25),
    "a sum": lambda w: int(w.shape[0] / 4 + 1) - 1,
    "all entries": lambda w: int(w.numel() / 512),
    "round": lambda w: round(w.shape[0] / 4),
    "floor": lambda w: math.floor(w.shape[0] / 4),
    "ceil": lambda w: math.ceil(w.shape[0] / 4),
    "trunc": lambda w: math.trunc(w.shape[0] / 4),
    "len": lambda w: len(w) // 4,
    "int of len": lambda w: int(len(w) / 4),
    "the other size": lambda w: w.shape[0] // int(4 * w.shape[0] / w.shape[0]),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_batch_through_floats_are_followed(name):
    gm = check(folded(SIZES[name]))
    if name != "trunc":  # which torch.export follows by itself
        assert not {math.trunc, math.floor, math.ceil} & {node.target for node in gm.graph.nodes if node.users}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("int", lambda x: int(x.shape[0] / 2) + 1),
        ("floor", lambda x: math.floor(x.shape[0] * 0.5) + 1),
        ("ceil", lambda x: math.ceil(x.shape[0] / 4) + 1),
    ],
)
def test_fractions_are_rounded_as_python_rounds_them(name, size):
    check(lambda m, x: x * torch.ones(size(x), 1).sum())


INEXACT = {
    "a third": lambda x: int(x.shape[0] / 3 * 3),
    "a factor that no float is": lambda x: int(x.shape[0] * 49 * (1 / 49)),
    "a tenth": lambda x: int(x.shape[0] * 0.1),
    "a negative fraction": lambda x: int((x.shape[0] - 80) / 16),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_floats_may_round_is_refused_with_its_line(name):
    with pytest.raises(
        CaptureError, match=r"at .*test_followed_idioms\.py:\d+ in `.*int\(.*batch size becomes the num"
    ):
        check(lambda m, x: x * INEXACT[name](x))


def test_a_float_of_the_batch_is_followed():
    check(lambda m, x: x / float(x.shape[0]))


def test_int_still_is_the_type_and_the_module_is_as_before():
    namespace = globals()

    def act(model, x):
        size, tokens = int(x.shape[0] / 1), x.shape[1]
        assert isinstance(3, int) and not isinstance(3.0, int) and issubclass(bool, int) and int("12") == 12
        assert {type(tokens): 1}[int] == 1
        assert int("ff", 16) == 255 and float("1.5") == 1.5 and isinstance(1.5, float) and len([1, 2]) == 2
        return x.reshape(size, 64, 8)

    check(act)
    assert not {"int", "float", "len"} & namespace.keys()


def test_everything_is_restored_after_an_error():
    before = torch.SymFloat.__floor__, torch.SymBool.__bool__, torch.cuda.device.__init__
    with pytest.raises(CaptureError):
        capture(Net(lambda m, x: x if x.sum() > int(x.shape[0] / 1) else -x), (images(2),))
    assert (torch.SymFloat.__floor__, torch.SymBool.__bool__, torch.cuda.device.__init__) == before
    assert not {"int", "float", "len"} & globals().keys() and "data" not in vars(torch.Tensor)


def test_functions_of_other_modules_are_followed_too(tmp_path, monkeypatch):
    (tmp_path / "somebodys_windows.py").write_text("def size(w, n):\n    return int(w.shape[0] / n)\n")
    monkeypatch.syspath_prepend(tmp_path)
    other = importlib.import_module("somebodys_windows")
    check(folded(lambda w: other.size(w, 2 * 2)))
    assert "int" not in vars(other)


@torch.jit.script
def scripted(x, factor: float):
    return torch.relu(x * factor)


def amp(*args, **options):
    def act(model, x):
        with torch.amp.autocast(*args, **options):
            return model.first(x)

    return act


class Doubled(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, grad):
        return grad * 2


def under(region):
    def act(model, x):
        with region():
            return model.first(x)

    return act


def assigned(model, x):
    model.height, model.images = x.shape[1], x.shape[0]
    model.seen = x * 2
    return model.seen.reshape(model.images * model.height, 8).view(model.images, model.height, 8)


def cast_buffer(model, x):
    model.mean = model.mean.type_as(x)
    return x - model.mean


def cast_attribute(model, x):
    model.plain = model.plain.type_as(x)
    return x - model.plain


def counted(model, x):
    model.counter += 1
    return x


def counted_buffer(model, x):
    model.scratch += x.mean()
    return x


def in_place(model, x):
    x = F.relu(x, inplace=True)
    x[:, 0] = 0
    x[:, 1:3, ::2] += 1
    return x.mul_(2)


def checked(model, x):
    count, tokens, channels = x.shape
    assert x.shape == (count, 64, 8) and tokens % 2 == 0, "sizes"
    print("the shape", x.shape)
    warnings.warn("an old function", stacklevel=1)
    return x if torch.jit.is_scripting() or torch.jit.is_tracing() else x * channels


def printed(model, x):
    model.text = f"{x.shape[0]} images, {x}"
    return x.to(x.device)


HARMLESS = {
    "autocast off": amp("cuda", enabled=False),
    "autocast of the inputs' device, off": amp("cpu", enabled=False),
    "autocast of another device": amp("cuda"),
    "custom_fwd": lambda m, x: Doubled.apply(x),
    "no_grad": under(torch.no_grad),
    "enable_grad": under(torch.enable_grad),
    "set_grad_enabled": under(lambda: torch.set_grad_enabled(True)),
    "inference_mode": under(torch.inference_mode),
    "assigned attributes": assigned,
    "a buffer that is cast": cast_buffer,
    "a tensor that is cast": cast_attribute,
    "a counter": counted,
    "a buffer that nobody reads": counted_buffer,
    "changes in place": in_place,
    "asserts, prints, warnings": checked,
    "f-strings": printed,
    "checkpoint": lambda m, x: checkpoint(m.first, x, use_reentrant=False),
    "reentrant checkpoint": lambda m, x: checkpoint(m.first, x, use_reentrant=True),
    "a scripted function": lambda m, x: scripted(x, 2.0),
    "data": lambda m, x: x + m.mean.data,
    "einops": lambda m, x: rearrange(rearrange(x, "b (h w) c -> (b h) w c", h=8), "(b h) w c -> b (h w) c", h=8),
    "einops with the batch": lambda m, x: rearrange(x.flatten(0, 1), "(b l) c -> b l c", b=x.shape[0]),
    "sizes": lambda m, x: x.view(x.size(0), -1).view(x.size(0), 64, 8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_idioms_are_followed(name):
    gm = check(HARMLESS[name])
    assert not [node for node in gm.graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False)]
    names = [site.name for site in find_linears(gm).values()]
    assert names[0] == "first" and names[-1] == "last"


def test_a_linear_in_a_region_keeps_its_module():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x):
            with torch.enable_grad(), torch.amp.autocast("cuda", enabled=False):
                return self.layers[0](x) + F.linear(x, self.layers[0].weight)

    site, again = find_linears(capture(nn.Sequential(Inner()), (images(2),))).values()
    assert site.name == "0.layers.0" and again.name == "0.layers.0@1"


def test_a_cuda_device_of_a_cpu_tensor_is_no_error():
    """As VMamba's kernels open it around every call."""

    def act(model, x):
        with torch.cuda.device(x.device):
            return x * 2

    gm = capture(Net(act).eval(), (images(2),))
    with torch.no_grad():
        assert torch.equal(gm(images(3)), Net(lambda m, x: x * 2)(images(3)))


def test_an_input_changed_in_place_is_left_alone_by_the_graph():
    gm, x = capture(nn.ReLU(inplace=True), (images(2),)), images(3)
    assert torch.equal(gm(x), images(3).relu()) and torch.equal(x, images(3))
