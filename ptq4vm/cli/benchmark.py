"""Time a quantized model against other ways to run the same network, on random images."""

import argparse
from typing import Any

from ptq4vm.cli import sources
from ptq4vm.cli.arguments import MODEL, between, count
from ptq4vm.cli.destinations import check_file
from ptq4vm.cli.render import Outcome

KINDS = (
    "quantized, fused, compiled, compiled-half, eager-fp32; in a checkout eager-loop, compiled-fp32, compiled-bf16, "
    "torchao-int8, onnxruntime-fp32, onnxruntime-int8, onnxruntime-custom, openvino-fp32, openvino-int8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, threads = parser.add_argument, between(1, 1024)
    add("model", metavar="MODEL", help=f"{MODEL}, whose model is quantized to W8A8 on noise")
    add("--kind", default="quantized", help=f"how MODEL runs: {KINDS}")
    add("--against", nargs="+", default=[], metavar="KIND", help="compare with these, or saved folders")
    add("--batch-size", type=count, nargs="+", default=[8], metavar="N", help="images at once; else 8")
    add("--threads", type=threads, nargs="+", default=[1], metavar="N", help="CPU threads; else 1")
    add("--repeats", type=count, default=20, metavar="N", help="rounds to time, after 3 to warm up")
    add("--layers", action="store_true", help="time each operator, in FP32 and quantized")
    add("--memory", action="store_true", help="measure what a forward adds to a fresh process")
    add("--csv", metavar="FILE", help="write the timings here, under the names of timm's columns")
    add("--picture", metavar="FILE", help="draw here where the time goes (.png, .svg or .pdf)")


def run(args: argparse.Namespace) -> Outcome:
    from ptq4vm.benchmark.kinds import from_checkout
    from ptq4vm.benchmark.run import Plan, run
    from ptq4vm.formatting import write_csv
    from ptq4vm.metadata import metadata_of

    if args.picture is not None:
        from_checkout("picture", "--picture").check_picture(args.picture)
    for file in (args.csv, args.picture):
        if file is not None:
            check_file(file)
    kinds = (args.kind, *args.against)
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise ValueError(f"{twice[0]} is given twice; a kind is compared with other ones")
    others: dict[str, Any] = {
        name: sources.open_model(name, None) for name in args.against if sources.is_model_folder(name)
    }
    sections = {"layers": args.layers or args.picture is not None, "memory": args.memory}
    plan = Plan(
        kinds=kinds,
        others=others,
        batch_sizes=tuple(args.batch_size),
        threads=tuple(args.threads),
        repeats=args.repeats,
        sections=tuple(name for name, asked in sections.items() if asked),
    )
    model, quantized = sources.open_both(args.model)
    shapes = {name: metadata_of(graph).input_shapes[0] for name, graph in {args.model: quantized, **others}.items()}
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())
        raise ValueError(f"models are compared on the same images, but these take different ones: {sizes}")
    findings = run(args.model, shapes[args.model], model, quantized, plan)
    if args.csv is not None:
        write_csv(args.csv, findings.rows())
    if args.picture is not None:
        layers: Any = findings.sections["layers"]
        layers.draw(args.picture, args.model)
    return Outcome(findings.to_dict(), findings.lines())
