"""Make the bundled Vim hard to quantize without changing what it computes.

    python examples/make_hard.py --output ptq4vm/models/pretrained

Published Visual Mambas have activation channels far larger than the rest; a small model trained on digits has few.
Two places let a channel grow while the function stays: a norm's weight against the columns of in_proj, and a row of
x_proj (its step part, which is linear up to dt_proj) against the columns of dt_proj. Factors are powers of two, so that
nothing is even rounded. Tokens cannot be rescaled in the same way: every path between two linears of Vim passes an
RMSNorm or a SiLU, which a factor that differs between tokens would change; the differences between tokens are those
that training gave the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import ptq4vm.models
from ptq4vm.models.plain import Block
from ptq4vm.models.registry import PRETRAINED

NORM_FACTORS = (64.0, 32.0, 16.0)
"""Of three channels of every in_proj input."""
STEP_FACTOR = 16.0
"""Of one channel of every dt_proj input."""


@torch.no_grad()
def harden(model: ptq4vm.models.Vim, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for block in model.layers:
        assert isinstance(block, Block)
        mixer = block.mixer
        chosen = torch.randperm(model.embed_dim, generator=generator)[: len(NORM_FACTORS)]
        factors = torch.ones(model.embed_dim)
        factors[chosen] = torch.tensor(NORM_FACTORS)
        block.norm.weight *= factors
        mixer.in_proj.weight /= factors
        for x_proj, dt_proj in ((mixer.x_proj, mixer.dt_proj), (mixer.x_proj_b, mixer.dt_proj_b)):
            rank = dt_proj.in_features
            factors = torch.ones(rank)
            factors[torch.randint(rank, (), generator=generator)] = STEP_FACTOR
            x_proj.weight[:rank] *= factors.unsqueeze(1)
            dt_proj.weight /= factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PRETRAINED)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = timm.create_model("vim_nano_patch4_32.digits", pretrained=True).eval()
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(options.seed))
    with torch.inference_mode():
        before = model(images)
    harden(model, options.seed)
    with torch.inference_mode():
        after = model(images)
    print(f"largest difference of the logits: {(after - before).abs().max().item():.1e}")
    save_file(model.state_dict(), options.output / "vim_nano_patch4_32.digits_hard.safetensors")


if __name__ == "__main__":
    main()
