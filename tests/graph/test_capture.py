"""Capturing a model, finding its linears, cutting it into blocks."""

import pytest
import torch
from helpers.strategies import normal
from torch import nn

from ptq4vm.graph.capture import CaptureError, capture
from ptq4vm.graph.partition import partition_blocks
from ptq4vm.graph.sites import find_linears
from ptq4vm.passes.prepare.canonicalize import canonicalize

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Flat(nn.Module):
    """No numbered module at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Stage(nn.Module):
    def __init__(self, width: int, downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.downsample = nn.Linear(width, 2 * width) if downsample else nn.Identity()

    def forward(self, x):
        return self.downsample(self.blocks(x))


class Hierarchical(nn.Module):
    """`layers.0.blocks.1`, with a downsample between the stages and a residual stream beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.layers = nn.Sequential(Stage(4, True), Stage(8, False))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean(1))


class Skipping(nn.Module):
    """Between the blocks: a norm that only an output reads, and a pooling that only the last block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(6) for _ in range(3))
        self.outnorm, self.pool = nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, x):
        first = self.layers[0](x)
        second = self.layers[1](first)
        return self.outnorm(first), self.layers[2](second + self.pool(first))


class WindowBlock(Block):
    """Merges the windows of 4 tokens with the batch."""

    def forward(self, x, windows):
        return super().forward(x.reshape(windows, 4, 6)).reshape(x.shape)


class Windows(nn.Module):
    """A size that is computed once and read in all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WindowBlock(6) for _ in range(2))

    def forward(self, x):
        windows = 2 * x.shape[0]
        x = nn.functional.pad(x, (0, 0, 0, 3))
        for layer in self.layers:
            x = layer(x, windows)
        return x


class TwoInputs(nn.Module):
    """The second input is read by the last block alone; two outputs, the first from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(6) for _ in range(3))

    def forward(self, x, y):
        x = self.layers[0](x)
        middle = self.layers[1](x)
        return middle.mean(1), self.layers[2](middle + y)


class Again(nn.Module):
    """The first block runs once more after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(6) for _ in range(2))

    def forward(self, x):
        return self.layers[0](self.layers[1](self.layers[0](x)))


def canonical(model: nn.Module, *examples: torch.Tensor) -> torch.fx.GraphModule:
    return canonicalize(capture(model, examples))


def tokens(images: int = 2, *, channels: int = 6, seed: int = 0) -> torch.Tensor:
    return normal(images, 5, channels, seed=seed)


# --- capture ---


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_left_alone(training):
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(5)).train(training)
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    gm = capture(model, (tokens(),))
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.zero_()
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == place and torch.equal(after[name], value) for name, (place, value) in before.items())
    assert all(module.training == training for module in model.modules())


def test_the_captured_model_is_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.9))
    assert torch.equal(capture(model, (tokens(),))(tokens()), model.eval()(tokens()))


@pytest.mark.parametrize("example", [1, 2, 3])
def test_the_batch_is_dynamic(small_vim, images, example):
    gm = capture(small_vim, (images[:example],))
    for count in (1, 2, 5):
        assert torch.equal(gm(images[:count]), small_vim(images[:count]))
    assert gm(images[:0]).shape == (0, 10)


def test_device_asserts_and_guards_are_gone(small_vim, images):
    gm = capture(small_vim, (images,))
    assert not [node for node in gm.graph.nodes if "assert" in str(node.target) or "guard" in str(node.target)]


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), inner)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_branch_on_values_is_an_error_that_names_the_module_and_the_way_out():
    with pytest.raises(CaptureError, match=r"cannot capture layers\.1\.1 \(Branching\).*torch\.where.*custom_op"):
        capture(Nested(Branching()), (tokens(),))


class OddBatch(nn.Module):
    def forward(self, x):
        return x if x.shape[0] == 2 else -x


def test_a_branch_on_the_batch_is_an_error():
    with pytest.raises(CaptureError, match="batch"):
        capture(Nested(OddBatch()), (tokens(),))


class Region(nn.Module):
    """A linear inside a region that torch.export may keep apart."""

    def __init__(self, region) -> None:
        super().__init__()
        self.inner, self.region = nn.Linear(6, 6), region

    def forward(self, x):
        with self.region():
            return self.inner(x)


@pytest.mark.parametrize(
    ("region", "operator"),
    [
        (torch.enable_grad, "wrap_with_set_grad_enabled"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "wrap_with_autocast"),
    ],
)
def test_a_region_that_would_hide_its_linears_is_an_error(region, operator):
    with pytest.raises(CaptureError, match=rf"keeps apart \({operator}\).*call the model without"):
        capture(Nested(Region(region)), (tokens(),))


def test_a_region_without_gradients_hides_nothing():
    model = Nested(Region(torch.no_grad))
    gm = capture(model, (tokens(),))
    names = ["layers.0", "layers.1.0", "layers.1.1.inner"]
    assert [site.name for site in find_linears(gm).values()] == names
    assert torch.equal(gm(tokens()), model(tokens()))


@pytest.mark.parametrize("examples", [(), (3,), (torch.tensor(1.0),)], ids=str)
def test_examples_without_a_batch_are_an_error(examples):
    with pytest.raises(ValueError, match="at least one tensor whose first axis is the batch"):
        capture(nn.Identity(), examples)


def test_another_resolution_is_an_error_that_names_both(small_vim, images):
    message = r"x: the model was captured for inputs of 3×16×16 \(16 patches\) and given 3×32×32 \(64 patches\)"
    with pytest.raises(ValueError, match=message + ".*resize the input, or prepare"):
        capture(small_vim, (images,))(normal(2, 3, 32, 32))


def test_another_token_count_is_an_error_that_names_both():
    gm = capture(Block(6), (tokens(),))
    with pytest.raises(ValueError, match=r"inputs of 5×6 \(5 tokens\) and given 7×6 \(7 tokens\)"):
        gm(normal(2, 7, 6))


# --- find_linears ---


def test_linears_are_named_by_their_weight_in_the_order_of_the_graph():
    found = find_linears(canonical(Hierarchical(), tokens())).values()
    blocks = [f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
    inner = [(f"{block}.{name}", block) for block in blocks for name in ("up", "down")]
    inner.insert(4, ("layers.0.downsample", None))  # its numbered module is a stage: there are blocks inside
    assert [(site.name, site.block) for site in found] == [("stem", None), *inner]  # the head sees no tokens
    assert [(site.tokens, site.in_features, site.out_features) for site in found][:3] == [
        (5, 6, 4),
        (5, 4, 8),
        (5, 8, 4),
    ]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return self.proj(torch.relu(self.proj(x)))


def test_a_shared_weight_is_numbered_by_call():
    gm = canonical(Shared(), tokens())
    assert [(site.name, site.weight) for site in find_linears(gm).values()] == [
        ("proj", "proj.weight"),
        ("proj@1", "proj.weight"),
    ]


class Product(nn.Module):
    def forward(self, x, y):
        return nn.functional.linear(x, y[0])


class Table(nn.Module):
    """What multiplies the first weight is a parameter, without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(1, 5, 6))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(x + self.first(self.table))


def test_a_product_without_images_is_no_linear_on_tokens():
    assert [site.name for site in find_linears(canonical(Table(), tokens())).values()] == ["second"]


def test_a_product_of_two_inputs_is_no_linear_of_a_weight():
    assert find_linears(canonical(Product(), tokens(), tokens(seed=1))) == {}


# --- cut ---


MODELS = {
    "vim": (None, ["stem", "layers.0", "layers.1", "head"]),
    "flat": (Flat, ["model"]),
    "sequential": (lambda: nn.Sequential(Block(6), Block(6), nn.LayerNorm(6)), ["stem", "0", "1", "head"]),
    "hierarchical": (
        Hierarchical,
        [
            "stem",
            "layers.0.blocks.0",
            "layers.0.blocks.1",
            "layers.1.blocks.0",
            "layers.1.blocks.1",
            "head",
        ],
    ),
    "again": (Again, ["stem", "layers.0", "layers.1"]),
    "two inputs": (TwoInputs, ["stem", "layers.0", "layers.1", "layers.2", "head"]),
    "skipping": (Skipping, ["stem", "layers.0", "layers.1", "layers.2", "head"]),
    "windows": (Windows, ["stem", "layers.0", "layers.1"]),
}


@pytest.fixture(params=MODELS)
def parts(request, small_vim, images):
    """A captured model, its pieces, and what gives it inputs for a number of images."""
    make, names = MODELS[request.param]
    torch.manual_seed(0)
    model = small_vim if make is None else make().eval()

    def inputs(count: int) -> tuple[torch.Tensor, ...]:
        if make is None:
            return (images[:count],)
        return tuple(tokens(count, seed=i) for i in range(2 if make is TwoInputs else 1))

    gm = canonical(model, *inputs(3))
    sites = find_linears(gm)
    blocks = [node for node, site in sites.items() if site.block is not None] or list(sites)
    return gm, partition_blocks(gm, blocks), inputs, names


def compose(gm, pieces, inputs):
    """The pieces one after another."""
    values = dict(zip((node.name for node in gm.graph.find_nodes(op="placeholder")), inputs, strict=True))
    for piece in pieces:
        values |= piece({name: values[name] for name in piece.inputs})
    return [values[node.name] for node in gm.graph.output_node().all_input_nodes]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_pieces_in_a_row_are_the_graph(parts, count):
    gm, pieces, inputs, _ = parts
    whole = gm(*inputs(count))
    whole = whole if isinstance(whole, (tuple, list)) else [whole]
    got = compose(gm, pieces, inputs(count))
    assert len(got) == len(whole) and all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


def test_the_pieces_are_what_precedes_each_block_and_what_follows(parts):
    _, pieces, _, names = parts
    assert [piece.name for piece in pieces] == names


def test_no_work_is_done_twice_or_left_out(parts):
    """Arithmetic of parameters alone may be repeated in every piece that reads it."""
    gm, pieces, _, _ = parts

    def work(module):
        data = {node for node in module.graph.nodes if node.op == "placeholder"}
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target is not aten.sym_size.int and data & set(node.all_input_nodes):
                data.add(node)
        return sorted(str(node.target) for node in data if node.op == "call_function")

    assert work(gm) == sorted(target for piece in pieces for target in work(piece.module))


def test_each_linear_is_in_the_piece_of_its_block(parts):
    gm, pieces, _, _ = parts
    where = {
        (str(node.target), piece.name) for piece in pieces for node in piece.module.graph.find_nodes(op="get_attr")
    }
    for site in find_linears(gm).values():
        if site.block is not None:
            assert (site.weight, site.block) in where


def pieces_of(model: nn.Module) -> dict[str, torch.fx.GraphModule]:
    gm = canonical(model.eval(), tokens())
    return {
        piece.name: piece
        for piece in partition_blocks(gm, [n for n, site in find_linears(gm).items() if site.block is not None])
    }


def reads(piece, name: str) -> bool:
    return any(str(node.target).startswith(name) for node in piece.module.graph.find_nodes(op="get_attr"))


def test_what_lies_between_two_blocks_opens_the_next():
    pieces = pieces_of(Hierarchical())
    assert reads(pieces["layers.1.blocks.0"], "layers.0.downsample")
    assert pieces["layers.0.blocks.1"].outputs == pieces["layers.1.blocks.0"].inputs


def test_a_block_hands_on_its_own_outputs_alone():
    pieces = pieces_of(Skipping())
    assert len(pieces["layers.0"].outputs) == 1
    assert reads(pieces["layers.2"], "pool") and reads(pieces["head"], "outnorm")


class Turned(nn.Module):
    """Between its blocks the tokens come first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(6) for _ in range(2))
        self.turn = nn.Identity()

    def forward(self, x):
        turned = self.layers[0](x).transpose(0, 1).relu()
        return self.layers[1](turned.transpose(0, 1)) + turned.sum()


def test_a_border_without_a_batch_is_an_error_that_names_the_node():
    with pytest.raises(CaptureError, match=r"relu \(in the model\) crosses the border of a block.*\(5, s\d+, 6\)"):
        pieces_of(Turned())


def test_the_pieces_share_their_parameters_with_the_graph(small_vim, images):
    gm = canonical(small_vim, images)
    pieces = partition_blocks(gm, list(find_linears(gm)))
    own = {id(parameter) for parameter in gm.parameters()}
    assert all(id(parameter) in own for piece in pieces for parameter in piece.module.parameters())
    before = compose(gm, pieces, (images,))[0]
    with torch.no_grad():
        gm.get_parameter("layers.1.mixer.out_proj.weight").mul_(2)
    after = compose(gm, pieces, (images,))[0]
    assert not torch.equal(before, after) and torch.equal(after, gm(images))


def test_parameters_still_learn_after_the_cut(small_vim, images):
    gm = canonical(small_vim, images)
    pieces = partition_blocks(gm, list(find_linears(gm)))
    compose(gm, pieces, (images,))[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in gm.parameters())
