"""How fast a model is, against other ways to run the same network, and where its time goes."""

from ptq4vm.benchmark.timing import Timing, compare, machine

__all__ = ["Timing", "compare", "machine"]
