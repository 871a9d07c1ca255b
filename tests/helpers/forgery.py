"""Forges files of models with a right digest."""

import json
from collections.abc import Callable
from typing import Any

from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from ptq4vm.serialization import model_file as module
from ptq4vm.serialization.model_file import KEY, read_content


def signed(content: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Returns a file of these tensors and this content."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps({"sha256": "", **content}, separators=(",", ":"))
    digest = module._digest(text, *module._split(serialize(tensors)))
    return serialize(tensors, metadata={KEY: text.replace('"sha256":""', f'"sha256":"{digest}"', 1)})


def forged(data: bytes, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> bytes:
    """Returns the file after `change` has edited its content and tensors in place."""
    content, tensors = read_content(data), deserialize(data)
    change(content, tensors)
    return signed(content, tensors)
