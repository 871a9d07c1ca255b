"""Files of weights that are damaged, or made to harm who reads them.

python -m pytest -m slow -s tests/hostile/test_checkpoints.py
"""

import functools
import io
import itertools
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hostile_outcomes import Case, of_command, report, run_all
from helpers.public_models import create
from safetensors.torch import save
from torch import Tensor

from ptq4vm.models.checkpoints import load_checkpoint
from ptq4vm.models.identify import identify

MODEL = "vim_nano_patch4_32"
SEEDS = int(os.environ.get("PTQ4VM_HOSTILE_SEEDS", "100"))
"""Of each kind of mutation and file."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.clone() for name, value in create(MODEL).state_dict().items()}


def files() -> dict[str, bytes]:
    state = weights()
    nested = {"state_dict": OrderedDict((f"model.{name}", value) for name, value in state.items()), "epoch": 3}
    return {
        "zip.pth": saved(state),
        "legacy.pth": saved(state, _use_new_zipfile_serialization=False),
        "nested.ckpt": saved(nested),
        "weights.safetensors": save(state, {"format": "pt"}),
    }


def place(random: random.Random, size: int) -> int:
    """Half of the places are near an end, where headers and directories are."""
    near = min(4096, size)
    return random.choice([random.randrange(size), random.randrange(near), size - 1 - random.randrange(near)])


def flip(data: bytearray, random: random.Random) -> bytes:
    for _ in range(random.randint(1, 8)):
        data[place(random, len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def cut(data: bytearray, random: random.Random) -> bytes:
    return bytes(data[: place(random, len(data))])


def splice(data: bytearray, random: random.Random) -> bytes:
    """A part is gone, there twice, of zeros, or of noise."""
    start = place(random, len(data))
    part = data[start : start + random.choice([1, 8, 100, 5000])]
    new = random.choice([b"", part + part, bytes(len(part)), random.randbytes(len(part)), b"\xff" * len(part)])
    return bytes(data[:start] + new + data[start + len(part) :])


def number(data: bytearray, random: random.Random) -> bytes:
    """A small number becomes a large one, as sizes and lengths in headers are."""
    start = min(place(random, len(data)), len(data) - 8)
    value = random.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
    data[start : start + 8] = struct.pack("<Q", value)
    return bytes(data)


MUTATIONS: dict[str, Callable[[bytearray, random.Random], bytes]] = {
    "bits flipped": flip,
    "truncated": cut,
    "parts moved": splice,
    "lying numbers": number,
}

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
    """Headers of safetensors that lie."""
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
    """Calls what it is told when it is read."""

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
    """What a pickle may hold."""
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
    """Archives that are no output of torch.save."""
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


FIRST: dict[str, Tensor] = {}
Make = Callable[[], bytes]
"""Called in the child, so that not all files are held at once."""


def load_case(make: Make, path: Path) -> Case:
    """Whether a model is filled wholly, or not at all and with an error that names the file."""

    def case() -> str:
        path.write_bytes(make())
        model = create(MODEL)
        model.load_state_dict(FIRST)
        try:
            load_checkpoint(model, path)
        except (ValueError, OSError) as error:
            changed = [name for name, value in model.state_dict().items() if not torch.equal(value, FIRST[name])]
            if changed:
                return f"silent difference: {len(changed)} tensors changed before {error}"
            text = str(error)
            strange = any(not char.isprintable() and char != "\n" for char in text)
            named = text.startswith(str(path)) and text.count("\n") <= 6
            return f"{'clear' if named and not strange else 'unclear'} error: {ascii(text)[:300]}"
        except BaseException as error:
            return f"unclear error: {type(error).__name__}: {error}"
        finite = all(value.isfinite().all() for value in model.state_dict().values())
        return "used as it is" if finite else "silent difference: values that are not finite"

    return case


def inspect_case(make: Make, path: Path) -> Case:
    def case() -> str:
        data = make()
        path.write_bytes(data)
        return of_command(["inspect", path, *(["--json"] if len(data) % 2 else [])], path.name)

    return case


def mutated(data: bytes, kind: str, seed: str) -> bytes:
    return MUTATIONS[kind](bytearray(data), random.Random(seed))


def cases(folder: Path) -> Iterator[tuple[str, Case]]:
    """Every third mutation, and everything that was made by hand, also goes through `ptq4vm inspect`."""
    for name, data in files().items():
        for kind, seed in itertools.product(MUTATIONS, range(SEEDS)):
            make = functools.partial(mutated, data, kind, f"{name} {kind} {seed}")
            yield kind, load_case(make, folder / name)
            if seed % 3 == 0:
                yield f"inspect, {kind}", inspect_case(make, folder / name)
    for (kind, content), new in itertools.product(contents(), (False, True)):
        make = functools.partial(saved, content, _use_new_zipfile_serialization=new)
        yield kind, load_case(make, folder / "made.pth")
        yield f"inspect, {kind}", inspect_case(make, folder / "made.pth")
    made = [*((kind, data, "made.pth") for kind, data in archives())]
    made += [(kind, data, "made.safetensors") for kind, data in headers()]
    for kind, data, name in made:
        yield kind, load_case(lambda data=data: data, folder / name)
        yield f"inspect, {kind}", inspect_case(lambda data=data: data, folder / name)


def test_a_hostile_file_is_used_whole_or_refused_by_name(tmp_path):
    torch.manual_seed(1)
    FIRST.update({name: torch.randn_like(value) for name, value in weights().items()})
    identify(weights())  # what it builds is kept for all children
    found = run_all(list(cases(tmp_path)), tmp_path)
    assert len(found) > 12 * SEEDS
    report("weight files", found)
