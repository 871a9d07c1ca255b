"""Upload a quantized model to the Hugging Face Hub, with a model card of what is known."""

import argparse
import json
from pathlib import Path
from typing import Any

from ptq4vm.cli import sources
from ptq4vm.cli.render import Outcome, say, stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="FOLDER", help="a quantized model")
    add("repo", metavar="ORG/NAME", help="repository, which is made if there is none")
    add("--metrics", metavar="FILE.json", help="its figures, as 'ptq4vm evaluate --json' prints them")
    add("--base-model", metavar="NAME", help="the model before quantization, ORG/NAME if it is on the Hub")
    add("--dataset", metavar="NAME", help="what it was calibrated with, and measured on if the file does not say")
    add("--licence", metavar="ID", help="such as apache-2.0")
    add("--private", action="store_true", default=None, help="make the repository private if it is new")
    add("--revision", metavar="BRANCH", help="else the main one")
    add("--message", metavar="TEXT", help="first line of the commit")


def run(args: argparse.Namespace) -> Outcome:
    import ptq4vm
    from ptq4vm.hub.names import HubName, parse_name

    repo = parse_name(args.repo).repo
    sources.check_model_folder(args.model)
    metrics = None if args.metrics is None else _metrics(args.metrics)
    if (Path(args.model) / "README.md").exists():
        say(f"{args.model}/README.md is not uploaded: the card is made of what is known of the model …")
    with stage("load"):
        quantized = ptq4vm.load(args.model)
    with stage("push"):
        url = ptq4vm.push_to_hub(
            quantized,
            args.repo,
            metrics=metrics,
            base_model=args.base_model,
            dataset=args.dataset,
            licence=args.licence,
            private=args.private,
            revision=args.revision,
            commit_message=args.message,
        )
    name = HubName(repo, args.revision)
    return Outcome({"url": url, "model": str(name)}, [f"pushed to {url}", f'ptq4vm.load("{name}") loads it'])


def _metrics(file: str) -> dict[str, Any]:
    """Returns the figures of a file; raises ValueError that names it."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--metrics {file}: {error}; 'ptq4vm evaluate --json' prints such a file") from error
    if not isinstance(found, dict):
        raise ValueError(f"--metrics {file}: it holds a JSON {type(found).__name__}, and figures are an object")
    return found
