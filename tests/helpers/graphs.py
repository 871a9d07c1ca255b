"""Graphs for tests of passes: captured, canonical, with a site at every linear."""

from ptq4vm.graph.capture import capture
from ptq4vm.graph.pipeline import clean_up
from ptq4vm.graph.sites import SITE, find_linears
from ptq4vm.passes.prepare.canonicalize import canonicalize


def canonical(model, *inputs):
    return canonicalize(capture(model, inputs))


def with_sites(gm):
    """Every linear is to be quantized."""
    for node, site in find_linears(gm).items():
        node.meta[SITE] = site
    return gm


def passed(change, model, *inputs):
    """A canonical graph with all sites after one pass."""
    return clean_up(change(with_sites(canonical(model, *inputs))))
