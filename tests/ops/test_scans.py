"""The selective scan and its gradient against their definition."""

import pytest
import torch
import torch.nn.functional as F
from helpers.references import close
from helpers.strategies import layouts, normal
from hypothesis import given

from ptq4vm.ops import scans


def plain_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """The definition, one step after another."""
    delta = delta if delta_bias is None else delta + delta_bias
    delta = F.softplus(delta) if delta_softplus else delta
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for t in range(u.shape[1]):
        step = delta[:, t].unsqueeze(-1)
        h = torch.exp(step * A) * h + step * B[:, t].unsqueeze(1) * u[:, t].unsqueeze(-1)
        y = (h * C[:, t].unsqueeze(1)).sum(-1)
        outputs.append(y if D is None else y + D * u[:, t])
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(u)
    return y if z is None else y * F.silu(z)


def scan_inputs(images, tokens, channels, states, *, D=True, z=True, bias=True, softplus=True, dtype=torch.float32):
    """A realistic scan: decays from almost 1 to almost 0."""
    u, delta = (normal(images, tokens, channels, seed=i, dtype=dtype) for i in (0, 1))
    A = -torch.arange(1, states + 1, dtype=dtype).repeat(channels, 1) * (1 + 0.1 * normal(channels, 1, seed=2)).to(
        dtype
    )
    B, C = (normal(images, tokens, states, seed=i, dtype=dtype) for i in (3, 4))
    return (
        u,
        delta if softplus else 0.1 * delta.abs(),
        A,
        B,
        C,
        normal(channels, seed=5, dtype=dtype) if D else None,
        normal(images, tokens, channels, seed=6, dtype=dtype) if z else None,
        normal(channels, seed=7, dtype=dtype).abs() - 3 * softplus if bias else None,
        softplus,
    )


OPTIONS = [
    {},
    {"D": False},
    {"z": False},
    {"bias": False},
    {"softplus": False},
    {"D": False, "z": False, "bias": False, "softplus": False},
]

SHAPES = [(2, 17, 5, 4), (1, 1, 1, 1), (3, 1, 8, 16), (0, 5, 3, 2), (2, 0, 3, 2), (1, 400, 12, 16), (2, 65, 3, 1)]


@pytest.fixture(params=[1, 64, 2**19], ids=lambda chunk: f"chunk{chunk}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(scans, "SCAN_CHUNK", request.param)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_scan_is_the_step_by_step_definition(shape, options, chunk):
    inputs = scan_inputs(*shape, **options)
    ours = scans.selective_scan(*inputs)
    assert ours.is_contiguous()
    assert close(ours, plain_scan(*inputs), 1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (1, 400, 12, 16)], ids=str)
def test_the_scans_gradient_is_that_of_the_definition(shape, options, chunk):
    inputs = scan_inputs(*shape, **options, dtype=torch.float64)
    leaves = [value.clone().requires_grad_() for value in inputs[:-1] if value is not None]
    rest = iter(leaves)
    y = plain_scan(*(None if value is None else next(rest) for value in inputs[:-1]), inputs[-1])
    grad = normal(*y.shape, seed=9, dtype=torch.float64)
    theirs = [torch.zeros_like(leaf) for leaf in leaves]  # of no tokens
    if y.requires_grad:
        theirs = torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)
    ours = scans.selective_scan_backward(grad, *inputs)
    assert len(ours) == 8
    present = [value for value, original in zip(ours, inputs[:-1], strict=True) if original is not None]
    absent = [value for value, original in zip(ours, inputs[:-1], strict=True) if original is None]
    assert all(value.numel() == 0 for value in absent)
    names = [
        name
        for name, value in zip(("u", "delta", "A", "B", "C", "D", "z", "bias"), inputs[:-1], strict=True)
        if value is not None
    ]
    wrong = [name for name, a, b in zip(names, present, theirs, strict=True) if not close(a, b, 1e-10)]
    assert not wrong


def test_a_long_scan_has_the_right_gradient_across_chunks(monkeypatch):
    monkeypatch.setattr(scans, "SCAN_CHUNK", 2**10)
    inputs = scan_inputs(1, 400, 3, 4, dtype=torch.float64)
    leaves = [value.clone().requires_grad_() for value in inputs[:-1]]
    y = plain_scan(*leaves, True)
    grad = normal(*y.shape, seed=9, dtype=torch.float64)
    ours = scans.selective_scan_backward(grad, *inputs)
    for a, b in zip(ours, torch.autograd.grad(y, leaves, grad), strict=True):
        assert close(a, b, 1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_size_of_the_chunks_does_not_matter(shape, monkeypatch):
    inputs = scan_inputs(*shape, dtype=torch.float64)
    grad = normal(*inputs[0].shape, seed=9, dtype=torch.float64)
    whole = scans.selective_scan(*inputs), *scans.selective_scan_backward(grad, *inputs)
    monkeypatch.setattr(scans, "SCAN_CHUNK", 3 * max(1, shape[0]) * shape[2] * shape[3])
    pieces = scans.selective_scan(*inputs), *scans.selective_scan_backward(grad, *inputs)
    assert all(close(a, b, 1e-14) for a, b in zip(pieces, whole, strict=True))


@given(layouts)
def test_the_scan_takes_any_layout(layout):
    inputs = scan_inputs(2, 9, 5, 4)
    again = scans.selective_scan(*(layout(value) for value in inputs[:-1]), True)
    assert close(again, scans.selective_scan(*inputs), 1e-6)  # exp is vectorised where it can be


def test_a_half_precision_scan_computes_in_float32():
    inputs = scan_inputs(2, 33, 5, 4)
    halves = [value.bfloat16() for value in inputs[:-1]]
    want = scans.selective_scan(*(value.float() for value in halves), True).bfloat16()
    assert torch.equal(scans.selective_scan(*halves, True), want)
