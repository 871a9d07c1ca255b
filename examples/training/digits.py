"""Train a bundled `*.digits` model on scikit-learn's handwritten digits.

    python examples/training/digits.py vim_nano_patch4_32 --output runs/digits

There are also local_vim_nano_patch4_32, vmamba_nano_32 and local_vmamba_nano_32. A Vim takes about twenty minutes on
two free cores. An interrupted run continues from its last epoch; the same seed gives the same weights on the same
machine and torch. The test split is looked at once, after training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm.data import loader, open_dataset, transform_for
from ptq4vm.evaluate import evaluate


def train(name: str, output: Path, epochs: int, batch_size: int, rate: float, weight_decay: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = timm.create_model(name, drop_path_rate=0.1)
    transform = transform_for(model)
    images, targets = next(iter(DataLoader(open_dataset("digits", "train", transform), batch_size=10_000)))
    augment = v2.RandomAffine(degrees=12, translate=(0.1, 0.1), scale=(0.85, 1.15), shear=8, fill=-1.0)

    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in model.no_weight_decay()]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or n in model.no_weight_decay()]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = math.ceil(len(images) / batch_size)
    warmup = 5 * steps

    def schedule(step: int) -> float:
        done = max(0.0, (step - warmup) / max(1, epochs * steps - warmup))
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    output.mkdir(parents=True, exist_ok=True)
    latest, first = output / "latest.pt", 0
    if latest.exists():
        state = torch.load(latest, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first = state["epoch"] + 1

    for epoch in range(first, epochs):
        torch.manual_seed(seed + 1 + epoch)
        model.train()
        total = 0.0
        for batch in (bar := tqdm(torch.randperm(len(images)).split(batch_size), desc=f"epoch {epoch}")):
            x = torch.stack([augment(image) for image in images[batch]])
            loss = F.cross_entropy(model(x), targets[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(batch)
            bar.set_postfix(loss=f"{loss.item():.3f}")
        with (output / "log.jsonl").open("a") as log:
            log.write(json.dumps({"epoch": epoch, "loss": total / len(images)}) + "\n")
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "epoch": epoch,
        }
        torch.save(state, latest.with_suffix(".tmp"))
        os.replace(latest.with_suffix(".tmp"), latest)

    model.eval()
    save_file(model.state_dict(), output / f"{name}.digits.safetensors")
    for split in ("train", "test"):
        print(split, evaluate(model, loader(open_dataset("digits", split, transform), 128)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="vim_nano_patch4_32")
    parser.add_argument("--output", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
