"""scikit-build-core with torch's headers: those of the environment if it has torch, else of a torch to build with.

pip builds in an environment of its own, where the torch that is already installed cannot be imported; a second one
would be gigabytes. The kernels need its headers alone.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build

build_sdist = build.build_sdist
get_requires_for_build_sdist = build.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build.prepare_metadata_for_build_editable


def get_requires_for_build_wheel(settings: dict[str, Any] | None = None) -> list[str]:
    return [*build.get_requires_for_build_wheel(settings), *_torch()]


def get_requires_for_build_editable(settings: dict[str, Any] | None = None) -> list[str]:
    return [*build.get_requires_for_build_editable(settings), *_torch()]


def build_wheel(folder: str, settings: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    return build.build_wheel(folder, _with_torch(settings), metadata)


def build_editable(folder: str, settings: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    return build.build_editable(folder, _with_torch(settings), metadata)


def _torch() -> list[str]:
    """torch, where there is a compiler to build the kernels with and no torch to build them against."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return ["torch>=2.11"] if compiler and _installed() is None else []


def _installed() -> Path | None:
    """The torch of the environment that pip installs into."""
    folder = Path(sysconfig.get_paths()["platlib"]) / "torch"
    return folder if (folder / "include" / "torch" / "csrc" / "stable").is_dir() else None


def _with_torch(settings: dict[str, Any] | None) -> dict[str, Any]:
    found = _installed()
    return (settings or {}) | ({"cmake.define.PTQ4VM_TORCH": str(found)} if found else {})
