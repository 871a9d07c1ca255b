"""Mutations of a saved model: of its bytes, and of its content before it is signed again."""

import random
import struct
from collections.abc import Callable
from typing import Any

import torch


def flip(random: random.Random, data: bytearray) -> None:
    for _ in range(random.choice((1, 1, 1, 8))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def truncate(random: random.Random, data: bytearray) -> None:
    del data[random.randrange(len(data)) :]


def insert(random: random.Random, data: bytearray) -> None:
    at = random.randrange(len(data))
    data[at:at] = random.randbytes(random.choice((1, 7, 4096)))


def overwrite(random: random.Random, data: bytearray) -> None:
    at = random.randrange(len(data))
    data[at : at + 8] = random.choice((b"\0" * 8, b"\xff" * 8, struct.pack("<q", -1), struct.pack("<q", 2**62)))


def claim(random: random.Random, data: bytearray) -> None:
    """Changes the length of the header, which comes first."""
    data[:8] = struct.pack("<Q", random.choice((0, 1, 2, len(data), 2**31, 2**63, random.getrandbits(64))))


def digits(random: random.Random, data: bytearray) -> None:
    """Changes a number in the text."""
    places = [i for i in range(len(data)) if 48 <= data[i] <= 57]
    if places:
        at = random.choice(places)
        data[at : at + 1] = str(random.choice((0, 1, 9, 10**9, 10**30, -1))).encode()


def swap(random: random.Random, data: bytearray) -> None:
    size = random.choice((1, 16, 256))
    one, two = (random.randrange(max(1, len(data) - size)) for _ in range(2))
    data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]


BYTES: tuple[Callable[[random.Random, bytearray], None], ...] = (flip, truncate, insert, overwrite, claim, digits, swap)


def _walk(random: random.Random, value: Any) -> tuple[Any, Any]:
    """Returns a container somewhere in a value, and one of its keys."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = random.choice(keys)
        inner = value[key]
        if not isinstance(inner, (dict, list)) or not inner or random.random() < 0.2:
            return value, key
        value = inner


STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 1e308, [], {}, [[]]),
    *("", "x", "../../etc/passwd", "__class__", "a; import os", "\u202e", "\x1b[2J", "x" * 5000),
    *("aten::from_file.default", "aten::relu_.default", "ptq4vm::quantize.default"),
    *({"node": "x"}, {"tuple": []}, {"dtype": "float64"}, {"float": "nan"}),
    *({"dict": [[[], 1]]}, {"slice": [None, 1, 0]}),
)


def replace_value(random: random.Random, content: Any, tensors: dict) -> None:
    container, key = _walk(random, content)
    container[key] = random.choice(STRANGE)


def delete_value(random: random.Random, content: Any, tensors: dict) -> None:
    container, key = _walk(random, content)
    del container[key]


def repeat_node(random: random.Random, content: Any, tensors: dict) -> None:
    nodes = content["graph"]["nodes"]
    nodes.insert(random.randrange(len(nodes)), dict(random.choice(nodes)))


def reorder_nodes(random: random.Random, content: Any, tensors: dict) -> None:
    nodes = content["graph"]["nodes"]
    one, two = random.randrange(len(nodes)), random.randrange(len(nodes))
    nodes[one], nodes[two] = nodes[two], nodes[one]


def call_another(random: random.Random, content: Any, tensors: dict) -> None:
    every = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(("aten::", "ptq4vm::", "prim"))]
    called = random.choice([entry for entry in content["graph"]["nodes"] if "call" in entry])
    name = random.choice(every)
    called["call"] = name if "." in name else f"{name}.default"


def nest(random: random.Random, content: Any, tensors: dict) -> None:
    value: Any = 1
    for _ in range(random.choice((20, 100, 400))):
        value = {"tuple": [value]} if random.random() < 0.5 else [value]
    container, key = _walk(random, content)
    container[key] = value


def rename_tensor(random: random.Random, content: Any, tensors: dict) -> None:
    name = random.choice(list(tensors))
    tensors[random.choice([str(word) for word in STRANGE])] = tensors.pop(name)


def retype_tensor(random: random.Random, content: Any, tensors: dict) -> None:
    name = random.choice(list(tensors))
    value = tensors[name]
    tensors[name] = random.choice(
        (value.double(), value.to(torch.int8), value[:0], value.unsqueeze(0), value.flatten()[:1], value.bool())
    )


def spoil_tensor(random: random.Random, content: Any, tensors: dict) -> None:
    name = random.choice([name for name in tensors if name.endswith(("scale", "zero_point"))])
    number = random.choice((0, -1, 200, float("nan"), float("inf"), 1e-45))
    if tensors[name].is_floating_point() or (number == number and abs(number) < 1e9):
        tensors[name] = torch.full_like(tensors[name], number)


MEANING: tuple[Callable[..., None], ...] = (
    replace_value, delete_value, repeat_node, reorder_nodes, call_another, nest, rename_tensor, retype_tensor,
    spoil_tensor,
)  # fmt: skip
