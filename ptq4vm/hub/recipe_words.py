"""A config in words, for people who do not know its fields."""

from ptq4vm.config import QuantConfig
from ptq4vm.recipes import RECIPES


def recipe_name(config: QuantConfig) -> str | None:
    """Returns the recipe, with its bits, that has these settings, whatever its seed; None where no recipe has.

    Example:
        >>> recipe_name(QuantConfig.w4a4(best=True, seed=3)), recipe_name(QuantConfig(gptq=True))
        ('best4', None)
    """
    bits = config.weights.bits
    return next((f"{name}{bits}" for name in RECIPES if _same(name, bits, config)), None)


def _same(name: str, bits: int, config: QuantConfig) -> bool:
    try:
        return QuantConfig.recipe(name, bits, seed=config.seed) == config
    except ValueError:  # a recipe that has no such bits
        return False


def in_words(config: QuantConfig) -> dict[str, str]:
    """Returns what a config does by headings, without what it does not do.

    Example:
        >>> in_words(QuantConfig.minmax(8))["Activations"]
        '8 bits, per tensor, static ranges, affine'
    """
    weights, activations, learning = config.weights, config.activations, config.learning
    granularity = str(activations.granularity)
    ranges = [] if granularity.endswith("dynamic") else ["static ranges"]
    kind = "symmetric" if activations.symmetric else "affine"
    state, outputs = config.state, config.outputs
    said = {
        "Recipe": recipe_name(config),
        "Weights": f"{weights.bits} bits, {_spaced(weights.granularity)}",
        "Activations": ", ".join([f"{activations.bits} bits", _spaced(granularity), *ranges, kind]),
        "Smoothing": None if config.smoothing is None else f"α = {config.smoothing:g}",
        "Range search": _spaced(config.range_search),
        "Learning": learning and f"{learning.epochs} epochs, {_spaced(learning.loss)} loss",
        "Weight rounding": "GPTQ" if config.gptq else None,
        "Rotation": "before linears that write to the residual stream" if config.rotation else None,
        "Hidden state of the scans": state and f"{state.bits} bits",
        "Results of operators": outputs and f"{outputs.bits} bits",
        "Bias correction": "yes" if config.bias_correction else None,
        "Class token": "in floating point" if config.class_token_in_float else None,
        "Calibrated on mirror images too": "yes" if config.mirror else None,
        "Always 8 bits": ", ".join(f"`{pattern}`" for pattern in config.eight_bit),
        "Excluded": ", ".join(f"`{pattern}`" for pattern in config.exclude),
    }
    return {heading: text for heading, text in said.items() if text}


def _spaced(value: object) -> str:
    return str(value).replace("_", " ")
