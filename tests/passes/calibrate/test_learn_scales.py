import dataclasses

import pytest
import torch
from helpers.strategies import normal

from ptq4vm import QuantConfig
from ptq4vm.graph.partition import partition_blocks
from ptq4vm.passes.calibrate.learn_scales import (
    _descend,
    block_loss,
    fold_learned_scales,
    learn_block,
    learnables,
    residual_streams,
    weighted_error,
)
from ptq4vm.passes.quantized_nodes import quantized_linears
from ptq4vm.quantization_specs import Granularity, Learning, Loss
from ptq4vm.quantizers import Mode

UNLEARNED = QuantConfig.w4a4(learning=None)
LEARNING = Learning(epochs=3, batch_size=4)


@pytest.fixture(params=[0, 1])
def block(request, roads, images):
    """A calibrated block that has not learned yet, its linears, and its inputs and targets in floating point."""
    gm = roads.calibrated(UNLEARNED)
    return prepare_block(gm, images, request.param)


def prepare_block(gm, images, index):
    linears = quantized_linears(gm)
    values = {"x": images}
    for linear in linears:
        linear.input.mode = linear.weight.mode = Mode.PASS
    part = next(p for p in partition_blocks(gm, [linear.node for linear in linears]) if p.name == f"layers.{index}")
    for earlier in partition_blocks(gm, [linear.node for linear in linears]):
        if earlier.name == part.name:
            break
        with torch.no_grad():
            values |= earlier({name: values[name] for name in earlier.inputs})
    inputs = {name: values[name] for name in part.inputs}
    with torch.no_grad():
        targets = part(inputs)
    members = [linear for linear in linears if linear.name.startswith(f"layers.{index}.")]
    assert len(members) == 6
    for linear in members:
        linear.input.mode = linear.weight.mode = Mode.QUANTIZE
    return part, members, inputs, targets


def state(members):
    tensors = [t for m in members for t in (m.input.scale, m.weight.scale, m.smooth)]
    return [tensor.detach().clone() for tensor in tensors]


def learn(block, config=LEARNING, seed=0, report=lambda epoch, loss: None):
    fisher = {name: torch.ones(target.shape[1:]) for name, target in block[3].items()}
    return learn_block(*block, config, seed, report, fisher)


def test_every_learnable_receives_a_gradient(block):
    part, members, inputs, targets = block
    learnables(members, LEARNING)
    block_loss(part(inputs), targets, 32).backward()
    idle = [
        f"{member.name}.{kind}"
        for member in members
        for kind, parameter in (
            ("input", member.input.log_factor),
            ("weight", member.weight.log_factor),
            ("smooth", member.smooth),
        )
        if parameter.grad is None or not parameter.grad.any() or not torch.isfinite(parameter.grad).all()
    ]
    assert not idle


def test_only_the_linears_named_learn(monkeypatch, block):
    members = block[1]
    before = state(members)
    losses = iter((1.0, 0.0))  # whatever was learned is kept
    monkeypatch.setattr("ptq4vm.passes.calibrate.learn_scales._mean_loss", lambda *_: next(losses))
    learn(block, dataclasses.replace(LEARNING, only=("*.in_proj",), epochs=10))
    moved = {i // 3 for i, (a, b) in enumerate(zip(state(members), before, strict=True)) if not torch.equal(a, b)}
    assert moved == {i for i, member in enumerate(members) if member.name.endswith(".in_proj")}
    assert learn(block, dataclasses.replace(LEARNING, only=("nothing",))) is None


def test_the_weighted_error_knows_length_and_the_cosine_does_not():
    target = normal(2, 3, 4)
    assert block_loss({"y": 2 * target}, {"y": target}, 4).item() == pytest.approx(0, abs=1e-6)
    assert weighted_error({"y": 2 * target}, {"y": target}, {"y": torch.rand(3, 4)}).item() == pytest.approx(1)


def test_the_fisher_loss_is_that_of_the_stream_with_the_diagonal_given(block):
    part, members, inputs, targets = block
    own = part.outputs[-1]  # the other is the stream before the block, which quantization does not change
    fisher = {name: torch.rand(value.shape[1:]) for name, value in targets.items()}
    with torch.no_grad():
        stream, wanted = (residual_streams(values, [own]) for values in (part(inputs), targets))
        expected = weighted_error(stream, wanted, fisher).item()
    one_batch = Learning(epochs=1, batch_size=len(targets[own]), loss=Loss.FISHER)
    before, _ = learn_block(part, members, inputs, targets, one_batch, 0, lambda epoch, loss: None, fisher)
    assert before == pytest.approx(expected, rel=1e-5)


def test_what_does_not_matter_adds_no_weighted_error():
    target = normal(2, 3, 4)
    output, fisher = target.clone(), torch.ones(3, 4)
    output[:, 1, 2] += 5
    assert weighted_error({"y": output}, {"y": target}, {"y": fisher}).item() > 0.1
    fisher[1, 2] = 0
    assert weighted_error({"y": output}, {"y": target}, {"y": fisher}).item() == 0


def test_a_stream_is_the_sum_of_the_outputs_of_its_shape():
    a, b, other = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 5)
    found = residual_streams({"a": a, "b": b, "other": other}, ["b", "other"])
    assert torch.equal(found["b"], a + b) and torch.equal(found["other"], other)


def test_learning_lowers_the_loss(block):
    before, after = learn(block, dataclasses.replace(LEARNING, epochs=10))
    assert 0 < after < before


def test_every_learnable_moves(monkeypatch, block):
    losses = iter((1.0, 0.0))  # whatever was learned is kept
    monkeypatch.setattr("ptq4vm.passes.calibrate.learn_scales._mean_loss", lambda *_: next(losses))
    before = state(block[1])
    learn(block)
    unmoved = [i for i, (a, b) in enumerate(zip(state(block[1]), before, strict=True)) if torch.equal(a, b)]
    assert not unmoved


def test_the_loss_afterwards_is_what_the_block_then_has(block):
    _, after = learn(block)
    part, _, inputs, targets = block
    with torch.no_grad():
        outputs = part(inputs)
    name = next(name for name, value in outputs.items() if not torch.equal(value, targets[name]))
    loss = 1 - torch.cosine_similarity(outputs[name], targets[name], dim=-1)
    assert loss.mean().item() == pytest.approx(after, rel=1e-5)


def test_a_block_that_got_worse_is_put_back(block):
    _, members, *_ = block
    before = state(members)
    wild = dataclasses.replace(LEARNING, scale_rate=0.9, smooth_rate=0.9)
    first, last = learn(block, wild)
    assert first == last
    assert all(torch.equal(a, b) for a, b in zip(state(members), before, strict=True))


def test_without_rates_nothing_changes(block):
    before = state(block[1])
    first, last = learn(block, dataclasses.replace(LEARNING, scale_rate=0.0, smooth_rate=0.0))
    assert first == last
    assert all(torch.equal(a, b) for a, b in zip(state(block[1]), before, strict=True))


@pytest.mark.parametrize(("rate", "kinds"), [("scale_rate", {2}), ("smooth_rate", {0, 1})])
def test_each_rate_has_its_own_parameters(monkeypatch, block, rate, kinds):
    losses = iter((1.0, 0.0))  # whatever was learned is kept
    monkeypatch.setattr("ptq4vm.passes.calibrate.learn_scales._mean_loss", lambda *_: next(losses))
    before = state(block[1])
    learn(block, dataclasses.replace(LEARNING, **{rate: 0.0}))
    moved = {i % 3 for i, (a, b) in enumerate(zip(state(block[1]), before, strict=True)) if not torch.equal(a, b)}
    assert moved == kinds


def test_afterwards_nothing_learns_any_more(block):
    learn(block)
    part, members, *_ = block
    assert all(m.input.log_factor is None and m.weight.log_factor is None for m in members)
    assert not any(parameter.requires_grad for parameter in part.module.parameters())


def test_scales_stay_positive_and_finite(block):
    learn(block, dataclasses.replace(LEARNING, scale_rate=0.5))
    for member in block[1]:
        for scale in (member.input.scale, member.weight.scale):
            assert (scale > 0).all() and torch.isfinite(1 / scale).all()


def test_progress_is_reported_every_epoch(block):
    seen = []
    learn(block, report=lambda epoch, loss: seen.append((epoch, loss)))
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert all(0 < loss < 2 for _, loss in seen)


def test_the_seed_decides_the_order(roads, images):
    def result(seed):
        block = prepare_block(roads.calibrated(UNLEARNED), images, 0)
        learn(block, seed=seed)
        return state(block[1])

    one, same, other = result(1), result(1), result(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_callers_random_numbers_are_not_touched(block):
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    learn(block)
    assert torch.equal(torch.rand(2), want)


def test_the_loss_is_zero_for_equal_and_two_for_opposite_outputs():
    target = normal(2, 3, 4).sign()  # of length 2: the cosine is exact
    output = target.clone().requires_grad_()
    assert block_loss({"y": output}, {"y": target}, 4).item() == 0
    assert block_loss({"y": output}, {"y": -target}, 4).item() == 2


def test_outputs_that_quantization_does_not_change_do_not_count(roads, images):
    """The residual stream that a block hands on is what it was: its target, whatever it says, moves no loss."""
    want = learn(prepare_block(roads.calibrated(UNLEARNED), images, 1))
    part, members, inputs, targets = prepare_block(roads.calibrated(UNLEARNED), images, 1)
    with torch.no_grad():
        outputs = part(inputs)
    same = {name for name, value in outputs.items() if torch.equal(value, targets[name])}
    assert same and same != set(outputs)
    assert learn((part, members, inputs, targets | {name: -targets[name] for name in same})) == want


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 7), (2, 3, 5, 1), (2, 3, 1, 1)])
def test_channels_may_come_last_or_first(shape):
    first, target = normal(*shape), normal(*shape, seed=1)
    losses = [
        block_loss({"y": output.requires_grad_()}, {"y": wanted}, 3).item()
        for output, wanted in ((first, target), (first.movedim(1, -1).contiguous(), target.movedim(1, -1).contiguous()))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    cosine = torch.cosine_similarity(first, target, dim=1)
    assert losses[0] == pytest.approx((1 - cosine).mean().item(), rel=1e-6)


def test_a_map_one_pixel_wide_still_has_a_gradient():
    output = normal(2, 4, 7, 1).requires_grad_()
    block_loss({"y": output}, {"y": normal(2, 4, 7, 1, seed=1)}, 4).backward()
    assert output.grad.ne(0).all()


@pytest.mark.parametrize("channels", [4, 5])
def test_the_last_axis_counts_where_the_channels_are_on_both_axes_or_on_none(channels):
    output, target = normal(2, 4, 7, 4).requires_grad_(), normal(2, 4, 7, 4, seed=1)
    loss = block_loss({"y": output}, {"y": target}, channels)
    assert loss == (1 - torch.cosine_similarity(output, target, dim=-1)).mean()


def test_dynamic_scales_do_not_learn_but_the_rest_does(roads, images):
    config = QuantConfig.w4a4(
        learning=None, activations={"granularity": Granularity.PER_TOKEN_DYNAMIC}, range_search=False
    )
    part, members, inputs, targets = prepare_block(roads.calibrated(config), images, 0)
    scales, smooth = (group["params"] for group in learnables(members, LEARNING))
    assert (len(scales), len(smooth)) == (6, 6)
    block_loss(part(inputs), targets, 32).backward()
    assert all(parameter.grad.any() for parameter in scales + smooth)
    fold_learned_scales(members)
    assert all(member.input.scale is None for member in members)


def test_rates_fall_along_a_cosine_to_zero():
    """Adam moves a parameter of constant gradient by the rate, whatever it is."""
    parameter, moves = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), []

    def loss_of(batch):
        moves.append(parameter.item())
        return parameter.sum() * 2 + 10

    config = Learning(epochs=4, batch_size=3)
    _descend(loss_of, [{"params": [parameter], "lr": 0.01}], 6, config, 0, lambda *_: None)
    positions = torch.tensor(moves, dtype=torch.float64)[2:-1]  # between two passes that measure
    steps = -positions.diff()
    want = 0.005 * (1 + torch.cos(torch.arange(8, dtype=torch.float64) * torch.pi / 8))
    torch.testing.assert_close(steps, want[: len(steps)], rtol=1e-6, atol=0)
    assert len(steps) == 8
