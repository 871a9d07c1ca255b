"""Translation of configs of format version 1, whose keys were flat: such files are on users' disks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOVED: dict[str, tuple[str, str, dict[Any, Any]]] = {
    "weight_bits": ("weights", "bits", {}),
    "per_tensor_weights": ("weights", "granularity", {False: "per_channel", True: "per_tensor"}),
    "activation_bits": ("activations", "bits", {}),
    "granularity": ("activations", "granularity", {}),
    "scheme": ("activations", "symmetric", {"affine": False, "symmetric": True}),
    "clusters": ("activations", "clusters", {}),
}
"""A flat key's section and key in version 2, and the new names of its values."""


def is_flat(values: Mapping[str, Any]) -> bool:
    """Returns whether a config has keys of version 1."""
    return not _MOVED.keys().isdisjoint(values)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of version 1 in the layout of version 2; raises ValueError for a mixture of both."""
    kept = {key: value for key, value in values.items() if key not in _MOVED}
    sections: dict[str, dict[str, Any]] = {}
    for key in _MOVED.keys() & values:
        section, name, words = _MOVED[key]
        value = values[key]
        if words and not (isinstance(value, str | bool) and value in words):
            raise ValueError(f"{key} must be one of {', '.join(map(str, words))}; got {value!r}")
        if section in kept:
            raise ValueError(f"config has the key {key!r} of format version 1 and {section!r} of version 2: keep one")
        sections.setdefault(section, {})[name] = words[value] if words else value
    return {**kept, **sections}
