"""The parser, the types of arguments, and the arguments that several commands take."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from ptq4vm.cli.sources import RANDOM
from ptq4vm.terminal_text import escaped

MODEL = "folder or hf-hub:ORG/NAME of a quantized model, or a timm name"
DATA = "digits (part of scikit-learn), or a folder DIR/<split>/<class>/*"
LARGEST = 2**31 - 1
"""The largest count on the command line."""


class Parser(argparse.ArgumentParser):
    """Repeats no words that a terminal would act on."""

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, and keeps the lines of texts that have several."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or isinstance(action.default, list)
        return action.help if silent else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def between(low: int, high: int) -> Callable[[str], int]:
    """Returns the type of whole numbers from `low` to `high`."""

    def count(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be at least {low} and at most {high}, got {value}")
        return value

    return count


count = between(1, LARGEST)


def word(text: str) -> str:
    """The type of all arguments that are no numbers."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("must not be empty, nor hold a null character")
    return text


def add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="test", help="train, or one of test, val, validation")


def add_weights(parser: argparse.ArgumentParser, whose: str = "") -> None:
    weights = f"file of weights, or '{RANDOM}'; else the weights timm knows of"
    parser.add_argument("--checkpoint", metavar="FILE", help=whose + weights)
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of the file")
