"""From a captured model to a graph with fake-quantizers."""
