"""Model cards: README.md of a repository, made of what is known of a quantized model; the unknown is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vm import ops
from ptq4vm.formatting import coverage_line, mebibytes, model_bytes
from ptq4vm.hub.metrics import RELATIVE, Figure, Metrics
from ptq4vm.hub.names import PREFIX, HubName, is_repo
from ptq4vm.hub.recipe_words import in_words, recipe_name
from ptq4vm.metadata import QuantizationMetadata, metadata_of
from ptq4vm.serialization.recorded_values import example_inputs
from ptq4vm.serialization.version_1 import build_model

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_SCANS = (ops.selective_scan.default, ops.selective_scan_quantized.default)
_COMMANDS = (
    ("ptq4vm inspect {}", "what is quantized, and how"),
    ("ptq4vm benchmark {} --kind fused", "the time on this machine"),
    ("ptq4vm export {} model.onnx", "to serve it without PyTorch, in ONNX Runtime or OpenVINO"),
    ("ptq4vm export {} model.pt2", "to run it in PyTorch, from C++ too, without Python code of ptq4vm"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """All that a card says of a model; None for what is unknown."""

    name: HubName
    quantized: GraphModule
    file_bytes: int
    metrics: Metrics = field(default=Metrics())
    base_model: str | None = None
    dataset: str | None = None
    licence: str | None = None

    def text(self) -> str:
        """Returns the card: metadata in YAML, which huggingface_hub has checked, and Markdown."""
        from huggingface_hub import ModelCard, ModelCardData

        results = self._results()
        base = self.base_model if self.base_model and is_repo(self.base_model) else None
        data = ModelCardData(
            library_name="ptq4vm",
            license=self.licence and self.licence.lower(),
            base_model=base,
            base_model_relation="quantized" if base else None,
            datasets=[self.dataset] if self.dataset and _is_dataset(self.dataset) else None,
            pipeline_tag="image-classification" if self._classifies else None,
            tags=self._tags(),
            model_name=self.name.repo.partition("/")[2] if results else None,
            eval_results=results or None,
        )
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(self._lines()), ignore_metadata_errors=False
        ).content

    @property
    def _metadata(self) -> QuantizationMetadata:
        return metadata_of(self.quantized)

    @property
    def _bits(self) -> str:
        config = self._metadata.config
        return f"W{config.weights.bits}A{config.activations.bits}"

    @property
    def _classifies(self) -> bool:
        architecture = self._metadata.architecture or {}
        return bool(architecture.get("arguments", {}).get("num_classes")) or self.metrics.task == "image-classification"

    def _tags(self) -> list[str]:
        scans = any(node.target in _SCANS for node in self.quantized.graph.nodes)
        return ["ptq4vm", "quantized", "post-training-quantization", self._bits.lower(), *(["mamba"] if scans else [])]

    def _results(self) -> list[EvalResult]:
        """Returns the figures for the card's `model-index`, which has none without a task and a dataset."""
        from huggingface_hub import EvalResult

        task, dataset = self.metrics.task, self.metrics.dataset
        if task is None or dataset is None:
            return []
        return [
            EvalResult(
                task_type=task,
                dataset_type=dataset if _is_dataset(dataset) else _slug(dataset),
                dataset_name=dataset,
                dataset_split=self.metrics.split,
                metric_type="accuracy" if figure.key == "top1" else figure.key,
                metric_name=figure.name,
                metric_value=figure.quantized,
            )
            for figure in self.metrics.figures
            if figure.quantized is not None and figure.key not in RELATIVE
        ]

    def _lines(self) -> Iterator[str]:
        title, recipe = self.name.repo.partition("/")[2], recipe_name(self._metadata.config)
        architecture = (self._metadata.architecture or {}).get("name")
        of = f"`{architecture}`" if architecture else "a model"
        yield f"# {title}\n"
        yield f"{of[0].upper() + of[1:]} with {self._bits} integer linears, quantized by ptq4vm" + (
            f" with its recipe `{recipe}`." if recipe else "."
        )
        yield "\n## How to use it\n"
        yield "With ptq4vm installed:\n\n```python"
        yield from self._usage()
        yield "```\n"
        yield (
            "Two files are downloaded, `config.json` and `model.safetensors`, and neither holds code. After "
            f'`import ptq4vm.models`, `timm.create_model("{self.name}")` returns the same model.'
        )
        yield "\n```sh"
        yield from (f"{command.format(self.name):{30 + len(str(self.name))}}  # {what}" for command, what in _COMMANDS)
        yield "```\n\n## What was done\n"
        yield from _table(("", ""), list(self._facts().items()))
        yield from self._accuracy()

    def _usage(self) -> Iterator[str]:
        preprocessing = (self._metadata.architecture or {}).get("preprocessing", {})
        load = f'model = ptq4vm.load("{self.name}")'
        if not preprocessing:
            inputs = ", ".join(map(_zeros, example_inputs(self.quantized, 1)))
            yield f"import ptq4vm, torch\n\n{load}\noutputs = model({inputs})"
            return
        known = {key: value for key, value in preprocessing.items() if key.isidentifier()}  # they become code
        arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        yield "import ptq4vm\nfrom PIL import Image\nfrom timm.data import create_transform\n"
        yield (
            f"{load}\ntransform = create_transform(\n    "
            + ",\n    ".join(f"{k}={v!r}" for k, v in arguments.items())
            + ",\n)"
        )
        yield 'images = transform(Image.open("picture.jpg").convert("RGB")).unsqueeze(0)\noutputs = model(images)'
        if self._classifies:
            yield "classes = outputs.argmax(dim=1)"

    def _facts(self) -> dict[str, str]:
        metadata = self._metadata
        architecture = (metadata.architecture or {}).get("name")
        covered = coverage_line(metadata.coverage).removeprefix("quantizes ") if metadata.coverage.products else None
        float_bytes = _float_bytes(metadata.architecture)
        size = mebibytes(self.file_bytes) + (f", in FP32 {mebibytes(float_bytes)}" if float_bytes else "")
        base = self.base_model and (_link(self.base_model) if is_repo(self.base_model) else self.base_model)
        facts = {
            "Base model": base,
            "Architecture": architecture and f"`{architecture}`, as timm names it",
            "Inputs": ", ".join("×".join(map(str, ("batch", *shape))) for shape in metadata.input_shapes),
            **in_words(metadata.config),
            "Quantized": covered or f"{len(metadata.linears)} linears",
            "Calibrated with images of": self.dataset,
            "Size": size,
            "Licence": self.licence,
        }
        return {heading: text for heading, text in facts.items() if text}

    def _accuracy(self) -> Iterator[str]:
        metrics = self.metrics
        if not metrics.figures:
            return
        on = [
            metrics.dataset or "",
            metrics.split and f"{metrics.split} split",
            metrics.images and f"{metrics.images:,} images",
        ]
        said = ", ".join(part for part in on if part)
        yield "\n## Accuracy\n"
        yield f"Measured on {said}.\n" if said else ""
        yield from _table(("", "quantized", "floating point"), [_row(figure) for figure in metrics.figures])


def _is_dataset(name: str) -> bool:
    """Whether a name may be the id of a dataset of the Hub."""
    return re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", name, re.ASCII) is not None


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") or "unknown"


def _row(figure: Figure) -> tuple[str, ...]:
    return (figure.name, *("" if value is None else f"{value:.6g}" for value in (figure.quantized, figure.floating)))


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (heading, ["---"] * len(heading), *rows):
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"


def _link(repo: str) -> str:
    from huggingface_hub import constants

    return f"[{repo}]({constants.ENDPOINT}/{repo})"


def _zeros(value: Any) -> str:
    return f"torch.zeros({tuple(value.shape)}, dtype={value.dtype})" if isinstance(value, Tensor) else repr(value)


def _float_bytes(architecture: Mapping[str, Any] | None) -> int | None:
    """Returns the size of the model before quantization where timm can build it, which takes no memory here."""
    try:
        with torch.device("meta"):
            return model_bytes(build_model(dict(architecture) if architecture else None, PREFIX))
    except ValueError:
        return None
