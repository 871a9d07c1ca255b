"""Quantize, linear and what belongs to them in stock ONNX: the same codes, and the same sums to the last bit."""

import pytest
import torch
from helpers.draws import qparams

from ptq4vm.ops.layouts import pack_int4

onnx_files = pytest.importorskip("helpers.onnx_files", exc_type=ImportError)

RUNTIMES = sorted(onnx_files.FORMS)
KINDS = ("tensor", "token", "image")


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _activation(images: int, tokens: int, channels: int, random: torch.Generator) -> torch.Tensor:
    """Values whose codes reach both ends and halves between codes."""
    return torch.randint(-600, 600, (images, tokens, channels), generator=random) / 4


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("smooth", [False, True])
def test_codes_are_those_of_quantize(runtime, kind, bits, smooth):
    random = _random()
    x = _activation(3, 5, 12, random)
    scale, zero_point = qparams(kind, 3, 5, bits, random)
    inverse = torch.where(scale > 0.5, 1 / scale, torch.ones(()))  # some multiply exactly: ties
    inv_smooth = torch.rand(12, generator=random) + 0.5 if smooth else None
    args = (x, inverse, zero_point, inv_smooth, bits)
    computed = ("x", "inv_scale", "zero_point") if kind == "image" else ("x",)
    codes = onnx_files.run_node("quantize", args, computed, runtime)[0]
    assert (codes == torch.ops.ptq4vm.quantize(*args).numpy()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("images", [1, 3, 8])
def test_sums_of_the_integer_form_are_exact(kind, bits, images):
    """With scales of one the result is the sum itself, and an even larger one than float32 has whole numbers for."""
    random, half = _random(), 2 ** (bits - 1)
    x = torch.randint(-half, half, (images, 7, 130), generator=random, dtype=torch.int8)
    weight = torch.randint(1 - half, half, (33, 130), generator=random, dtype=torch.int8)
    weight[:2] = half - 1  # the largest sums there are, which products of two at a time would saturate
    x[:, :2] = half - 1
    scale, zero_point = qparams(kind, images, 7, bits, random)
    scale = torch.ones_like(scale)
    codes = pack_int4(weight) if bits == 4 else weight
    args = (x, scale, zero_point, codes, torch.ones(33), None, torch.float32)
    computed = ("x", "x_scale", "x_zero_point") if kind == "image" else ("x",)
    assert (
        onnx_files.run_node("linear", args, computed, "onnxruntime")[0] == torch.ops.ptq4vm.linear(*args).numpy()
    ).all()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_linears_are_ours_but_for_rounding(runtime, kind, bits, bias):
    random, half = _random(1), 2 ** (bits - 1)
    x = torch.randint(-half, half, (2, 7, 130), generator=random, dtype=torch.int8)
    weight = torch.randint(1 - half, half, (33, 130), generator=random, dtype=torch.int8)
    scale, zero_point = qparams(kind, 2, 7, bits, random)
    weight_scale = torch.rand(33, generator=random) + 0.01
    codes = pack_int4(weight) if bits == 4 else weight
    args = (x, scale, zero_point, codes, weight_scale, torch.randn(33, generator=random) if bias else None)
    computed = ("x", "x_scale", "x_zero_point") if kind == "image" else ("x",)
    ours = torch.ops.ptq4vm.linear(*args, torch.float32).numpy()
    theirs = onnx_files.run_node("linear", (*args, torch.float32), computed, runtime)[0]
    assert abs(theirs - ours).max() <= 1e-6 * abs(ours).max()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_ours(kind, runtime):
    random = _random()
    x = torch.randint(-128, 128, (3, 5, 12), generator=random, dtype=torch.int8)
    args = (x, *qparams(kind, 3, 5, 8, random))
    computed = ("x_q", "scale", "zero_point") if kind == "image" else ("x_q",)
    found = onnx_files.run_node("dequantize", args, computed, runtime)[0]
    assert (found == torch.ops.ptq4vm.dequantize(*args).numpy()).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("smooth", [False, True])
def test_dynamic_qparams_are_ours(bits, smooth):
    random = _random()
    x = torch.randn(3, 5, 12, generator=random)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, x[0, 1].abs(), -x[0, 2].abs()
    args = (x, torch.rand(12, generator=random) + 0.5 if smooth else None, bits)
    scale, zero_point = torch.ops.ptq4vm.choose_qparams(*args)
    found = onnx_files.run_node("choose_qparams", args)
    assert (found[0] == scale.numpy()).all() and (found[1] == zero_point.numpy()).all()


@pytest.mark.parametrize("channels", [1, 2, 8, 12, 17, 34, 192, 384])
def test_rotations_are_ours_but_for_rounding(channels):
    x = torch.randn(3, 5, channels, generator=_random())
    ours = torch.ops.ptq4vm.rotate(x).numpy()
    assert abs(onnx_files.run_node("rotate", (x,))[0] - ours).max() <= 1e-5


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_of_4_bits_takes_half_a_byte(bits, runtime):
    """But for TensorRT, which multiplies no INT4 by int8."""
    random = _random()
    weight = torch.randint(-7, 8, (16, 64), generator=random, dtype=torch.int8)
    codes = pack_int4(weight) if bits == 4 else weight
    x = torch.zeros(2, 3, 64, dtype=torch.int8)
    args = (x, torch.ones(1), torch.zeros(1, dtype=torch.int32), codes, torch.ones(16), None, torch.float32)
    model = onnx_files.one_node("linear", args, ("x",), onnx_files.FORMS[runtime])
    weights = [each for each in model.graph.initializers.values() if each.shape.numpy() == (64, 16)]
    assert [each.dtype.name for each in weights] == ["INT4" if bits == 4 and runtime != "tensorrt" else "INT8"]
