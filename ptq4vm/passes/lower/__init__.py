"""From a calibrated graph to integers and fused kernels."""
