"""Make the bundled Vim hard to quantize without changing what it computes; `ptq4vm.models.outliers` explains how.

python examples/training/hard.py --output ptq4vm/models/pretrained
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from ptq4vm.models.outliers import inject_outliers
from ptq4vm.models.registry import PRETRAINED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PRETRAINED)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = timm.create_model("vim_nano_patch4_32.digits", pretrained=True).eval()
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(options.seed))
    with torch.inference_mode():
        before = model(images)
    inject_outliers(model, options.seed)
    with torch.inference_mode():
        after = model(images)
    print(f"largest difference of the logits: {(after - before).abs().max().item():.1e}")
    save_file(model.state_dict(), options.output / "vim_nano_patch4_32.digits_hard.safetensors")


if __name__ == "__main__":
    main()
