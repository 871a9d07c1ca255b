"""Sections of a config: weights, activations, outputs and states to quantize, and the learning of scales."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ptq4vm.config_fields import Checked, number, patterns, whole

Bits = Annotated[int, whole(2, 8)]
Clusters = Annotated[int, whole(1, 256)]
Count = Annotated[int, number(lambda value: value >= 1, "at least 1;")]
Epochs = Annotated[int, number(lambda value: value >= 1, "at least 1; for no learning use learning=None;")]
Patterns = Annotated[tuple[str, ...], patterns]
Rate = Annotated[float, number(lambda value: 0 <= value < 1, "in [0, 1);", int | float)]


class Granularity(enum.StrEnum):
    """The number of scales of one activation tensor x (B, L, D), and when they are found."""

    PER_TENSOR = "per_tensor"
    """One static scale for the tensor: x (B, L, D), scale (1,)."""
    PER_TOKEN_DYNAMIC = "per_token_dynamic"
    """One scale per image and token, found at run time from that token's minimum and maximum: x (B, L, D), scale
    (B, L)."""
    PER_TOKEN = "per_token"
    """One static scale per token position: x (B, L, D), scale (L,) (PTQ4VM section 4.1, "PTS"); binds the model to one
    token count."""
    K_SCALED_TOKEN = "k_scaled_token"
    """As many static scales as there are `clusters` of token positions of like magnitude: x (B, L, D), scale (L,) with
    K values (k-scaled paper); learning tells those of a cluster apart again."""
    K_SCALED_CHANNEL = "k_scaled_channel"
    """As many static scales as there are clusters of channels: x (B, L, D), scale (D,) with K values. At run time x is
    multiplied by a vector, as smoothing does, and W by its inverse."""

    @property
    def static_per_token(self) -> bool:
        """True where there is a table with the scale of every token."""
        without = (Granularity.PER_TENSOR, Granularity.PER_TOKEN_DYNAMIC, Granularity.K_SCALED_CHANNEL)
        return self not in without

    @property
    def k_scaled(self) -> bool:
        """True where scales belong to clusters."""
        return self in (Granularity.K_SCALED_TOKEN, Granularity.K_SCALED_CHANNEL)


class WeightGranularity(enum.StrEnum):
    """The number of scales of one weight W (N, D)."""

    PER_CHANNEL = "per_channel"
    """One scale per output channel: W (N, D), scale (N,)."""
    PER_TENSOR = "per_tensor"
    """One scale for the weight, as in the k-scaled paper: W (N, D), scale (N,) of equal values."""


class RangeSearch(enum.StrEnum):
    """The search for the range of a tensor."""

    MINMAX = "minmax"
    """Minimum to maximum."""
    SQUARED_ERROR = "squared_error"
    """The truncation with the least squared error (PTQ4VM section 4.3, stage 2)."""
    RELEASED = "released"
    """The search of PTQ4VM's released code, to be measured against; see `ptq4vm.quantizers.range_search`."""


class Loss(enum.StrEnum):
    """The distance between a block's output and that in floating point, which learning minimizes."""

    COSINE = "cosine"
    """1 - cosine similarity of each token's channels (PTQ4VM eq. 9)."""
    FISHER = "fisher"
    """Squared error of the residual stream, weighted by how much the model's output depends on each entry; see
    `ptq4vm.passes.calibrate.fisher`."""


class Factors(enum.StrEnum):
    """The divisors of the hidden state, found from the states h of the calibration images."""

    MAXIMA = "maxima"
    """r_C = max|h| of each channel, then r_D = max|h / r_C| of each state."""
    POWERS = "powers"
    """Powers of the means of |h|, which sum to one (k-scaled paper, factor-determining)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerRange(Checked):
    """The signed integers that a tensor is quantized to; a narrow range leaves out the lowest one.

    Example:
        >>> IntegerRange(bits=8, narrow_range=False).bounds, IntegerRange(bits=8, narrow_range=True).bounds
        ((-128, 127), (-127, 127))
    """

    bits: Bits
    narrow_range: bool

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        half = 2 ** (self.bits - 1)
        return (1 - half if self.narrow_range else -half), half - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec(Checked):
    """Quantization of the linears' weights; codes are symmetric around zero.

    Args:
        bits: 2 to 8; at most 4 are stored as two codes a byte.
        granularity: one scale per output channel or per weight.

    Raises:
        ValueError: names the field, as `weights.bits`, and what it takes.

    Example:
        >>> WeightSpec(bits=4)
        WeightSpec(bits=4, granularity=<WeightGranularity.PER_CHANNEL: 'per_channel'>)
    """

    section: ClassVar[str] = "weights"
    bits: Bits = 8
    granularity: WeightGranularity = WeightGranularity.PER_CHANNEL


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec(Checked):
    """Quantization of the linears' inputs.

    Args:
        bits: 2 to 8.
        granularity: the number of scales of an input, and when they are found.
        symmetric: zero points are 0, and all codes are used; False: a zero point shifts the codes.
        clusters: 1 to 256, the K of the k-scaled granularities.

    Raises:
        ValueError: names the field, as `activations.bits`, and what it takes.

    Example:
        >>> ActivationSpec(bits=6, granularity="per_tensor").granularity
        <Granularity.PER_TENSOR: 'per_tensor'>
    """

    section: ClassVar[str] = "activations"
    bits: Bits = 8
    granularity: Granularity = Granularity.PER_TOKEN
    symmetric: bool = False
    clusters: Clusters = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning(Checked):
    """JLSS: block-wise joint learning of smoothing scales and quantization scales (PTQ4VM section 4.3).

    Scales are learned as logarithms, so they stay positive, and a rate is a relative change: with Adam,
    `scale_rate=2e-2` moves a scale by at most about 2 % a step. The rates decay to zero along a cosine; scales with
    rate zero are not learned.

    Args:
        epochs: passes over the calibration images, for each block.
        scale_rate: relative change, per optimizer step, of the activation and weight scales.
        smooth_rate: relative change, per optimizer step, of the smoothing scales.
        loss: the distance to minimize.
        batch_size: images in one optimizer step.
        only: shell patterns of the linears that learn, such as `*.in_proj`; empty for all.

    Raises:
        ValueError: names the field, as `learning.epochs`, and what it takes.

    Example:
        >>> Learning(epochs=20, loss="fisher").loss
        <Loss.FISHER: 'fisher'>
    """

    section: ClassVar[str] = "learning"
    epochs: Epochs
    scale_rate: Rate = 2e-2
    smooth_rate: Rate = 2e-2
    loss: Loss = Loss.COSINE
    batch_size: Count = 32
    only: Patterns = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputQuantization(Checked):
    """Quantization of the results of linears, convolutions (their weights too), norms, SiLU, GELU, softplus, and scans
    before their skip connection (k-scaled paper). Linears outside the blocks, such as the head, are quantized too.

    Args:
        bits: 2 to 8.
        k_scaled: several intervals, as in the paper: over tokens for the results of scans and of linears that
            write to the residual stream, over channels for those of depth-wise convolutions, SiLU and softplus; one
            elsewhere. False: one everywhere.

    Raises:
        ValueError: names the field, as `outputs.bits`, and what it takes.

    Example:
        >>> OutputQuantization(k_scaled=False)
        OutputQuantization(bits=8, k_scaled=False)
    """

    section: ClassVar[str] = "outputs"
    bits: Bits = 8
    k_scaled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StateQuantization(Checked):
    """Quantization of the scans' hidden state between tokens (k-scaled paper).

    Args:
        bits: 2 to 8.
        factors: divide the state by factors of its channels and states, so that one interval fits it; None: do not.
        per_token: one interval for every step of the scan; False: one for all.
        integrate: fold the factors of states into x_proj; False multiplies B and C by them when the model runs.

    Raises:
        ValueError: names the field, as `state.bits`, and what it takes.

    Example:
        >>> StateQuantization(factors="powers").factors
        <Factors.POWERS: 'powers'>
    """

    section: ClassVar[str] = "state"
    bits: Bits = 8
    factors: Factors | None = Factors.MAXIMA
    per_token: bool = True
    integrate: bool = True
