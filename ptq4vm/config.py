"""The user's choices: frozen, validated, and unchanged by a round trip through JSON."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from ptq4vm import config_v1
from ptq4vm.config_fields import Checked, member, number, refuse
from ptq4vm.quantization_specs import (
    ActivationSpec,
    Granularity,
    IntegerRange,
    Learning,
    OutputQuantization,
    Patterns,
    RangeSearch,
    StateQuantization,
    WeightSpec,
)
from ptq4vm.recipes import RECIPES, merged, settings_at

FORMAT_VERSION = 2
"""The layout of what `to_dict` returns; version 1 had flat keys, see `ptq4vm.config_v1`."""

Fraction = Annotated[float, number(lambda value: 0 <= value <= 1, "None or in [0, 1];", int | float)]
Seed = Annotated[int, number(lambda value: 0 <= value < 2**63, "a non-negative integer of 63 bits;")]


def _range_search(name: str, value: Any) -> enum.StrEnum:
    if isinstance(value, bool):
        return RangeSearch.SQUARED_ERROR if value else RangeSearch.MINMAX
    return member(RangeSearch, name, value)


Search = Annotated[RangeSearch, _range_search]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig(Checked):
    """Settings of quantization: `prepare` reads the granularity and the bits, `calibrate` the rest.

    Enums may be given by their values, and sections (`weights`, `activations`, `learning`, …) as mappings.

    Args:
        weights: bits and granularity of the linears' weights.
        activations: bits, granularity and symmetry of the linears' inputs.
        power_of_two: round the ratios of k-scaled intervals to powers of two where the k-scaled paper does.
        smoothing: SmoothQuant's α: s = max|X|^α / max|W|^(1 - α) per channel, of root mean squares before a rotation;
            None for no smoothing.
        range_search: the search for ranges of activations and weights; True stands for `squared_error`, False for
            `minmax`.
        rotation: rotate the inputs of linears that write to the residual stream, after smoothing; see
            `ptq4vm.passes.prepare.rotate`.
        gptq: round weights for their inputs in the quantized model (GPTQ, Frantar et al. 2023). Learning follows and
            keeps the codes, since scales fit only the codes that they were learned with.
        learning: joint learning of the scales; None for none.
        mirror: calibrate on each image's mirror image too, for data in which left may be right; takes twice the time.
        seed: decides the order of the images in learning; the caller's loader decides which images there are.
        exclude: shell patterns of linears to keep in floating point, such as `layers.0.*` or `*.dt_proj*`.
        eight_bit: shell patterns of linears whose weights and inputs always have 8 bits.
        class_token_in_float: keep the class token's row of the linears' inputs in floating point (PTQ4VM table 1).
        pooled: quantize products of one value per image too, per tensor: squeeze-and-excitation, channel gates.
        outputs: quantize the results of operators too; None for linears alone.
        state: quantize the scans' hidden state; None keeps it in floating point.
        bias_correction: b - E[x_q (W_q - W)] for every bias b of a quantized weight (k-scaled paper).

    Raises:
        ValueError: for a value that a field does not take, with the field's name, and for fields that contradict each
            other.

    Example:
        >>> config = QuantConfig(weights=WeightSpec(bits=4), activations={"granularity": "per_tensor"}, smoothing=None)
        >>> config.weights.bits, config.activations.bits, str(config.activations.granularity)
        (4, 8, 'per_tensor')
    """

    weights: WeightSpec = field(default=WeightSpec())
    activations: ActivationSpec = field(default=ActivationSpec())
    power_of_two: bool = True
    smoothing: Fraction | None = 0.5
    range_search: Search = RangeSearch.SQUARED_ERROR
    rotation: bool = False
    gptq: bool = False
    learning: Learning | None = None
    mirror: bool = False
    seed: Seed = 0
    exclude: Patterns = ()
    eight_bit: Patterns = ()
    class_token_in_float: bool = False
    pooled: bool = False
    outputs: OutputQuantization | None = None
    state: StateQuantization | None = None
    bias_correction: bool = False

    def _check_together(self) -> None:
        kind, symmetric, search = self.activations.granularity, self.activations.symmetric, self.range_search
        dynamic, by_channel = kind is Granularity.PER_TOKEN_DYNAMIC, kind is Granularity.K_SCALED_CHANNEL
        searched, released = search is not RangeSearch.MINMAX, search is RangeSearch.RELEASED
        smooth, learned = self.smoothing is not None, self.learning is not None
        outputs, corrected = self.outputs is not None, self.bias_correction
        contradictions = {
            f"range_search needs static scales, but granularity is {kind}; turn one of them off": dynamic and searched,
            "dynamic scales are affine: leave symmetric out, or choose a static granularity": dynamic and symmetric,
            "the released code's range search is affine: leave symmetric out": symmetric and released,
            f"{kind} has no zero points: give activations.symmetric=True": kind.k_scaled and not symmetric,
            "scales of channels take the place of smoothing: give smoothing=None": by_channel and smooth,
            "rotation changes the channels of what outputs quantizes; turn one of them off": self.rotation and outputs,
            "with outputs nothing is learned: give learning=None": outputs and learned,
            "gptq chooses weights after biases are corrected; turn one of them off": self.gptq and corrected,
        }
        refuse(contradictions)

    def weight(self, linear: str) -> IntegerRange:
        """Returns the integers of the weight of the linear with that name."""
        return IntegerRange(bits=self._bits(linear, self.weights.bits), narrow_range=True)

    def activation(self, linear: str) -> IntegerRange:
        """Returns the integers of the input of the linear with that name."""
        return IntegerRange(bits=self._bits(linear, self.activations.bits), narrow_range=False)

    def _bits(self, linear: str, bits: int) -> int:
        return 8 if matches(linear, self.eight_bit) else bits

    @classmethod
    def w8a8(cls, **changes: Any) -> Self:
        """PTQ4VM at 8 bits: smoothing, per-token static scales, truncation, 10 epochs of JLSS; changes as in `recipe`.

        Example:
            >>> QuantConfig.w8a8(learning=None, activations={"granularity": "per_tensor"}).activations.bits
            8
        """
        return cls.recipe("ptq4vm", 8, **changes)

    @classmethod
    def w6a6(cls, **changes: Any) -> Self:
        """PTQ4VM at 6 bits: as `w8a8`, with 50 epochs of JLSS."""
        return cls.recipe("ptq4vm", 6, **changes)

    @classmethod
    def w4a4(cls, best: bool = False, **changes: Any) -> Self:
        """PTQ4VM at 4 bits: as `w8a8`, with 100 epochs of JLSS. `best` is the recipe past the paper, with 10."""
        return cls.recipe("best" if best else "ptq4vm", 4, **changes)

    @classmethod
    def minmax(cls, bits: int, **changes: Any) -> Self:
        """The paper's MinMax baseline: one static minimum-to-maximum range per activation tensor, no smoothing."""
        return cls.recipe("minmax", bits, **changes)

    @classmethod
    def smoothquant(cls, bits: int, **changes: Any) -> Self:
        """The paper's SmoothQuant baseline: `minmax` after smoothing with α = 0.5."""
        return cls.recipe("smoothquant", bits, **changes)

    @classmethod
    def kscaled(cls, bits: int = 8, **changes: Any) -> Self:
        """The k-scaled paper: linears, convolutions, activations and the hidden state, all symmetric."""
        return cls.recipe("kscaled", bits, **changes)

    @classmethod
    def recipe(cls, name: str, bits: int, **changes: Any) -> Self:
        """Returns a recipe by name at a number of bits, with some fields changed.

        Args:
            name: a key of `ptq4vm.recipes.RECIPES`, as `ptq4vm quantize --help` lists them.
            bits: 2 to 8, of weights and activations.
            changes: fields of the config; a mapping changes only those keys of a section that it has.

        Returns:
            The config.

        Raises:
            ValueError: for a name that no recipe has, and for values that a config does not take.

        Example:
            >>> QuantConfig.recipe("best", 4, weights={"bits": 8}, learning={"epochs": 2}).learning.loss
            <Loss.FISHER: 'fisher'>
        """
        if name not in RECIPES:
            raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
        IntegerRange(bits=bits, narrow_range=False)
        return cls(**merged(settings_at(name, bits), changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types, with the format's version; `from_dict` returns the same config again.

        Example:
            >>> QuantConfig.w4a4().to_dict()["weights"]
            {'bits': 4, 'granularity': 'per_channel'}
        """
        return {"format_version": FORMAT_VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}

    def to_json(self) -> str:
        """Returns `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config that a mapping describes, nested or with the flat keys of format version 1.

        Args:
            values: what `to_dict` returned, or some of its keys; the others have their defaults.

        Returns:
            The config.

        Raises:
            ValueError: for unknown keys, since a typo must not quietly mean the default, and for values that a config
                does not take.

        Example:
            >>> QuantConfig.from_dict({"weights": {"bits": 4}}) == QuantConfig.from_dict({"weight_bits": 4})
            True
        """
        keys = dict(values)
        version = keys.pop("format_version", 1 if config_v1.is_flat(values) else FORMAT_VERSION)
        if version not in (1, FORMAT_VERSION):
            raise ValueError(f"config has format version {version!r:.40}, which this ptq4vm does not read: upgrade it")
        return cls.from_keys(config_v1.nested(keys) if version == 1 else keys)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Returns the config that a JSON object describes, as `from_dict`; raises ValueError for other text.

        Example:
            >>> QuantConfig.from_json('{"smoothing": null}').smoothing is None
            True
        """
        values = json.loads(text)
        if not isinstance(values, Mapping):
            raise ValueError(f"a config is a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a linear's name fits one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
