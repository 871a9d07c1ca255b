"""Installed extensions seen as ours while a model is captured: their functions by name, and what takes their place."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from ptq4vm.authors.catalogue import STAND_INS


def replacements() -> dict[Any, Any]:
    """Returns our function for every function of the table that a real, imported package has.

    Classes are not in it: their code calls the functions.
    """
    found = {}
    for module, names in STAND_INS.items():
        real = vars(sys.modules[module]) if module in sys.modules else {}
        for name, ours in names.items():
            theirs = real.get(name)
            if callable(theirs) and not isinstance(theirs, type) and not isinstance(ours, type) and theirs is not ours:
                found[theirs] = ours
    return found


@contextlib.contextmanager
def extensions_replaced() -> Iterator[None]:
    """Puts our functions in the place of installed extensions' wherever an imported module holds one by name.

    torch.export cannot look into a compiled function, and a scan that is one of ours is quantized and fused.
    """
    ours = replacements()
    places = []
    for module in list(sys.modules.values()) if ours else ():
        for name, value in list(getattr(module, "__dict__", {}).items()):
            with contextlib.suppress(TypeError):  # not hashable
                if value in ours:
                    places.append((vars(module), name, value))
    try:
        for namespace, name, value in places:
            namespace[name] = ours[value]
        yield
    finally:
        for namespace, name, value in places:
            namespace[name] = value
