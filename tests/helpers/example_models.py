"""What the tests of examples/ run: a bundled model in eight bits, and pictures as people have them."""

import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from torch import nn
from torch.fx import GraphModule

import ptq4vm
from helpers.strategies import normal
from ptq4vm.models import create_model

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/imagenet-samples.tar"
SIZES = (((640, 427), "RGB"), ((300, 500), "L"), ((57, 31), "RGBA"), ((32, 32), "RGB"), ((20, 24), "P"))


def bundled(name: str) -> tuple[nn.Module, GraphModule]:
    """Returns a bundled model and the same in W8A8."""
    model = create_model(name, pretrained=True).eval()
    images = normal(16, 3, 32, 32, seed=0)
    return model, ptq4vm.quantize(model, [images], ptq4vm.QuantConfig.minmax(8), progress=False)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, **options: Any) -> Iterator[subprocess.Popen]:
    """Runs a server until the end of the block, which begins when it answers at the port."""
    server = subprocess.Popen(command, **options)
    try:
        for _ in range(300):
            assert server.poll() is None, "the server ended"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield server
    finally:
        server.terminate()
        server.wait(20)


def pictures(folder: Path, photographs: int = 8) -> list[Path]:
    """Writes ships at sea, drawn in several sizes, shapes and modes, and photographs where there are some."""
    made = []
    for place, (size, mode) in enumerate(SIZES):
        made.append(folder / f"{place}.{'png' if mode in ('RGBA', 'P') else 'jpg'}")
        _ship(size, place).convert(mode).save(made[-1])
    if PHOTOGRAPHS.is_file():
        with tarfile.open(PHOTOGRAPHS) as archive:
            members = [member for member in archive.getmembers() if member.name.endswith(".JPEG")][::8][:photographs]
            archive.extractall(folder, members, filter="data")
        made += [folder / member.name for member in members]
    return made


def _ship(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    sky = np.random.default_rng(seed).integers(120, 160, (height, width, 3), np.uint8)
    image = Image.fromarray(sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 0.7, width, height), (20, 60, 140))
    hull = ((0.1, 0.6), (0.9, 0.6), (0.8, 0.8), (0.2, 0.8))
    draw.polygon([(width * x, height * y) for x, y in hull], (150, 40, 30))
    return image.filter(ImageFilter.GaussianBlur(min(size) / 100))
