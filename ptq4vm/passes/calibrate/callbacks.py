"""The events of a calibration, which a progress bar or a user may follow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm


class CalibrationCallback:
    """Follows a calibration: a subclass overrides the events that it needs, and `calibrate` calls them in order.

    An exception that an event raises ends the calibration; with `resume_dir` the finished blocks are kept.

    Example:
        >>> import torch, ptq4vm
        >>> class Printed(ptq4vm.CalibrationCallback):
        ...     def on_block_end(self, block, report):
        ...         print(block, report["linears"])
        >>> model, images = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(2, 5, 8)
        >>> prepared = ptq4vm.prepare(model, (images,), ptq4vm.QuantConfig.minmax(8))
        >>> _ = ptq4vm.calibrate(prepared, [images], progress=False, callbacks=[Printed()])
        model ['0']
    """

    def on_start(self, blocks: Sequence[str], epochs: int) -> None:
        """Called once, with the names of the blocks to be calibrated and the epochs of learning of each, at least 1."""

    def on_fisher_batch(self, batch: int, batches: int) -> None:
        """Called after every batch, counted from 1, from which `Loss.FISHER` learns what matters."""

    def on_block_start(self, block: str) -> None:
        """Called before a block is calibrated, or read from `resume_dir`."""

    def on_epoch(self, block: str, epoch: int, loss: float) -> None:
        """Called after every epoch of learning, counted from 0, with its mean loss."""

    def on_block_end(self, block: str, report: Mapping[str, Any]) -> None:
        """Called after a block, with its report: `linears`, `cosine_loss`, and what learning did."""

    def on_end(self) -> None:
        """Called once, also where calibration ends early."""


class Callbacks(CalibrationCallback):
    """Several callbacks as one, called in order."""

    def __init__(self, callbacks: Sequence[CalibrationCallback]) -> None:
        for event in (name for name in vars(CalibrationCallback) if name.startswith("on_")):
            setattr(self, event, functools.partial(_call_each, [getattr(one, event) for one in callbacks]))


def _call_each(functions: Sequence[Callable[..., None]], *values: Any) -> None:
    for function in functions:
        function(*values)


class ProgressBar(CalibrationCallback):
    """Shows block, epoch and loss in a line on standard error."""

    bar: Any = None
    name = ""

    def on_start(self, blocks: Sequence[str], epochs: int) -> None:
        self.blocks, self.epochs, self.finished = len(blocks), epochs, 0

    def on_fisher_batch(self, batch: int, batches: int) -> None:
        self._show("fisher", batches, "batch")
        self.bar.update()

    def on_block_start(self, block: str) -> None:
        self._show("calibrate", self.epochs * self.blocks, "epoch")
        self.bar.set_postfix(block=block)

    def on_epoch(self, block: str, epoch: int, loss: float) -> None:
        self.bar.set_postfix(block=block, epoch=epoch + 1, loss=f"{loss:.3e}")
        self.bar.update()

    def on_block_end(self, block: str, report: Mapping[str, Any]) -> None:
        self.finished += 1
        self.bar.update(max(0, self.epochs * self.finished - self.bar.n))

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _show(self, name: str, total: int, unit: str) -> None:
        if name != self.name:
            self.on_end()
            self.name, self.bar = name, tqdm(total=total, desc=name, unit=unit)
