"""What ONNX files say of real pictures: the classes that the fused model says in PyTorch."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import ptq4vm
from ptq4vm.data import calibration_batches, loader, open_dataset, transform_for
from ptq4vm.models import create_model
from ptq4vm.onnx import export

onnx_files = pytest.importorskip("helpers.onnx_files", exc_type=ImportError)

CIFAR10 = Path(__file__).parents[3] / "shared/data/cifar10.tar.xz"
MODELS = ("vim_micro_patch4_32", "local_vim_micro_patch4_32", "vmamba_micro_32", "local_vmamba_micro_32")
IMAGES = 2500
RUNTIMES = ("portable", "onnxruntime", "custom")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CIFAR10.exists(), reason="needs CIFAR-10, which is not part of the repository"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    with tarfile.open(CIFAR10) as archive:
        archive.extractall(path, filter="data")
    return str(path / "cifar10")


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", MODELS)
def test_files_say_what_the_fused_model_says(name, bits, folder, tmp_path):
    model = create_model(f"{name}.cifar10", pretrained=True).eval()
    transform = transform_for(model)
    train, test = (open_dataset(folder, split, transform) for split in ("train", "test"))
    config = ptq4vm.QuantConfig(range_search="minmax", weights={"bits": bits}, activations={"bits": bits})
    quantized = ptq4vm.quantize(model, calibration_batches(train, 64, 32, 0), config, progress=False)
    sessions = {
        runtime: onnx_files.session(
            export(quantized, tmp_path / f"{runtime}.onnx", runtime),
            library=ptq4vm.onnx.library() if runtime == "custom" else None,
        )
        for runtime in RUNTIMES
    }
    fused, same, seen = ptq4vm.fuse(quantized), dict.fromkeys(RUNTIMES, 0), 0
    for images, _ in loader(Subset(test, [i * len(test) // IMAGES for i in range(IMAGES)]), 125):
        with torch.inference_mode():
            expected = fused(images).argmax(1).numpy()
        for runtime, session in sessions.items():
            found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0].argmax(1)
            same[runtime] += int(np.equal(found, expected).sum())
        seen += len(images)
    assert seen == IMAGES
    print(name, bits, {runtime: count / IMAGES for runtime, count in same.items()})
    assert min(same.values()) >= 0.995 * IMAGES
