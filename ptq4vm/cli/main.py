"""Reads the command line, runs one command, and prints what it found or why it failed."""

import contextlib
import sys
from collections.abc import Sequence

from ptq4vm import __version__
from ptq4vm.cli import benchmark, doctor, evaluate, export, inspect, push, quantize
from ptq4vm.cli.arguments import Help, Parser, word
from ptq4vm.cli.failures import INTERRUPTED, TERMINATED, Terminated, interrupted_text, message_of, terminable
from ptq4vm.cli.imports import imported
from ptq4vm.cli.render import complain, prepare_streams, show

COMMANDS = (quantize, evaluate, benchmark, inspect, export, push, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; wrong usage exits with 2 as argparse does.

    Only the result goes to standard output; whatever is printed on the way goes to standard error.
    """
    prepare_streams()
    args = _parser().parse_args(argv)
    try:
        with terminable(), contextlib.redirect_stdout(sys.stderr), imported(args.imports):
            outcome = args.run(args)
    except KeyboardInterrupt as stop:
        complain(interrupted_text(args))
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except Exception as error:
        message = message_of(error, args)
        if message is None:
            raise
        complain(f"error: {message}")
        return 1
    return show(outcome, args.json)


def _parser() -> Parser:
    parser = Parser(prog="ptq4vm", description="Post-training quantization of Visual Mamba.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ptq4vm {__version__}")
    first = (
        "run this Python first, which registers models with timm; mamba_ssm and kin that are absent are stood in for"
    )
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="FILE|MODULE", help=first)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        name, text = command.__name__.rpartition(".")[2], command.__doc__
        made = commands.add_parser(name, help=text, description=text, formatter_class=Help, allow_abbrev=False)
        made.register("type", None, word)
        made.set_defaults(run=command.run)
        made.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_arguments(made)
    return parser
