"""Reads and edits graphs; knows no method of quantization."""
