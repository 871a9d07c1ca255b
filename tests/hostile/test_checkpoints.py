"""Files of weights that are damaged, or made to harm who reads them.

python -m pytest -m slow -s tests/hostile/test_checkpoints.py
"""

import functools
import itertools
import os
import random
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.hostile_outcomes import Case, of_command, report, run_all
from helpers.hostile_weights import MODEL, archives, contents, headers, saved, weights
from helpers.public_models import create
from safetensors.torch import save
from torch import Tensor

from ptq4vm.models.checkpoints import load_checkpoint
from ptq4vm.models.identify import identify

SEEDS = int(os.environ.get("PTQ4VM_HOSTILE_SEEDS", "100"))
"""Number of mutations of each kind and file."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


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
    """Draws a place; half of them are near an end, where headers and directories are."""
    near = min(4096, size)
    return random.choice([random.randrange(size), random.randrange(near), size - 1 - random.randrange(near)])


def flip(data: bytearray, random: random.Random) -> bytes:
    for _ in range(random.randint(1, 8)):
        data[place(random, len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def cut(data: bytearray, random: random.Random) -> bytes:
    return bytes(data[: place(random, len(data))])


def splice(data: bytearray, random: random.Random) -> bytes:
    """Removes a part, doubles it, or fills it with zeros or noise."""
    start = place(random, len(data))
    part = data[start : start + random.choice([1, 8, 100, 5000])]
    new = random.choice([b"", part + part, bytes(len(part)), random.randbytes(len(part)), b"\xff" * len(part)])
    return bytes(data[:start] + new + data[start + len(part) :])


def number(data: bytearray, random: random.Random) -> bytes:
    """Writes a number over 8 bytes, as sizes and lengths in headers are."""
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

FIRST: dict[str, Tensor] = {}

Make = Callable[[], bytes]
"""Makes a file, in the child, so that not all files are held at once."""


def load_case(make: Make, path: Path) -> Case:
    """Checks that a model is filled wholly, or not at all and with an error that names the file."""

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
    """Yields all cases; every third mutation, and all files made by hand, also go through `ptq4vm inspect`."""
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
