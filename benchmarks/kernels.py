"""Native kernels against what PyTorch has, in turn, in one process; a Markdown table on standard output.

    python benchmarks/kernels.py --threads 1

Packed linears at the sizes of Vim (197 tokens) and VMamba against what oneDNN makes of bfloat16 with its own packed
weights (and GELU, where ours has it and gives codes), and F.linear in float32; scan and convolution against the PyTorch
reference operators, forward, and forward with backward; norms and convolutions that give codes against the same
operators one by one; the scans of whole blocks, with the steps' linears, for one image; a scan with its state as
codes against one in float32. Medians, of one thread's processor time; the linears' and scans' inputs are codes. The
share is that of the fastest int8 linear found, one whose operands fit the second cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the script runs without an editable install too

from benchmarks.one_by_one import (
    conv1d_one_by_one,
    conv2d_one_by_one,
    gate_one_by_one,
    norm_one_by_one,
    rotate_one_by_one,
)
from ptq4vm import ops
from ptq4vm.backend import native
from ptq4vm.ops import convolution_1d, directional_scans, layouts
from ptq4vm.ops import scans as scan_ops

TOKENS = 197
PROJECTIONS = {
    "Vim-Ti in_proj": (TOKENS, 192, 768),
    "Vim-Ti out_proj": (TOKENS, 384, 192),
    "Vim-S in_proj": (TOKENS, 384, 1536),
    "Vim-S out_proj": (TOKENS, 768, 384),
    "Vim-S x_proj": (TOKENS, 768, 56),
    "Vim-B in_proj": (TOKENS, 768, 3072),
    "Vim-B out_proj": (TOKENS, 1536, 768),
    "Vim-B x_proj": (TOKENS, 1536, 80),
    "VMamba fc1, stage 1": (3136, 96, 384),
    "VMamba fc2, stage 1": (3136, 384, 96),
    "VMamba fc1, stage 3": (196, 384, 1536),
    "VMamba fc2, stage 3": (196, 1536, 384),
}


DIRECTIONAL = {
    "Vim-S": {"directions": 2, "side": 0, "tokens": 197, "channels": 768, "rank": 24, "states": 16},
    "VMamba-T 56×56": {"directions": 4, "side": 56, "tokens": 3136, "channels": 96, "rank": 6, "states": 1},
    "VMamba-T 14×14": {"directions": 4, "side": 14, "tokens": 196, "channels": 384, "rank": 24, "states": 1},
}


def milliseconds(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of each, called in turn; of one thread its processor time, which other processes disturb less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 2):
        for name, call in candidates.items():
            call()  # brings its operands into the caches, whatever ran before
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: 1000 * statistics.median(values[2:]) for name, values in times.items()}


def packed(weight: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Arguments of linear_packed from random codes, in the place of a float weight."""
    codes = torch.randint(1 - 2 ** (bits - 1), 2 ** (bits - 1), weight.shape, dtype=torch.int8)
    return layouts.pack_weight(codes, bits), codes.sum(-1, dtype=torch.int32), torch.rand(len(weight)), None


def activations(*shape: int) -> tuple[Tensor, ...]:
    """Codes and their qparams by token."""
    zero_point = torch.randint(-128, 128, shape[-2:-1], dtype=torch.int32)
    return torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[-2]), zero_point


def best_speed(rounds: int) -> float:
    """TOP/s of int8 where memory is no limit."""
    sizes = [(512, 1024, 1024), (256, 768, 512), (256, 1536, 256)]
    speeds = []
    for tokens, channels, features in sizes:
        x, weight = activations(1, tokens, channels), packed(torch.empty(features, channels), 8)
        found = milliseconds({"int8": lambda x=x, w=weight: ops.linear_packed(*x, *w, torch.bfloat16)}, rounds)
        speeds.append(2e-9 * tokens * channels * features / found["int8"])
    return max(speeds)


def float_linear(x: Tensor, weight: Tensor, after: str = "none") -> Callable[[], Tensor]:
    """The fastest bfloat16 linear that torch has, with what comes after it: of a frozen and compiled model."""
    x, weight = x.bfloat16(), weight.bfloat16()
    try:
        prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])
    except RuntimeError:  # this processor has no bfloat16
        return lambda: F.gelu(F.linear(x, weight)) if after == "gelu" else F.linear(x, weight)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, prepacked, None, after, [], "none")


def linears(batch: int, rounds: int) -> None:
    peak = best_speed(rounds)
    print(
        f"\nbest int8: {peak:.2f} TOP/s\n\n| batch {batch} | bf16 ms | int8 ms | × bf16 | × fp32 | 4-bit × bf16 "
        "| with GELU × bf16 | TOP/s | share |",
        "|---|---|---|---|---|---|---|---|---|",
        sep="\n",
    )
    for name, (tokens, channels, features) in PROJECTIONS.items():
        x, weight = torch.randn(batch, tokens, channels), torch.randn(features, channels)
        codes, w8, w4 = activations(*x.shape), packed(weight, 8), packed(weight, 4)
        new = (torch.rand(tokens), codes[2], None, 8)
        found = milliseconds(
            {
                "bf16": float_linear(x, weight),
                "fp32": lambda x=x, w=weight: F.linear(x, w),
                "int8": lambda x=codes, w=w8: ops.linear_packed(*x, *w, torch.bfloat16),
                "int4": lambda x=codes, w=w4: ops.linear_packed(*x, *w, torch.bfloat16),
                "bf16 gelu": float_linear(x, weight, "gelu"),
                "gelu": lambda x=codes, w=w8, new=new: ops.linear_gelu_quantize(*x, *w, False, *new),
            },
            rounds,
        )
        speed = 2e-9 * batch * tokens * channels * features / found["int8"]
        ratios = (found["bf16"] / found["int8"], found["fp32"] / found["int8"], found["bf16"] / found["int4"])
        shown = " | ".join(f"{ratio:.2f}" for ratio in (*ratios, found["bf16 gelu"] / found["gelu"], speed))
        times = f"{found['bf16']:.3f} | {found['int8']:.3f}"
        print(f"| {name} {channels}→{features} | {times} | {shown} | {speed / peak:.0%} |")


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
            f"scan, {states} states": (ops.selective_scan, scan_ops.selective_scan, inputs),
            f"scan, {states} states, backward": (backward, scan_ops.selective_scan_backward, (grad, *inputs)),
        }
        compare(pairs, rounds)
    for name, sizes in DIRECTIONAL.items():
        inputs, qparams = directional(**sizes)
        pairs = {
            f"directional scan, {name}": (
                ops.directional_scan,
                directional_scans.directional_scan,
                (*inputs, True, 1.0),
            ),
            f"directional scan, {name}, codes": (
                ops.directional_scan_quantize,
                directional_scans.directional_scan_quantize,
                (*inputs, 1.0, *qparams),
            ),
        }
        compare(pairs, rounds)
    x, weight, bias = torch.randn(8, TOKENS, 768), torch.randn(768, 4), torch.randn(768)
    backward = torch.ops.ptq4vm.causal_conv1d_backward
    inputs = (x, weight, bias, True)
    pairs = {
        "convolution and SiLU": (ops.causal_conv1d, convolution_1d.causal_conv1d, inputs),
        "convolution and SiLU, backward": (
            backward,
            convolution_1d.causal_conv1d_backward,
            (torch.ones_like(x), *inputs),
        ),
    }
    compare(pairs, rounds)


def producers(rounds: int) -> None:
    print("\n| one image, codes included | fused µs | one by one µs | ratio |\n|---|---|---|---|")
    order = torch.stack((torch.arange(TOKENS), torch.arange(TOKENS).flip(0))).int()
    for dtype in (torch.float32, torch.bfloat16):
        scales, zeros = 20 * torch.rand(2, TOKENS), torch.zeros(2, TOKENS, dtype=torch.int32)
        x, residual = torch.randn(1, TOKENS, 384, dtype=dtype), torch.randn(1, TOKENS, 384)
        weight, bias = torch.randn(2, 384)
        half = torch.randn(1, TOKENS, 2 * 768, dtype=dtype)[..., :768]  # of what in_proj gives
        scans, gates = torch.randn(4, 1, TOKENS, 768, dtype=dtype), torch.rand(4, 1, 1, 768, dtype=dtype)
        taps, biases, smooth = torch.randn(2, 768, 4), torch.randn(2, 768), torch.rand(2, 768)
        maps, kernel, shifts = torch.randn(1, 56 * 56, 96, dtype=dtype), torch.randn(96, 3, 3), torch.randn(96)
        of_maps = (20 * torch.rand(4, 56 * 56), torch.zeros(4, 56 * 56, dtype=torch.int32), None, 8)
        one = (scales[0], zeros[0], None, 8)
        cases: dict[str, tuple[Callable, Callable, tuple]] = {
            "residual and RMS norm, 197×384": (
                ops.norm_quantize,
                norm_one_by_one,
                (x, residual, weight, None, 1e-5, True, False, *one),
            ),
            "layer norm, 197×384": (
                ops.norm_quantize,
                norm_one_by_one,
                (x, None, weight, bias, 1e-5, False, False, *one),
            ),
            "layer norm and rotation, 197×384": (
                ops.norm_quantize,
                norm_one_by_one,
                (x, None, weight, bias, 1e-5, False, True, *one),
            ),
            "rotation, 197×384": (ops.rotate_quantize, rotate_one_by_one, (x, False, *one)),
            "GELU and rotation, 197×384": (ops.rotate_quantize, rotate_one_by_one, (x, True, *one)),
            "four scans with their gates, summed, 197×768": (
                ops.gate_quantize,
                gate_one_by_one,
                (scans, gates, False, *one),
            ),
            "SiLU of a gate, 197×768": (ops.gate_quantize, gate_one_by_one, (scans[:1], half[None], True, *one)),
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
        for name, (one, plain, inputs) in cases.items():
            found = milliseconds(
                {"fused": lambda f=one, a=inputs: f(*a), "plain": lambda f=plain, a=inputs: f(*a)}, 10 * rounds
            )
            ratio = found["plain"] / found["fused"]
            kind = str(dtype).removeprefix("torch.")
            print(f"| {name}, {kind} | {1000 * found['fused']:.0f} | {1000 * found['plain']:.0f} | {ratio:.1f} |")


def directional(
    directions: int, side: int, tokens: int, channels: int, rank: int, states: int, images: int = 1
) -> tuple[tuple, tuple]:
    """Alternate directions are reversed, and on a map of this side the second half goes down the columns."""
    ways = torch.arange(tokens).repeat(directions, 1)
    if side:
        ways[directions // 2 :] = torch.arange(tokens).view(side, side).t().flatten()
    ways[1::2] = ways[1::2].flip(1)
    weight = torch.randint(-127, 128, (directions, channels, rank), dtype=torch.int8)
    scale, zero_point = torch.full((directions, tokens), 0.03), torch.zeros(directions, tokens, dtype=torch.int32)
    inputs = (
        torch.randn(1 if side else directions, images, tokens, channels),
        torch.randn(directions, images, tokens, rank + 2 * states),
        1 / scale,
        scale,
        zero_point,
        None,
        8,
        layouts.pack_weight(weight, 8),
        weight.sum(-1, dtype=torch.int32),
        torch.full((directions, channels), 0.5 / 127 / rank**0.5),
        torch.rand(directions, channels) * 5 - 7,
        -torch.arange(1.0, states + 1).expand(directions, channels, states),
        torch.ones(directions, channels),
        None if side else torch.randn(images, tokens, 2 * channels)[..., channels:],
        ways.int(),
    )
    return inputs, (torch.full((tokens,), 20.0), zero_point[0], None, 8)


STATES = {
    "Vim-Ti, one image": (1, 197, 384, 16, True),
    "Vim-Ti, eight images": (8, 197, 384, 16, True),
    "VMamba-T, 56×56": (1, 3136, 192, 1, False),
    "VMamba-T, 28×28": (1, 784, 384, 1, False),
    "LocalVMamba, 56×56": (1, 3136, 192, 16, False),
}
"""Images, tokens, channels, states, and whether there is a gate."""


def states(rounds: int) -> None:
    print("\n| scan of one direction | float32 ms | codes ms | codes × float32 | KiB of state | of codes |")
    print("|---|---|---|---|---|---|")
    for name, (images, tokens, channels, count, gated) in STATES.items():
        u, delta, z = (torch.randn(images, tokens, channels) for _ in range(3))
        B, C = (torch.randn(images, tokens, count) for _ in range(2))
        A, D, bias = -4 * torch.rand(channels, count), torch.randn(channels), torch.randn(channels) - 4
        inputs = (u, delta, A, B, C, D, z if gated else None, bias, True)
        scales = torch.full((tokens,), 0.02), torch.full((tokens,), 50.0)
        found = milliseconds(
            {
                "float32": lambda a=inputs: ops.selective_scan(*a),
                "codes": lambda a=inputs, s=scales: ops.selective_scan_quantized(*a, *s, 8),
            },
            rounds,
        )
        kept = images * channels * count / 1024
        ratio = found["codes"] / found["float32"]
        print(f"| {name} | {found['float32']:.2f} | {found['codes']:.2f} | {ratio:.2f} | {4 * kept:.2f} | {kept:.2f} |")


def compare(pairs: dict[str, tuple[Callable, Callable, tuple]], rounds: int) -> None:
    for name, (ours, theirs, inputs) in pairs.items():
        found = milliseconds(
            {"native": lambda f=ours, a=inputs: f(*a), "reference": lambda f=theirs, a=inputs: f(*a)}, rounds
        )
        ratio = found["reference"] / found["native"]
        print(f"| {name} | {found['native']:.2f} | {found['reference']:.2f} | {ratio:.1f} |")


def all_linears(rounds: int) -> None:
    for batch in (1, 8):
        linears(batch, rounds)


SECTIONS = {
    "linears": all_linears,
    "scans": lambda rounds: scans(max(3, rounds // 5)),
    "states": states,
    "producers": producers,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="of the tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"kernels {native.isa()}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds")
    with torch.inference_mode():
        for section in options.only:
            SECTIONS[section](options.rounds)
