"""Installed versions are those that the run says it tests, and the README names no others."""

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = sorted((ROOT / "constraints").glob("*.txt"))


def pins(row: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", row.read_text(), re.MULTILINE))


def public(release: str) -> str:
    """2.11.0+cu130 is a build of 2.11.0."""
    return release.partition("+")[0]


@pytest.mark.skipif("PTQ4VM_CONSTRAINTS" not in os.environ, reason="`make test-matrix` names the row")
def test_the_run_tests_the_versions_of_its_row() -> None:
    import torch
    import torchvision

    have = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    assert {name: public(found) for name, found in have.items()} == pins(ROOT / os.environ["PTQ4VM_CONSTRAINTS"])


def test_torchvision_is_the_one_of_this_torch() -> None:
    import torch
    from torchvision.ops import nms  # an operator of its library, which loads beside one torch only

    assert nms(torch.zeros(1, 4), torch.zeros(1), 0.5).tolist() == [0]
    assert public(version("torch")) == public(torch.__version__)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.stem)
def test_a_row_pins_torch_and_torchvision(row: Path) -> None:
    assert pins(row).keys() == {"torch", "torchvision"}


def test_the_oldest_row_is_what_the_package_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = min((pins(row)["torch"] for row in ROWS), key=lambda release: [*map(int, release.split("."))])
    assert f"torch>={oldest.rpartition('.')[0]}" in asked


def test_readme_claims_the_versions_of_the_rows() -> None:
    claimed = re.search(r"tested on torch (\S+) and (\S+) ", (ROOT / "README.md").read_text())
    assert claimed and set(claimed.groups()) == {pins(row)["torch"] for row in ROWS}
