"""Draws of operators' arguments, and how close results must be: shared by the tests of all implementations."""

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st

from ptq4vm.backend import native
from ptq4vm.ops import layouts, linears, quantization, scans

ALL = ("portable", "avx2", "vnni", "amx")

needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


def available() -> list[str]:
    if native.unavailable_reason() is not None:
        return []
    best = native.isa()
    return list(ALL[: ALL.index(best) + 1])


def draw(seed: int):
    return torch.Generator().manual_seed(seed)


SUPPRESSED = [HealthCheck.function_scoped_fixture]  # one instruction set for all examples is what is meant

ROWS = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 65, 197])

CHANNELS = st.sampled_from([1, 2, 3, 15, 31, 32, 33, 63, 64, 65, 128, 200, 1100])

FEATURES = st.sampled_from([0, 1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100])

STATES = st.sampled_from([1, 2, 3, 8, 16, 17])

SCAN_CHANNELS = st.sampled_from([1, 15, 16, 17, 33, 72, 130])

KINDS = st.sampled_from(["tensor", "token", "image"])


def qparams(kind, images, tokens, bits, random):
    shape = {"tensor": (1,), "token": (tokens,), "image": (images, tokens)}[kind]
    half = 2 ** (bits - 1)
    return torch.rand(shape, generator=random) + 0.01, torch.randint(
        -half, half, shape, generator=random, dtype=torch.int32
    )


def scan_inputs(images, tokens, channels, states, optional, random):
    def normal(*shape):
        return torch.randn(shape, generator=random)

    u, delta, z = (normal(images, tokens, channels) for _ in range(3))
    B, C = (normal(images, tokens, states) for _ in range(2))
    A = -torch.rand(channels, states, generator=random) * 2
    D, bias = normal(channels), normal(channels)
    return u, 3 * delta, A, B, C, *(value if optional else None for value in (D, z, bias))


def relative(ours, exact):
    if not exact.numel():
        return 0.0
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def packed(weight, bits):
    return layouts.pack_weight(weight, bits), weight.sum(-1, dtype=torch.int32)


def linear_inputs(stack, images, tokens, channels, features, bits, kind, bias, random):
    """Arguments of linear_packed but for the dtype; `stack` linears, or one."""
    half, lead = 2 ** (bits - 1), () if stack is None else (stack,)
    each = [qparams(kind, images, tokens, bits, random) for _ in range(stack or 1)]
    scale, zero_point = (torch.stack(parts) if lead else parts[0] for parts in zip(*each, strict=True))
    x = torch.randint(-half, half, (*lead, images, tokens, channels), generator=random, dtype=torch.int8)
    weight = torch.randint(1 - half, half, (*lead, features, channels), generator=random, dtype=torch.int8)
    weight_scale = torch.rand(*lead, features, generator=random)
    bias = torch.randn(*lead, features, generator=random) if bias else None
    return x, scale, zero_point, *packed(weight, bits), weight_scale, bias


def rows_of_more(x, strided):
    """x, or its values as the first half of rows twice as long, after one number: at no alignment, and no copy."""
    if not strided:
        return x
    more = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    more[..., 1 : x.shape[-1] + 1] = x
    return more[..., 1 : x.shape[-1] + 1]


def directional_qparams(directions, tokens, per_token, bits, random):
    shape = (directions, tokens if per_token else 1)
    half = 2 ** (bits - 1)
    zero_point = torch.randint(-half, half, shape, generator=random, dtype=torch.int32)
    return torch.rand(shape, generator=random) * 100 / 2 ** (8 - bits), zero_point


def assert_same_codes(ours, theirs):
    """But for one code in a thousand that a rounding moves by one."""
    difference = (ours.int() - theirs.int()).abs()
    assert not difference.numel() or difference.max() <= 1
    assert difference.sum() <= max(1, difference.numel() / 1000)


HALF = 2**-8


def part(x, dtype, random):
    """The same values as a slice of the channels of a larger tensor."""
    before, after = (torch.randn(*x.shape[:-1], n, generator=random) for n in (3, 5))
    return torch.cat((before, x, after), -1).to(dtype)[..., 3:-5]


def orders(directions, tokens, padding, random):
    """Random permutations, and between their tokens as many -1 as `padding` says."""
    rows = []
    for _ in range(directions):
        row = torch.full((tokens + padding,), -1, dtype=torch.int32)
        places = torch.randperm(tokens + padding, generator=random)[:tokens]
        row[places] = torch.randperm(tokens, generator=random, dtype=torch.int32)
        rows.append(row)
    return torch.stack(rows)


def directional_inputs(random, K, shared, images, tokens, channels, rank, states, optional, bits, padding, dtype):
    def normal(*shape):
        return torch.randn(shape, generator=random)

    def integers(low, high, *shape, kind=torch.int32):
        return torch.randint(low, high, shape, generator=random, dtype=kind)

    half, scales = 2 ** (bits - 1), 1 if padding % 2 else tokens
    scale = 4 * (torch.rand(K, scales, generator=random) + 0.5) / half
    weight = integers(1 - half, half, K, channels, rank, kind=torch.int8)
    return (
        part(normal(1 if shared else K, images, tokens, channels), dtype, random),
        normal(K, images, tokens, rank + 2 * states),
        1 / scale,
        scale,
        integers(-half // 4, half // 4 + 1, K, scales),
        torch.rand(K, rank, generator=random) + 0.5 if optional else None,
        bits,
        layouts.pack_weight(weight, bits),
        weight.sum(-1, dtype=torch.int32),
        (torch.rand(K, channels, generator=random) + 0.5) / (half * rank**0.5),
        normal(K, channels) - 1,
        -2 * torch.rand(K, channels, states, generator=random),
        normal(K, channels) if optional else None,
        part(normal(images, tokens, channels), dtype, random) if optional else None,
        orders(K, tokens, padding, random),
    )


def exact_directional(inputs, merge, factor):
    """`directional_scans.directional_scan` in float64 from the step's float32 on."""
    u, projected, inv_scale, scale, zero, smooth, bits, weight, _, weight_scale, bias, A, D, z, order = inputs
    states, results = A.shape[-1], []
    low_rank, B, C = projected.split((projected.shape[-1] - 2 * states, states, states), -1)
    w_q = layouts.unpack_weight(weight, A.shape[1], low_rank.shape[-1])
    for k, tokens in enumerate(order.long()):
        codes = quantization.quantize(low_rank[k], inv_scale[k], zero[k], None if smooth is None else smooth[k], bits)
        delta = linears.linear(codes, scale[k], zero[k], w_q[k], weight_scale[k], None, torch.float32)
        x = u[k if len(u) > 1 else 0]
        read = [
            torch.where((tokens >= 0)[:, None], v[:, tokens.clamp(min=0)], 0).double() for v in (x, delta, B[k], C[k])
        ]
        skip = None if D is None else D[k].double()
        y = scans.selective_scan(read[0], read[1], A[k].double(), *read[2:], skip, None, bias[k].double(), True)
        results.append(torch.zeros(x.shape, dtype=torch.double).index_copy_(1, tokens[tokens >= 0], y[:, tokens >= 0]))
    gate = factor if z is None else torch.nn.functional.silu(z.double()) * factor
    return (sum(results) if merge else torch.stack(results)) * gate


def counting(u, tokens):
    """A scan of one channel and state whose states are sums of u, and its scale of 1."""
    ones = torch.ones(1, tokens, 1)
    return ones * u, ones, torch.zeros(1, 1), ones, ones, None, None, None, False, torch.ones(1), torch.ones(1)


def largest_states(u, delta, A, B, bias):
    """max |h_t| (L,) in `scans.selective_scan` with softplus."""
    step, h, largest = torch.nn.functional.softplus(delta if bias is None else delta + bias).unsqueeze(-1), 0, []
    for t in range(u.shape[1]):
        h = torch.exp(step[:, t] * A) * h + step[:, t] * u[:, t].unsqueeze(-1) * B[:, t].unsqueeze(-2)
        largest.append(h.abs().amax() if h.numel() else h.sum())
    return torch.stack(largest) if largest else u.new_empty(0)


def assert_threads_change_no_bit(everything):
    """Results of `everything()`, a tuple of tensors, are the same on one thread, on two and on five."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])
