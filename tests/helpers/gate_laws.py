"""The law of gated sums, one of those of operator_laws.py."""

import torch
from hypothesis import strategies as st

from helpers.draws import assert_same_codes, draw, qparams, rows_of_more
from helpers.laws import BITS, CHANNELS, DTYPES, FLAG, IMAGES, SEEDS, TOKENS, law
from ptq4vm.ops import gates


@law(
    "gate_quantize",
    dtype=DTYPES, other=DTYPES, K=st.integers(1, 4), images=IMAGES, tokens=TOKENS, channels=CHANNELS, shared=FLAG,
    silu=FLAG, bits=BITS, per_token=FLAG, smooth=FLAG, strided=FLAG, seed=SEEDS,
)  # fmt: skip
def gated_sums(gpu, dtype, other, K, images, tokens, channels, shared, silu, bits, per_token, smooth, strided, seed):
    random = draw(seed)
    x = rows_of_more(torch.randn(K, images, tokens, channels, generator=random).to(dtype), strided)
    gate = torch.randn(K, images, 1 if shared else tokens, channels, generator=random).to(other)
    scale, zero_point = qparams("token" if per_token else "tensor", images, tokens, bits, random)
    inv_smooth = torch.rand(channels, generator=random) if smooth else None
    arguments = (x, rows_of_more(gate, not strided), silu, 20 / 2 ** (8 - bits) / scale, zero_point, inv_smooth, bits)
    codes, want = gpu.gate_quantize(*arguments), gates.gate_quantize(*arguments)
    assert torch.equal(codes, want) or silu
    assert_same_codes(codes, want)
