"""The time of a model beside other ways to run the same network. Rivals are in `benchmarks/` of the repository."""

from ptq4vm.benchmark.timing import Timing, compare, machine

__all__ = ["Timing", "compare", "machine"]
