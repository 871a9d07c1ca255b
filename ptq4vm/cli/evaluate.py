"""Accuracy on a split, and agreement with another model."""

import argparse

from ptq4vm.cli import sources
from ptq4vm.cli.arguments import DATA, MODEL, add_split, add_weights, count
from ptq4vm.cli.render import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add("--data-dir", required=True, metavar="DIR", help=DATA)
    add_weights(parser, "for models given by name: ")
    add_split(parser)
    add("--batch-size", type=count, default=64, metavar="N", help="images at once")
    add("--limit", type=count, metavar="N", help="take only N images, spread over the split")
    add("--against", metavar="MODEL", help="count the images on which both models say the same")


def run(args: argparse.Namespace) -> Outcome:
    from ptq4vm import evaluate as evaluation
    from ptq4vm.formatting import table

    names = [args.model] if args.against is None else [args.model, args.against]
    if args.checkpoint is not None and all(map(sources.is_model_folder, names)):
        raise ValueError(f"--checkpoint is for a model given by name; {' and '.join(names)} has its own weights")
    sources.check_ema(args)
    models = [sources.open_model(name, args.checkpoint, args.ema) for name in names]
    loaders = [sources.loader_for(model, args) for model in models]
    reference = None if args.against is None else evaluation.predictions(models[1], loaders[1])
    found = evaluation.evaluate(models[0], loaders[0], reference_predictions=reference)
    result = {"model": args.model, "against": args.against, "split": args.split, **found.to_dict()}
    columns = {"model": "model", "images": "images", "top1": "top-1 %", "top5": "top-5 %"}
    if args.against is not None:
        columns |= {"agreement": f"% as {args.against}", "divergence": "KL"}
        columns |= {"reference_top1": f"top-1 % of {args.against}"}
    lines = [table([result], columns | {"loss": "loss", "nonfinite": "not finite", "seconds": "seconds"})]
    if found.nonfinite:
        lines += [
            f"{found.nonfinite} of {found.images} images hold NaN or infinity in their pixels or logits: they count as "
            "wrong, and loss and KL are left out; do the weights fit the model?"
        ]
    return Outcome(result, lines)
