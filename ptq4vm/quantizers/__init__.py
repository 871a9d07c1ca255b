"""Fake-quantizers, one module for each kind of value, and the searches for their scales."""

from ptq4vm.quantizers.activation import ActivationFakeQuantize
from ptq4vm.quantizers.base import FakeQuantize, Mode, constant, quantized_decomposed, quiet_import
from ptq4vm.quantizers.output import OUTPUT, OutputFakeQuantize
from ptq4vm.quantizers.scan import ScanFakeQuantize
from ptq4vm.quantizers.weight import WeightFakeQuantize

__all__ = [
    "OUTPUT",
    "ActivationFakeQuantize",
    "FakeQuantize",
    "Mode",
    "OutputFakeQuantize",
    "ScanFakeQuantize",
    "WeightFakeQuantize",
    "constant",
    "quantized_decomposed",
    "quiet_import",
]
