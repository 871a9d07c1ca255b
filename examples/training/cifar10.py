"""Train a bundled `*.cifar10` model.

    python examples/training/cifar10.py vmamba_micro_32 --data-dir cifar10 --output runs/cifar10

There are also vim_micro_patch4_32, local_vim_micro_patch4_32 and local_vmamba_micro_32. `cifar10/train/<class>/*` and
`cifar10/test/<class>/*` hold the images. An interrupted run continues from its last epoch; `--weights` goes on from a
finished model with a new schedule. The same seed gives the same weights on the same machine and torch. The test images
are looked at once, after training, with the weights in half precision, as they are saved.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.optim import muon
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional
from tqdm import tqdm

import ptq4vm.models  # noqa: F401  (adds our models to timm's registry)
from ptq4vm.data import loader, open_dataset, transform_for
from ptq4vm.evaluate import evaluate
from ptq4vm.files import replace_file

# bfloat16, its default, is slow on CPUs that emulate it
muon.zeropower_via_newtonschulz = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)

PADDING = 4
"""Pixels by which an image may move."""


def augment(images: Tensor) -> Tensor:
    """Each image of (B, C, H, W) moved by up to `PADDING` pixels, mirrored at the border; half are flipped."""
    count, _, height, width = images.shape
    padded = F.pad(images.float(), (PADDING,) * 4, mode="reflect")
    rows = torch.randint(0, 2 * PADDING + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * PADDING + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def optimizers(model: nn.Module, rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    kept = model.no_weight_decay()
    matrices, decayed, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name not in kept and not name.endswith("head.weight"):
            matrices.append(parameter)
        else:
            (decayed if parameter.ndim > 1 and name not in kept else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [
        muon.Muon(matrices, lr=rate, weight_decay=weight_decay, nesterov=True),
        torch.optim.AdamW(groups, lr=rate, fused=True),
    ]


def train(
    name: str,
    data_dir: Path,
    output: Path,
    epochs: int,
    batch_size: int,
    rate: float,
    weight_decay: float,
    bf16: bool,
    seed: int,
    weights: Path | None,
) -> None:
    torch.manual_seed(seed)
    model = timm.create_model(f"{name}.cifar10")
    if weights is not None:
        model.load_state_dict(load_file(weights))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    raw = DataLoader(open_dataset(str(data_dir), "train", functional.pil_to_tensor), batch_size=1000)
    pairs = list(tqdm(raw, desc="read", unit_scale=1000))
    images, targets = (torch.cat(values) for values in zip(*pairs, strict=True))
    mean, std = (255 * torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))

    steppers = optimizers(model, rate, weight_decay)
    steps = len(images) // batch_size
    total, warmup = epochs * steps, steps

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, (total - step) / max(1, total - warmup))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(stepper, schedule) for stepper in steppers]
    parts = {"model": model, **{f"optimizer{i}": s for i, s in enumerate(steppers)}}
    parts |= {f"schedule{i}": s for i, s in enumerate(schedulers)}
    latest, first = output / f"{name}.pt", 0
    if latest.exists():
        state = torch.load(latest, weights_only=True, map_location=device)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        first = state["epoch"] + 1

    for epoch in range(first, epochs):
        torch.manual_seed(seed + 1 + epoch)
        model.train()
        start, summed = time.perf_counter(), 0.0
        order = torch.randperm(len(images))[: steps * batch_size].view(steps, batch_size)
        for chosen in (bar := tqdm(order, desc=f"{name} epoch {epoch}", mininterval=5)):
            x = ((augment(images[chosen]) - mean) / std).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), targets[chosen].to(device), label_smoothing=0.1)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in (*steppers, *schedulers):
                stepper.step()
            summed += loss.item()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        with (output / f"{name}.jsonl").open("a") as log:
            seconds = round(time.perf_counter() - start)
            log.write(json.dumps({"epoch": epoch, "loss": round(summed / steps, 4), "seconds": seconds}) + "\n")
        state = {key: part.state_dict() for key, part in parts.items()} | {"epoch": epoch}
        replace_file(latest, lambda path, state=state: torch.save(state, path))

    halves = {key: value.cpu().half() for key, value in model.state_dict().items()}
    replace_file(output / f"{name}.cifar10.safetensors", lambda path: save_file(halves, path))
    model.load_state_dict(halves)
    test = loader(open_dataset(str(data_dir), "test", transform_for(model)), 250)
    print(json.dumps({"name": name, "epochs": epochs, "test_top1": evaluate(model.eval(), test).top1}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--bf16", action="store_true", help="for GPUs, and CPUs with AMX or AVX512-BF16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="safetensors to begin with, in place of random weights")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    train(**vars(options))
