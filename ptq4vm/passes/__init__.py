"""One pass a file; each takes a graph and returns a graph, or calibrates the fake-quantizers inside one."""
