"""Configs that the verbs are tried with."""

from helpers.strategies import EVERYTHING
from ptq4vm import Granularity, Learning, QuantConfig

CONFIGS = {
    "w8a8": QuantConfig.w8a8(learning=Learning(epochs=1)),
    "w4a4": QuantConfig.w4a4(learning=Learning(epochs=1)),
    "w2a3": QuantConfig(weights={"bits": 2}, activations={"bits": 3}),
    "w6a5 unsmoothed": QuantConfig(weights={"bits": 6}, activations={"bits": 5}, smoothing=None),
    "per tensor": QuantConfig.smoothquant(8),
    "per tensor unsmoothed": QuantConfig.minmax(4),
    "dynamic": QuantConfig(activations={"granularity": Granularity.PER_TOKEN_DYNAMIC}, range_search=False),
    "dynamic w4a4 unsmoothed": QuantConfig.minmax(4, activations={"granularity": Granularity.PER_TOKEN_DYNAMIC}),
    "everything": EVERYTHING,
}
