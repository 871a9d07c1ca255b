"""Native kernels against what PyTorch has, in turn, in one process; a Markdown table on standard output.

    python benchmarks/kernels.py --threads 1

Linears at the sizes of Vim's projections (197 tokens) against F.linear in bfloat16 and float32; scan and convolution
against the PyTorch reference operators, forward, and forward with backward; norms and convolutions that give codes
against the same operators one by one. Medians; the kernels' inputs are codes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4vm import native, ops, reference

TOKENS = 197
PROJECTIONS = {
    "Vim-Ti in_proj": (192, 768),
    "Vim-Ti out_proj": (384, 192),
    "Vim-S in_proj": (384, 1536),
    "Vim-S out_proj": (768, 384),
    "Vim-B in_proj": (768, 3072),
    "Vim-B out_proj": (1536, 768),
    "Vim-B x_proj": (1536, 80),
    "Vim-B dt_proj": (48, 1536),
}


def milliseconds(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 2):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values[2:]) for name, values in times.items()}


def linears(batch: int, rounds: int) -> None:
    print(
        f"\n| batch {batch} | bf16 ms | int8 ms | × bf16 | × fp32 | 4-bit × bf16 | TOP/s |",
        "|---|---|---|---|---|---|---|",
        sep="\n",
    )
    for name, (channels, features) in PROJECTIONS.items():
        x, weight = torch.randn(batch, TOKENS, channels), torch.randn(features, channels)
        half, half_weight = x.bfloat16(), weight.bfloat16()
        codes = torch.randint(-128, 128, x.shape, dtype=torch.int8)
        scale, zero_point = torch.rand(TOKENS), torch.zeros(TOKENS, dtype=torch.int32)
        w_q, w_scale = torch.randint(-127, 128, weight.shape, dtype=torch.int8), torch.rand(features)
        packed = reference.pack_int4(w_q.clamp(-7, 7))
        arguments = (w_scale, None, torch.bfloat16)
        found = milliseconds(
            {
                "bf16": lambda a=half, w=half_weight: F.linear(a, w),
                "fp32": lambda a=x, w=weight: F.linear(a, w),
                "int8": lambda q=codes, s=scale, z=zero_point, w=w_q, r=arguments: ops.linear(q, s, z, w, *r),
                "int4": lambda q=codes, s=scale, z=zero_point, w=packed, r=arguments: ops.linear(q, s, z, w, *r),
            },
            rounds,
        )
        speed = 2e-9 * batch * TOKENS * channels * features / found["int8"]
        ratios = (found["bf16"] / found["int8"], found["fp32"] / found["int8"], found["bf16"] / found["int4"])
        shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} {channels}→{features} | {found['bf16']:.3f} | {found['int8']:.3f} | {shown} | {speed:.2f} |")


def scans(rounds: int) -> None:
    print("\n| 8 images, 197 tokens, 768 channels | native ms | reference ms | ratio |\n|---|---|---|---|")
    for states in (1, 16):
        u, delta, z = (torch.randn(8, TOKENS, 768) for _ in range(3))
        B, C = (torch.randn(8, TOKENS, states) for _ in range(2))
        A, D, bias = -torch.rand(768, states), torch.randn(768), torch.randn(768)
        inputs = (u, delta, A, B, C, D, z, bias, True)
        grad = torch.ones_like(u)
        backward = torch.ops.ptq4vm.selective_scan_backward
        pairs = {
            f"scan, {states} states": (ops.selective_scan, reference.selective_scan, inputs),
            f"scan, {states} states, backward": (backward, reference.selective_scan_backward, (grad, *inputs)),
        }
        compare(pairs, rounds)
    x, weight, bias = torch.randn(8, TOKENS, 768), torch.randn(768, 4), torch.randn(768)
    backward = torch.ops.ptq4vm.causal_conv1d_backward
    inputs = (x, weight, bias, True)
    pairs = {
        "convolution and SiLU": (ops.causal_conv1d, reference.causal_conv1d, inputs),
        "convolution and SiLU, backward": (backward, reference.causal_conv1d_backward, (torch.ones_like(x), *inputs)),
    }
    compare(pairs, rounds)


def norm_one_by_one(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, *codes: Any
) -> object:
    total = x.float() if residual is None else x + residual
    shape = total.shape[-1:]
    y = F.rms_norm(total, shape, weight, eps) if rms else F.layer_norm(total, shape, weight, bias, eps)
    return total, ops.quantize(y, *codes)


def conv1d_one_by_one(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, *codes: Any) -> object:
    """Of the two directions that need no gather, and leave the second one reversed."""
    inv_scale, zero_point, smooth, bits = codes
    u = [ops.causal_conv1d(y, weight[k], bias[k], True) for k, y in enumerate((x, x.flip(1)))]
    return u, [ops.quantize(u[k], inv_scale[k], zero_point[k], smooth[k], bits) for k in range(2)]


def conv2d_one_by_one(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, *codes: Any) -> object:
    inv_scale, zero_point, _, bits = codes
    maps = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    filters = weight.unsqueeze(1).to(x.dtype)
    u = F.silu(F.conv2d(maps, filters, bias.to(x.dtype), padding=1, groups=len(weight)))
    u = u.permute(0, 2, 3, 1).flatten(1, 2)
    return u, [ops.quantize(u, inv_scale[k], zero_point[k], None, bits) for k in range(len(inv_scale))]


def producers(rounds: int) -> None:
    print("\n| one image, codes included | fused µs | one by one µs | ratio |\n|---|---|---|---|")
    order = torch.stack((torch.arange(TOKENS), torch.arange(TOKENS).flip(0))).int()
    for dtype in (torch.float32, torch.bfloat16):
        scales, zeros = 20 * torch.rand(2, TOKENS), torch.zeros(2, TOKENS, dtype=torch.int32)
        x, residual = torch.randn(1, TOKENS, 384, dtype=dtype), torch.randn(1, TOKENS, 384)
        weight, bias = torch.randn(2, 384)
        half = torch.randn(1, TOKENS, 2 * 768, dtype=dtype)[..., :768]  # of what in_proj gives
        taps, biases, smooth = torch.randn(2, 768, 4), torch.randn(2, 768), torch.rand(2, 768)
        maps, kernel, shifts = torch.randn(1, 56 * 56, 96, dtype=dtype), torch.randn(96, 3, 3), torch.randn(96)
        of_maps = (20 * torch.rand(4, 56 * 56), torch.zeros(4, 56 * 56, dtype=torch.int32), None, 8)
        one = (scales[0], zeros[0], None, 8)
        cases: dict[str, tuple[Callable, Callable, tuple]] = {
            "residual and RMS norm, 197×384": (
                ops.norm_quantize,
                norm_one_by_one,
                (x, residual, weight, None, 1e-5, True, *one),
            ),
            "layer norm, 197×384": (ops.norm_quantize, norm_one_by_one, (x, None, weight, bias, 1e-5, False, *one)),
            "two convolutions and SiLU, 197×768": (
                ops.conv1d_quantize,
                conv1d_one_by_one,
                (half, taps, biases, order, scales, zeros, smooth, 8),
            ),
            "3×3 and SiLU, four codes, 56×56×96": (
                ops.conv2d_quantize,
                conv2d_one_by_one,
                (maps, kernel, shifts, 56, 56, *of_maps),
            ),
        }
        for name, (fused, plain, inputs) in cases.items():
            found = milliseconds(
                {"fused": lambda f=fused, a=inputs: f(*a), "plain": lambda f=plain, a=inputs: f(*a)}, 10 * rounds
            )
            ratio = found["plain"] / found["fused"]
            kind = str(dtype).removeprefix("torch.")
            print(f"| {name}, {kind} | {1000 * found['fused']:.0f} | {1000 * found['plain']:.0f} | {ratio:.1f} |")


def compare(pairs: dict[str, tuple[Callable, Callable, tuple]], rounds: int) -> None:
    for name, (ours, theirs, inputs) in pairs.items():
        found = milliseconds(
            {"native": lambda f=ours, a=inputs: f(*a), "reference": lambda f=theirs, a=inputs: f(*a)}, rounds
        )
        ratio = found["reference"] / found["native"]
        print(f"| {name} | {found['native']:.2f} | {found['reference']:.2f} | {ratio:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"kernels {native.isa()}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds")
    with torch.inference_mode():
        for batch in (1, 8):
            linears(batch, options.rounds)
        scans(max(3, options.rounds // 5))
        producers(options.rounds)
