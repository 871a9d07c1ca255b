"""Blocks and whole models of benchmarks/gpu.py: in floating point, compiled, and quantized in several ways.

Models have random weights, and scales from noise. `benchmarks.speed.pieces` says how they are made block by block.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import ptq4vm
from benchmarks.gpu_rows import BATCHES, Candidate, Row, Setup
from benchmarks.speed import bounds
from benchmarks.speed.pieces import Pieces, write_branch
from benchmarks.speed.torch_ops import replace_ops
from ptq4vm import ops
from ptq4vm.config import QuantConfig
from ptq4vm.graph.capture import capture
from ptq4vm.quantization_specs import ActivationSpec, Granularity, RangeSearch, WeightSpec

MODELS = (
    "vim_base_patch16_224",
    "vmamba_base_s1l20",
    "vim_small_patch16_224",
    "vmamba_tiny_s1l8",
    "vmamba_small_s1l20",
    "vim_tiny_patch16_224",
)
"""The most important first."""

SMOKE: dict[str, dict[str, Any]] = {
    "vim_nano_patch4_32": {"depth": 2, "embed_dim": 32},
    "vmamba_nano_32": {"depths": (2,), "embed_dim": 16},
}

QUANTIZED = {
    "W8A8 per token": QuantConfig(range_search=RangeSearch.MINMAX),
    "W8A8 per tensor": QuantConfig(
        range_search=RangeSearch.MINMAX, activations=ActivationSpec(granularity=Granularity.PER_TENSOR)
    ),
    "W8A8 dynamic": QuantConfig(
        range_search=RangeSearch.MINMAX, activations=ActivationSpec(granularity=Granularity.PER_TOKEN_DYNAMIC)
    ),
    "W4A4 per token": QuantConfig(
        range_search=RangeSearch.MINMAX, weights=WeightSpec(bits=4), activations=ActivationSpec(bits=4)
    ),
}
EAGER, MAMBA = "fp16", "fp16, mamba-ssm"
MAMBA_PACKAGES = "mamba_ssm", "causal_conv1d"
COMPILED = {"compiled bf16": torch.bfloat16, "compiled fp16": torch.float16}


def can_quantize() -> bool:
    return not absent("torchao", "timm")


def absent(*packages: str) -> list[str]:
    return [package for package in packages if find_spec(package) is None]


def missing() -> list[str]:
    """Lines that say which comparisons are not possible here, and why."""
    said = []
    if not can_quantize():
        packages = " and ".join(absent("torchao", "timm"))
        said.append(f"no {packages}: no model can be quantized, linears and operators alone are timed")
    if absent(*MAMBA_PACKAGES):
        said.append(f"no {' and '.join(absent(*MAMBA_PACKAGES))}: fp16 runs with our scan and convolution alone")
    return said


def taken_apart(model: str, setup: Setup) -> tuple[Pieces, dict[int, Any], tuple[int, ...]]:
    """Returns the pieces of a model with random weights, its blocks' inputs for noise, and the shape of an image.

    On the CPU, where blocks are quantized too: they are moved before they are fused.
    """
    key = model, "pieces"
    if key not in setup.pieces:
        import timm

        import ptq4vm.models  # noqa: F401  (adds ours to timm's registry)

        torch.manual_seed(0)
        made = timm.create_model(model, **SMOKE.get(model, {})).eval()
        shape = tuple(timm.data.resolve_model_data_config(made)["input_size"])
        pieces = Pieces(made)
        setup.pieces[key] = pieces, pieces.streams(torch.randn(2, *shape)), shape
    return setup.pieces[key]


def quantized_block(model: str, name: str, place: int, setup: Setup) -> Any:
    """The fused block at a place, with activations in bfloat16 but for what it adds to the stream."""
    key = model, name, place
    if key not in setup.pieces:
        pieces, streams, _ = taken_apart(model, setup)
        prepared = ptq4vm.prepare(pieces.pieces[place], streams[place], QUANTIZED[name])
        lowered = ptq4vm.convert(ptq4vm.calibrate(prepared, [streams[place]], progress=False))
        setup.pieces[key] = ptq4vm.fuse(lowered.to(setup.device), activations=torch.bfloat16)
    return setup.pieces[key]


def fused_block(model: str, name: str, place: int, setup: Setup, *, ends: bool = False) -> Any:
    """A copy; what it adds is bfloat16 too unless it `ends` a stage."""
    made = copy.deepcopy(quantized_block(model, name, place, setup))
    return write_branch(made, torch.float32 if ends else torch.bfloat16)


def block_of(name: str, model: str, setup: Setup) -> Callable[[int, int], nn.Module]:
    """Returns a maker of the block at a place, given the place of the one that is alike."""
    pieces, _, _ = taken_apart(model, setup)
    if name in QUANTIZED:
        return lambda place, first: fused_block(model, name, first, setup, ends=pieces.ends(place))
    if name == MAMBA:
        return lambda place, first: copy.deepcopy(mamba_block(model, first, setup))
    if name in COMPILED:
        return lambda place, first: compiled(pieces.copy(place).to(COMPILED[name]))
    return lambda place, first: pieces.copy(place).half()


def compiled(block: nn.Module) -> nn.Module:
    """Compiled where it is first called; blocks that are alike share the code."""
    block.compile(dynamic=False)
    return block


def names_of(whole: bool) -> list[str]:
    mamba = [] if absent(*MAMBA_PACKAGES) else [MAMBA]
    floats = list(COMPILED)[:1] if whole else list(COMPILED)
    return [EAGER, *mamba, *floats, *QUANTIZED]


def model_row(model: str, batch: int, place: int) -> Row:
    def candidates(setup: Setup) -> dict[str, Callable[[], Candidate]]:
        torch._dynamo.reset()  # one batch, one compilation

        def make(name: str) -> Candidate:
            pieces, _, shape = taken_apart(model, setup)
            dtype = dtype_of(name)
            images = torch.randn(2 if setup.smoke else batch, *shape, device=setup.device, dtype=dtype)
            whole = pieces.assemble(dtype, block_of(name, model, setup)).to(setup.device)
            bound = bound_of(model, name, images, setup) if name in QUANTIZED and setup.gpu else None
            return Candidate([functools.partial(whole, images)], bound)

        return {name: functools.partial(make, name) for name in names_of(whole=True)}

    return Row("models", model, batch, (20 if batch == BATCHES[0] else 40) + place, candidates)


def block_row(model: str, batch: int, place: int) -> Row:
    """One block of each kind that the model has, one after another."""

    def candidates(setup: Setup) -> dict[str, Callable[[], Candidate]]:
        torch._dynamo.reset()

        def make(name: str) -> Candidate:
            pieces, streams, _ = taken_apart(model, setup)
            block, dtype, calls, bound = block_of(name, model, setup), dtype_of(name), [], 0.0
            for place in pieces.blocks:
                sizes = [(2 if setup.smoke else batch, *x.shape[1:]) for x in streams[place]]
                stream = [torch.randn(size, device=setup.device, dtype=dtype) for size in sizes]
                if name in QUANTIZED:
                    stream[1] = stream[1].float()
                    if setup.gpu is not None:
                        bound += bounds.graph(setup.gpu, fused_block(model, name, place, setup), *stream)
                calls.append(functools.partial(block(place, place).eval().to(setup.device), *stream))
            return Candidate([lambda: [call() for call in calls]], bound or None)

        return {name: functools.partial(make, name) for name in names_of(whole=False)}

    return Row("blocks", model, batch, (45 if batch == BATCHES[0] else 60) + place, candidates)


def dtype_of(name: str) -> torch.dtype:
    """The type of a candidate's activations outside its blocks."""
    return torch.float16 if name in (EAGER, MAMBA) else COMPILED.get(name, torch.bfloat16)


def bound_of(model: str, name: str, images: Tensor, setup: Setup) -> float:
    """Sums the bounds of all blocks of a model; its stem, head and downsampling do not count."""
    pieces, streams, _ = taken_apart(model, setup)
    assert setup.gpu is not None
    total = 0.0
    for place in pieces.blocks:
        shape, block = (len(images), *streams[place][0].shape[1:]), fused_block(model, name, place, setup)
        hidden, residual = (images.new_empty(shape, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        total += pieces.count(place) * bounds.graph(setup.gpu, block, hidden, residual)
    return total


# --- mamba-ssm ---


def mamba_block(model: str, place: int, setup: Setup) -> Any:
    """The captured block in float16 with the scan and the convolution of mamba-ssm."""
    key = model, MAMBA, place
    if key not in setup.pieces:
        pieces, streams, _ = taken_apart(model, setup)
        captured = capture(pieces.copy(place).half(), tuple(x.half() for x in streams[place]))
        setup.pieces[key] = replace_ops(captured, WITH_MAMBA)
    return setup.pieces[key]


def mamba_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any, softplus: bool
) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    turned = [None if x is None else x.transpose(1, 2).contiguous() for x in (u, delta, B, C, z)]
    y = selective_scan_fn(*turned[:2], A, *turned[2:4], D, turned[4], bias, softplus)
    return y.transpose(1, 2)


def mamba_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    y = causal_conv1d_fn(x.transpose(1, 2).contiguous(), weight, bias, activation="silu" if silu else None)
    return y.transpose(1, 2)


WITH_MAMBA: dict[Any, Callable[..., Tensor]] = {
    ops.selective_scan.default: mamba_scan,
    ops.causal_conv1d.default: mamba_conv1d,
}
"""They want channels before tokens."""
