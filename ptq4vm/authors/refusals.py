"""What is not covered: names that can be imported, and say so when they are called."""

from typing import Any, NoReturn


def refused(name: str, reason: str) -> type:
    """Returns a class that stands for a function or a class, and raises NotImplementedError when it is called."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"ptq4vm has no stand-in for {name}: {reason}")

    return type(name.rpartition(".")[2], (), {"__new__": refuse, "__doc__": f"Not covered: {reason}."})


def refuse_arguments(function: str, reason: str, **values: Any) -> None:
    """Raises NotImplementedError that names the first argument with a value; None and False are none."""
    for name, value in values.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"ptq4vm's stand-in for {function} does not take {name}: {reason}")


BACKWARD = "stand-ins compute the forward pass alone; train with the real extension"
STEPS = "it generates token by token, which no vision model does"
MAMBA2 = "only Mamba-1's selective scan is an operator of ptq4vm"
