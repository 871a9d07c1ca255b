"""Files of weights that were made by hand to harm who reads them."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from helpers.public_models import create

MODEL = "vim_nano_patch4_32"


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.clone() for name, value in create(MODEL).state_dict().items()}


NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "\x1b[2J\x07",
    "a\nb\rc",
    "\udcff",
    "",
    ".",
    "..",
    "a..b",
    "x" * 100_000,
    "%s{0}",
]

HEADERS: list[Any] = [
    {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**63]},
    {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
    {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
    {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    {"dtype": "F32", "shape": [0, 2**50], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]},
    [1, 2],
    None,
]


def headers() -> Iterator[tuple[str, bytes]]:
    """Yields lying headers of safetensors."""
    for entry in HEADERS:
        text = json.dumps({"head.bias": entry}).encode()
        yield "lying headers", struct.pack("<Q", len(text)) + text + bytes(4)
    good = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    texts = [f'{{"a": {good}, "a": {good}}}', "[" * 100_000, '{"a":' * 100_000, "{}", "null", '{"a": NaN}', '"', "\x00"]
    texts += [f"{{{json.dumps(name)}: {good}}}" for name in NAMES]
    texts += [f'{{"__metadata__": {{"a": 1}}, "a": {good}}}', f'{{"__metadata__": {good}}}']
    for text in texts:
        data = text.encode()
        yield "names and nesting", struct.pack("<Q", len(data)) + data + bytes(4)
        yield "lying headers", struct.pack("<Q", 2**63 + len(data)) + data + bytes(4)


class Lie:
    """Pickles as a call of any function."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Lie:
    storage = torch.ones(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    return Lie(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, OrderedDict())


def nested(kind: str, depth: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(depth):
        value = {"model": value} if kind == "dict" else [value] if kind == "list" else (value,)
    return value


def contents() -> Iterator[tuple[str, Any]]:
    """Yields contents of pickles."""
    state = weights()
    lies = [
        tensor((2**40,), (0,)),
        tensor((2**20, 2**20), (0, 0)),
        tensor((2**20, 2**20), (1, 1)),
        tensor((5,), (1,)),
        tensor((2,), (1,), 2**62),
        tensor((2,), (-1,), 3),
        tensor((-1,), (1,)),
        tensor((2**62, 4), (1, 1)),
        tensor((1,) * 200, (1,) * 200),
        tensor((0, 2**50), (1, 1)),
        tensor((2, 2), (1,)),
        Lie(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**40,), (1,), False),
        Lie(torch._utils._rebuild_parameter, torch.ones(3), True, OrderedDict()),
        Lie(torch._utils._rebuild_parameter, 3, True, OrderedDict()),
    ]
    for lie in lies:
        for name in ("head.bias", "stranger"):
            yield "lying tensors", {**state, name: lie}
    odd = [
        torch.ones(10).to_sparse(),
        torch.ones(1, 10).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(10), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        torch.ones(10, device="meta"),
        torch.ones(10, dtype=torch.complex64),
        torch.ones(10, dtype=torch.bool),
        torch.ones(10, dtype=torch.int8),
        torch.ones(10).to(torch.float8_e5m2),
        torch.ones(10, dtype=torch.uint16),
        torch.full((10,), torch.nan),
        torch.full((10,), 1e300, dtype=torch.float64),
        torch.ones(()),
        torch.ones(0),
        torch.ones(10).conj(),
        "text",
        None,
        10**5000,
        [torch.ones(10)],
    ]
    for value in odd:
        for name in ("head.bias", "cls_token"):
            yield "odd tensors", {"state_dict": {**state, name: value}}
    for name in NAMES:
        yield "names and nesting", {**state, name: torch.ones(1)}
        yield "names and nesting", {name: state}
        yield "names and nesting", {f"{name}.{key}": value for key, value in state.items()}
    for kind in ("dict", "list", "tuple"):
        for depth in (3, 10, 100):
            yield "names and nesting", nested(kind, depth)
    loop: dict[str, Any] = {}
    loop["model"] = loop["state_dict"] = loop
    for value in (
        loop,
        {"model": loop, **state},
        {1: 2},
        {b"a": torch.ones(1)},
        {(1, 2): torch.ones(1)},
        {None: state},
    ):
        yield "names and nesting", value
    for value in (state | {"model." + key: value for key, value in state.items()}, {"model": {}}, {"model": []}, {}):
        yield "duplicates and nothing", value
    yield (
        "duplicates and nothing",
        {**{f"a.{key}": v for key, v in state.items()}, **{f"b.{k}": v for k, v in state.items()}},
    )
    for call, *arguments in (
        (os.system, "true"),
        (eval, "1"),
        (open, "/etc/passwd"),
        (getattr, state, "clear"),
        (print,),
    ):
        yield "code", {"model": state, "args": Lie(call, *arguments)}
        yield "code", Lie(call, *arguments)


def archives() -> Iterator[tuple[str, bytes]]:
    """Yields archives that torch.save does not write."""
    with zipfile.ZipFile(io.BytesIO(saved(weights()))) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    data = next(name for name in entries if name.endswith("data.pkl"))
    bomb = next(name for name in entries if "/data/" in name)
    version = next(name for name in entries if name.endswith("version"))
    changes: list[dict[str, bytes | None]] = [
        {data: None},
        {version: None},
        {bomb: None},
        {data: b""},
        {data: pickle.dumps([1] * 10, 2)},
        {data: b"\x80\x02" + b"(" * 100_000 + b"."},
        {data: b"\x80\x02" + b"]q\x00" * 100_000 + b"."},
        {data: b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueR."},
        {data: b"\x80\x02\x8b\xff\xff\xff\x7f"},
        {data: b"\x80\x02X\xff\xff\xff\xff"},
        {data: b"\x80\x09."},
        {version: b"99999999999999999999\n"},
        {version: b"\xff"},
        {bomb: b""},
        {bomb: bytes(1 << 27)},
        {"../../outside": b"x", "/etc/absolute": b"x"},
        {"archive/byteorder": b"big"},
        {"constants.pkl": pickle.dumps((), 2)},
    ]
    for change in changes:
        for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", how) as archive:
                for name, content in {**entries, **change}.items():
                    if content is not None:
                        archive.writestr(name, content)
            yield "odd archives", file.getvalue()
    for content in (b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80", b"\x80\x02.", b"<html>", bytes(10**6)):
        yield "odd archives", content
