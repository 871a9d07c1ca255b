"""Commands that the tests of the command line run."""

MODEL = "vim_nano_patch4_32"
WEIGHTS = ("--checkpoint", "random")
CONFIG = {"weights": {"bits": 4}, "range_search": False}


def calibration(output, data="digits", config="w8a8", *more) -> list[str]:
    command = ["quantize", MODEL, "--data-dir", str(data), "--output", str(output), *WEIGHTS]
    return [*command, "--config", str(config), "--images", "4", "--batch-size", "2", *more]
