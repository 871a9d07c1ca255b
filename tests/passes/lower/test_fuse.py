"""Fused graphs compute what the lowered ones do, for all families, and say what they left."""

import collections

import pytest
import timm
import torch
from helpers.fusing import copied, counted, fuse_lowered
from helpers.lowering import Recorder
from helpers.public_models import NANO, SAMPLED, slow_but

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm import Granularity, QuantConfig, convert, ops, quantize
from ptq4vm.backend import native
from ptq4vm.graph.insert import Insertion, aten, attribute, follow_device, propagate, set_tensor
from ptq4vm.passes.lower import patterns
from ptq4vm.passes.lower.fold import FoldConstants
from ptq4vm.passes.lower.fuse import fusions
from ptq4vm.passes.lower.scan_branches import find_branch
from ptq4vm.serialization.recorded_values import with_values

CONFIGS = {
    "w8a8": QuantConfig(range_search=False),
    "rotated w4a4": QuantConfig(weights={"bits": 4}, activations={"bits": 4}, rotation=True, range_search=False),
    "per tensor": QuantConfig.minmax(8),
}


@pytest.fixture(scope="module")
def lowered():
    """Bundled models by name and config, on random images; made once."""
    made = {}

    def make(name, config="w8a8"):
        if (name, config) not in made:
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=True).eval()
            made[name, config] = quantize(model, [torch.randn(8, 3, 32, 32)], CONFIGS[config], progress=False)
        return made[name, config]

    return make


EXPECTED = {
    "vim_nano_patch4_32": dict(
        norm_quantize=6, linear_packed=18, conv1d_quantize=6, directional_scan_quantize=6
    ),
    "local_vim_nano_patch4_32": dict(
        norm_quantize=4, linear_packed=12, conv1d_quantize=4, directional_scan=4, gate_quantize=4
    ),
    "vmamba_nano_32": dict(
        norm_quantize=12, linear_packed=16, conv2d_quantize=4, directional_scan=4, linear_gelu_quantize=4
    ),
    "local_vmamba_nano_32": dict(
        norm_quantize=6, linear_packed=14, conv2d_quantize=4, directional_scan=4, gate_quantize=4
    ),
}  # fmt: skip

# What a rotation changes: the scan's merged result is one value.
ROTATED = {
    "vim_nano_patch4_32": dict(directional_scan=6, directional_scan_quantize=0, rotate_quantize=6),
    "local_vim_nano_patch4_32": dict(gate_quantize=0, rotate_quantize=4),
    "vmamba_nano_32": {},  # its norm and its MLP rotate on the way
    "local_vmamba_nano_32": dict(gate_quantize=0, rotate_quantize=4),
}


@pytest.mark.parametrize("name", slow_but(("vim_nano_patch4_32",), NANO))
def test_every_family_is_fused(lowered, name):
    gm = fuse_lowered(copied(lowered(name)))
    assert counted(gm) == EXPECTED[name]
    assert not any(fusion.skip_reason for fusion in fusions(gm))


@pytest.mark.parametrize("name", SAMPLED)
def test_every_familys_rotations_are_fused(lowered, name):
    gm = fuse_lowered(copied(lowered(name, "rotated w4a4")))
    assert counted(gm) == collections.Counter(EXPECTED[name] | ROTATED[name])
    assert not any(fusion.skip_reason for fusion in fusions(gm))
    half = fuse_lowered(copied(lowered(name, "rotated w4a4")), torch.bfloat16)
    turned = half.graph.find_nodes(op="call_function", target=ops.rotate_quantize.default)
    sums = name.startswith("local")  # LocalMamba's channel attention lies between, in float32
    assert all(node.args[0].meta["val"].dtype == (torch.float32 if sums else torch.bfloat16) for node in turned)


FUSED = {
    getattr(torch.ops.ptq4vm, name).default: ops.REFERENCES[name].__wrapped__
    for name in (
        "linear_packed",
        "linear_gelu_quantize",
        "rotate_quantize",
        "norm_quantize",
        "gate_quantize",
        "conv1d_quantize",
        "conv2d_quantize",
        "directional_scan",
        "directional_scan_quantize",
    )
}


def results(value):
    return value if isinstance(value, tuple) else (value,)


def compare(gm, images):
    """Every fused operator of a graph against its meaning, on the same inputs: codes, and those that differ."""
    recorder = Recorder(gm, images)
    codes = moved = 0
    for node in gm.graph.nodes:
        if node.target not in FUSED:
            continue
        arguments = torch.fx.map_arg(node.args, recorder.values.__getitem__)
        for ours, want in zip(results(recorder.values[node]), results(FUSED[node.target](*arguments)), strict=True):
            if ours.dtype == torch.int8:
                difference = (ours.int() - want.int()).abs()
                assert difference.max() <= 1, node
                codes, moved = codes + ours.numel(), moved + int(difference.sum())
            elif node.target is ops.linear_packed.default:
                assert torch.equal(ours, want), node
            else:
                torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
    return codes, moved


def sets():
    """Instruction sets: whole models take the best one every time; the others' kernels have tests of their own."""
    names = ("portable", "avx2", "vnni", "amx")
    found = ["reference"] if native.unavailable_reason() else list(names[: names.index(native.isa()) + 1])
    return slow_but(found[-1:], found)


@pytest.mark.parametrize("isa", sets())
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", slow_but(("vim_nano_patch4_32",), NANO))
def test_integers_are_those_of_the_references_but_for_rounding_ties(lowered, name, config, isa):
    gm = fuse_lowered(copied(lowered(name, config)))
    before = native.isa()
    if isa != "reference":
        torch.ops.ptq4vm._use_isa(isa)
    try:
        codes, moved = compare(gm, torch.randn(3, 3, 32, 32))
    finally:
        if isa != "reference":
            torch.ops.ptq4vm._use_isa(before)
    assert codes > 50_000 and moved <= codes / 1000


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SAMPLED)
def test_logits_are_those_of_the_lowered_graph(lowered, name, config):
    plain = lowered(name, config)
    gm = fuse_lowered(copied(plain))
    with torch.inference_mode():
        for count in (1, 2, 5):
            images = torch.randn(count, 3, 32, 32)
            ours, theirs = gm(images), plain(images)
            # a code that moves by one at a tie moves all that follows a little
            assert (ours - theirs).norm() <= 0.05 * theirs.norm()
            assert (ours - theirs).abs().median() <= 0.02 * theirs.abs().max()


@pytest.mark.parametrize("name", slow_but(("vim_nano_patch4_32",), NANO))
def test_bfloat16_activations_cost_less_than_quantization(lowered, name):
    """The trained models' logits move less than W8A8 itself has moved them."""
    plain = lowered(name)
    gm = fuse_lowered(copied(plain), torch.bfloat16)
    assert sum(value.dtype is torch.bfloat16 for value in values(gm)) > sum(
        value.dtype is torch.bfloat16 for value in values(fuse_lowered(copied(plain)))
    )
    model, images = timm.create_model(name, pretrained=True).eval(), torch.randn(16, 3, 32, 32)
    with torch.inference_mode():
        exact, quantized, half = model(images), plain(images), gm(images)
    assert (half - quantized).norm() <= (quantized - exact).norm() and half.dtype is torch.float32


def values(gm):
    found = (node.meta.get("val") for node in gm.graph.nodes)
    return [value for value in found if isinstance(value, torch.Tensor)]


def test_other_types_of_activations_are_refused(lowered):
    with pytest.raises(ValueError, match=r"torch\.float16"):
        fuse_lowered(copied(lowered("vim_nano_patch4_32")), torch.float16)


def test_fusing_again_changes_nothing(lowered):
    gm = fuse_lowered(copied(lowered("vmamba_nano_32")))
    code = gm.code
    assert fuse_lowered(gm).code == code


@pytest.mark.parametrize(("capability", "nibbles"), [(80, True), (86, True), (90, False), (120, False)])
def test_weights_on_a_gpu_lie_in_its_rows(lowered, monkeypatch, capability, nibbles):
    """Nibbles where tensor cores take them, weight and input have no more bits, and it is worth packing the input."""
    gm, images = lowered("vmamba_nano_32", "rotated w4a4"), torch.randn(2, 3, 32, 32)
    tiled = fuse_lowered(copied(gm))
    monkeypatch.setattr(patterns, "capability_of", lambda device: capability)
    monkeypatch.setattr(patterns, "NIBBLE_FEATURES", 100)
    rows = fuse_lowered(copied(gm))
    kinds = set()
    for node in rows.graph.nodes:
        if node.target in (ops.linear_packed.default, ops.linear_gelu_quantize.default):
            weight, scale = (attribute(rows, node.args[i].target) for i in (3, 5))
            assert weight.dim() == scale.dim() + 1
            kinds.add((weight.dtype is torch.uint8, scale.shape[-1] >= 100))
        elif node.target is ops.directional_scan.default:
            assert attribute(rows, node.args[7].target).dim() == 5
    assert kinds == {(False, False), (nibbles, True)}
    assert torch.equal(rows(images), tiled(images))


def moved(gm, device):
    """A copy whose tensors are on a device that need not be here, and so have no numbers."""
    gm = copied(gm)
    (x,) = gm.graph.find_nodes(op="placeholder")
    mode = x.meta["val"].fake_mode
    for name, value in [*gm.named_parameters(), *gm.named_buffers()]:
        fake = mode.from_tensor(value.detach(), static_shapes=True)
        with mode:
            set_tensor(gm, name, fake.to(device))
    return gm


@pytest.mark.slow
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NANO)
def test_a_model_that_was_moved_is_wholly_there(lowered, monkeypatch, name, activations):
    """On the second of two GPUs: constants, values, and the layout of weights, for any number of images."""
    monkeypatch.setattr(native, "supports", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (8, 6))[device.index])
    monkeypatch.setattr(patterns, "NIBBLE_FEATURES", 100)
    there = torch.device("cuda", 1)
    gm = fuse_lowered(moved(lowered(name, "rotated w4a4"), there), activations)
    assert {value.device for value in gm.state_dict().values()} == {there}
    nibbles = set()
    for node in propagate(gm).graph.nodes:
        values = node.meta["val"] if isinstance(node.meta.get("val"), (tuple, list)) else [node.meta.get("val")]
        assert {value.device for value in values if isinstance(value, torch.Tensor)} <= {there}, node
        if node.target in (ops.linear_packed.default, ops.linear_gelu_quantize.default):
            weight, scale = (attribute(gm, node.args[i].target) for i in (3, 5))
            assert weight.dim() == scale.dim() + 1
            nibbles.add((weight.dtype is torch.uint8, scale.shape[-1] >= 100))
    assert nibbles == {(False, False), (True, True)}
    batch, classes = gm.graph.output_node().args[0][0].meta["val"].shape
    assert isinstance(batch, torch.SymInt) and classes == 10


def test_unfused_weights_are_dropped(lowered):
    plain = lowered("vim_nano_patch4_32", "rotated w4a4")
    names = {name for name, _ in fuse_lowered(copied(plain)).named_buffers()}
    assert names and not any(name.endswith(("weight_q", "A_log")) for name in names)


def test_dynamic_scales_are_left_and_named(roads):
    config = QuantConfig(activations={"granularity": Granularity.PER_TOKEN_DYNAMIC}, range_search=False)
    plain = convert(roads.calibrated(config))
    gm = fuse_lowered(copied(plain))
    reasons = {fusion.skip_reason for fusion in fusions(gm) if "scan" in fusion.pattern}
    assert reasons == {"the scale (per-token dynamic) is computed when the model runs"}
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(gm(images), plain(images))


def test_a_projection_reads_a_scans_input_by_any_views(lowered):
    gm = FoldConstants()(follow_device(with_values(copied(lowered("vim_nano_patch4_32")))))
    scan = next(iter(gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default)))
    quantize_node = find_branch(gm, scan).input.node
    u = quantize_node.args[0]
    quantize_node.args = (Insertion(gm, quantize_node).call(aten.clone.default, u), *quantize_node.args[1:])
    assert find_branch(gm, scan).input.node is quantize_node
    quantize_node.args = (Insertion(gm, quantize_node).call(aten.flip.default, u, [1]), *quantize_node.args[1:])
    with pytest.raises(patterns.NotFused, match="its projection reads something else"):
        find_branch(gm, scan)
