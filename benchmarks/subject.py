"""A trained model with its images, and the cost of quantizing it: what the demo and the benchmarks share."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import Subset

import ptq4vm
from ptq4vm.config import QuantConfig
from ptq4vm.data import calibration_batches, loader, open_dataset, transform_for
from ptq4vm.evaluate import Evaluation, evaluate, predictions
from ptq4vm.graph.capture import capture
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.prepare.pipeline import prepare_captured

CALIBRATION_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The outcome of quantizing with one config."""

    quantized: GraphModule
    evaluation: Evaluation
    """On the test images, beside the predictions in floating point."""
    blocks: Sequence[dict[str, Any]]
    """Losses by block, of the record."""
    seconds: float
    """The time of calibration."""


class Subject:
    """A trained model, the images of its dataset, and its logits for the test images."""

    def __init__(
        self, model: nn.Module, data_dir: str, *, test_images: int | None = None, batch_size: int = 250
    ) -> None:
        self.model = model
        transform = transform_for(model)
        self.train = open_dataset(data_dir, "train", transform)
        classes: Any = model.num_classes
        test: Any = open_dataset(data_dir, "test", transform, num_classes=classes)
        if test_images is not None and test_images < len(test):
            # from all over the split, whose folders are sorted by class
            test = Subset(test, [i * len(test) // test_images for i in range(test_images)])
        self.test = list(loader(test, batch_size))
        self.example = (self.test[0][0][:2],)
        self.graph = capture(model, self.example)
        self.logits = predictions(model, self.test)
        targets = torch.cat([targets for _, targets in self.test])
        self.top1 = 100 * (self.logits.argmax(1) == targets).double().mean().item()

    def evaluate(self, module: nn.Module) -> Evaluation:
        """Compares with the model's own predictions on the test images."""
        return evaluate(module, self.test, reference_predictions=self.logits, progress=False, check_finite=True)

    def prepared(self, config: QuantConfig) -> GraphModule:
        """Prepares as `ptq4vm.prepare` does, from a graph that is captured once."""
        return prepare_captured(copy.deepcopy(self.graph), self.model, self.example, config)

    def calibration(self, images: int, seed: int) -> list[Tensor]:
        return calibration_batches(self.train, images, CALIBRATION_BATCH, seed)

    def quantize(self, config: QuantConfig, images: int, *, fused: bool) -> Cost:
        """Calibrates on so many images, and evaluates the quantized model, fused or operator by operator."""
        batches, prepared = self.calibration(images, config.seed), self.prepared(config)
        started = time.perf_counter()
        ptq4vm.calibrate(prepared, batches, progress=False)
        seconds = time.perf_counter() - started
        blocks = metadata_of(prepared).blocks
        quantized = ptq4vm.convert(prepared)
        found = self.evaluate(ptq4vm.fuse(quantized) if fused else quantized)
        return Cost(quantized=quantized, evaluation=found, blocks=blocks, seconds=seconds)
