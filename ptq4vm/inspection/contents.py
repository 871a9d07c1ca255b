"""Describes the graph of a saved model, or a file of weights: for programs, and as lines of text."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ptq4vm.formatting import mebibytes, table
from ptq4vm.models.checkpoints import bad_values, open_checkpoint
from ptq4vm.models.identify import Match, identify, registered
from ptq4vm.passes.lower.fuse import fusions
from ptq4vm.passes.lower.pipeline import converted_graph, fusing_pipeline
from ptq4vm.terminal_text import escaped, listing


def graph_report(quantized: GraphModule) -> tuple[dict[str, Any], list[str]]:
    """Fuses a lowered graph; returns the places that were fused, and those that were left and why."""
    found = fusions(converted_graph(quantized, fusing_pipeline()))
    done = [fusion for fusion in found if fusion.skip_reason is None]
    left = [fusion for fusion in found if fusion.skip_reason is not None]
    lines = [table([{"module": fusion.place, "fused": fusion.pattern} for fusion in done])] if done else []
    if left:
        rows = [{"module": fusion.place, "left": fusion.pattern, "why": fusion.skip_reason} for fusion in left]
        lines += ["", table(rows)]
    lines += ["", f"{len(done)} places fused, {len(left)} left"]
    return {"fused": [asdict(fusion) for fusion in done], "left": [asdict(fusion) for fusion in left]}, lines


def weights_report(path: Path, ema: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the contents of a file of weights, and the registered models it is for; `ema` takes averaged weights."""
    file = open_checkpoint(path, ema=ema)
    if any(name.endswith(".weight_q") for name in file.weights):
        raise ValueError(f"{path} holds the weights of a quantized model: inspect its folder, {path.parent}")
    tensors, bad = file.weights.values(), bad_values(file.weights)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    matches = best_matches(identify(file.weights))
    result: dict[str, Any] = {
        "file": str(path),
        "container": file.container,
        "averaged": list(file.averaged),
        "prefix": file.prefix,
        "left_out": len(file.left_out),
        "tensors": len(tensors),
        "values": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(dtypes),
        "nonfinite": bad,
        "matches": [
            asdict(match) | {"fits": match.fits, "notes": list(match.notes), "next": _next(match, path, ema)}
            for match in matches
        ],
    }
    lines = [
        f"{escaped(str(path))}: weights "
        + (f"under {escaped(file.container)}" if file.container else "without a container")
    ]
    if file.averaged and file.container not in file.averaged:
        lines += [f"averaged weights too, under {', '.join(file.averaged)}: read them with --ema"]
    lines += file.notes
    counted = dtypes if len(dtypes) == 1 else [f"{dtype} ({count})" for dtype, count in dtypes.items()]
    size = f"{result['values']:,} values, {mebibytes(result['bytes'])}"
    lines += [f"{len(tensors)} tensors, {size}, {', '.join(counted)}"]
    if bad:
        lines += [f"{len(bad)} tensors hold NaN or infinity, and no model is filled with them: {listing(bad)}"]
    for match in matches:
        lines += ["", f"{match} (family {match.family}): {_verdict(match)}"]
        lines += [f"  {line}" for line in (*match.lines(), *match.notes)]
        lines += [f"  {line}" for line in (_next(match, path, ema) or "").splitlines()]
    if not matches:
        lines += ["", f"of none of the families known here ({', '.join(dict.fromkeys(registered().values()))})"]
    if sum(match.fits for match in matches) > 1:
        lines += [
            "",
            "Tensors cannot tell these models apart (directions of scans are no tensors): accuracy on images",
            "decides; run ptq4vm evaluate with each name and this file.",
        ]
    return result, lines


def _verdict(match: Match) -> str:
    if match.fits:
        return "every tensor fits"
    share = int(100 * match.agreement)  # below 100 %, which means that every tensor fits
    return "fits but for its ends" if match.only_ends else f"the closest, {share} % of the tensors agree"


def best_matches(matches: Sequence[Match]) -> list[Match]:
    """Selects the matches that fit, and the backbones that take most of the file; if none fits, the closest."""
    names = {match.name for match in matches if match.fits}
    return [
        match
        for match in matches
        if match.fits
        or (match.only_ends and match.name in names)
        or (not names and match.agreement == matches[0].agreement)
    ]


def _next(match: Match, path: Path, ema: bool) -> str | None:
    """Returns the command that uses the file for the model, or Python code where no command can."""
    if from_command_line(match):
        option = " --ema" if ema else ""
        return f"ptq4vm quantize {match.name} --checkpoint {shlex.quote(str(path))}{option} --data-dir DIR --output DIR"
    if not (match.fits or match.only_ends):
        return None
    options = "".join(f", {key}={value}" for key, value in match.options.items())
    how = (", ema=True" if ema else "") + ("" if match.fits else ", strict=False")
    return f'model = timm.create_model("{match.name}"{options})\nload_checkpoint(model, {str(path)!r}{how})'


def from_command_line(match: Match) -> bool:
    """Whether the commands, which classify images of three channels, can use the file for this model."""
    return match.fits and not match.features_only and "in_chans" not in match.arguments
