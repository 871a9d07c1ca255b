"""Places in the user's code: the line, in neither torch nor this package, that a call stack passed through last."""

import linecache
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from torch import nn
from torch.fx import Node


@dataclass(frozen=True)
class Place:
    """A line of the user's code and the module of the model that ran it."""

    module: str
    """Its path and type, such as `layers.1.mixer (Mixer)`."""
    file: str = ""
    """Empty where the module is one of torch's own."""
    line: int = 0
    namespace: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The globals of that code."""

    @property
    def text(self) -> str:
        """The line as it is written."""
        return linecache.getline(self.file, self.line, self.namespace).strip()

    def __str__(self) -> str:
        return f"{self.module}, at {self.file}:{self.line} in `{self.text}`" if self.file else self.module


class UserCode:
    """Tells the user's code from that of libraries, for one model.

    Installed packages are libraries, except those that the model's own modules come from.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        classes = {kind for module in model.modules() for kind in type(module).__mro__}
        self._packages = {_package(kind.__module__) for kind in classes} - {"torch", "ptq4vm", "builtins"}

    def owns(self, frame: FrameType) -> bool:
        """Returns whether a frame runs code that the user can change."""
        name, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
        package = _package(name)
        if name.startswith("ptq4vm.models.") or package in self._packages:
            return True
        if package in ("torch", "ptq4vm") or package in sys.stdlib_module_names - {"__main__"}:
            return False
        return not file.startswith(_GENERATED) and not any(f"{os.sep}{part}{os.sep}" in file for part in _INSTALLED)

    def of_frame(self, frame: FrameType | None) -> Place:
        """Returns the innermost place of the stack that ends with a frame."""
        return self._place([(each, each.f_lineno) for each in _outwards(frame)])

    def of_error(self, error: BaseException) -> Place:
        """Returns the place where an exception, or the first one that it came from, was raised."""
        stacks = [_frames(each.__traceback__) for each in _chain(error)]
        own = (stack for stack in stacks if any(self.owns(frame) for frame, _ in stack))
        return self._place(next(own, stacks[0]))

    def _place(self, stack: Sequence[tuple[FrameType, int]]) -> Place:
        """Returns the place of a stack, innermost frame first."""
        index = next((i for i, (frame, _) in enumerate(stack) if self.owns(frame)), None)
        # torch.export shows a module that is shared through a proxy that has its attributes
        paths = {id(vars(module)): path for path, module in self._modules.items()}
        found = (paths.get(id(_first_argument(frame))) for frame, _ in stack[index or 0 :])
        path = next((path for path in found if path is not None), "")
        kind = type(self._modules[path]).__name__
        module = f"{path} ({kind})" if path else kind
        if index is None:
            return Place(module)
        frame, line = stack[index]
        return Place(module, frame.f_code.co_filename, line, frame.f_globals)


def recorded_line(node: Node) -> str:
    """Returns the place in the user's code that torch.export recorded of a node, to be put behind a sentence."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    found = re.search(r'File "(.+)", line (\d+)', lines[-2]) if len(lines) > 1 else None
    return f", at {found[1]}:{found[2]} in `{lines[-1].strip()}`" if found else ""


def _first_argument(frame: FrameType) -> Any:
    """Returns the attributes of a function's first argument, which is the module in a method of one."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return getattr(frame.f_locals.get(names[0]), "__dict__", None) if names else None


_GENERATED = ("<eval_with_key", "<string>", "<frozen")
_INSTALLED = ("site-packages", "dist-packages")


def _package(name: str) -> str:
    return name.partition(".")[0]


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _frames(traceback: TracebackType | None) -> list[tuple[FrameType, int]]:
    found = []
    while traceback is not None:
        found.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return found[::-1]


def _chain(error: BaseException) -> list[BaseException]:
    """Returns an exception after those that it came from, the first one first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found[::-1]
