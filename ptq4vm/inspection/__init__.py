"""Inspects files and folders, the error of each quantized linear, and the inputs of linears, with pictures."""
