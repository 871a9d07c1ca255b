import json

import numpy as np
import pytest
from helpers.cli_commands import CONFIG, calibration
from PIL import Image

from ptq4vm.cli.main import main


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> str:
    """Ten classes of two images, wider than high and larger than the model's."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(20):
            path = root / split / f"class_{number % 10}" / f"{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(path)
    return str(root)


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, photos, config) -> str:
    """A quantized model, made by the command."""
    folder = str(tmp_path_factory.mktemp("models") / "quantized")
    assert main(calibration(folder, photos, config)) == 0
    return folder


@pytest.fixture
def run(capsys):
    """Code, standard output and standard error of a command."""

    def call(*argv) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return call
