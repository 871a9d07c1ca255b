"""What the user asks for: frozen, validated, and the same after a round trip through JSON."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

_Enum = TypeVar("_Enum", bound=enum.StrEnum)
_Part = TypeVar("_Part", "Learning", "Outputs", "State")


class Scheme(enum.StrEnum):
    """Whether a zero point shifts the codes."""

    SYMMETRIC = "symmetric"
    AFFINE = "affine"


class Granularity(enum.StrEnum):
    """How many scales one activation tensor has, and when they are found."""

    PER_TENSOR = "per_tensor"
    """One static scale for the tensor."""
    PER_TOKEN_DYNAMIC = "per_token_dynamic"
    """One scale per image and token, found at run time from that token's minimum and maximum."""
    PER_TOKEN = "per_token"
    """One static scale per token position (PTQ4VM section 4.1, "PTS"); binds the model to one token count."""
    K_SCALED_TOKEN = "k_scaled_token"
    """As many static scales as there are `clusters` of token positions of like magnitude (k-scaled paper)."""
    K_SCALED_CHANNEL = "k_scaled_channel"
    """The same of channels. At run time x is multiplied by a vector, as smoothing does, and W by its inverse."""

    @property
    def static_per_token(self) -> bool:
        """Whether there is a table with the scale of every token."""
        return self in (Granularity.PER_TOKEN, Granularity.K_SCALED_TOKEN)

    @property
    def k_scaled(self) -> bool:
        return self in (Granularity.K_SCALED_TOKEN, Granularity.K_SCALED_CHANNEL)


class RangeSearch(enum.StrEnum):
    """How the range of a tensor is found."""

    MINMAX = "minmax"
    """Minimum to maximum."""
    SQUARED_ERROR = "squared_error"
    """The truncation with the least squared error (PTQ4VM section 4.3, stage 2)."""
    RELEASED = "released"
    """That of PTQ4VM's released code, to be measured against; see `ptq4vm.quantizers.range_search`."""


class Loss(enum.StrEnum):
    """What learning makes small: the distance of a block's output from that in floating point."""

    COSINE = "cosine"
    """1 - cosine similarity of each token's channels (PTQ4VM eq. 9)."""
    FISHER = "fisher"
    """Squared error of the residual stream, each entry by how much the model's output depends on it; see
    `ptq4vm.passes.calibrate.fisher`."""


class Factors(enum.StrEnum):
    """What the hidden state is divided by, found from the states h of the calibration images."""

    MAXIMA = "maxima"
    """r_C = max|h| of each channel, and r_D that of each state of what remains."""
    POWERS = "powers"
    """Powers of the means of |h|, which sum to one (k-scaled paper, factor-determining)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one tensor becomes integers."""

    bits: int
    scheme: Scheme

    def __post_init__(self) -> None:
        _check_bits("bits", self.bits)

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest code; codes are signed everywhere."""
        half = 2 ** (self.bits - 1)
        return (1 - half if self.scheme is Scheme.SYMMETRIC else -half), half - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """JLSS: block-wise joint learning of smoothing scales and step sizes (PTQ4VM section 4.3).

    Scales are learned as logarithms, so they stay positive, and a rate is a relative change: with Adam,
    `scale_rate=2e-2` moves a step size by at most about 2 % a step. The rates decay to zero along a cosine; what has
    the rate zero is not learned.
    """

    epochs: int
    scale_rate: float = 2e-2
    """Step size (relative, per optimizer step) of the activation and weight scales."""
    smooth_rate: float = 2e-2
    """Step size (relative, per optimizer step) of the smoothing scales."""
    loss: Loss = Loss.COSINE
    batch_size: int = 32
    """Images in one optimizer step."""
    only: tuple[str, ...] = ()
    """Shell patterns of the linears that learn, such as `*.in_proj`; none for all."""

    def __post_init__(self) -> None:
        _check(
            "learning.epochs",
            self.epochs,
            int,
            lambda v: v >= 1,
            "at least 1; for no learning use learning=None",
        )
        _check("learning.batch_size", self.batch_size, int, lambda v: v >= 1, "at least 1")
        for name in ("scale_rate", "smooth_rate"):
            _check(f"learning.{name}", getattr(self, name), (int, float), lambda v: 0 <= v < 1, "in [0, 1)")
        object.__setattr__(self, "loss", _member("learning.loss", Loss, self.loss))
        object.__setattr__(self, "only", _patterns("learning.only", self.only))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Quantization of what operators give: linears, convolutions (their weights too), norms, SiLU and GELU, softplus,
    scans before their skip connection (k-scaled paper). Linears outside the blocks, such as the head, are quantized
    too."""

    bits: int = 8
    k_scaled: bool = True
    """Several intervals, as the paper has them: over tokens for the results of scans and of linears that write to the
    residual stream, over channels for those of depth-wise convolutions, SiLU and softplus; one elsewhere. False: one
    everywhere."""

    def __post_init__(self) -> None:
        _check_bits("outputs.bits", self.bits)
        _check_flag("outputs.k_scaled", self.k_scaled)

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, scheme=Scheme.AFFINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Quantization of the scans' hidden state between tokens (k-scaled paper)."""

    bits: int = 8
    factors: Factors | None = Factors.MAXIMA
    """Divide the state by factors of its channels and states, so that one interval a step fits it; None: by nothing."""
    per_token: bool = True
    """One interval for every step of the scan; False: one for all."""
    integrate: bool = True
    """Fold the factors of states into x_proj; False multiplies B and C by them when the model runs."""

    def __post_init__(self) -> None:
        _check_bits("state.bits", self.bits)
        for name in ("per_token", "integrate"):
            _check_flag(f"state.{name}", getattr(self, name))
        if self.factors is not None:
            object.__setattr__(self, "factors", _member("state.factors", Factors, self.factors))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """One recipe: `prepare` reads the granularity and the bits, `calibrate` the rest."""

    weight_bits: int = 8
    activation_bits: int = 8
    granularity: Granularity = Granularity.PER_TOKEN
    """Of the inputs of linears."""
    scheme: Scheme = Scheme.AFFINE
    """Of the inputs of linears: symmetric ones have the zero point 0 and all codes."""
    per_tensor_weights: bool = False
    """One scale for a whole weight, as in the k-scaled paper, instead of one per output channel."""
    clusters: int = 4
    """K of the k-scaled granularities."""
    power_of_two: bool = True
    """Let the ratios of k-scaled intervals be powers of two wherever the k-scaled paper does; False for nowhere."""
    smoothing: float | None = 0.5
    """SmoothQuant's α: s = max|X|^α / max|W|^(1 - α) per channel, of root mean squares before a rotation; None for no
    smoothing."""
    range_search: RangeSearch = RangeSearch.SQUARED_ERROR
    """Of activations and weights; True and False stand for `squared_error` and `minmax`."""
    rotation: bool = False
    """Rotate the inputs of linears that write to the residual stream, after smoothing; see
    `ptq4vm.passes.prepare.rotate`."""
    gptq: bool = False
    """Round weights for the inputs that the quantized model gives them (GPTQ, Frantar et al. 2023). Learning comes
    after it and keeps the codes: scales that learned with other codes would not fit these."""
    learning: Learning | None = None
    mirror: bool = False
    """Calibrate on each image's mirror image too: twice the images at no cost but time, where left may be right."""
    seed: int = 0
    """Decides the order of the images in learning. The caller's loader decides which images there are."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of linears to keep in floating point, such as `layers.0.*` or `*.dt_proj*`."""
    eight_bit: tuple[str, ...] = ()
    """Shell patterns of linears whose weights and inputs get 8 bits whatever the others get."""
    class_token_in_float: bool = False
    """Keep the class token's row of the linears' inputs in floating point (PTQ4VM table 1)."""
    outputs: Outputs | None = None
    """Quantize what operators give, too; None for linears alone."""
    state: State | None = None
    """Quantize the scans' hidden state; None keeps it in floating point."""
    bias_correction: bool = False
    """b - E[x_q (W_q - W)] for every bias b of a quantized weight (k-scaled paper)."""

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits)
        _check_bits("activation_bits", self.activation_bits)
        object.__setattr__(self, "granularity", _member("granularity", Granularity, self.granularity))
        if self.smoothing is not None:
            _check("smoothing", self.smoothing, (int, float), lambda v: 0 <= v <= 1, "None or in [0, 1]")
        search = self.range_search
        if isinstance(search, bool):
            search = RangeSearch.SQUARED_ERROR if search else RangeSearch.MINMAX
        object.__setattr__(self, "range_search", _member("range_search", RangeSearch, search))
        for name in _FLAGS:
            _check_flag(name, getattr(self, name))
        object.__setattr__(self, "scheme", _member("scheme", Scheme, self.scheme))
        _check("clusters", self.clusters, int, lambda v: 1 <= v <= 256, "a whole number between 1 and 256")
        object.__setattr__(self, "learning", _nested("learning", Learning, self.learning))
        object.__setattr__(self, "outputs", _nested("outputs", Outputs, self.outputs))
        object.__setattr__(self, "state", _nested("state", State, self.state))
        self._check_together()
        _check("seed", self.seed, int, lambda v: 0 <= v < 2**63, "a non-negative integer of 63 bits")
        for name in ("exclude", "eight_bit"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))

    def _check_together(self) -> None:
        """Refuses what no model has: fields that contradict each other."""
        if self.granularity is Granularity.PER_TOKEN_DYNAMIC:
            if self.range_search is not RangeSearch.MINMAX:
                raise ValueError(
                    "range_search needs static scales, but granularity is per_token_dynamic; turn one of them off"
                )
            if self.scheme is Scheme.SYMMETRIC:
                raise ValueError("dynamic scales are affine: leave scheme out, or choose a static granularity")
        if self.scheme is Scheme.SYMMETRIC and self.range_search is RangeSearch.RELEASED:
            raise ValueError("the released code's range search is affine: leave scheme out")
        if self.granularity.k_scaled and self.scheme is not Scheme.SYMMETRIC:
            raise ValueError(f"{self.granularity} has no zero points: give scheme='symmetric'")
        if self.granularity is Granularity.K_SCALED_CHANNEL and self.smoothing is not None:
            raise ValueError("scales of channels take the place of smoothing: give smoothing=None")
        if self.rotation and self.outputs:
            raise ValueError("rotation changes the channels of what outputs quantizes; turn one of them off")
        if self.learning is not None and self.outputs:
            raise ValueError("with outputs nothing is learned: give learning=None")
        if self.gptq and self.bias_correction:
            raise ValueError("gptq chooses weights after biases are corrected; turn one of them off")

    def weight(self, linear: str) -> QuantSpec:
        """Of the linear of that name."""
        return QuantSpec(bits=8 if matches(linear, self.eight_bit) else self.weight_bits, scheme=Scheme.SYMMETRIC)

    def activation(self, linear: str) -> QuantSpec:
        """Of the input of the linear of that name."""
        return QuantSpec(bits=8 if matches(linear, self.eight_bit) else self.activation_bits, scheme=Scheme.AFFINE)

    @classmethod
    def w8a8(cls, **changes: Any) -> Self:
        """PTQ4VM at 8 bits: smoothing, per-token static scales, truncation, 10 epochs of JLSS."""
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
        """One of `RECIPES` at a number of bits, with some fields changed."""
        if name not in RECIPES:
            raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
        _check_bits("bits", bits)
        base: dict[str, Any] = {"weight_bits": bits, "activation_bits": bits}
        return cls(**base | RECIPES[name](_epochs(bits)) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same config back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Refuses keys it does not know: a typo must not quietly give the default."""
        return cls(**_known("config", cls, values))

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        if not isinstance(values, Mapping):
            raise ValueError(f"a config is a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a linear's name fits one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _epochs(bits: int) -> int:
    """PTQ4VM table 7: the epochs of JLSS at 8, 6 and 4 bits; between them those of fewer bits."""
    return 10 if bits == 8 else 50 if bits >= 6 else 100


_FLAGS = ("per_tensor_weights", "power_of_two", "rotation", "gptq", "mirror", "class_token_in_float", "bias_correction")

_PER_TENSOR = {"granularity": Granularity.PER_TENSOR}
_MINMAX = {"range_search": RangeSearch.MINMAX}
_SECOND_PAPER = {"scheme": Scheme.SYMMETRIC, "per_tensor_weights": True, "smoothing": None}

RECIPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "minmax": lambda _: _PER_TENSOR | _MINMAX | {"smoothing": None},
    "smoothquant": lambda _: _PER_TENSOR | _MINMAX,
    "per_tensor": lambda epochs: _PER_TENSOR | {"learning": Learning(epochs=epochs)},
    "per_token_dynamic": lambda epochs: (
        _MINMAX | {"granularity": Granularity.PER_TOKEN_DYNAMIC, "learning": Learning(epochs=epochs)}
    ),
    "pts": lambda _: _MINMAX,
    "pts+truncation": lambda _: {},
    "ptq4vm": lambda epochs: {"learning": Learning(epochs=epochs)},
    "ptq4vm_released": lambda epochs: {"range_search": RangeSearch.RELEASED, "learning": _released(epochs)},
    "best": lambda _: {
        "rotation": True,
        "gptq": True,
        "mirror": True,
        "learning": Learning(epochs=10, loss=Loss.FISHER, scale_rate=1e-2, smooth_rate=0.0),
    },
    "kscaled": lambda _: (
        _SECOND_PAPER | _PER_TENSOR | {"outputs": Outputs(), "state": State(), "bias_correction": True}
    ),
    "kscaled_naive": lambda _: (
        _SECOND_PAPER
        | _PER_TENSOR
        | _MINMAX
        | {"outputs": Outputs(k_scaled=False), "state": State(factors=None, per_token=False)}
    ),
    "kscaled_linears": lambda _: _SECOND_PAPER | {"granularity": Granularity.K_SCALED_TOKEN, "bias_correction": True},
    "state": lambda _: {"exclude": ("*",), "state": State()},
    "state_naive": lambda _: _MINMAX | {"exclude": ("*",), "state": State(factors=None, per_token=False)},
    "ptq4vm+state": lambda epochs: {"learning": Learning(epochs=epochs), "state": State()},
}
"""What each recipe sets, given the paper's epochs of learning: PTQ4VM's baselines and ladder, its released code, ours.

`per_tensor` and `per_token_dynamic` are `ptq4vm` at another granularity. `kscaled` is the second paper, with
`kscaled_naive` for its baseline; `state` quantizes nothing but the hidden state.
"""


def _released(epochs: int) -> Learning:
    """The released code's: x_proj and dt_proj run without gradients; all images make one step; the rates that it gives
    the scales as they are, here relative to scales of about a tenth."""
    learned = ("*.in_proj", "*.out_proj", "*.fc1", "*.fc2")
    return Learning(epochs=epochs, batch_size=256, scale_rate=5e-3, smooth_rate=1e-2, only=learned)


def _check(name: str, value: Any, kinds: type | tuple[type, ...], holds: Callable[[Any], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
        raise ValueError(f"{name} must be {wanted}; got {value!r}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def _member(name: str, kind: type[_Enum], value: Any) -> _Enum:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(kind)}; got {value!r}") from None


def _nested(name: str, kind: type[_Part], value: Any) -> _Part | None:
    """A part of a config: as it is, from its keys, or None."""
    if isinstance(value, Mapping):
        known = _known(name, kind, value)
        if kind is Learning and "epochs" not in known:
            raise ValueError("learning needs the key 'epochs'; to leave it out use null")
        value = kind(**known)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, its keys, or None; got {value!r}")
    return value


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be a sequence of patterns, got {value!r}")
    if not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{name} must hold patterns of linears' names, got {list(value)!r}")
    return tuple(value)


def _check_bits(name: str, bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{name} must be a whole number between 2 and 8, got {bits!r}")


def _known(name: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{name} has no key {', '.join(map(repr, unknown))}; it knows {', '.join(fields)}")
    return dict(values)
