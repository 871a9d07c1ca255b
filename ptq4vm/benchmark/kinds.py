"""Ways to run one network that `ptq4vm benchmark` compares; a checkout of the repository adds rivals.

A builder takes the network and a batch of images, and returns a callable for such batches, made for this batch size
and for torch's present number of threads. docs/benchmark.md describes each.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline

Call = Callable[[Tensor], Any]
Builder = Callable[["Network", Tensor], Call]

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Network:
    """One network in floating point and quantized, and a folder for files that builders make on the way."""

    model: nn.Module
    quantized: GraphModule
    folder: Path


def from_checkout(module: str, wanted: str) -> Any:
    """Imports `benchmarks.speed.<module>` of the checkout that this package runs from, and of no other folder.

    Raises ImportError, which names what is wanted, where the package was installed without its checkout.
    """
    if not (CHECKOUT / "benchmarks" / "speed" / f"{module}.py").is_file():
        raise ImportError(
            f"the installed package has no {wanted}; its repository has more: clone it and run 'pip install -e .' there"
        )
    if "benchmarks" not in sys.modules:
        spec = PathFinder.find_spec("benchmarks", [str(CHECKOUT)])
        assert spec is not None and spec.loader is not None
        sys.modules["benchmarks"] = package = module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"benchmarks.speed.{module}")


def builder(name: str) -> Builder:
    """Returns the builder of a kind; raises ValueError for an unknown one, ImportError where it is not installed."""
    if name in KINDS:
        return KINDS[name]
    return from_checkout("rivals", f"kind {name!r} (it has {', '.join(KINDS)})").builder(name)


def build(name: str, network: Network, images: Tensor) -> Call:
    """Builds a kind; raises as `builder` does."""
    make = builder(name)
    with _quiet(), torch.no_grad():
        return make(network, images)


def called(call: Call, images: Tensor) -> Call:
    """Calls it once, so that it compiles under the options of this moment."""
    with torch.inference_mode():
        call(images)
    return call


def _backend(network: Network, images: Tensor, **options: Any) -> Call:
    """Compiles the lowered graph by our backend of torch.compile, which fuses."""
    if "ptq4vm" not in torch._dynamo.list_backends(exclude_tags=()):
        raise ImportError("torch.compile knows no backend 'ptq4vm': install ptq4vm again (pip install .)")
    return called(torch.compile(network.quantized, backend="ptq4vm", dynamic=False, options=options), images)


KINDS: dict[str, Builder] = {
    "quantized": lambda network, images: network.quantized,
    "fused": lambda network, images: converted_graph(network.quantized, fusing_pipeline()),
    "compiled": _backend,
    "compiled-half": partial(_backend, activations=torch.bfloat16),
    "eager-fp32": lambda network, images: network.model,
}
"""The first two are called operator by operator; the last one has our scan and convolution."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences compilers, exporters and quantizers: only the table is read."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
